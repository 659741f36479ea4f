# `make check` is what CI runs after it has installed the package (.ci/run).
.PHONY: check test lint docs

check: test lint

test:
	pytest

lint:
	ruff check .
	ruff format --check .
	mypy

docs:
	mkdocs build --strict
