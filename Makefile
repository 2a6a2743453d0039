# make demo   run both demo VAEs over the bundled clip          make test   run the tests
# make lint   ruff and pyright                                  make clean  remove what the others made
# make test-comfyui   run the tests inside a ComfyUI checkout: COMFYUI_PATH, COMFYUI_PYTHON; without them it says how
# Each target sets up everything it needs in .venv; PYTHON chooses the interpreter (3.11 or newer).

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-comfyui lint clean

demo: .venv/.cli
	$(BIN)/cviv-vae demo --output demo_output --overwrite

test: .venv/.dev
	$(BIN)/python -m pytest -n auto --dist worksteal

test-comfyui:
	$(PYTHON) tests/comfyui/run.py

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.cli: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) --editable ".[cli]"
	touch $@

.venv/.dev: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv demo_output build *.egg-info .pytest_cache .ruff_cache .hypothesis
