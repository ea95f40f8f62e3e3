# Two commands: `make demo` runs the race, `make test` runs the checks. Each makes its own virtual environment.
# `make test-full` runs tests of three and more parametrized arguments with all combinations, not only with all pairs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
OUT ?= out/demo

.PHONY: demo test test-full lint clean

$(VENV)/torch.stamp: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	touch $@

$(VENV)/demo.stamp: $(VENV)/torch.stamp pyproject.toml
	$(PIP) --editable ".[cli,hf,pde]"
	touch $@

$(VENV)/all.stamp: $(VENV)/torch.stamp pyproject.toml
	$(PIP) --editable ".[all]"
	# Only tests compare with it. Isolated, its build would download a torch of its own. Its C++ part, which takes most of
	# a minute and which nothing here calls, is left out: without a compiler it is plain Python.
	$(PIP) setuptools-scm wheel opt_einsum && CXX=false $(PIP) --no-deps --no-build-isolation torchTT==0.5.0
	touch $@ $(VENV)/demo.stamp

demo: $(VENV)/demo.stamp
	$(BIN)/comoving race --task fno --optimizers adamw,tensor-galore,tucker-adam,comoving --steps 400 --rank 0.1 --out $(OUT)

lint: $(VENV)/all.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-full: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal --full

clean:
	rm -rf $(VENV) out
