# shellcheck shell=bash
# Sourced by tpu_vm.sh, queued_resource.sh, gke.sh, worker.sh and sweep.sh: options, quoting, dry runs, the commit that
# runs, and the loop that starts a run again. An option --some-name=value can also be given as TTO_SOME_NAME.
if [ "${BASH_VERSINFO[0]}" -lt 4 ] || { [ "${BASH_VERSINFO[0]}" -eq 4 ] && [ "${BASH_VERSINFO[1]}" -lt 4 ]; }; then
  echo "bash $BASH_VERSION is too old: 4.4 or newer is needed (macOS: brew install bash)" >&2
  exit 64
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

REFUSED=64  # what was asked can't work: never tried again
STOPPED=130 # an operator ended the run: not started again
PAGES=(train evaluate convert prepare_data compile_tpu report bench)
# What options that can be given more than once were given, and what follows --.
# shellcheck disable=SC2034
ENV_LIST=() GRID_LIST=() CREATE_ARG_LIST=() REST=()

note() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

fail() { # MESSAGE: refuse, before any work
  note "$*"
  exit "$REFUSED"
}

usage() { # the comment at the head of the script
  sed -n '2,/^set -euo/s/^# \{0,1\}//p' "$0"
}

quote() { # WORD...: the words as the shell reads them back, on one line
  local LC_ALL=C word out=()
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then
      out+=("$word")
    else
      out+=("'${word//"'"/"'\"'\"'"}'")
    fi
  done
  printf '%s\n' "${out[*]}"
}

perform() { # COMMAND...: run it; in a dry run, print it
  if [ -n "${TTO_DRY_RUN:-}" ]; then
    quote "$@"
  else
    printf '+ %s\n' "$(quote "$@")" >&2
    "$@"
  fi
}

list() { # WORD...: a, b or c
  local text=$1
  while [ $# -gt 2 ]; do
    text+=", $2"
    shift
  done
  [ $# -lt 2 ] || text+=" or $2"
  printf '%s\n' "$text"
}

is_one_of() { # WORD CHOICE...
  local word=$1 choice
  shift
  for choice in "$@"; do
    [ "$word" != "$choice" ] || return 0
  done
  return 1
}

parse_options() { # VALUES SWITCHES ARGUMENT...: sets TTO_NAME of each option; what follows -- goes to REST
  local values switches repeated=(env grid create_arg) name value
  read -ra values <<<"$1"
  read -ra switches <<<"$2 dry_run"
  shift 2
  while [ $# -gt 0 ]; do
    case "$1" in
      -h | --help)
        usage
        exit 0
        ;;
      --)
        shift
        REST=("$@")
        break
        ;;
      --*) ;;
      *) fail "unexpected argument '$1': options look like --name=value, the page and its flags follow --" ;;
    esac
    name=${1%%=*}
    name=${name#--}
    name=${name//-/_}
    if is_one_of "$name" "${switches[@]}"; then
      [[ $1 != *=* ]] || fail "--${name//_/-} is a switch and takes no value, got '${1#*=}'"
      printf -v "TTO_${name^^}" 1
    elif is_one_of "$name" "${values[@]}"; then
      if [[ $1 == *=* ]]; then
        value=${1#*=}
      else
        [ $# -gt 1 ] || fail "--${name//_/-} needs a value"
        shift
        value=$1
      fi
      [ -n "$value" ] || fail "--${name//_/-} is empty"
      if is_one_of "$name" "${repeated[@]}"; then
        local -n values_so_far="${name^^}_LIST"
        values_so_far+=("$value")
        unset -n values_so_far
      else
        printf -v "TTO_${name^^}" '%s' "$value"
      fi
    else
      local known=("${values[@]}" "${switches[@]}" help)
      known=("${known[@]/#/--}")
      fail "unknown option '${1%%=*}': choose $(list "${known[@]//_/-}")"
    fi
    shift
  done
}

require() { # NAME...: options that have no default
  local name variable
  for name in "$@"; do
    variable=TTO_${name^^}
    [ -n "${!variable:-}" ] || fail "--${name//_/-} is missing: give --${name//_/-}=... or set $variable"
  done
}

require_choice() { # NAME CHOICE...
  local name=$1 variable=TTO_${1^^}
  shift
  is_one_of "${!variable}" "$@" || fail "--${name//_/-}=${!variable}: choose $(list "$@")"
}

require_number() { # NAME LEAST
  local variable=TTO_${1^^}
  [[ ${!variable} =~ ^[0-9]{1,9}$ ]] && [ "$((10#${!variable}))" -ge "$2" ] ||
    fail "--${1//_/-}=${!variable} is no whole number of at least $2"
}

require_subcommand() { # GIVEN CHOICE...
  local given=$1
  shift
  is_one_of "$given" "$@" && return
  case "$given" in
    -h | --help)
      usage
      exit 0
      ;;
    '') fail "a command is missing: choose $(list "$@"), or --help" ;;
    *) fail "unknown command '$given': choose $(list "$@"), or --help" ;;
  esac
}

require_zone() {
  require zone
  [[ $TTO_ZONE =~ ^[a-z]+-[a-z]+[0-9]+-[a-z0-9]+$ ]] ||
    fail "--zone=$TTO_ZONE is no zone: a zone is a region and a suffix, such as us-east5-b"
}

require_env() {
  local pair
  for pair in "${ENV_LIST[@]}"; do
    [[ $pair =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || fail "--env=$pair: give NAME=VALUE"
  done
}

require_page() { # checks REST: a page and its flags
  [ "${#REST[@]}" -gt 0 ] || fail "no page: after -- comes $(list "${PAGES[@]}"), then its flags"
  is_one_of "${REST[0]}" "${PAGES[@]}" || fail "unknown page '${REST[0]}': choose $(list "${PAGES[@]}")"
  case "${REST[0]}" in train | evaluate) ;; *) return 0 ;; esac
  local workdir='' i
  for ((i = 1; i < ${#REST[@]}; i++)); do
    case "${REST[i]}" in
      --workdir=*) workdir=${REST[i]#*=} ;;
      --workdir) workdir=${REST[i + 1]:-} ;;
    esac
  done
  [ -n "$workdir" ] || fail "${REST[0]} needs --workdir=gs://BUCKET/RUN after --: a retry resumes from it"
  [[ $workdir == *://* ]] || [ -n "${TTO_ALLOW_LOCAL_WORKDIR:-}" ] ||
    fail "--workdir=$workdir is on the worker's own disk: every worker has another, and it is lost with the machine." \
      "Use gs://BUCKET/RUN, or --allow-local-workdir if the path is on a disk that all workers mount"
}

# The commit that runs. Every worker gets an archive of it, and installs what the package index held at its date: so all
# workers, and a retry weeks later, have the same code and the same versions.
resolve_commit() { # sets COMMIT, SHORT, EXCLUDE_NEWER, ARCHIVE; only reads from git
  local ref=${TTO_REF:-HEAD}
  COMMIT=$(git rev-parse --verify --quiet --end-of-options "$ref^{commit}") ||
    fail "--ref=$ref names no commit of this checkout"
  SHORT=${COMMIT:0:12}
  git cat-file -e "$COMMIT:launch/worker.sh" 2>/dev/null ||
    fail "commit $SHORT has no launch/worker.sh: choose a newer --ref"
  if [ -z "${TTO_REF:-}" ] && [ -n "$(git status --porcelain --untracked-files=no)" ]; then
    local changed="tracked files differ from HEAD ($SHORT), and what runs is a commit: commit them, or say --ref=HEAD"
    [ -n "${TTO_DRY_RUN:-}" ] || fail "$changed"
    note "$changed"
  fi
  EXCLUDE_NEWER=${TTO_EXCLUDE_NEWER:-$(git show --no-patch --format=%cI "$COMMIT")}
  ARCHIVE=${TMPDIR:-/tmp}/tto_jax-$SHORT.tar.gz
}

make_archive() { perform git archive --format=tar.gz --output="$ARCHIVE" "$COMMIT"; }

# A run on TPU VMs. `remote COMMAND` and `copy_to_workers FILE NAME` are the launcher's; the run itself lives on the
# workers, detached from this connection (worker.sh), so that a lost connection costs nothing.

worker_script() { printf 'tto_jax/%s/launch/worker.sh\n' "$1"; }

put_code() { # the commit onto every worker, installed
  local file=tto_jax-$SHORT.tar.gz fetch='' setup
  setup=$(quote bash "$(worker_script "$SHORT")" setup "--commit=$COMMIT" "--exclude-newer=$EXCLUDE_NEWER" \
    "--extras=${TTO_EXTRAS:-tpu}")
  make_archive || return
  if [ -n "${TTO_STAGE:-}" ]; then
    perform gcloud storage cp "$ARCHIVE" "${TTO_STAGE%/}/$file" || return
    fetch="$(quote gcloud storage cp "${TTO_STAGE%/}/$file" "$file") && "
  else
    copy_to_workers "$ARCHIVE" "$file" || return
  fi
  remote "${fetch}mkdir -p tto_jax/$SHORT && tar -xzf $file -C tto_jax/$SHORT && $setup &&\
 ln -sfn $SHORT tto_jax/current"
}

start_run() {
  local envs=("${ENV_LIST[@]/#/--env=}") status=0
  remote "$(quote bash "$(worker_script "$SHORT")" start "${envs[@]}" -- "${REST[@]}")" || status=$?
  if [ "$status" = 127 ]; then # bash found no such script
    note "commit $SHORT is not on the workers: run setup first"
    return "$REFUSED"
  fi
  return "$status"
}

follow_run() { remote "$(quote bash "$(worker_script "$SHORT")" wait)"; }

stop_run() { remote "$(quote bash "$(worker_script current)" stop "--grace=$TTO_GRACE")"; }

show_logs() {
  local follow=()
  [ -z "${TTO_FOLLOW:-}" ] || follow=(--follow)
  remote "$(quote bash "$(worker_script current)" logs "--lines=$TTO_LINES" "${follow[@]}")"
}

# Until the run ends by itself. `prepare` and `confirm` are the launcher's: what must be there before, and must still be
# there after. The arguments, and with them the workdir, are the same each time.
run_with_retries() {
  local retry=0 status=0 before
  while :; do
    before=$status
    status=0
    one_attempt "$before" || status=$?
    case "$status" in
      0) return 0 ;;
      "$STOPPED") note "stopped by an operator: not started again" ;;
      "$REFUSED") note "refused, see above: not tried again" ;;
      *)
        if [ "$retry" -lt "$TTO_RETRIES" ]; then
          retry=$((retry + 1))
          note "ended with $status: retry $retry of $TTO_RETRIES in $TTO_RETRY_DELAY s, with the same arguments"
          sleep "$TTO_RETRY_DELAY"
          continue
        fi
        note "ended with $status: gave up after $retry retries. The same command goes on from the last checkpoint"
        ;;
    esac
    return "$status"
  done
}

one_attempt() { # STATUS of the attempt before
  prepare || return
  # 255 is ssh's own failure, and the run is probably well: attach to it. After any other end what is left of the run is
  # stopped first: a worker that still waits for a lost one would not meet the new start.
  if [ "$1" -ne 0 ] && [ "$1" -ne 255 ]; then
    stop_run || return
  fi
  start_run && follow_run && confirm
}
