#!/usr/bin/env bash
# bash launch/queued_resource.sh create|status|logs|run|stop|delete --name=NAME --zone=ZONE [OPTION...] [-- PAGE...]
# TPU VMs that Google Cloud hands out from a queue: on demand, spot or reserved, one slice or several.
#
#   create  asks for the machines: --accelerator-type and --provisioning. They come when there is room.
#   status  the state: WAITING_FOR_RESOURCES, PROVISIONING, ACTIVE, SUSPENDED (taken away), FAILED
#   run     everything, until PAGE has ended: asks for the machines if nobody has, waits for them, copies and installs
#           the commit, starts PAGE on all workers, shows the log. Machines that were taken away are asked for again,
#           and PAGE goes on with the same arguments, so from the last checkpoint of the same workdir.
#             bash launch/queued_resource.sh run --name=brpo --zone=us-west4-a --accelerator-type=v5litepod-64 \
#               --provisioning=spot --retries=50 --delete-when-done -- \
#               train --config=configs/brpo_r1_qwen_1p5b_8k.py --workdir=gs://my-bucket/runs/brpo
#           The page lives on the workers: after a lost connection or Ctrl-C here the same command attaches to it.
#   stop    SIGTERM to the page (it saves its last step), SIGKILL after --grace=60 seconds. The machines stay, and cost.
#   logs    the last --lines=100 of worker 0 of slice 0 (--worker=all --node=all: of all); --follow
#   delete  the machines and the request. Without it both stay, and cost.
#
# Options (also as environment variables, TTO_ZONE for --zone; a switch: TTO_INTERNAL_IP=1)
#   --name --zone --project            the request; the project is gcloud's own by default
#   --accelerator-type                 create, run: v5litepod-N, v5p-N, v6e-N or v4-N. N counts chips for v5litepod and
#                                      v6e, and cores, two a chip, for v4 and v5p: v5p:4x4x4 is v5p-128
#   --provisioning                     create, run: spot, on-demand or reserved
#   --node-count=1                     slices (multislice)
#   --runtime-version                  by default what belongs to the accelerator type
#   --valid-until-duration=6h          give up on machines that have not come by then; by default never
#   --create-arg=ARG                   one more argument for gcloud's create, such as --network=..., any number of times
#   --delete-when-done                 run: delete the machines after the page has ended by itself
#   --worker=all --node=all            run, stop: all workers of all slices, or one number each
#   --internal-ip                      ssh to the internal addresses
#   --ref=HEAD                         run: the commit that runs; HEAD must have no uncommitted changes
#   --exclude-newer=DATE               package versions as of this date; by default the commit's own; none: the newest
#   --extras=tpu                       extras of the package, such as tpu,logging
#   --stage=gs://BUCKET/PATH           run: hand the code over through a bucket, for many workers
#   --env=NAME=VALUE                   run: environment of the page, any number of times
#   --retries=20 --retry-delay=30      run: how often to start again, for whatever reason, and after how many seconds
#   --poll=60                          run: seconds between two looks at the queue
#   --allow-local-workdir              run: a --workdir that is no bucket
#   --dry-run                          print the commands, one a line, and run nothing
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

command=${1:-}
require_subcommand "$command" create status logs run stop delete
shift
parse_options "name zone project accelerator_type provisioning node_count runtime_version valid_until_duration \
  create_arg worker node ref exclude_newer extras stage env retries retry_delay poll grace lines" \
  "delete_when_done internal_ip allow_local_workdir follow" "$@"
: "${TTO_NODE_COUNT:=1}" "${TTO_RETRIES:=20}" "${TTO_RETRY_DELAY:=30}" "${TTO_POLL:=60}"
: "${TTO_GRACE:=60}" "${TTO_LINES:=100}"
if [ "$command" = logs ]; then
  : "${TTO_WORKER:=0}" "${TTO_NODE:=0}"
else
  : "${TTO_WORKER:=all}" "${TTO_NODE:=all}"
fi
require name
require_zone
# shellcheck disable=SC2153 # `require` has seen to it
[[ $TTO_NAME =~ ^[a-z]([a-z0-9-]{0,58}[a-z0-9])?$ ]] ||
  fail "--name=$TTO_NAME: lower-case letters, digits and hyphens, a letter first, at most 60"
[[ $TTO_WORKER =~ ^(all|[0-9]+)$ ]] || fail "--worker=$TTO_WORKER: choose all or a number"
[[ $TTO_NODE =~ ^(all|[0-9]+)$ ]] || fail "--node=$TTO_NODE: choose all or a number"
require_number node_count 1
require_number retries 0
require_number retry_delay 0
require_number poll 0
require_number grace 0
require_number lines 1
require_env
where=("--zone=$TTO_ZONE")
[ -z "${TTO_PROJECT:-}" ] || where+=("--project=$TTO_PROJECT")
workers=("--worker=$TTO_WORKER" "--node=$TTO_NODE")
[ -z "${TTO_INTERNAL_IP:-}" ] || workers+=(--internal-ip)

remote() { # COMMAND
  perform gcloud compute tpus queued-resources ssh "$TTO_NAME" "${where[@]}" "${workers[@]}" --quiet "--command=$1"
}

copy_to_workers() { # FILE NAME
  perform gcloud compute tpus queued-resources scp "$1" "$TTO_NAME:$2" "${where[@]}" "${workers[@]}" --quiet
}

machine_options() { # sets create_options from the options, or refuses them
  require accelerator_type provisioning
  require_choice provisioning spot on-demand reserved
  local runtime
  case "$TTO_ACCELERATOR_TYPE" in
    v5litepod-[1-9]*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-[1-9]*) runtime=v2-alpha-tpuv5 ;;
    v6e-[1-9]*) runtime=v2-alpha-tpuv6e ;;
    v4-[1-9]*) runtime=tpu-ubuntu2204-base ;;
    v5e*) fail "--accelerator-type=$TTO_ACCELERATOR_TYPE: Google Cloud calls v5e v5litepod, as in v5litepod-64" ;;
    tpu7x*) fail "--accelerator-type=$TTO_ACCELERATOR_TYPE: this type comes through GKE only, see gke.sh" ;;
    *) fail "--accelerator-type=$TTO_ACCELERATOR_TYPE: choose v5litepod-N, v5p-N, v6e-N or v4-N" ;;
  esac
  [[ ${TTO_ACCELERATOR_TYPE##*-} =~ ^[0-9]+$ ]] || fail "--accelerator-type=$TTO_ACCELERATOR_TYPE ends in no number"
  create_options=("--accelerator-type=$TTO_ACCELERATOR_TYPE" "--runtime-version=${TTO_RUNTIME_VERSION:-$runtime}")
  if [ "$TTO_NODE_COUNT" -gt 1 ]; then
    create_options+=("--node-count=$TTO_NODE_COUNT" "--node-prefix=$TTO_NAME")
  else # gcloud refuses a count of 1
    create_options+=("--node-id=$TTO_NAME")
  fi
  case "$TTO_PROVISIONING" in
    spot) create_options+=(--spot) ;;
    reserved) create_options+=(--reserved) ;;
  esac
  [ -z "${TTO_VALID_UNTIL_DURATION:-}" ] || create_options+=("--valid-until-duration=$TTO_VALID_UNTIL_DURATION")
  create_options+=("${CREATE_ARG_LIST[@]}")
}

create() {
  perform gcloud compute tpus queued-resources create "$TTO_NAME" "${where[@]}" "${create_options[@]}" --quiet
}

delete() { perform gcloud compute tpus queued-resources delete "$TTO_NAME" "${where[@]}" --force --quiet; }

describe() { perform gcloud compute tpus queued-resources describe "$TTO_NAME" "${where[@]}" "$@"; }

read_state() { # prints the state, ABSENT if there is no such request, UNKNOWN if gcloud can't say
  local state errors
  errors=$(mktemp)
  if state=$(describe '--format=value(state.state)' 2>"$errors") && [ -n "$state" ]; then
    printf '%s\n' "$state"
  elif grep -qi -e NOT_FOUND -e 'not found' "$errors"; then
    printf 'ABSENT\n'
  else
    tail -n 1 "$errors" >&2
    printf 'UNKNOWN\n'
  fi
  rm -f "$errors"
}

EXPECTED='' # the request is there, as far as we know: if it is not, somebody has deleted it

wait_for_machines() { # asks for them if need be, once
  local state again='' unknown=0
  if [ -n "${TTO_DRY_RUN:-}" ]; then
    create
    describe '--format=value(state.state)'
    return
  fi
  while :; do
    state=$(read_state)
    case "$state" in
      ACTIVE)
        EXPECTED=1
        return 0
        ;;
      ABSENT)
        if [ -n "$EXPECTED" ]; then
          note "somebody has deleted the request: not asked for again"
          return "$STOPPED"
        fi
        create || return
        again=1 EXPECTED=1
        ;;
      SUSPENDED | FAILED) # taken away, or never given
        note "the request is $state; 'status' says why"
        [ -z "$again" ] || return 75
        delete || return
        again=1 EXPECTED=''
        continue
        ;;
      UNKNOWN)
        unknown=$((unknown + 1))
        [ "$unknown" -lt 5 ] || return 75
        ;;
      *) EXPECTED=1 ;;
    esac
    note "$TTO_NAME: $state"
    sleep "$TTO_POLL"
  done
}

prepare() {
  wait_for_machines && put_code
}

confirm() { # the page ended well: its own end, or the machines'?
  local state
  if [ -n "${TTO_DRY_RUN:-}" ]; then
    describe '--format=value(state.state)'
    return
  fi
  state=$(read_state)
  case "$state" in
    ACTIVE | UNKNOWN) return 0 ;;
  esac
  note "the request is $state"
  return 75
}

case "$command" in
  create)
    machine_options
    create
    ;;
  status) describe ;;
  logs) show_logs ;;
  run)
    machine_options
    require_page
    resolve_commit
    status=0
    run_with_retries || status=$?
    if [ "$status" = 0 ] && [ -n "${TTO_DELETE_WHEN_DONE:-}" ]; then
      delete
    elif [ -z "${TTO_DRY_RUN:-}" ]; then
      note "the machines stay, and cost, until: bash launch/queued_resource.sh delete --name=$TTO_NAME --zone=$TTO_ZONE"
    fi
    exit "$status"
    ;;
  stop) stop_run ;;
  delete) delete ;;
esac
