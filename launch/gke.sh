#!/usr/bin/env bash
# bash launch/gke.sh build|run|status|logs|delete [OPTION...] [-- PAGE FLAG...]
# On a GKE cluster made by xpk (`xpk cluster create`), whose queue starts the workload when there is room.
#
#   build   the image of a commit of this checkout, pushed as IMAGE:COMMIT
#             bash launch/gke.sh build --image=us-docker.pkg.dev/my-project/images/tto_jax
#   run     hands PAGE over as an xpk workload. The cluster starts it again, with the same arguments, at most --retries
#           times: after a preemption, and after any exit code but 0.
#             bash launch/gke.sh run --name=brpo --cluster=pods --zone=us-east5-b --tpu-type=v6e-16 \
#               --image=us-docker.pkg.dev/my-project/images/tto_jax -- \
#               train --config=configs/brpo_r1_qwen_1p5b_8k.py --workdir=gs://my-bucket/runs/brpo
#   status  the workload's line in the queue
#   logs    the last --lines=100 of worker 0 of slice 0 (--worker=all: of all); --follow
#   delete  the workload; the cluster stays, and costs
#
# Options (also as environment variables, TTO_ZONE for --zone; a switch: TTO_FOLLOW=1)
#   --name                             the workload: lower-case letters, digits and hyphens, at most 40
#   --cluster --zone --project         the cluster; the project is gcloud's own by default
#   --tpu-type                         run: v5litepod-N, v5p-N, v6e-N, v4-N or tpu7x-N, as the cluster has them
#   --num-slices=1                     run
#   --image                            build, run: without a tag, the commit is the tag; run also takes IMAGE:TAG
#   --provisioning                     run, on a cluster with autoprovisioning: spot, on-demand or reserved
#   --reservation                      run: the reservation's name, with --provisioning=reserved
#   --priority=medium                  run: very-low, low, medium, high or very-high
#   --grace=60                         run: seconds a pod has between SIGTERM and SIGKILL
#   --ref=HEAD                         build, run: the commit; HEAD must have no uncommitted changes
#   --exclude-newer=DATE               build: package versions as of this date; by default the commit's own; none: the
#                                      newest
#   --extras=tpu                       build: extras of the package, such as tpu,logging
#   --env=NAME=VALUE                   run: environment of the page, any number of times
#   --retries=20                       run
#   --allow-local-workdir              run: a --workdir that is no bucket
#   --dry-run                          print the commands, one a line, and run nothing
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

command=${1:-}
require_subcommand "$command" build run status logs delete
shift
parse_options "name cluster zone project tpu_type num_slices image provisioning reservation priority grace ref \
  exclude_newer extras env retries worker lines" "allow_local_workdir follow" "$@"
: "${TTO_NUM_SLICES:=1}" "${TTO_PRIORITY:=medium}" "${TTO_GRACE:=60}" "${TTO_EXTRAS:=tpu}" "${TTO_RETRIES:=20}"
: "${TTO_WORKER:=0}" "${TTO_LINES:=100}"
require_number num_slices 1
require_number grace 0
require_number retries 0
require_number lines 1
require_choice priority very-low low medium high very-high
require_choice worker 0 all
require_env
if [ "$command" != build ]; then
  require name cluster
  require_zone
  [[ $TTO_NAME =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    fail "--name=$TTO_NAME: lower-case letters, digits and hyphens, a letter first, at most 40"
fi
where=("--cluster=${TTO_CLUSTER:-}" "--zone=${TTO_ZONE:-}")
[ -z "${TTO_PROJECT:-}" ] || where+=("--project=$TTO_PROJECT")

# shellcheck disable=SC2153 # the commands that call it require it
has_tag() { [[ ${TTO_IMAGE##*/} == *[:@]* ]]; }

build() {
  local context=${ARCHIVE%.tar.gz}
  make_archive
  perform mkdir -p "$context"
  perform tar -xzf "$ARCHIVE" -C "$context"
  perform docker build "--file=$context/launch/Dockerfile" "--build-arg=COMMIT=$COMMIT" \
    "--build-arg=EXCLUDE_NEWER=$EXCLUDE_NEWER" "--build-arg=EXTRAS=$TTO_EXTRAS" "--tag=$TTO_IMAGE:$SHORT" "$context"
  perform docker push "$TTO_IMAGE:$SHORT"
}

capacity() { # sets capacity_options
  capacity_options=()
  [ -n "${TTO_PROVISIONING:-}" ] || return 0
  require_choice provisioning spot on-demand reserved
  if [ "$TTO_PROVISIONING" = reserved ]; then
    require reservation
    capacity_options=("--reservation=$TTO_RESERVATION")
  else
    capacity_options=("--$TTO_PROVISIONING")
  fi
}

page_command() { # what the container runs; exec: xpk's SIGTERM comes to worker.sh, not to a shell around it
  local words
  words=$(quote exec bash /opt/tto_jax/launch/worker.sh run "${ENV_LIST[@]/#/--env=}" -- "${REST[@]}")
  [[ $words != *$'\n'* ]] || fail "a line break in an argument: xpk writes the command into YAML, where it can't stand"
  # Kubernetes replaces $(NAME) in a container's command, and reads $$ as $.
  printf '%s\n' "${words//'$'/'$$'}"
}

run() {
  local image=$TTO_IMAGE words
  words=$(page_command)
  if ! has_tag; then
    resolve_commit
    image=$TTO_IMAGE:$SHORT
  fi
  # By default xpk starts a workload again after exit code 42 or 127 to 255 only: a Python error is 1.
  perform xpk workload create "--workload=$TTO_NAME" "${where[@]}" "--tpu-type=$TTO_TPU_TYPE" \
    "--num-slices=$TTO_NUM_SLICES" "--docker-image=$image" "${capacity_options[@]}" "--priority=$TTO_PRIORITY" \
    "--max-restarts=$TTO_RETRIES" --restart-on-exit-codes=1-126 "--termination-grace-period-seconds=$TTO_GRACE" \
    "--command=$words"
}

logs() {
  local project=() selector="jobset.sigs.k8s.io/jobset-name=$TTO_NAME" follow=()
  [ -z "${TTO_PROJECT:-}" ] || project=("--project=$TTO_PROJECT")
  [ "$TTO_WORKER" = all ] || selector+=,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0
  [ -z "${TTO_FOLLOW:-}" ] || follow=(--follow)
  perform gcloud container clusters get-credentials "$TTO_CLUSTER" "--location=${TTO_ZONE%-*}" "${project[@]}"
  perform kubectl logs --namespace=default "--selector=$selector" "--tail=$TTO_LINES" --prefix \
    --max-log-requests=1000 "${follow[@]}"
}

case "$command" in
  build)
    require image
    ! has_tag || fail "--image=$TTO_IMAGE has a tag: leave it out, the commit becomes the tag"
    resolve_commit
    build
    ;;
  run)
    require tpu_type image
    [[ $TTO_TPU_TYPE =~ ^(v5litepod|v5p|v6e|v4|tpu7x)-[1-9][0-9]*$ ]] ||
      fail "--tpu-type=$TTO_TPU_TYPE: choose v5litepod-N, v5p-N, v6e-N, v4-N or tpu7x-N"
    capacity
    require_page
    run
    ;;
  status) perform xpk workload list "${where[@]}" "--filter-by-job=$TTO_NAME" ;;
  logs) logs ;;
  delete) perform xpk workload delete "${where[@]}" "--workload=$TTO_NAME" --force ;;
esac
