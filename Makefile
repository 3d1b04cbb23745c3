# Two commands for a newcomer: `make demo` and `make test`. Everything they need is made in .venv; nothing else is touched,
# except that a machine without any Chromium gets one.

PYTHON ?= python3
BIN := .venv/bin
# PyTorch's wheels for Linux are built for CUDA by default. Without a GPU the constrained version is enough.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test lint docs tables clean
.DELETE_ON_ERROR:

demo: .venv/ready
	$(BIN)/python -m agentkv.run --method full,gui-kv,snapkv --budget 0.4 --out runs/demo

test: .venv/ready
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

# Tables of docs/results.md, docs/rag.md and docs/serving.md, from the rows that lie beside them.
tables: .venv/ready
	$(BIN)/python docs/tables.py

# The variable keeps the theme's note on mkdocs 2 out of the log: versions are pinned. A warning stops the build.
docs: .venv/ready-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# torch comes first and pinned: asked for as a range it would pull the newest build. Without npm's registry all but the
# tasks on sites works, so that line may fail.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) --upgrade pip
	$(INSTALL) $$(grep '^torch==' constraints.txt)
	$(INSTALL) --constraint constraints.txt --editable '.[dev,agents,conversations,eval,kernels,models,pipeline,porag,rag,ray,retrieval,serve,structured]'
	$(INSTALL) --constraint constraints.txt --no-deps miniwob
	$(BIN)/python -m envs.install
	-$(BIN)/python -m envs.sites install
	touch $@

.venv/ready-docs: .venv/ready
	$(INSTALL) --constraint constraints.txt --editable '.[docs]'
	touch $@

clean:
	rm -rf .venv runs site
