#!/usr/bin/env bash
# Makes .venv, installs the test extra, lints, runs the tests, files shared among two processes (compiling takes most of
# the time). Arguments go to pytest: `bash launch/test.sh -m slow -n 0`, the long ones, one after the other.
set -euo pipefail
EXTRAS=test
source "$(dirname "$0")/setup.sh"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
# In the order of their names: sorted by their number of tests, the files that take longest would come last. A process
# that crashes ends the tests: they would wait for ever for the rest of its files.
exec .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart=0 "$@"
