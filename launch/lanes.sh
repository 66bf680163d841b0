# Sourced: `lanes 'COMMANDS' 'COMMANDS'` runs two lists of shell commands at once, each on its own half of the processors.
# Small programs gain little from a second thread; two of them side by side do. With one processor they run in turn.
lanes() {
  local cpus half failed=0 pids=()
  cpus=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
  half=$((cpus / 2))
  if [ "$half" -lt 1 ]; then
    for commands in "$@"; do
      (set -euo pipefail; eval "$commands") || return 1
    done
    return
  fi
  local i=0
  for commands in "$@"; do
    (
      set -euo pipefail
      command -v taskset >/dev/null && taskset -cp "$((i * half))-$((i * half + half - 1))" "$BASHPID" >/dev/null 2>&1 || true
      eval "$commands"
    ) &
    pids+=($!)
    i=$((i + 1))
  done
  for pid in "${pids[@]}"; do
    wait "$pid" || failed=1
  done
  return "$failed"
}
