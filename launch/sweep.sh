#!/usr/bin/env bash
# bash launch/sweep.sh --workdir=gs://BUCKET/SWEEP --grid=NAME=VALUE,VALUE... [--grid=...] [OPTION...] -- COMMAND...
# Every point of a grid of configuration overrides: one command a point, in turn. A point that fails does not stop the
# others. Given again, the sweep goes on where it stopped: a point resumes from its own workdir.
#
#   bash launch/sweep.sh --workdir=gs://my-bucket/sweep --grid=optimizer.learning_rate=1e-6,3e-6 --grid=seed=0,1,2 -- \
#     bash launch/queued_resource.sh run --name=pod --zone=us-west4-a --accelerator-type=v5litepod-64 \
#     --provisioning=spot -- train --config=configs/brpo_r1_qwen_1p5b_8k.py
# runs COMMAND --workdir=gs://my-bucket/sweep/optimizer.learning_rate=1e-6,seed=0 --config.optimizer.learning_rate=1e-6
# --config.seed=0 and five more. In COMMAND, {name} stands for a name of the point (--name=sweep: sweep-0, sweep-1),
# which workloads on GKE need. Several at a time: sweep.sh --dry-run ... | xargs -d '\n' -P 4 -I POINT bash -c POINT
#
#   --grid=NAME=VALUES   an override --config.NAME and its values; a comma within (), [], {} or quotes is part of a
#                        value. The name config is the configuration itself: --grid=config=configs/a.py,configs/b.py
#   --separator=,        another character between values, for values that hold a comma
#   --workdir            each point gets WORKDIR/NAME=VALUE,NAME=VALUE
#   --name=sweep         for {name}
#   --dry-run            print the commands, one a line, and run nothing
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse_options "workdir grid separator name" "" "$@"
: "${TTO_SEPARATOR:=,}" "${TTO_NAME:=sweep}"
require workdir
[[ $TTO_NAME =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] ||
  fail "--name=$TTO_NAME: lower-case letters, digits and hyphens, a letter first"
[ "${#TTO_SEPARATOR}" = 1 ] || fail "--separator=$TTO_SEPARATOR: one character"
[ "${#GRID_LIST[@]}" -gt 0 ] || fail "--grid is missing: give --grid=NAME=VALUE,VALUE"
[ "${#REST[@]}" -gt 0 ] || fail "no command: after -- comes what a point runs, such as python -m tto_jax.train"
for word in "${REST[@]}"; do
  [[ $word != --workdir* ]] ||
    fail "$word in the command: every point has a workdir of its own, give --workdir before --"
done

split() { # TEXT: sets VALUES, split at separators outside brackets and quotes
  local text=$1 depth=0 quoted='' value='' i char
  VALUES=()
  for ((i = 0; i < ${#text}; i++)); do
    char=${text:i:1}
    if [ "$char" = "$TTO_SEPARATOR" ] && [ "$depth" = 0 ] && [ -z "$quoted" ]; then
      VALUES+=("$value")
      value=''
      continue
    fi
    value+=$char
    if [ -n "$quoted" ]; then
      [ "$char" != "$quoted" ] || quoted=''
      continue
    fi
    case "$char" in
      \( | \[ | \{) depth=$((depth + 1)) ;;
      \) | \] | \}) depth=$((depth - 1)) ;;
      \' | \") quoted=$char ;;
    esac
  done
  [ "$depth" = 0 ] && [ -z "$quoted" ] || fail "--grid: a bracket or quote in '$text' is not closed"
  VALUES+=("$value")
}

# The grid, first axis outermost: the folder of each point, and its flags, each ended by END.
END=$'\x1f'
folders=('')
flags=('')
for axis in "${GRID_LIST[@]}"; do
  name=${axis%%=*}
  [[ $axis == *=* ]] && [[ $name =~ ^[A-Za-z_][A-Za-z0-9_.]*$ ]] || fail "--grid=$axis: give NAME=VALUE,VALUE"
  split "${axis#*=}"
  if [ "$name" = config ]; then flag=--config; else flag=--config.$name; fi
  next_folders=()
  next_flags=()
  for i in "${!folders[@]}"; do
    for value in "${VALUES[@]}"; do
      [ -n "$value" ] || fail "--grid=$axis has an empty value"
      next_folders+=("${folders[i]:+${folders[i]},}$name=${value//[^A-Za-z0-9._+-]/_}")
      next_flags+=("${flags[i]}$flag=$value$END")
    done
  done
  folders=("${next_folders[@]}")
  flags=("${next_flags[@]}")
done
twice=$(printf '%s\n' "${folders[@]}" | sort | uniq -d | head -n 1)
[ -z "$twice" ] ||
  fail "two points would share the workdir $twice: their values differ in special characters only, or not at all"

failed=()
for i in "${!folders[@]}"; do
  mapfile -t -d "$END" overrides < <(printf '%s' "${flags[i]}")
  perform "${REST[@]//'{name}'/$TTO_NAME-$i}" "--workdir=${TTO_WORKDIR%/}/${folders[i]}" "${overrides[@]}" ||
    failed+=("${folders[i]}")
done
if [ "${#failed[@]}" -gt 0 ]; then
  note "${#failed[@]} of ${#folders[@]} points failed: ${failed[*]}"
  exit 1
fi
