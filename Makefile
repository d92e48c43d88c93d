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
.PHONY: help env test lint reproduce-tiny predict bench-peers check-prediction bench-gpu tiny-model mlflow-ui clean clean-env

help:  ## Show this list
	@awk -F ':.*##  *' '/^[a-z][a-z0-9-]*:.*## / { printf "  %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "Settings:"
	@echo "  PYTHON=...       use this interpreter and make no environment"
	@echo "  ENV_TOOL=...     micromamba, mamba or conda (default: the first one found) or venv (else)"
	@echo "  TORCH_INDEX=URL  an index where pip also looks while the environment is made (CPU builds)"
	@echo "  ARGS=...         more arguments for pytest, bench-peers, the training script or the MLflow server"
	@echo "  MODEL=DIR TEXT=FILE TP=N   reproduce-tiny on another model, text or tensor-parallel degree"

env: $(READY)  ## Create the environment (.conda or .venv); other targets do it by themselves
	@echo "Ready: $(PYTHON)"

test: $(READY)  ## Run the test suite
	HF_HUB_OFFLINE=1 $(PYTHON) -m pytest $(ARGS)

lint: $(READY)  ## Check style and formatting
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

# ---- The main job. Each stage is a file that the next one reads, so an interrupted run goes on where it stopped.
EXPERIMENT := experiments/tiny.yaml
NAME := $(if $(MODEL),$(notdir $(patsubst %/,%,$(MODEL))),spd-tiny)$(if $(TP),-tp$(TP))
RUN := runs/reproduce-$(NAME)
SPD = $(PYTHON) -m spd --experiment $(EXPERIMENT)
STAGE = $(if $(MODEL),--model "$(MODEL)") --records $(RUN)/records --reproduction $(NAME)
ON = $(if $(TP),--tp $(TP)) $(if $(TEXT),--text "$(TEXT)")

reproduce-tiny: $(RUN)/plan.json $(RUN)/sweep.json $(RUN)/bench.json  ## Sensitivity, plan, perplexity, latency, figures
	$(SPD) report $(RUN)/records --out paper_figures/$(NAME) --records $(RUN)/records --reproduction $(NAME) >/dev/null
	@echo "Figures and tables are in paper_figures/$(NAME); 'make mlflow-ui' compares runs." >&2

$(RUN)/asked: FORCE  # changes when another model, text or degree is asked for under the same name
	@mkdir -p $(@D); echo '$(MODEL) $(TEXT) $(TP)' | cmp -s - $@ || echo '$(MODEL) $(TEXT) $(TP)' > $@

$(RUN)/sensitivity.json: $(RUN)/asked $(EXPERIMENT) $(wildcard $(or $(MODEL),spd/tiny/model)/*.safetensors $(TEXT)) | $(READY)
	@echo "1/4 sensitivity of every block" >&2
	@rm -rf $(RUN)/repairs  # of another model, text or experiment
	$(SPD) sensitivity $(STAGE) $(ON) --out $@ >/dev/null

$(RUN)/plan.json: $(RUN)/sensitivity.json
	@echo "2/4 plan" >&2
	$(SPD) plan $< --records $(RUN)/records --reproduction $(NAME) --out $@ >/dev/null

$(RUN)/sweep.json: $(RUN)/sensitivity.json
	@echo "3/4 perplexity against the percentage of blocks dropped" >&2
	$(SPD) sweep $< $(STAGE) $(ON) --repairs $(RUN)/repairs --out $@ >/dev/null

$(RUN)/bench.json: $(RUN)/sensitivity.json
	@echo "4/4 time to first token on real processes" >&2
	$(SPD) bench --sensitivity $< $(STAGE) --out $@ >/dev/null

FORCE:
.NOTPARALLEL:  # a stage that is timed wants the machine to itself

predict: $(READY)  ## The paper's latency figures for LLaMA2 7B-70B, predicted, beside its claims
	rm -rf runs/predict
	$(PYTHON) -m spd predict-paper --records runs/predict --reproduction predicted >/dev/null
	$(PYTHON) -m spd report runs/predict --out paper_figures/predicted --records runs --reproduction predicted >/dev/null

bench-peers: $(READY)  ## TTFT and TPOT beside transformers: same weights, same threads, one run (under ten minutes)
	rm -rf runs/bench-peers
	$(PYTHON) -m spd bench-peers $(ARGS) --records runs/bench-peers --reproduction peers >/dev/null
	$(PYTHON) -m spd report runs/bench-peers --out paper_figures/peers --records runs --reproduction peers >/dev/null

# The predictor against measurement: fitted to some sizes, prompts, links and percentages, checked on others.
CHECK := runs/check-prediction
TIMED = $(PYTHON) -m spd bench --tp 2 --new-tokens 4 --repeats 15 --no-mlflow --reproduction check-prediction
check-prediction: $(READY)  ## Calibrate the latency model on this machine; errors on what it was not fitted to (minutes)
	rm -rf $(CHECK)
	set -e; for shape in llama-8m llama-125m; do for tokens in 64 160; do for link in 1GBps,1ms 200MBps,2ms; do \
	  $(TIMED) --shape $$shape --prompt-len $$tokens --link $$link --records $(CHECK)/fitted >/dev/null; done; done; done
	set -e; for of in "llama-33m 96" "llama-33m 128" "llama-8m 128" "llama-125m 128"; do set -- $$of; \
	  $(TIMED) --shape $$1 --prompt-len $$2 --link 500MBps,1500us --percentages 0,50,100 --records $(CHECK)/checked >/dev/null; done
	$(PYTHON) -m spd profile $(CHECK)/fitted --check $(CHECK)/checked --statistic min --out $(CHECK)/machine.json \
	  --records $(CHECK)/records --reproduction check-prediction >/dev/null
	$(PYTHON) -m spd report $(CHECK)/records $(CHECK)/checked --out paper_figures/calibration --records runs --reproduction check-prediction >/dev/null

ON_GPU = $(PYTHON) -m spd bench --device cuda --dtype bfloat16 --compile --new-tokens 64 --records runs/bench-gpu
bench-gpu: $(READY)  ## On a GPU: 7B with random weights, and rank 0's share of 70B at tp=8, compiled and as CUDA graphs
	@$(PYTHON) -c "import sys, torch; torch.cuda.is_available() or sys.exit('bench-gpu times on a GPU, and torch sees none.')"
	$(ON_GPU) --shape llama2-7b
	$(ON_GPU) --shape llama2-70b --tp 8 --alone --link $(or $(LINK),300GBps,25us) --drop none --drop all

tiny-model: $(READY)  ## Train spd-tiny again; an interrupted training goes on where it stopped
	$(PYTHON) -m spd.tiny.train $(ARGS)

mlflow-ui: $(READY)  ## Compare runs in the browser
	$(PYTHON) -m mlflow ui --backend-store-uri "$${MLFLOW_TRACKING_URI:-sqlite:///mlflow.db}" $(ARGS)

clean:  ## Remove caches and build products; environments, records and results stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . \( -name .git -o -name .venv -o -name .conda \) -prune -o -name __pycache__ -type d -exec rm -rf {} +

clean-env:  ## Remove the environment
	rm -rf .venv .conda
