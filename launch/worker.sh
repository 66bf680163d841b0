#!/usr/bin/env bash
# bash launch/worker.sh setup|run|start|wait|stop|logs [OPTION...] [-- PAGE FLAG...]
# On a worker (a TPU VM, a container): installs this checkout, and runs a page of tto_jax. The launchers call it.
#
#   setup   .venv beside this folder, with the package and its extras, by uv (fetched if it is missing); Python 3.11 to
#           3.13 of the system, or one that uv brings. Nothing is done twice.
#           --commit=ID --exclude-newer=DATE (take no package version younger than that; none: no limit) --extras=tpu
#   run     PAGE in the foreground (containers). SIGTERM goes to the page, which saves its last step and ends.
#   start   PAGE in the background: it outlives this connection. If this very command runs already: done.
#   wait    prints the log of the background run until it ends, and ends with its exit code
#   stop    SIGTERM to the background run, SIGKILL after --grace=60 seconds
#   logs    the last --lines=100 of the log [--follow]
#
# run and start take --env=NAME=VALUE, any number of times. --dry-run prints the commands of setup and run.
# Exit codes: the page's, 143 if SIGTERM stopped it (run again: it resumes); 130 after `stop`; 137 if the run was
# killed; 64 if what was asked can't work. Files of the background run: TTO_RUN_DIR, by default ~/tto_jax/run.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

RUN_DIR=${TTO_RUN_DIR:-$HOME/tto_jax/run}
PRINT_LINES_OF_OLD_LOG=100

find_uv() {
  local candidate
  for candidate in "$(command -v uv || true)" "$HOME/.local/bin/uv"; do
    if [ -x "$candidate" ]; then
      UV=$candidate
      return
    fi
  done
  perform sh -c 'curl -LsSf https://astral.sh/uv/install.sh | sh'
  UV=$HOME/.local/bin/uv
}

setup_worker() {
  local wanted="$TTO_COMMIT $TTO_EXTRAS $TTO_EXCLUDE_NEWER" limit=()
  if [ -f .venv/installed ] && [ "$(<.venv/installed)" = "$wanted" ]; then
    note "installed already: $wanted"
    return
  fi
  [ "$TTO_EXCLUDE_NEWER" = none ] || limit=("--exclude-newer=$TTO_EXCLUDE_NEWER")
  find_uv
  perform rm -rf .venv
  perform "$UV" venv --quiet '--python=>=3.11,<3.14' .venv
  perform "$UV" pip install --quiet --python=.venv/bin/python "${limit[@]}" ".[$TTO_EXTRAS]"
  perform .venv/bin/python -c 'import jax, tto_jax; print("jax", jax.__version__)'
  [ -n "${TTO_DRY_RUN:-}" ] || printf '%s\n' "$wanted" >.venv/installed
}

installed_commit() { sed -n 's/ .*//p' .venv/installed 2>/dev/null || true; }

run_page() { # the page in the foreground; returns its exit code
  local child='' status term_came=0 interrupted pair
  for pair in "${ENV_LIST[@]}"; do
    export "${pair?}"
  done
  TTO_COMMIT=$(installed_commit)
  export TTO_COMMIT
  trap 'term_came=1; interrupted=1; kill -TERM "$child" 2>/dev/null || true' TERM INT
  .venv/bin/python -m "tto_jax.${REST[0]}" "${REST[@]:1}" &
  child=$!
  [ "$term_came" = 0 ] || kill -TERM "$child" # it came before there was a child
  while :; do # a trapped signal ends `wait`, not the page
    interrupted=0
    status=0
    wait "$child" || status=$?
    [ "$interrupted" = 1 ] || break
  done
  trap - TERM INT
  if [ -n "${TTO_RECORD:-}" ]; then
    [ ! -e "$RUN_DIR/stop_requested" ] || status=$STOPPED
    printf '%s\n' "$status" >"$RUN_DIR/exit"
  fi
  return "$status"
}

# The background run: pid, command, log and, when it has ended, exit.

run_pid() { # prints the pid of the run if it is alive
  local pid
  pid=$(cat "$RUN_DIR/pid" 2>/dev/null) || return 1
  # After a reboot the number can belong to something else.
  kill -0 "$pid" 2>/dev/null && tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null | grep -q worker.sh || return 1
  printf '%s\n' "$pid"
}

start_page() {
  local command pid
  command=$(quote "$PWD" "${ENV_LIST[@]}" -- "${REST[@]}")
  mkdir -p "$RUN_DIR"
  if pid=$(run_pid); then
    [ "$command" = "$(cat "$RUN_DIR/command")" ] ||
      fail "another run is going on here (pid $pid): $(cat "$RUN_DIR/command"). Stop it first"
    note "runs already (pid $pid)"
    return
  fi
  rm -f "$RUN_DIR/exit" "$RUN_DIR/stop_requested"
  printf '%s\n' "$command" >"$RUN_DIR/command"
  printf '\n== %s %s\n' "$(date -u +%FT%TZ)" "$command" >>"$RUN_DIR/log"
  setsid bash launch/worker.sh run --record "${ENV_LIST[@]/#/--env=}" -- "${REST[@]}" </dev/null >>"$RUN_DIR/log" 2>&1 &
  printf '%s\n' "$!" >"$RUN_DIR/pid"
  note "started (pid $!), log in $RUN_DIR/log"
}

wait_for_page() {
  local pid
  [ -e "$RUN_DIR/command" ] || fail "nothing was started on this worker"
  if pid=$(run_pid); then
    tail -n "$PRINT_LINES_OF_OLD_LOG" -s 0.5 --pid="$pid" -f "$RUN_DIR/log"
  else
    tail -n "$PRINT_LINES_OF_OLD_LOG" "$RUN_DIR/log"
  fi
  if [ -e "$RUN_DIR/exit" ]; then
    return "$(<"$RUN_DIR/exit")"
  fi
  [ ! -e "$RUN_DIR/stop_requested" ] || return "$STOPPED"
  note "the run was killed, or the machine started anew"
  return 137
}

stop_page() {
  local pid deadline=$((SECONDS + TTO_GRACE))
  if ! pid=$(run_pid); then
    note "nothing runs"
    return
  fi
  touch "$RUN_DIR/stop_requested"
  kill -TERM "$pid"
  while run_pid >/dev/null; do
    if [ "$SECONDS" -ge "$deadline" ]; then
      note "still there after $TTO_GRACE s: killed"
      kill -KILL -- "-$pid" 2>/dev/null || true
      break
    fi
    sleep 0.2
  done
}

show_log() {
  local follow=()
  [ -z "${TTO_FOLLOW:-}" ] || follow=(-f)
  [ -e "$RUN_DIR/log" ] || fail "no log at $RUN_DIR/log: nothing was started on this worker"
  tail -n "$TTO_LINES" "${follow[@]}" "$RUN_DIR/log"
}

command=${1:-}
require_subcommand "$command" setup run start wait stop logs
shift
case "$command" in
  setup)
    parse_options "commit exclude_newer extras" "" "$@"
    : "${TTO_COMMIT:=unknown}" "${TTO_EXCLUDE_NEWER:=none}" "${TTO_EXTRAS:=tpu}"
    setup_worker
    ;;
  run | start)
    parse_options "env" "record" "$@"
    TTO_ALLOW_LOCAL_WORKDIR=1 # the launcher has checked it
    require_env
    require_page
    [ -n "${TTO_DRY_RUN:-}" ] || [ -x .venv/bin/python ] || fail "no .venv in $PWD: run setup first"
    if [ -n "${TTO_DRY_RUN:-}" ]; then
      perform env "${ENV_LIST[@]}" .venv/bin/python -m "tto_jax.${REST[0]}" "${REST[@]:1}"
    elif [ "$command" = start ]; then
      start_page
    else
      run_page
    fi
    ;;
  wait)
    parse_options "" "" "$@"
    wait_for_page
    ;;
  stop)
    parse_options "grace" "" "$@"
    : "${TTO_GRACE:=60}"
    require_number grace 0
    stop_page
    ;;
  logs)
    parse_options "lines" "follow" "$@"
    : "${TTO_LINES:=100}"
    require_number lines 1
    show_log
    ;;
esac
