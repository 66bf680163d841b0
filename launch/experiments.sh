#!/usr/bin/env bash
# bash launch/experiments.sh peak|chain [WORKDIR]: MRT beside BRPO and their baselines, five seeds each. Seed k has a warm
# start of its own, from which all variants go on, with the same evaluation problems; only last checkpoints are evaluated.
# Runs that are done are skipped, others resumed: a second call goes on where the first one stopped. A processor runs one
# at a time. VARIANTS and SEEDS choose some of them.
set -euo pipefail
TASK=${1:?give a task: peak or chain}
case "${2:-}" in
  /* | *://*) WORKDIR=$2 ;;
  *) WORKDIR=$PWD/${2:-runs/experiments_$TASK} ;;
esac
case "$TASK" in
  peak | chain) ;;
  *)
    echo "unknown task '$TASK': choose peak or chain" >&2
    exit 2
    ;;
esac
read -ra variants <<<"${VARIANTS:-grpo mrt_online brpo mrt_star star progress_gae_0 progress_gae_half progress_gae_1 \
  grpo_length mrt_termination brpo_linear brpo_base}"
read -ra seeds <<<"${SEEDS:-0 1 2 3 4}"
# shellcheck source=launch/setup.sh
source "$(dirname "$0")/setup.sh"
mkdir -p "$WORKDIR"

run() { # NAME SEED: trains and evaluates the variant, or the warm start
  local name=$1 seed=$2 dir="$WORKDIR/$1-$2-$2" method
  [ "$name" != warm_start ] || dir="$WORKDIR/warm_start-$seed"
  [ ! -e "$dir/evaluation/curve.png" ] || return 0
  [ -z "${SLOT:-}" ] || taskset -cp "$SLOT" "$BASHPID" >/dev/null 2>&1 || true # one thread each is faster than shared ones
  local options=(--config.seed="$seed" --config.warm_start.seed="$seed" --config.warm_start.cache="$WORKDIR")
  case "$name" in
    warm_start)
      .venv/bin/python -m tto_jax.train --config="configs/$TASK.py:grpo" --workdir="$WORKDIR/grpo-$seed-$seed" \
        "${options[@]}" --warm_start_only &&
        .venv/bin/python -m tto_jax.evaluate --workdir="$WORKDIR/grpo-$seed-$seed" --warm_start --out="$dir"
      return
      ;;
    mrt_star | star)
      method=$([ "$name" = star ] && echo plain || echo mrt)
      .venv/bin/python -m tto_jax.star --config="configs/star.py:$TASK,$method" --workdir="$dir" "${options[@]}" || return
      ;;
    *) .venv/bin/python -m tto_jax.train --config="configs/$TASK.py:$name" --workdir="$dir" "${options[@]}" || return ;;
  esac
  .venv/bin/python -m tto_jax.evaluate --workdir="$dir"
}
logged() { # NAME SEED
  local log="$WORKDIR/$1-$2.log"
  if run "$@" >"$log" 2>&1; then
    echo "done: $1, seed $2"
  else
    tail -n 5 "$log"
    return 1
  fi
}
export -f run logged
export TASK WORKDIR

# shellcheck disable=SC2016 # it is bash that expands them
for name in warm_start "${variants[@]}"; do
  for seed in "${seeds[@]}"; do echo "$name $seed"; done
done | xargs -P "$(getconf _NPROCESSORS_ONLN)" -n 2 --process-slot-var=SLOT bash -euo pipefail -c 'logged "$@"' bash

# The report is about all runs that are there, of earlier calls, too.
folders=() baseline=()
for folder in "$WORKDIR"/warm_start-? "$WORKDIR"/*-?-?; do
  [ -e "$folder/evaluation/curve.png" ] || continue
  folders+=("$folder")
  [[ $folder != */grpo-?-? ]] || baseline=(--baseline=grpo)
done
.venv/bin/python -m tto_jax.report --out="$WORKDIR" "${baseline[@]}" "${folders[@]}"
