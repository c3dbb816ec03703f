# shellcheck shell=bash
# What the scripts of this folder share; they source it.
#
# Arguments are --name=value. A script says which it knows, in ARG with their
# defaults, and which of them must be given, in REQUIRED, and calls
# `parse "$@"`. What stands after `--` goes to the main job as it is.

declare -A ARG
declare -a REQUIRED EXTRA
DRY_RUN=

fail() {
  echo "error: $(basename "$0"): $1" >&2
  exit 1
}

# The comment at the head of the script is its help.
show_help() {
  sed -n '2,/^$/{s/^# \{0,1\}//;/^$/!p;/^$/p}' "$0"
}

parse() {
  local name missing=()
  while (($#)); do
    case $1 in
      --help)
        show_help
        exit 0
        ;;
      --dry_run) DRY_RUN=1 ;;
      --)
        shift
        EXTRA=("$@")
        break
        ;;
      --*=*)
        name=${1%%=*}
        name=${name#--}
        [[ -v ARG[$name] ]] || fail "unknown argument --$name; see --help."
        ARG[$name]=${1#*=}
        ;;
      *) fail "unexpected $1; arguments are --name=value, see --help." ;;
    esac
    shift
  done
  for name in "${REQUIRED[@]}"; do
    [[ -n ${ARG[$name]} ]] || missing+=("--$name=...")
  done
  ((${#missing[@]} == 0)) || fail "needs ${missing[*]}; see --help."
}

# Fails unless an argument is a whole number from 1 on.
check_count() {
  [[ ${ARG[$1]} =~ ^[1-9][0-9]*$ ]] ||
    fail "--$1=${ARG[$1]}: not a whole number from 1 on."
}

# A word as a shell would read it, quoted only where it must be.
quote() {
  if [[ $1 =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
    printf '%s' "$1"
  else
    printf "'%s'" "${1//\'/\'\\\'\'}"
  fi
}

# Runs a command, or with --dry_run prints it.
run() {
  if [[ -z $DRY_RUN ]]; then
    exec "$@"
  fi
  local line=
  for word in "$@"; do
    line+="$(quote "$word") "
  done
  echo "${line% }"
}

# The offline stages through Beam, with the options given as arguments; search
# deals index shards to ARG[groups] units.
run_main() {
  check_count groups
  run python -m retrieval_aug.main \
    "--config=${ARG[config]}" \
    "--workdir=${ARG[workdir]}" \
    "--stages=${ARG[stages]}" \
    "--config.search.groups=${ARG[groups]}" \
    "--beam=$*" \
    "${EXTRA[@]}"
}
