# `make` lists the targets. A reproduction is a list of commands; one that is asked what it has answered gives that answer
# at once, so that it goes on where it was interrupted, and a changed number redoes what depends on it.
# ---- Environment: made once, by the first target that needs it. Its stamp's name changes with the pins and the folder.
ifndef PYTHON
KEY := $(shell { pwd -P; cat environment.yml; sed '/^\[tool\.pytest/,$$d' pyproject.toml; } | cksum | cut -d ' ' -f 1)
CONDA := $(firstword $(shell for t in micromamba mamba conda; do if command -v $$t >/dev/null 2>&1; then echo $$t; fi; done) $(wildcard $(MAMBA_EXE) $(CONDA_EXE)))
ENV_TOOL ?= $(if $(wildcard .venv/.ready-*),venv,$(or $(CONDA),$(if $(wildcard .conda/.ready-$(KEY)),conda),venv))
READY := $(if $(filter venv,$(ENV_TOOL)),.venv,.conda)/.ready-$(KEY)
override PYTHON := $(dir $(READY))bin/python
export PYTHONNOUSERSITE := 1
endif
export MLFLOW_DISABLE_TELEMETRY ?= true
export PYTHONPATH := .:experiments:paper_figures:$(PYTHONPATH)
export PYTHON TORCH_INDEX MODEL TEXT MODELS TPS TEXTS LINKS LINK SHAPE
.PHONY: help env test fuzz torture audit check-vllm lint keep figures ledger notebooks tiny-model mlflow-ui clean clean-env sensitivities ablation policies predict budget answers
#:   PYTHON=...       use this interpreter and make no environment
#:   ENV_TOOL=...     micromamba, mamba or conda (default: the first one found) or venv (else)
#:   TORCH_INDEX=URL  an index where pip also looks while the environment is made (CPU builds)
#:   ARGS=...         more arguments for pytest, every stage of a reproduction, bench-* or the MLflow server
#:   MODEL=DIR TEXT=FILE TP=N   reproduce-* on another model, text or tensor-parallel degree
#:   NPROC=N NNODES=N NODE_RANK=N RDZV=HOST:PORT   processes a node, and nodes, of reproduce-*; the first node's address
#:   EVAL_TEXT=FILE TASKS=a,b TASKS_DIR=DIR LIMIT=N STRATEGIES=a,b DEVICE=NAME   see the README
#:   MODELS, TPS, TEXTS, LINKS   lists that sensitivities and bench-links go over
#:   DRY_RUN=1 SHAPE_ONLY=1 FORCE=1   say what it takes; run the chain on two random blocks; go on whatever is missing
help:  ## Show this list
	@sed -n 's/^\([a-z][a-z0-9%-]*\)[:)].*# *\([A-Z].*\)/  \1                    \2/p' Makefile experiments/measure.sh | sed 's/^\(  .\{17\}\) */\1/'
	@echo "Settings:"; sed -n 's/^#: //p' Makefile
$(READY):
	@sh experiments/environment.sh "$(ENV_TOOL)" $@
env: $(READY)  ## Create the environment (.conda or .venv); other targets do it by themselves
	@echo "Ready: $(PYTHON)"
test: $(READY)  ## Run the test suite
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(PYTHON) -m pytest --numprocesses 2 --dist loadgroup $(ARGS)
	@echo "Left out: make check-vllm, what vLLM itself makes of exported folders (355 MB to download once)." >&2
.vllm/.ready: tests/vllm_requirements.txt | $(READY)
	$(PYTHON) -m pip install --quiet --no-deps --upgrade --target .vllm -r $< && touch $@
check-vllm: .vllm/.ready  ## Serve exported folders by vLLM itself, on CPUs, beside the engine; MODEL=DIR: that one too
	HF_HUB_OFFLINE=1 PYTHONPATH="$(CURDIR)/.vllm" $(PYTHON) -m pytest -rP tests/vllm_check.py $(ARGS)
fuzz: $(READY)  ## N=10000 mutated files, as users might give them (FUZZ_FROM=SEED: others), with a tally
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 FUZZ=$(or $(N),10000) $(PYTHON) -m pytest -qs --tb=short tests/test_fuzz.py -k mutated $(ARGS)
torture: $(READY)  ## Kill commands KILLS=100 times, fill disks, take servers away: the same records must come out
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 KILLS=$(or $(KILLS),100) $(PYTHON) -m pytest -rP --tb=short tests/torture.py $(ARGS)
audit: $(READY)  ## Known vulnerabilities of the pins, by pip-audit (put into .audit), which asks pypi.org
	$(PYTHON) -m pip install --quiet --upgrade --target .audit pip-audit==2.10.1
	sed -n 's/^ *- \([a-z].*==.*\)/\1/p' environment.yml >.audit/pins.txt
	PYTHONPATH=.audit $(PYTHON) -m pip_audit --no-deps --disable-pip -r .audit/pins.txt $(ARGS)
lint: $(READY)  ## Check style and formatting
	$(PYTHON) -m ruff check . && $(PYTHON) -m ruff format --check .

# ---- Reproductions: experiments/NAME.yaml in runs/NAME-tpN. One GPU a process (NPROC), or one process for all shards; GPUS: with a copy of the model on each in a sweep.
TP ?= 8
NPROC ?= 1
NNODES ?= 1
NODE_RANK ?= 0
RUN = runs/$(or $(NAME),$(notdir $(patsubst %/,%,$(MODEL))),$*)-tp$(TP)
CUDA = $(filter cuda,$(or $(DEVICE),$(shell sed -n 's/^  device: *//p' $<)))
NODES = $(if $(filter-out 1,$(NNODES)),--nnodes $(NNODES) --node-rank $(NODE_RANK) --rdzv-endpoint $(RDZV),--standalone)
TORCHRUN = $(PYTHON) -m torch.distributed.run $(NODES) --nproc-per-node
GO = $(if $(filter 1-1,$(NPROC)-$(NNODES)),$(PYTHON),$(TORCHRUN) $(NPROC))
COPIES = $(filter-out 1,$(if $(GPUS),$(shell echo $$(( $(GPUS) * $(NNODES) )))))
FIRST = $(if $(filter 0,$(NODE_RANK)),,@exit 0; )
SECTIONS = $(shell sed -n 's/^\([a-z0-9]*\):.*/\1/p' $<)
TO = --records $(RUN)/records --reproduction $(notdir $(RUN)) $(ARGS)
ON = --tp $(TP) $(if $(MODEL),--model "$(MODEL)") $(if $(DEVICE),--device $(DEVICE)) $(if $(TEXT),--text "$(TEXT)")
TASK = $(if $(TASKS),--tasks $(TASKS)) $(if $(TASKS_DIR),--tasks-dir "$(TASKS_DIR)") $(if $(LIMIT),--limit $(LIMIT))
# On a text of the user's for a paper's experiment, evaluation is on another text, or on the windows after calibration's.
APART = $(if $(EVAL_TEXT),--calibration-text "$(TEXT)" --text "$(EVAL_TEXT)",$(if $(CUDA),$(if $(TEXT),--calibration-text "$(TEXT)" --skip 128)))
TIMED = $(if $(CUDA),[ $(TP) = $$(( $(NPROC) * $(NNODES) )) ] || { echo "Latency was left out: NPROC=$(TP)." >&2; exit 0; }; $(GO),$(FIRST)$(PYTHON))
BENCH = -m spd --experiment $< bench --sensitivity $(RUN)/sensitivity.json $(if $(MODEL),--model "$(MODEL)") $(if $(CUDA),--device cuda --tp $(TP))
ifndef DRY_RUN
reproduce-%: experiments/%.yaml | $(READY)  ## Of experiments/NAME.yaml: sensitivity, plan, repairs, accuracy, latency, figures
	$(if $(CUDA),$(if $(filter 1,$(NNODES)),$(PYTHON),$(TORCHRUN) 1) experiments/preflight.py $< --tp $(TP) --processes $(NPROC) \
	  --nodes $(NNODES) $(if $(GPUS),--gpus $(GPUS)) $(if $(FORCE),--force) $(if $(MODEL),--model "$(MODEL)") $(if $(TEXT),--text "$(TEXT)") $(if $(TASKS_DIR),--tasks-dir "$(TASKS_DIR)"))
	$(GO) -m spd --experiment $< sensitivity $(ON) $(TO) --out $(RUN)/sensitivity.json >/dev/null
	$(FIRST)$(PYTHON) -m spd --experiment $< plan $(RUN)/sensitivity.json $(TO) --out $(RUN)/plan.json >/dev/null
	$(if $(COPIES),$(TORCHRUN) $(GPUS),$(GO)) -m spd --experiment $< sweep $(RUN)/sensitivity.json $(ON) $(APART) $(TASK) \
	  $(if $(STRATEGIES),--strategies $(STRATEGIES)) $(if $(COPIES),--data-parallel $(COPIES)) --repairs $(RUN)/repairs $(TO) --out $(RUN)/sweep.json >/dev/null
	$(if $(filter table1,$(SECTIONS)),$(GO) experiments/table1.py --experiment $< $(ON) $(TO) --out $(RUN)/table1.json >/dev/null)
	$(if $(filter distill,$(SECTIONS)),$(GO) -m spd --experiment $< distill --plan $(RUN)/plan.json $(ON) $(TO) --out $(RUN)/repaired >/dev/null)
	$(if $(filter eval,$(SECTIONS)),$(GO) -m spd --experiment $< eval --plan $(RUN)/repaired $(ON) $(TASK) $(TO) --out $(RUN)/eval.json >/dev/null)
	$(TIMED) $(BENCH) $(TO) --out $(RUN)/bench.json >/dev/null
	$(if $(CUDA),$(TIMED) $(BENCH) --compile $(TO) --records $(RUN)/compiled --out $(RUN)/bench-compiled.json >/dev/null)
	$(if $(CUDA),export NCCL_P2P_DISABLE=1; $(TIMED) $(BENCH) $(TO) --records $(RUN)/lbw --out $(RUN)/bench-lbw.json >/dev/null)
	$(if $(CUDA),export NCCL_P2P_DISABLE=1; $(TIMED) $(BENCH) --compile $(TO) --records $(RUN)/lbw-compiled --out $(RUN)/bench-lbw-compiled.json >/dev/null)
	$(FIRST)$(PYTHON) -m spd report $(RUN)/records $(TO) --out $(RUN)/figures >/dev/null
	$(if $(CUDA),$(FIRST)for of in compiled lbw lbw-compiled; do [ ! -d $(RUN)/$$of ] || \
	  $(PYTHON) -m spd report $(RUN)/$$of $(TO) --out $(RUN)/figures/$$of >/dev/null || exit; done)
	@echo "Figures and tables are in $(RUN)/figures, records in $(RUN)/records; 'make mlflow-ui' compares runs." >&2
else
reproduce-%: experiments/%.yaml | $(READY)
	+@$(MAKE) --no-print-directory -n DRY_RUN= $@
	@$(PYTHON) experiments/budget.py $< --tp $(TP) --processes $$(( $(NPROC) * $(NNODES) )) --nodes $(NNODES) $(if $(COPIES),--data-parallel $(COPIES)) $(if $(MODEL),--model "$(MODEL)")
endif
PAPER = $(@:reproduce-%=llama2-%)
reproduce-smollm2: TP = 3
ifndef SHAPE_ONLY
reproduce-7b reproduce-13b:
	+@for tp in $(if $(filter file,$(origin TP)),8 4,$(TP)); do $(MAKE) --no-print-directory reproduce-$(PAPER) TP=$$tp \
	  NPROC=$$(( $(NPROC) * $(NNODES) < tp ? $(NPROC) : tp / $(NNODES) )) GPUS=$(NPROC) || exit; done
reproduce-70b:  ## LLaMA2-70B on the node's eight GPUs; reproduce-7b and -13b: at tp 8 and 4 on one, or NPROC=8
	+@$(MAKE) --no-print-directory reproduce-$(PAPER) NPROC=$(if $(filter file,$(origin NPROC)),8,$(NPROC))
else
reproduce-7b reproduce-13b reproduce-70b: | $(READY)
	$(PYTHON) experiments/shape_only.py --shape $(PAPER) --blocks 2 --out runs/$(PAPER)-shape-only/model
	+@$(MAKE) --no-print-directory reproduce-shape-only NAME=$(PAPER)-shape-only MODEL=runs/$(PAPER)-shape-only/model
endif
keep: $(READY)  ## Put the records of RUN=runs/NAME among the committed ones, and draw their figures
	mkdir -p experiments/records/$(notdir $(RUN)) && cp $(RUN)/records/*.json experiments/records/$(notdir $(RUN))/
	$(PYTHON) paper_figures/draw.py $(notdir $(RUN))
figures: $(READY)  ## Draw paper_figures again from the committed records
	$(PYTHON) paper_figures/draw.py
ledger: $(READY)  ## REPRODUCTION.md: every claim of the paper beside the committed records
	$(PYTHON) paper_figures/ledger.py experiments/records --out REPRODUCTION.md
sensitivities ablation policies predict bench-peers bench-links check-prediction bench-gpu budget answers: $(READY)
	TP=$(TP) sh experiments/measure.sh $@ $(ARGS)
notebooks: $(READY)  ## Run the notebooks and keep what they show in them
	$(PYTHON) -m jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False notebooks/*.ipynb
tiny-model: $(READY)  ## Train spd-tiny again; an interrupted training goes on where it stopped
	$(PYTHON) experiments/train_tiny.py $(ARGS)
mlflow-ui: $(READY)  ## Compare runs in the browser, the committed ones among them
	$(PYTHON) -m spd.tracking experiments/records --uri "$${MLFLOW_TRACKING_URI:-sqlite:///mlflow.db}"
	$(PYTHON) -m mlflow ui --backend-store-uri "$${MLFLOW_TRACKING_URI:-sqlite:///mlflow.db}" $(ARGS)
clean:  ## Remove caches and build products; environments, records and results stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . \( -name .git -o -name .venv -o -name .conda -o -name .vllm -o -name .audit \) -prune -o -name __pycache__ -type d -exec rm -rf {} +
clean-env:  ## Remove the environment
	rm -rf .venv .conda .vllm .audit
.NOTPARALLEL:  # a stage that is timed wants the machine to itself
