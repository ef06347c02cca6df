# The daily commands; `just` lists them.
_default:
    @just --list

# everything, as continuous integration runs it
ci:
    .ci/run

# all tests
test *args:
    python -m pytest -n 2 {{args}}

# the tests that need no torch
quick *args:
    python -m pytest -m "not slow" {{args}}

# form and types
lint:
    ruff check .
    ruff format --check .
    mypy

# how right the answers are, against GPU memory that was measured
score *args:
    python scripts/score.py {{args}}

# docs/coverage.md: which model types the exact engine runs
coverage *args:
    python scripts/coverage.py {{args}}

# the two engines held together, type by type
engines *args:
    python scripts/engines.py {{args}}

# docs/guide.md and docs/accuracy.md (some minutes), README's outputs and figures: written anew from what the code says
docs:
    python scripts/guide.py
    python scripts/accuracy.py
    HFVRAM_GOLDEN=1 python -m pytest tests/test_readme.py

# expected outputs, written anew: read the difference before it is committed
golden:
    HFVRAM_GOLDEN=1 python -m pytest tests/test_readme.py tests/test_show_text.py tests/test_show_cli.py

# how fast it is
bench:
    python benchmarks/first_command.py
    python benchmarks/batch.py
