# make quickstart: prepare, train dense and half sparse, compare and sample, on any CPU. make test:
# ruff and the test suite. Both install into .venv.
PYTHON ?= python3
RUN := .venv/bin/python

.PHONY: quickstart test test-clients lines

quickstart: .venv/installed
	$(RUN) prepare.py stdlib
	$(RUN) train.py config/quickstart.py --prune_score=none --out_dir=out/quickstart_dense
	$(RUN) train.py config/quickstart.py
	$(RUN) report.py out/quickstart_dense out/quickstart --plot=out/quickstart.png
	$(RUN) sample.py out/quickstart_dense --prompt="The" --max_new_tokens=200
	$(RUN) sample.py out/quickstart --prompt="The" --max_new_tokens=200

test: .venv/installed-test
	$(RUN) -m ruff check .
	$(RUN) -m pytest -q

# Others' programs on what this one writes.
test-clients: .venv/installed-clients
	$(RUN) -m pytest -q -m clients

# Lines of source, and how many of them python train.py loads.
lines:
	@$(PYTHON) tests/count_lines.py

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is too old: Python 3.11 or newer is needed; make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; echo "no venv module: install it (Debian: apt install python3-venv)"; exit 1; }

.venv/installed: requirements.txt constraints.txt | .venv/bin/python
	$(RUN) -m pip install -q -r requirements.txt -c constraints.txt
	@touch $@

.venv/installed-test: requirements-test.txt .venv/installed
	$(RUN) -m pip install -q -r requirements-test.txt -c constraints.txt
	@touch $@

.venv/installed-clients: .venv/installed-test
	$(RUN) -m pip install -q "lm_eval[hf]" wandb trackio tensorboard -c constraints.txt
	@touch $@
