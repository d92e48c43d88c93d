# `make` lists the targets. One that needs Python depends on $(READY) and runs $(PYTHON):
#
#     summary: $(READY)  ## One line for `make help`
#     	$(PYTHON) -m spd ...
#     results/summary.json: results/plan.json | $(READY)    (order-only: a new environment does not redo results)
#
# Works with GNU make 3.81 and later, so with the one that macOS has.

.DEFAULT_GOAL := help

# ---- Environment: made once, by the first target that needs it. $(READY) is its stamp, written last, and its name
# changes with the pins, what is installed of pyproject.toml, and the folder (the package is installed in place).
ifndef PYTHON
KEY := $(shell { pwd -P; cat environment.yml; sed '/^\[tool\.pytest/,$$d' pyproject.toml; } | cksum | cut -d ' ' -f 1)
CONDA := $(firstword $(foreach tool,micromamba mamba conda,$(if $(shell command -v $(tool) 2>/dev/null),$(tool))) \
           $(wildcard $(MAMBA_EXE) $(CONDA_EXE)))
# (The last two are set where mamba or conda is a shell function and not on PATH.)
# The kind that is there stays; a finished .conda serves also where conda itself is not on PATH.
ENV_TOOL ?= $(if $(wildcard .venv/.ready-*),venv,$(or $(CONDA),$(if $(wildcard .conda/.ready-$(KEY)),conda),venv))
ENV_DIR := $(if $(filter venv,$(ENV_TOOL)),.venv,.conda)
READY := $(ENV_DIR)/.ready-$(KEY)
override PYTHON := $(ENV_DIR)/bin/python
export PYTHONNOUSERSITE := 1
endif

export MLFLOW_DISABLE_TELEMETRY ?= true
WITH_INDEX := $(if $(TORCH_INDEX),PIP_EXTRA_INDEX_URL="$${PIP_EXTRA_INDEX_URL:+$$PIP_EXTRA_INDEX_URL }$(TORCH_INDEX)")
SAY_FAILED = { echo "$(ENV_DIR) could not be made, for the reason above; the next make starts it afresh$(1)." >&2; exit 1; }

.venv/.ready-$(KEY):
	@set -e; python=; \
	for candidate in python3.11 python3 python3.12 python3.13 python3.14; do \
	  if $$candidate -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; \
	  then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "No Python 3.11 or later with its venv module was found on PATH (Debian and Ubuntu: packages python3 and" \
	    "python3-venv); install one, or conda, or name one that has all of environment.yml with PYTHON=..." >&2; \
	  exit 1; \
	fi; \
	echo "Making .venv with $$($$python --version); this happens once and downloads a few GB at most."; \
	rm -rf .venv; \
	{ $$python -m venv .venv && $(WITH_INDEX) .venv/bin/python -m pip install --no-input --editable .; } \
	  || $(call SAY_FAILED)
	@touch $@

.conda/.ready-$(KEY):
	@set -e; \
	echo "Making .conda with $(ENV_TOOL); this happens once and downloads a few GB at most."; \
	rm -rf .conda; \
	CONDA_ALWAYS_YES=true MAMBA_ALWAYS_YES=true $(WITH_INDEX) \
	  "$(ENV_TOOL)" $(if $(findstring micromamba,$(notdir $(ENV_TOOL))),,env) create \
	  --prefix "$(CURDIR)/.conda" --file environment.yml || $(call SAY_FAILED, (make ENV_TOOL=venv uses pip alone))
	@touch $@

# ---- Targets
.PHONY: help env test lint reproduce-tiny distill-tiny reproduce-7b reproduce-13b reproduce-70b sensitivities ablation predict \
  bench-peers bench-links check-prediction bench-gpu figures ledger notebooks tiny-model mlflow-ui clean clean-env

help:  ## Show this list
	@awk -F ':.*##  *' '/^[a-z][a-z0-9-]*:.*## / { printf "  %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "Settings:"
	@echo "  PYTHON=...       use this interpreter and make no environment"
	@echo "  ENV_TOOL=...     micromamba, mamba or conda (default: the first one found) or venv (else)"
	@echo "  TORCH_INDEX=URL  an index where pip also looks while the environment is made (CPU builds)"
	@echo "  ARGS=...         more arguments for pytest, bench-peers, the training script or the MLflow server"
	@echo "  MODELS, TPS, TEXTS   lists that sensitivities goes over"
	@echo "  MODEL=DIR TEXT=FILE TP=N   reproduce-* on another model, text or tensor-parallel degree"
	@echo "  NPROC=N NNODES=N NODE_RANK=N MASTER_ADDR=HOST   processes a node, and nodes, of reproduce-7b and larger"
	@echo "  EVAL_TEXT=FILE TASKS_DIR=DIR LIMIT=N STRATEGIES=a,b DEVICE=NAME   see the README"
	@echo "  DRY_RUN=1 SHAPE_ONLY=1     say what it takes, or run the chain on two random blocks"

env: $(READY)  ## Create the environment (.conda or .venv); other targets do it by themselves
	@echo "Ready: $(PYTHON)"

test: $(READY)  ## Run the test suite
	HF_HUB_OFFLINE=1 $(PYTHON) -m pytest $(ARGS)

lint: $(READY)  ## Check style and formatting
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

# ---- Reproductions. Each stage is a file that the next one reads, so an interrupted run goes on where it stopped. What
# a stage is asked (the experiment's common section and its own, settings given here) stands in $(RUN)/asked-STAGE, which
# is written only when it changes: a changed hyper-parameter redoes what depends on it and nothing else.
EXPERIMENT := experiments/tiny.yaml
NAME := $(if $(MODEL),$(notdir $(patsubst %/,%,$(MODEL))),spd-tiny)$(if $(TP),-tp$(TP))
RUN = runs/reproduce-$(NAME)
FIGURES = paper_figures/$(NAME)
NPROC ?= 1
NNODES ?= 1
NODE_RANK ?= 0
WORLD = $(shell expr $(NPROC) '*' $(NNODES))
LOW_BANDWIDTH := NCCL_P2P_DISABLE=1  # between GPUs of a node, as the paper's LBW has it

TO = --records $(RUN)/records --reproduction $(NAME)
STAGE = $(if $(MODEL),--model "$(MODEL)") $(if $(DEVICE),--device $(DEVICE)) $(TO)
ON = $(if $(TP),--tp $(TP)) $(if $(TEXT),--text "$(TEXT)")
# On one text of the user's, evaluation is on the windows after those of calibration.
APART = $(if $(DEVICE),$(if $(TEXT),--calibration-text "$(TEXT)" $(if $(EVAL_TEXT),--text "$(EVAL_TEXT)",--skip 128)))
EVAL = $(if $(TASKS),--tasks $(TASKS)) $(if $(TASKS_DIR),--tasks-dir "$(TASKS_DIR)") $(if $(LIMIT),--limit $(LIMIT))
SWEEP = $(APART) $(EVAL) \
  $(if $(STRATEGIES),--strategies $(STRATEGIES))
# Latency is measured on one GPU a shard, over direct links and without them, or on this machine's cores.
BENCHES = $(if $(DEVICE),$(if $(filter cuda-$(TP),$(DEVICE)-$(WORLD)),bench-hbw bench-lbw),bench)

# Stages that only some experiments ask for, by a section of their name.
asks = $(if $(shell grep -s '^$(1):' $(EXPERIMENT)),$(RUN)/$(2))
REPAIRED = $(call asks,distill,repaired/result.json)
MORE = $(call asks,table1,table1.json) $(REPAIRED) $(call asks,eval,eval.json)

SPD = $(PYTHON) -m spd --experiment $(EXPERIMENT)
TORCHRUN = $(PYTHON) -m torch.distributed.run
# $(call launch,PROCESSES A NODE,PORT): a port for each stage, since another node's last one may still be closing.
ifeq ($(NNODES),1)
launch = $(if $(filter 1,$(1)),$(SPD),$(TORCHRUN) --standalone --nproc-per-node $(1) -m spd --experiment $(EXPERIMENT))
else
launch = $(TORCHRUN) --nnodes $(NNODES) --node-rank $(NODE_RANK) \
           --master-addr $(or $(MASTER_ADDR),$(error Several nodes meet at the first: MASTER_ADDR=its name)) --master-port $(2) \
           --nproc-per-node $(1) -m spd --experiment $(EXPERIMENT)
endif
# $(call run,WORDS,PROGRAM,ARGUMENTS,PROCESSES): a stage's command; with DRY_RUN what it is and what it would take.
run = @echo "$(1)" >&2; $(if $(DRY_RUN),echo '$(strip $(2)) $(strip $(3))'; $(SPD) --dry-run $(4) $(3),set -x; $(2) $(3) >/dev/null)
# What one process does is the first node's alone.
first = $(if $(filter 0,$(NODE_RANK)),$(run),@:)
REDONE = $(if $(DRY_RUN),FORCE)

reproduce-tiny: $(FIGURES)/tables.md  ## Sensitivity, plan, repairs, accuracy, latency, figures, ledger
	$(PYTHON) -m spd ledger experiments/records $(RUN)/records --records $(RUN)/records --out REPRODUCTION.md >/dev/null

# Each degree is a make of its own: $(call paper,EXPERIMENT,DEGREES,PROCESSES A NODE where NPROC does not say); never more
# processes than shards.
per_node = $(shell n=$(if $(filter file,$(origin NPROC)),$(2),$(NPROC)); m=$$(expr $(1) / $(NNODES)); \
  if [ $$n -lt $$m ]; then echo $$n; else echo $$m; fi)
paper = $(if $(SHAPE_ONLY),$(call pipeline,shape-only,$(1)-shape-only,SHAPE=$(1) MODEL=runs/reproduce-$(1)-shape-only/model),\
  $(foreach tp,$(or $(TP),$(2)),$(call pipeline,$(1),$(1)-tp$(tp),TP=$(tp) NPROC=$(call per_node,$(tp),$(3)) DEVICE=$(or $(DEVICE),cuda)) &&) true)
pipeline = $(MAKE) --no-print-directory PREFLIGHT=1 EXPERIMENT=experiments/$(1).yaml NAME=$(2) $(3) paper_figures/$(2)/tables.md

reproduce-7b: $(READY)  ## LLaMA2-7B as in the paper, at tp 8 and 4, on GPUs (DRY_RUN=1 says what it takes)
	+@$(call paper,llama2-7b,8 4,1)

reproduce-13b: $(READY)  ## LLaMA2-13B likewise
	+@$(call paper,llama2-13b,8 4,1)

reproduce-70b: $(READY)  ## LLaMA2-70B at tp 8 (SHAPE_ONLY=1: two random blocks of its shape, without a GPU)
	+@$(call paper,llama2-70b,8,8)

# The first node writes what is asked before the pre-flight check, where all nodes meet; the others read it after.
ASKED := $(foreach stage,sensitivity plan sweep table1 distill eval bench,$(RUN)/asked-$(stage))
$(ASKED): $(RUN)/asked-%: FORCE $(if $(filter 0,$(NODE_RANK)),,$(RUN)/preflight.json)
	@$(if $(DRY_RUN)$(filter-out 0,$(NODE_RANK)),:,mkdir -p $(@D); { \
	  awk '/^[a-z]/ { on = $$1 == "common:" || $$1 == "$*:" } { sub(/ *#.*/, "") } on && NF' $(EXPERIMENT); \
	  echo '$(STAGE) $(ON) $(if $(filter sweep,$*),$(SWEEP)) $(if $(filter eval,$*),$(EVAL))'; } > $@.partial; \
	  cmp -s $@.partial $@ && rm $@.partial || mv $@.partial $@)

$(RUN)/preflight.json: FORCE $(if $(filter 0,$(NODE_RANK)),$(ASKED)) $(if $(SHAPE),$(MODEL)) | $(READY)
	$(call run,pre-flight check,$(call launch,1,29500),preflight $(if $(MODEL),--model "$(MODEL)") \
	  $(if $(DEVICE),--device $(DEVICE)) $(if $(TP),--tp $(TP)) $(if $(TEXT),--text "$(TEXT)") \
	  $(if $(EVAL_TEXT),--text "$(EVAL_TEXT)") $(if $(TASKS_DIR),--tasks-dir "$(TASKS_DIR)") \
	  --processes $(NPROC) --nodes $(NNODES) --folder $(RUN) --out $@,$(WORLD))

READS = $(if $(PREFLIGHT),$(RUN)/preflight.json) $(READY)

$(RUN)/sensitivity.json: $(RUN)/asked-sensitivity $(REDONE) $(wildcard $(or $(MODEL),spd/tiny/model)/*.safetensors $(TEXT)) | $(READS)
	$(call run,sensitivity of every block,$(call launch,$(NPROC),29501),sensitivity $(STAGE) $(ON) --out $@,$(WORLD))

$(RUN)/plan.json: $(RUN)/sensitivity.json $(RUN)/asked-plan $(REDONE)
	$(call first,plan,$(SPD),plan $< $(TO) --out $@,1)

$(RUN)/sweep.json: $(RUN)/sensitivity.json $(RUN)/asked-sweep $(REDONE)
	$(call run,perplexity and accuracy against the percentage of blocks dropped,$(call launch,$(NPROC),29502),sweep $< $(STAGE) $(ON) \
	  $(SWEEP) --repairs $(RUN)/repairs --out $@,$(WORLD))

$(RUN)/table1.json: $(RUN)/asked-table1 $(REDONE) | $(READS)
	$(call run,other block designs,$(call launch,$(NPROC),29506),table1 $(STAGE) $(ON) \
	  $(if $(EVAL_TEXT),--text "$(EVAL_TEXT)") --out $@,$(WORLD))

# A repair goes on in its folder, unless something else was asked for or planned when it began.
$(RUN)/repaired/result.json: $(RUN)/plan.json $(RUN)/asked-distill $(REDONE)
	@$(if $(DRY_RUN),,cat $^ | cmp -s - $(@D).asked || { rm -rf $(@D); cat $^ > $(@D).asked; })
	$(call run,repair of what the plan drops,$(call launch,$(NPROC),29507),distill --plan $< $(STAGE) $(ON) --out $(@D),$(WORLD))

distill-tiny: $(RUN)/repaired/result.json  ## Repair the blocks that the tiny reproduction's plan drops

$(RUN)/eval.json: $(RUN)/plan.json $(REPAIRED) $(RUN)/asked-eval $(REDONE)
	$(call run,accuracy of the plan question by question,$(call launch,$(NPROC),29505),eval \
	  --plan $(if $(REPAIRED),$(RUN)/repaired,$<) $(STAGE) $(ON) $(EVAL) --out $@,$(WORLD))

$(RUN)/bench.json: $(RUN)/sensitivity.json $(RUN)/asked-bench $(REDONE)
	$(call run,time to first token on real processes,$(SPD),bench --sensitivity $< $(STAGE) --out $@,1)

$(RUN)/bench-hbw.json: $(RUN)/sensitivity.json $(RUN)/asked-bench $(REDONE)
	$(call run,time to first token over direct links,$(call launch,$(NPROC),29503),bench --sensitivity $< $(STAGE) \
	  --tp $(TP) --out $@,$(WORLD))

$(RUN)/bench-lbw.json: $(RUN)/sensitivity.json $(RUN)/asked-bench $(REDONE)
	$(call run,time to first token without direct links,$(LOW_BANDWIDTH) $(call launch,$(NPROC),29504),bench \
	  --sensitivity $< $(STAGE) --tp $(TP) --records $(RUN)/lbw --out $@,$(WORLD))

$(FIGURES)/tables.md: $(RUN)/plan.json $(RUN)/sweep.json $(MORE) $(BENCHES:%=$(RUN)/%.json) $(REDONE)
	$(call first,figures and tables,$(SPD),report $(RUN)/records --out $(@D) $(TO),1)
	$(if $(filter bench-lbw,$(BENCHES)),$(call first,low bandwidth,$(SPD),report $(RUN)/lbw --out $(@D)/lbw $(TO),1))
	$(if $(BENCHES),,@echo "Latency was left out: it needs one GPU for each of the tp=$(TP) shards (NPROC=$(TP))." >&2)
	$(if $(DRY_RUN),,@echo "Figures and tables are in $(@D); 'make mlflow-ui' compares runs." >&2)

runs/reproduce-$(SHAPE)-shape-only/model: | $(READY)
	$(call run,random weights of the shape of $(SHAPE),$(SPD),shape-only --shape $(SHAPE) --blocks 2 --out $@,1)

FORCE:
.NOTPARALLEL:  # a stage that is timed wants the machine to itself

MODELS := spd-tiny
TPS := 2 4 8
TEXTS := builtin builtin-train
sensitivities: $(READY)  ## Sensitivities and classes over MODELS, TPS and TEXTS: the paper's figures 4 and 6
	@set -e; for model in $(MODELS); do for tp in $(TPS); do for text in $(TEXTS); do \
	  at=runs/sensitivities/$$(basename $$model)-tp$$tp-$$(basename $$text); echo "$$at" >&2; \
	  test -e $$at/plan.json && continue; set -- --records runs/sensitivities/records; \
	  $(PYTHON) -m spd sensitivity --model $$model --tp $$tp --text $$text --windows 64 --out $$at/sensitivity.json "$$@" >/dev/null; \
	  $(PYTHON) -m spd plan $$at/sensitivity.json --out $$at/plan.json "$$@" >/dev/null; \
	done; done; done
	$(PYTHON) -m spd report runs/sensitivities/records --out paper_figures/sensitivities --records runs >/dev/null

CALIBRATION := 128
ablation: $(READY)  ## What each step of a repair gives, on MODEL and TEXT (ARGS: windows, learning rate)
	$(PYTHON) -m spd ablate --model $(or $(MODEL),spd-tiny) --text $(or $(TEXT),builtin) --tp $(or $(TP),8) --calibration $(CALIBRATION) \
	  --skip $(CALIBRATION) --windows 64 --learning-rate 0.001 $(ARGS) --repairs runs/ablation/repairs-$(NAME) --records runs/ablation/records >/dev/null
	$(PYTHON) -m spd report runs/ablation/records --out paper_figures/ablation --records runs >/dev/null

predict: $(READY)  ## The paper's latency figures for LLaMA2 7B-70B, predicted, beside its claims
	rm -rf runs/predict
	$(PYTHON) -m spd predict-paper --records runs/predict --reproduction predicted >/dev/null
	$(PYTHON) -m spd report runs/predict --out paper_figures/predicted --records runs --reproduction predicted >/dev/null

bench-peers: $(READY)  ## TTFT and TPOT beside transformers: same weights, same threads, one run (under ten minutes)
	rm -rf runs/bench-peers
	$(PYTHON) -m spd bench-peers $(ARGS) --records runs/bench-peers --reproduction peers >/dev/null
	$(PYTHON) -m spd report runs/bench-peers --out paper_figures/peers --records runs --reproduction peers >/dev/null

LINKS ?= 100GBps,5us 10GBps,50us 2GBps,200us 1GBps,500us 500MBps,1ms 200MBps,2ms
bench-links: $(READY)  ## What dropping gains on LINKS, emulated between two processes: figures 2 and 7 measured (minutes)
	rm -rf runs/bench-links
	set -e; for link in $(LINKS); do $(PYTHON) -m spd bench --shape $(or $(SHAPE),llama-33m) --tp 2 --link $$link --repeats 40 \
	  --new-tokens 4 --percentages 0,25,50,75,100 --records runs/bench-links --reproduction links $(ARGS) >/dev/null; done
	$(PYTHON) -m spd report runs/bench-links --out paper_figures/links --records runs --reproduction links >/dev/null

# The predictor against measurement: fitted to some sizes, prompts, links and percentages, checked on others. The runs of
# both are mixed, so that a machine that slows down or speeds up meanwhile does so for both.
CHECK := runs/check-prediction
TIMED := fitted/llama-8m/64/1GBps,1ms fitted/llama-125m/160/200MBps,2ms checked/llama-33m/96/500MBps,1500us \
  fitted/llama-8m/160/200MBps,2ms fitted/llama-125m/64/1GBps,1ms checked/llama-8m/128/500MBps,1500us \
  fitted/llama-8m/160/1GBps,1ms fitted/llama-125m/64/200MBps,2ms checked/llama-125m/128/500MBps,1500us \
  fitted/llama-8m/64/200MBps,2ms fitted/llama-125m/160/1GBps,1ms checked/llama-33m/128/500MBps,1500us
check-prediction: $(READY)  ## Calibrate the latency model on this machine; errors on what it was not fitted to (ten minutes)
	rm -rf $(CHECK)
	set -e; for timed in $(TIMED); do set -- $$(echo $$timed | tr / ' '); \
	  $(PYTHON) -m spd bench --tp 2 --new-tokens 4 --repeats 40 --no-mlflow --reproduction check-prediction \
	  --shape $$2 --prompt-len $$3 --link $$4 --records $(CHECK)/$$1 \
	  $$(test $$1 = fitted || echo --percentages 0,50,100) >/dev/null; done
	$(PYTHON) -m spd profile $(CHECK)/fitted --check $(CHECK)/checked --out $(CHECK)/machine.json \
	  --records $(CHECK)/records --reproduction check-prediction >/dev/null
	$(PYTHON) -m spd report $(CHECK)/records --out paper_figures/calibration --records runs --reproduction check-prediction >/dev/null

ON_GPU = $(PYTHON) -m spd bench --device cuda --dtype bfloat16 --compile --new-tokens 64 --records runs/bench-gpu
bench-gpu: $(READY)  ## On a GPU: 7B with random weights, and rank 0's share of 70B at tp=8, compiled and as CUDA graphs
	@$(PYTHON) -c "import sys, torch; torch.cuda.is_available() or sys.exit('bench-gpu times on a GPU, and torch sees none.')"
	$(ON_GPU) --shape llama2-7b
	$(ON_GPU) --shape llama2-70b --tp 8 --alone --link $(or $(LINK),300GBps,25us) --drop none --drop all

figures: $(READY)  ## Draw paper_figures, and fill in the README's tables, again from the committed records
	@set -e; for folder in experiments/records/*/; do echo "$$folder" >&2; \
	  $(PYTHON) -m spd report $$folder --out paper_figures/$$(basename $$folder) --records runs --no-mlflow \
	    $$(case $$folder in */ablation/|*/budget/) echo --page README.md;; esac) >/dev/null 2>&1; \
	done

ledger: $(READY)  ## REPRODUCTION.md: every claim of the paper beside the committed records
	$(PYTHON) -m spd ledger experiments/records --out REPRODUCTION.md >/dev/null

notebooks: $(READY)  ## Run the notebooks and keep what they show in them
	$(PYTHON) -m spd.notebooks notebooks

tiny-model: $(READY)  ## Train spd-tiny again; an interrupted training goes on where it stopped
	$(PYTHON) -m spd.tiny.train $(ARGS)

mlflow-ui: $(READY)  ## Compare runs in the browser
	$(PYTHON) -m mlflow ui --backend-store-uri "$${MLFLOW_TRACKING_URI:-sqlite:///mlflow.db}" $(ARGS)

clean:  ## Remove caches and build products; environments, records and results stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . \( -name .git -o -name .venv -o -name .conda \) -prune -o -name __pycache__ -type d -exec rm -rf {} +

clean-env:  ## Remove the environment
	rm -rf .venv .conda
