#!/bin/sh
# Measurements that are loops over one command, by name: sensitivities, bench-links, check-prediction, bench-gpu.
# make NAME runs them with its own PYTHON; each ends with figures in paper_figures.
set -e
loop=$1 at=runs/$1
shift
spd() { "$PYTHON" -m spd "$@" --reproduction "$loop" >/dev/null; }
case $loop in
sensitivities) # of each model, degree and calibration text
  for model in ${MODELS:-spd-tiny}; do for tp in ${TPS:-2 4 8}; do for text in ${TEXTS:-builtin builtin-train}; do
    out=$at/$(basename "$model")-tp$tp-$(basename "$text")
    echo "$out" >&2
    spd sensitivity --model "$model" --tp "$tp" --text "$text" --windows 64 --out "$out/sensitivity.json" --records "$at/records" "$@"
    spd plan "$out/sensitivity.json" --out "$out/plan.json" --records "$at/records"
  done; done; done ;;
bench-links) # what dropping gains, over links emulated between two processes
  rm -rf "$at"
  for link in ${LINKS:-100GBps,5us 10GBps,50us 2GBps,200us 1GBps,500us 500MBps,1ms 200MBps,2ms}; do
    spd bench --shape "${SHAPE:-llama-33m}" --tp 2 --link "$link" --repeats 40 --new-tokens 4 --percentages 0,25,50,75,100 \
      --records "$at/records" "$@"
  done ;;
check-prediction) # fitted to some shapes, prompts and links, checked on others; mixed, so that a slower hour slows both
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
bench-gpu) # one GPU: 7B with random weights, and rank 0's share of 70B at tp=8, compiled and as CUDA graphs
  "$PYTHON" -c "import sys, torch; torch.cuda.is_available() or sys.exit('bench-gpu times on a GPU, and torch sees none.')"
  on_gpu="--device cuda --dtype bfloat16 --compile --new-tokens 64 --records $at"
  spd bench --shape llama2-7b $on_gpu "$@"
  spd bench --shape llama2-70b --tp 8 --alone --link "${LINK:-300GBps,25us}" --drop none --drop all $on_gpu "$@" ;;
*)
  echo "There is no loop '$loop'." >&2
  exit 1 ;;
esac
