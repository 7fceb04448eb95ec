#!/usr/bin/env bash
# Sets up what is needed, lints, checks types, and runs every test:
#   bash scripts/test.sh [--setup-only] [pytest arguments...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh --browser
if [ "${1:-}" = "--setup-only" ]; then
    exit 0
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
# Two files at a time, each in one thread (tests/conftest.py). `-n 0` is one after the other.
exec .venv/bin/pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
