#!/usr/bin/env bash
# bash launch/tpu_vm.sh setup|run|stop|logs --name=TPU --zone=ZONE [OPTION...] [-- PAGE FLAG...]
# On a TPU VM that exists already, one host or many. This script does not create, delete or bring back the machine: for
# that, for spot machines and for several slices see queued_resource.sh.
#
#   setup   copies a commit of this checkout to all workers and installs it there
#   run     starts PAGE on all workers, shows the log, starts it again with the same arguments if it ends too early
#             bash launch/tpu_vm.sh run --name=my-tpu --zone=us-east5-b -- \
#               train --config=configs/brpo_r1_qwen_1p5b_8k.py --workdir=gs://my-bucket/runs/brpo
#           It lives on the workers: after a lost connection or Ctrl-C here the same command attaches to it.
#   stop    SIGTERM (the run saves its last step), SIGKILL after --grace=60 seconds
#   logs    the last --lines=100 of worker 0 (--worker=all: of all); --follow
#
# Options (also as environment variables, TTO_ZONE for --zone; a switch: TTO_INTERNAL_IP=1)
#   --name --zone --project            the TPU VM; the project is gcloud's own by default
#   --worker=all                       setup, run, stop: all, or one number for a page that needs one process
#   --internal-ip                      ssh to the internal addresses
#   --ref=HEAD                         the commit that runs; HEAD must have no uncommitted changes
#   --exclude-newer=DATE               package versions as of this date; by default the commit's own; none: the newest
#   --extras=tpu                       extras of the package, such as tpu,logging
#   --stage=gs://BUCKET/PATH           setup: hand the code over through a bucket, for many workers
#   --env=NAME=VALUE                   run: environment of the page, any number of times
#   --retries=10 --retry-delay=30      run: how often to start again, and after how many seconds
#   --allow-local-workdir              run: a --workdir that is no bucket
#   --dry-run                          print the commands, one a line, and run nothing
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

command=${1:-}
require_subcommand "$command" setup run stop logs
shift
parse_options "name zone project worker ref exclude_newer extras stage env retries retry_delay grace lines" \
  "internal_ip allow_local_workdir follow" "$@"
: "${TTO_RETRIES:=10}" "${TTO_RETRY_DELAY:=30}" "${TTO_GRACE:=60}" "${TTO_LINES:=100}"
if [ "$command" = logs ]; then : "${TTO_WORKER:=0}"; else : "${TTO_WORKER:=all}"; fi
require name
require_zone
[[ $TTO_WORKER =~ ^(all|[0-9]+)$ ]] || fail "--worker=$TTO_WORKER: choose all or a number"
require_number retries 0
require_number retry_delay 0
require_number grace 0
require_number lines 1
require_env
where=("--zone=$TTO_ZONE")
[ -z "${TTO_PROJECT:-}" ] || where+=("--project=$TTO_PROJECT")
workers=("--worker=$TTO_WORKER")
[ -z "${TTO_INTERNAL_IP:-}" ] || workers+=(--internal-ip)

remote() { # COMMAND
  perform gcloud compute tpus tpu-vm ssh "$TTO_NAME" "${where[@]}" "${workers[@]}" --quiet "--command=$1"
}

copy_to_workers() { # FILE NAME
  perform gcloud compute tpus tpu-vm scp "$1" "$TTO_NAME:$2" "${where[@]}" "${workers[@]}" --quiet
}

state_of() { perform gcloud compute tpus tpu-vm describe "$TTO_NAME" "${where[@]}" '--format=value(state)'; }

prepare() {
  local state
  if [ -n "${TTO_DRY_RUN:-}" ]; then
    state_of
    return
  fi
  state=$(state_of) || return
  case "$state" in
    READY) return 0 ;;
    PREEMPTED | TERMINATED | STOPPED)
      note "the TPU VM is $state and does not come back by itself: make it anew, set it up and give the same command," \
        "or use queued_resource.sh, which does so"
      return "$REFUSED"
      ;;
  esac
  note "the TPU VM is $state"
  return 75
}

confirm() { prepare; } # the page ended well: its own end, or the machine's?

case "$command" in
  setup)
    resolve_commit
    put_code
    ;;
  run)
    require_page
    resolve_commit
    run_with_retries
    ;;
  stop) stop_run ;;
  logs) show_logs ;;
esac
