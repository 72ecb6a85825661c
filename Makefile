# make quickstart   install into .venv and train a small model as a chain of short jobs
# make test         install what tests need, check, and run all tests
# make test-long    the tests that take too long for every run
# make bench        the benchmarks; each prints a ratio to a baseline of the same run

PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test test-long check bench clean

quickstart: .venv/.installed
	@if [ -e runs/quickstart/final_model ]; then \
		$(BIN)/hpcresume status quickstart; \
	elif [ -e runs/quickstart/run.yaml ]; then \
		$(BIN)/hpcresume resume quickstart; \
	else \
		$(BIN)/hpcresume submit configs/quickstart.yaml --cluster local --time 00:00:13 \
			--set chain.lead_s=2; \
	fi

test: check
	$(BIN)/pytest -n 3 --dist loadgroup -m "not long"

test-long: .venv/.tests
	$(BIN)/pytest -m long

check: .venv/.tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_architecture.py

bench: .venv/.tests
	for benchmark in chain_efficiency checkpoint cli link_gap session_overhead warm_start; do $(BIN)/python benchmarks/$$benchmark.py; done

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.installed: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

.venv/.tests: pyproject.toml constraints.txt .venv/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

clean:
	rm -rf .venv runs .pytest_cache .mypy_cache .ruff_cache
