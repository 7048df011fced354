# Each target works on a fresh machine, because it sets up .venv first. PYTHON=python3.12 picks another Python.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SHORT ?=
PEFT ?=

NATIVE := setup.py pyproject.toml $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.py')
PYTHON_FILES := lora_kernels tests benchmarks docs examples scripts csrc setup.py conftest.py lora_kernels_autoload.py

.PHONY: help test test-slow test-plugins notebook compatibility demo bench bench-many bench-kinds bench-training doctor docs lint format clean

help:
	@echo "make test       set up and run the tests that a contributor runs (about 9 minutes on 2 cores)"
	@echo "                (PEFT=0.19.1: with that version of PEFT instead of the pinned one)"
	@echo "make test-slow  run the rest: emulated and interpreted GPU kernels, ahead-of-time compiles, long runs"
	@echo "make test-plugins  run the tests of the plug-ins with axolotl, ms-swift and LLaMA-Factory"
	@echo "make compatibility run the tests and record the versions for docs/compatibility.md"
	@echo "make notebook   run examples/first_steps.ipynb anew"
	@echo "make demo       fine-tune a small vision transformer on real data (SHORT=1: half a minute)"
	@echo "make bench      measure against PEFT and the frozen layer; writes benchmarks/results/ and the docs' figures"
	@echo "make bench-many measure many adapters in one batch, the layer and generation (about seven minutes)"
	@echo "make bench-kinds measure experts, embeddings, convolutions and other layers (about three minutes)"
	@echo "make bench-training run the sweep over ranks and the pretraining with ReLoRA (about eight minutes)"
	@echo "make doctor     show which back-ends serve this machine, and what is missing"
	@echo "make docs       build the documentation into build/site; a warning is an error"
	@echo "make lint       ruff, mypy, clang-format (make format repairs)"

$(VENV)/.requirements: requirements-dev.txt requirements-extra.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --upgrade --quiet pip
	$(BIN)/pip install --quiet -r requirements-dev.txt
	$(BIN)/pip install --quiet --no-deps -r requirements-extra.txt
	@touch $@

# The install is editable. The extensions are built into lora_kernels/, that for CUDA where nvcc is found, and again when
# one of their sources has changed.
$(VENV)/.installed: $(VENV)/.requirements $(NATIVE)
	LORA_KERNELS_CUDA=auto LORA_KERNELS_REQUIRE_NATIVE=1 $(BIN)/pip install --quiet --no-build-isolation --no-deps -e .
	@touch $@

# Another PEFT lies in a folder of its own, before .venv on the path.
build/peft-%: $(VENV)/.requirements
	$(BIN)/pip install --quiet --no-deps --target $@ peft==$*

OTHER_PEFT := $(if $(PEFT),build/peft-$(PEFT))
WITH_PEFT := $(if $(PEFT),PYTHONPATH=$(CURDIR)/$(OTHER_PEFT))

test: $(VENV)/.installed $(OTHER_PEFT)
	$(WITH_PEFT) LORA_KERNELS_REQUIRE_NATIVE=1 $(BIN)/python -m pytest tests -m "not slow"

test-slow: $(VENV)/.installed $(OTHER_PEFT)
	$(WITH_PEFT) LORA_KERNELS_REQUIRE_NATIVE=1 $(BIN)/python -m pytest tests -m slow

# The trainers are installed without their dependencies, in a folder of their own.
build/plugins: $(VENV)/.installed requirements-plugins.txt
	$(BIN)/pip install --quiet --no-deps --target $@ -r requirements-plugins.txt

test-plugins: build/plugins
	PYTHONPATH=$(CURDIR)/build/plugins $(BIN)/python -m pytest tests/plugins

compatibility: $(VENV)/.installed
	$(BIN)/python scripts/compatibility.py --record
	$(BIN)/python scripts/compatibility.py --table

notebook: $(VENV)/.installed
	$(BIN)/python scripts/notebook.py

demo: $(VENV)/.installed
	$(BIN)/python examples/digits.py $(if $(SHORT),--short)

bench: $(VENV)/.installed
	$(BIN)/python -m lora_kernels bench --plot
	$(BIN)/python scripts/update_readme.py

bench-many: $(VENV)/.installed
	$(BIN)/python -m lora_kernels bench --suite many --plot
	$(BIN)/python -m benchmarks.generation_many --plot
	$(BIN)/python scripts/update_readme.py

bench-kinds: $(VENV)/.installed
	$(BIN)/python -m lora_kernels bench --suite kinds --plot
	$(BIN)/python scripts/update_readme.py

bench-training: $(VENV)/.installed
	$(BIN)/python examples/rank_sweep.py --record
	$(BIN)/python examples/pretrain_relora.py --seeds 3 --record
	$(BIN)/python scripts/update_readme.py

doctor: $(VENV)/.installed
	$(BIN)/python -m lora_kernels doctor

docs: $(VENV)/.requirements
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

lint: $(VENV)/.requirements
	$(BIN)/ruff check $(PYTHON_FILES)
	$(BIN)/ruff format --check $(PYTHON_FILES)
	$(BIN)/mypy
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

format: $(VENV)/.requirements
	$(BIN)/ruff check --fix $(PYTHON_FILES)
	$(BIN)/ruff format $(PYTHON_FILES)
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format -i

clean:
	rm -rf build dist *.egg-info lora_kernels/*.so $(VENV)/.installed
