#!/usr/bin/env bash
# bash launch/quickstart.sh [WORKDIR]
# From nothing to the result: .venv, a warm start on `peak`, then GRPO, GRPO with a length penalty, BRPO and MRT from it,
# evaluated at 8 budgets. Writes WORKDIR/results.json, curves.png, training.png and prints the table. About 6 minutes on
# 2 cores after the installation. A second call resumes what was interrupted and skips what is done.
# SEED and WARM_START_SEED (default 0) choose the random numbers.
set -euo pipefail
case "${1:-}" in
  /* | *://*) WORKDIR=$1 ;;
  *) WORKDIR=$PWD/${1:-runs/quickstart} ;;
esac
source "$(dirname "$0")/setup.sh"
source launch/lanes.sh
begin=$SECONDS

seeds=(--config.seed="${SEED:-0}" --config.warm_start.seed="${WARM_START_SEED:-0}" --config.warm_start.cache="$WORKDIR")
train() { # NAME: trains and evaluates a variant
  .venv/bin/python -m tto_jax.train --config="configs/peak.py:$1" --workdir="$WORKDIR/$1" "${seeds[@]}"
  .venv/bin/python -m tto_jax.evaluate --workdir="$WORKDIR/$1"
}
.venv/bin/python -m tto_jax.train --config=configs/peak.py:brpo --workdir="$WORKDIR/brpo" "${seeds[@]}" --warm_start_only
.venv/bin/python -m tto_jax.evaluate --workdir="$WORKDIR/brpo" --warm_start --out="$WORKDIR/warm_start"
lanes 'train brpo; train grpo_length' 'train mrt; train grpo'
.venv/bin/python -m tto_jax.report --out="$WORKDIR" --baseline=grpo \
  "$WORKDIR"/{warm_start,grpo,grpo_length,brpo,mrt}
echo "done in $((SECONDS - begin)) s: $WORKDIR/results.json, $WORKDIR/curves.png"
