#!/usr/bin/env bash
# Makes .venv, installs the test extra, lints, runs the tests. Arguments go to pytest: `bash launch/test.sh -m slow`.
set -euo pipefail
EXTRAS=test
source "$(dirname "$0")/setup.sh"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
exec .venv/bin/python -m pytest "$@"
