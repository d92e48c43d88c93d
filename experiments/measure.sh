#!/bin/sh
# What is measured beside reproductions, by name: `make NAME` calls this with its PYTHON. Records go to runs/NAME;
# `make keep RUN=runs/NAME` puts them among the committed ones and draws their figures.
set -e
name=$1 at=runs/$1
shift
script() { file=$1; shift; "$PYTHON" "experiments/$file.py" "$@" --records "$at/records" --reproduction "$name" >/dev/null; }
spd() { "$PYTHON" -m spd "$@" --reproduction "$name" >/dev/null; }
case $name in
ablation) # What each step of a repair gives, on MODEL and TEXT
  script ablation --model "${MODEL:-spd-tiny}" --text "${TEXT:-builtin}" --tp "${TP:-8}" --calibration 128 --skip 128 --windows 64 \
    --learning-rate 0.001 --repairs "$at/repairs" "$@" ;;
predict) # The paper's latency figures for LLaMA2 7B-70B, predicted, beside its claims
  script predict_paper "$@" ;;
bench-peers) # TTFT and TPOT beside transformers: same weights, same threads (under ten minutes)
  script bench_peers "$@" ;;
budget) # What repairing LLaMA2 takes, estimated
  script budget "$@" ;;
sensitivities) # Of every block, over MODELS, TPS and TEXTS: the paper's figures 4 and 6
  for model in ${MODELS:-spd-tiny}; do for tp in ${TPS:-2 4 8}; do for text in ${TEXTS:-builtin builtin-train}; do
    out=$at/$(basename "$model")-tp$tp-$(basename "$text")
    echo "$out" >&2
    spd sensitivity --model "$model" --tp "$tp" --text "$text" --windows 64 --out "$out/sensitivity.json" --records "$at/records" "$@"
    spd plan "$out/sensitivity.json" --out "$out/plan.json" --records "$at/records"
  done; done; done ;;
bench-links) # What dropping gains over LINKS, emulated between two processes (minutes)
  rm -rf "$at"
  for link in ${LINKS:-100GBps,5us 10GBps,50us 2GBps,200us 1GBps,500us 500MBps,1ms 200MBps,2ms}; do
    spd bench --shape "${SHAPE:-llama-33m}" --tp 2 --link "$link" --repeats 40 --new-tokens 4 --percentages 0,25,50,75,100 \
      --records "$at/records" "$@"
  done ;;
check-prediction) # Calibrate the latency model here; errors on what it was not fitted to (ten minutes)
  # What is fitted and what is checked are mixed, so that a slower hour slows both.
  rm -rf "$at"
  for timed in fitted/llama-8m/64/1GBps,1ms fitted/llama-125m/160/200MBps,2ms checked/llama-33m/96/500MBps,1500us \
    fitted/llama-8m/160/200MBps,2ms fitted/llama-125m/64/1GBps,1ms checked/llama-8m/128/500MBps,1500us \
    fitted/llama-8m/160/1GBps,1ms fitted/llama-125m/64/200MBps,2ms checked/llama-125m/128/500MBps,1500us \
    fitted/llama-8m/64/200MBps,2ms fitted/llama-125m/160/1GBps,1ms checked/llama-33m/128/500MBps,1500us; do
    IFS=/ read -r part shape prompt link <<END
$timed
END
    spd bench --tp 2 --new-tokens 4 --repeats 40 --no-mlflow --shape "$shape" --prompt-len "$prompt" --link "$link" \
      --records "$at/$part" $([ "$part" = fitted ] || echo --percentages 0,50,100) "$@"
  done
  spd profile "$at/fitted" --check "$at/checked" --out "$at/machine.json" --records "$at/records" ;;
policies) # What policies lose for their bytes on TEXT (ranked on TEXTS), and take between two processes over LINKS
  on="--model ${MODEL:-spd-tiny} --tp ${TP:-8} --windows 8 $*"
  spd sensitivity --fast $on --text "${TEXTS:-builtin-train}" --out "$at/sensitivity.json" --records "$at/records"
  script policies "$at/sensitivity.json" $on --text "${TEXT:-builtin}" --percentages 50,70,90,100
  drop="--drop ${DROP:-0-5}" on="--model ${MODEL:-spd-tiny} --tp 2 --records $at/records"
  spd distill $on $drop --text builtin --seq-len 32 --windows 2 --recipe zs --out "$at/dropped"
  for link in ${LINKS:-1GBps,20us 1GBps,2ms 100MBps,20us}; do
    spd bench $on --plan "$at/dropped" --drop none $drop --bits 4 --new-tokens 4 --repeats 8 --link "$link"
  done ;;
answers) # What pays on which link: LLaMA2-70B predicted, MODEL scored on TEXT, and what records know of it
  spd sensitivity --fast --policies drop,int8,int4,int3 --model "${MODEL:-spd-tiny}" --tp "${TP:-8}" --text "${TEXT:-builtin-train}" \
    --windows 6 --out "$at/sensitivity.json" --records "$at/records"
  script answers "$at/sensitivity.json" --model "${MODEL:-spd-tiny}" "$@" ;;
bench-gpu) # On a GPU: 7B with random weights, and rank 0's share of 70B, compiled and as CUDA graphs
  "$PYTHON" -c "import sys, torch; torch.cuda.is_available() or sys.exit('bench-gpu times on a GPU, and torch sees none.')"
  on_gpu="--device cuda --dtype bfloat16 --compile --new-tokens 64 --records $at"
  spd bench --shape llama2-7b $on_gpu "$@"
  spd bench --shape llama2-70b --tp 8 --alone --link "${LINK:-300GBps,25us}" --drop none --drop all $on_gpu "$@" ;;
*)
  echo "There is no measurement '$name'." >&2
  exit 1 ;;
esac
