# `make check` is what CI runs after it has installed the package (.ci/run).
.PHONY: check test lint docs lowest fuzz kills mutations

check: test lint

test:
	pytest

lint:
	ruff check .
	ruff format --check .
	mypy

docs:
	mkdocs build --strict

# The fast tests with the lowest versions that pyproject.toml allows.
lowest:
	bash .ci/lowest

# Thousands of calls, right and wrong, through every door: `make fuzz FUZZ_EXAMPLES=100000`.
fuzz:
	FUZZ_EXAMPLES=$(or $(FUZZ_EXAMPLES),10000) python tests/fuzz/run.py

# Every long job killed at random moments and started again: `make kills ROUNDS=600`.
kills:
	python tests/kills/run.py --rounds $(or $(ROUNDS),60)

# Whether the tests see random mistakes in the code.
mutations:
	python tests/mutations/run.py --jobs 2
