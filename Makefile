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
.PHONY: help env test lint reproduce-tiny sensitivities predict figures ledger notebooks tiny-model mlflow-ui clean clean-env

help:  ## Show this list
	@awk -F ':.*##  *' '/^[a-z][a-z0-9-]*:.*## / { printf "  %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "Settings:"
	@echo "  PYTHON=...       use this interpreter and make no environment"
	@echo "  ENV_TOOL=...     micromamba, mamba or conda (default: the first one found) or venv (else)"
	@echo "  TORCH_INDEX=URL  an index where pip also looks while the environment is made (CPU builds)"
	@echo "  ARGS=...         more arguments for pytest, the training script or the MLflow server"
	@echo "  MODELS, TPS, TEXTS   lists that sensitivities goes over"
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

reproduce-tiny: $(RUN)/plan.json $(RUN)/sweep.json $(RUN)/eval.json $(RUN)/bench.json  ## Sensitivity to ledger
	$(SPD) report $(RUN)/records --out paper_figures/$(NAME) --records $(RUN)/records --reproduction $(NAME) >/dev/null
	$(PYTHON) -m spd ledger experiments/records $(RUN)/records --records $(RUN)/records --out REPRODUCTION.md >/dev/null
	@echo "Figures and tables are in paper_figures/$(NAME), claims in REPRODUCTION.md; 'make mlflow-ui' compares runs." >&2

$(RUN)/asked: FORCE  # changes when another model, text or degree is asked for under the same name
	@mkdir -p $(@D); echo '$(MODEL) $(TEXT) $(TP)' | cmp -s - $@ || echo '$(MODEL) $(TEXT) $(TP)' > $@

$(RUN)/sensitivity.json: $(RUN)/asked $(EXPERIMENT) $(wildcard $(or $(MODEL),spd/tiny/model)/*.safetensors $(TEXT)) | $(READY)
	@echo "1/5 sensitivity of every block" >&2
	@rm -rf $(RUN)/repairs  # of another model, text or experiment
	$(SPD) sensitivity $(STAGE) $(ON) --out $@ >/dev/null

$(RUN)/plan.json: $(RUN)/sensitivity.json
	@echo "2/5 plan" >&2
	$(SPD) plan $< --records $(RUN)/records --reproduction $(NAME) --out $@ >/dev/null

$(RUN)/sweep.json: $(RUN)/sensitivity.json
	@echo "3/5 perplexity and accuracy against the percentage of blocks dropped" >&2
	$(SPD) sweep $< $(STAGE) $(ON) --repairs $(RUN)/repairs --out $@ >/dev/null

$(RUN)/eval.json: $(RUN)/plan.json
	@echo "4/5 perplexity and accuracy of the plan, question by question" >&2
	$(SPD) eval --plan $< $(STAGE) $(ON) --out $@ >/dev/null

$(RUN)/bench.json: $(RUN)/sensitivity.json
	@echo "5/5 time to first token on real processes" >&2
	$(SPD) bench --sensitivity $< $(STAGE) --out $@ >/dev/null

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

predict: $(READY)  ## The paper's latency figures for LLaMA2 7B-70B, predicted, beside its claims
	rm -rf runs/predict
	$(PYTHON) -m spd predict-paper --records runs/predict --reproduction predicted >/dev/null
	$(PYTHON) -m spd report runs/predict --out paper_figures/predicted --records runs --reproduction predicted >/dev/null

figures: $(READY)  ## Draw paper_figures again from the committed records
	@set -e; for folder in experiments/records/*/; do echo "$$folder" >&2; \
	  $(PYTHON) -m spd report $$folder --out paper_figures/$$(basename $$folder) --records runs --no-mlflow >/dev/null 2>&1; \
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
