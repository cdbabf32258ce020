# make train    a small network learns to find drawn people: about ten minutes on two cores, no GPU
# make test     every notebook and every test
# make check    notebooks, modules and README.md agree
# make bench    how fast each part is on this machine
# make bench-overfit   sixteen real images learned by heart, about ten minutes; DATA=folder of COCO data
# PYTHON=python3.12 make ... picks the interpreter for the environment
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin

.PHONY: train test check bench bench-overfit readme

# installed once, and again only when what is to be installed has changed
$(VENV)/.installed: setup.py settings.ini pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo 'posenb needs Python 3.10 or newer; choose one with: PYTHON=python3.12 make ...' >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) || { echo 'no virtual environment could be made: install the venv module of $(PYTHON) (on Debian and Ubuntu: apt install python3-venv)' >&2; exit 1; }
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]'
	@touch $@

train: $(VENV)/.installed
	$(BIN)/posenb_train --out runs/people

test: $(VENV)/.installed
	cd nbs && ../$(BIN)/nbdev_test --n-workers 2 --do-print
	$(BIN)/python -m pytest -q tests
	@! $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || $(BIN)/python -m pytest -q -m gpu tests

check: $(VENV)/.installed
	$(BIN)/nbdev_export && $(BIN)/nbdev_clean && git diff --exit-code -- posenb nbs
	$(BIN)/python .ci/readme.py && git diff --exit-code -- README.md nbs/images

bench: $(VENV)/.installed
	$(BIN)/posenb_bench

bench-overfit: $(VENV)/.installed
	$(BIN)/python tests/bench_overfit.py $(DATA)

readme: $(VENV)/.installed
	$(BIN)/python .ci/readme.py
