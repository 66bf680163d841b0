#!/usr/bin/env bash
# bash launch/reproduce.sh peak|chain [WORKDIR]: the README's tables. Every variant from the same warm starts with the same
# seeds, problems and steps, evaluated on 1,024 shared problems, the last checkpoints only. peak: 3 warm starts x 2 seeds of
# 8 variants, about 70 minutes on 2 cores; chain: 2 seeds of 6 variants, about 25. A second call goes on where it stopped.
set -euo pipefail
TASK=${1:?give a task: peak or chain}
case "${2:-}" in
  /* | *://*) WORKDIR=$2 ;;
  *) WORKDIR=$PWD/${2:-runs/$TASK} ;;
esac
source "$(dirname "$0")/setup.sh"
source launch/lanes.sh

train() { # NAME WARM_START_SEED SEED [FLAG...]: a run named NAME-WARM_START_SEED-SEED
  local name=$1 dir="$WORKDIR/$1-$2-$3"
  [ -e "$dir/evaluation/curve.png" ] && return
  .venv/bin/python -m tto_jax.train --config="configs/$TASK.py:${name%%@*}" --workdir="$dir" \
    --config.variant="$name" --config.warm_start.cache="$WORKDIR" --config.warm_start.seed="$2" --config.seed="$3" "${@:4}"
  .venv/bin/python -m tto_jax.evaluate --workdir="$dir"
}
warm() { # WARM_START_SEED SEED: the warm start of the brpo run with these seeds, trained and evaluated
  local dir="$WORKDIR/brpo-$1-$2"
  [ -e "$WORKDIR/warm_start-$1/evaluation/curve.png" ] && return
  .venv/bin/python -m tto_jax.train --config="configs/$TASK.py:brpo" --workdir="$dir" --config.variant=brpo \
    --config.warm_start.cache="$WORKDIR" --config.warm_start.seed="$1" --config.seed="$2" --warm_start_only
  .venv/bin/python -m tto_jax.evaluate --workdir="$dir" --warm_start --out="$WORKDIR/warm_start-$1"
}
penalty() { train "grpo_length@$1" "$2" "$3" --config.credit.length_penalty="$1"; }

peak_results() { for w in 0 1 2; do for name in brpo grpo mrt; do train $name $w "$1"; done; done; }
peak_controls() {
  for w in 0 1 2; do
    for p in 0.2 0.5 1.0; do penalty $p $w "$1"; done
    for name in grpo_answers group; do train $name $w "$1"; done
  done
}
chain_results() {
  for name in brpo grpo mrt; do train $name "$1" "$1"; done
  for p in 0.2 0.5 1.0; do penalty $p "$1" "$1"; done
}

case "$TASK" in
  peak)
    lanes 'warm 0 0; warm 2 0' 'warm 1 0'
    lanes 'peak_results 0' 'peak_results 1'
    lanes 'peak_controls 0' 'peak_controls 1'
    ;;
  chain)
    lanes 'warm 0 0; chain_results 0' 'warm 1 1; chain_results 1'
    ;;
  *)
    echo "unknown task '$TASK': choose peak or chain" >&2
    exit 2
    ;;
esac
shopt -s nullglob
runs=()
for name in warm_start grpo grpo_length@0.2 grpo_length@0.5 grpo_length@1.0 grpo_answers group brpo mrt; do
  runs+=("$WORKDIR/$name"-?-? "$WORKDIR/$name"-?)
done
.venv/bin/python -m tto_jax.report --out="$WORKDIR" --baseline=grpo --target=brpo "${runs[@]}"
