# make demo | make test | make claims | make soak | make lint: each sets up .venv first, if it is not there yet.
PYTHON ?= python3
BIN = .venv/bin

demo: .venv/run
	$(BIN)/python robust_kd.py --demo

test: .venv/dev
	$(BIN)/python -m pytest

soak: .venv/dev
	$(BIN)/python tests/stress/soak.py --minutes 10

claims: .venv/dev
	$(BIN)/python benchmark/prepare.py cifar10-16
	$(BIN)/python benchmark/claims.py all

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/run: requirements.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("error: Python 3.11 or newer is needed, this is " + sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/dev: .venv/run requirements-dev.txt
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-deps robustbench==1.1.1
	touch $@

.PHONY: demo test claims soak lint
