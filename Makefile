# `make demo` and `make test` set everything up by themselves. PYTHON=... picks the interpreter (default: the newest of
# 3.13, 3.12 and 3.11 that runs), VENV=... the folder, ARGS=... goes to the command.

VENV ?= .venv
EXTRAS ?= dev
ARGS ?=
STAMP := $(VENV)/.installed
BIN := $(VENV)/bin

.PHONY: help demo test soak targets bench lint format clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    set up $(VENV) and run the EP320 demo"
	@echo "make test    run the tests"
	@echo "make soak    run the long tests (thousands of steps)"
	@echo "make targets compile for TPUs and GPUs that are not here (an hour), docs/targets.md"
	@echo "make bench   run every benchmark"
	@echo "make lint    ruff and mypy"
	@echo "make format  let ruff rewrite the sources"
	@echo "make clean   remove $(VENV) and caches"

demo: $(STAMP)
	$(BIN)/cmjax demo $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

soak: $(STAMP)
	$(BIN)/python -m pytest -m soak --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

targets: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "jax[cuda13]"
	$(BIN)/python scripts/make_target_table.py $(ARGS)

bench: $(STAMP)
	$(BIN)/cmjax bench all $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis

# The stamp is newer than pyproject.toml only after an install that succeeded; sources are installed editable, so they
# do not count.
$(STAMP): pyproject.toml
	@set -eu; \
	if [ ! -x "$(BIN)/python" ]; then \
	  python="$(PYTHON)"; \
	  [ -n "$$python" ] || python="$$(sh scripts/find_python.sh)"; \
	  echo "setting up $(VENV) with $$python"; \
	  "$$python" -m venv "$(VENV)"; \
	fi; \
	"$(BIN)/python" -m pip install --quiet --disable-pip-version-check --editable ".[$(EXTRAS)]"; \
	touch "$(STAMP)"
