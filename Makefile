# Two commands for a newcomer: `make demo` and `make test`. Everything they need is made in .venv; nothing else is touched,
# except that a machine without any Chromium gets one.

PYTHON ?= python3
BIN := .venv/bin
# PyTorch's wheels for Linux are built for CUDA by default. Without a GPU the constrained version is enough.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test peers lint docs tables clean
.DELETE_ON_ERROR:

demo: .venv/ready
	$(BIN)/python -m agentkv.run --method full,gui-kv,snapkv --budget 0.4 --out runs/demo

test: .venv/ready
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

# Clients and engines that pin other versions than ours or bring much: each has an environment of its own, in which its
# tests run. Of two of them the wheels are for CUDA and want gigabytes: what these tests import is asked for by name, as
# they miss it.
peers: .venv-browser-use/ready .venv-harness/ready .venv-lmcache/ready .venv-vllm/ready
	OMP_NUM_THREADS=1 .venv-browser-use/bin/python -m pytest -rs tests/agentkv/test_browser_use.py
	OMP_NUM_THREADS=1 .venv-harness/bin/python -m pytest -rs tests/textkv/serve/test_clients.py -k harness
	OMP_NUM_THREADS=1 .venv-lmcache/bin/python -m pytest -rs tests/textkv/test_lmcache_serde.py
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest -rs tests/textkv/test_vllm_packed.py

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

PEER = $(@D)/bin/python -m pip install --quiet --disable-pip-version-check
TORCH := $$(grep '^torch==' constraints.txt)

# browser-use 0.13 pins click 8.3.3, with which only huggingface_hub 1 and our oldest transformers go.
.venv-browser-use/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	$(PEER) $(TORCH)
	$(PEER) $(TORCH) transformers==5.17.0 browser-use==0.13.14 pytest --editable '.[agents,serve,structured]'
	touch $@

# The LM Evaluation Harness brings scipy, scikit-learn and the metrics of tasks that we do not run.
.venv-harness/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	$(PEER) $(TORCH)
	$(PEER) --constraint constraints.txt pytest openai 'lm-eval[api]' --editable '.[serve,structured,harness]'
	touch $@

.venv-lmcache/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	$(PEER) $(TORCH)
	$(PEER) --constraint constraints.txt pytest --editable .
	$(PEER) --no-deps lmcache==0.5.6
	$(PEER) aiohttp cachetools cryptography numba opentelemetry-sdk prometheus_client psutil py-cpuinfo pyyaml \
	    requests sortedcontainers
	touch $@

.venv-vllm/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	$(PEER) $(TORCH)
	$(PEER) --constraint constraints.txt pytest --editable '.[serve,structured]'
	$(PEER) --no-deps vllm==0.33.0
	$(PEER) aiohttp cachetools cbor2 cloudpickle llguidance msgspec openai openai_harmony partial_json_parser psutil \
	    py-cpuinfo pybase64 pyzmq requests urllib3 uvloop
	touch $@

.venv/ready-docs: .venv/ready
	$(INSTALL) --constraint constraints.txt --editable '.[docs]'
	touch $@

clean:
	rm -rf .venv .venv-browser-use .venv-harness .venv-lmcache .venv-vllm runs site
