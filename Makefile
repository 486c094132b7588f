# Two commands matter: `make book` and `make test`. `make help` lists the rest.

PYTHON ?= python3
PORT ?= 8000
# make test: each with one thread of torch's, for two of them beside another busy process wait for each other.
PROCESSES ?= 2
RUN := .venv/bin/python
# In CI a browser that is missing is a failure; elsewhere its tests are skipped, and say so.
export TOKENIZERS_PARALLELISM = false

.DEFAULT_GOAL := help
.PHONY: help venv book serve lab notebooks test test-long bench workshop pdf requirements clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: ## .venv from requirements.txt, if it is missing or stale
	@$(PYTHON) tools/environment.py

book: venv ## execute the notebooks, write the pages to _build/html
	@$(RUN) tools/book.py

serve: book ## show the pages on localhost
	@echo "http://127.0.0.1:$(PORT)  (Ctrl-C ends it)"
	@$(RUN) -m http.server $(PORT) --bind 127.0.0.1 --directory _build/html

lab: venv ## open the notebooks in JupyterLab
	@$(RUN) -m jupyterlab notebooks

notebooks: venv ## execute the notebooks and write their outputs back into them
	@$(RUN) tools/notebooks.py

test: export TQDM_DISABLE = 1 # a bar says how fast a machine is; the outputs that are compared do not
test: book ## lint, unit tests, notebooks against their outputs, the built pages in a browser
	@$(RUN) tools/chromium.py
	@$(RUN) tools/node.py
	@$(RUN) -m ruff check
	@$(RUN) -m ruff format --check
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -m "not long" -n $(PROCESSES) --dist loadscope --nbval --nbval-current-env \
	    --nbval-sanitize-with tests/nbval_sanitize.cfg --nbval-cell-timeout 300 --durations 10 tests notebooks

test-long: venv ## what takes minutes and gigabytes: the full 7B shape among it
	@$(RUN) -m pytest -m long tests

bench: book ## measure against peers, write benchmarks/results
	@$(RUN) benchmarks/decode_attention.py
	@$(RUN) benchmarks/lookup_seeds.py
	@$(RUN) benchmarks/heads_seeds.py
	@$(RUN) benchmarks/induction_seeds.py
	@$(RUN) benchmarks/sharing_seeds.py
	@$(RUN) benchmarks/latent_seeds.py
	@$(RUN) benchmarks/siblings.py
	@$(RUN) benchmarks/window_prefill.py
	@$(RUN) benchmarks/conversion.py
	@$(RUN) benchmarks/serving.py
	@$(RUN) benchmarks/loading.py
	@$(RUN) benchmarks/quantize.py --sections half full kernels
	@$(RUN) benchmarks/explorers.py
	@$(RUN) benchmarks/live.py
	@$(RUN) benchmarks/notebook_memory.py
	@$(RUN) benchmarks/waiting.py
	@if command -v nvidia-smi >/dev/null; then $(RUN) benchmarks/gpu.py; else echo "no GPU here: benchmarks/gpu.py left out"; fi

workshop: venv ## student copies, solutions and slides, into dist/workshop
	@$(RUN) tools/workshop.py

pdf: book ## the pages as one PDF, into dist
	@$(RUN) tools/pdf.py

requirements: venv ## compile requirements.txt from pyproject.toml
	@$(RUN) tools/requirements.py
	@$(RUN) tools/licences.py

clean: ## remove what make made, .venv included
	rm -rf _build .venv .pytest_cache .ruff_cache .hypothesis src/*.egg-info
	find . -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf
