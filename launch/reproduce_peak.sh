#!/usr/bin/env bash
# bash launch/reproduce_peak.sh [WORKDIR]: the README's table of peak. 3 warm starts x 2 seeds of every variant, evaluated on
# 1,024 shared problems, the last checkpoints only. About an hour on 2 cores; a second call goes on where it was stopped.
set -euo pipefail
case "${1:-}" in
  /* | *://*) WORKDIR=$1 ;;
  *) WORKDIR=$PWD/${1:-runs/peak} ;;
esac
source "$(dirname "$0")/setup.sh"
source launch/lanes.sh

train() { # NAME WARM_START_SEED SEED [FLAG...]: a run named NAME-WARM_START_SEED-SEED
  local name=$1 dir="$WORKDIR/$1-$2-$3" seeds=(--config.warm_start.seed="$2" --config.seed="$3")
  local variant=${name%%@*}
  [ -e "$dir/evaluation/curve.png" ] && return
  .venv/bin/python -m tto_jax.train --config="configs/peak.py:$variant" --workdir="$dir" "${seeds[@]}" \
    --config.variant="$name" --config.warm_start.cache="$WORKDIR" "${@:4}"
  .venv/bin/python -m tto_jax.evaluate --workdir="$dir"
}
warm() { # SEED
  local dir="$WORKDIR/brpo-$1-0"
  [ -e "$WORKDIR/warm_start-$1/evaluation/curve.png" ] && return
  .venv/bin/python -m tto_jax.train --config=configs/peak.py:brpo --workdir="$dir" --config.warm_start.seed="$1" \
    --config.seed=0 --config.warm_start.cache="$WORKDIR" --warm_start_only
  .venv/bin/python -m tto_jax.evaluate --workdir="$dir" --warm_start --out="$WORKDIR/warm_start-$1"
}
main_pairs() { # SEED: the four runs that the thresholds speak of
  for w in 0 1 2; do
    for name in brpo grpo mrt; do train $name $w "$1"; done
  done
}
controls() { # SEED
  for w in 0 1 2; do
    train grpo_length@0.2 $w "$1" --config.credit.length_penalty=0.2
    train grpo_length@0.5 $w "$1" --config.credit.length_penalty=0.5
    train grpo_length@1.0 $w "$1" --config.credit.length_penalty=1.0
    train grpo_answers $w "$1"
    train group $w "$1"
  done
}
lanes 'warm 0; warm 2' 'warm 1'
lanes 'main_pairs 0' 'main_pairs 1'
lanes 'controls 0' 'controls 1'
.venv/bin/python -m tto_jax.report --out="$WORKDIR" --baseline=grpo "$WORKDIR"/warm_start-? \
  "$WORKDIR"/{grpo,grpo_length@0.2,grpo_length@0.5,grpo_length@1.0,grpo_answers,group,brpo,mrt}-?-?
