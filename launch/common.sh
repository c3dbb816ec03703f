# shellcheck shell=bash
# What the scripts of this folder share; they source it.
#
# Arguments are --name=value. A script says which it knows, in ARG with their
# defaults, and which of them must be given, in REQUIRED, and calls
# `parse "$@"`. What stands after `--` goes to the main job as it is.

declare -A ARG
declare -a REQUIRED EXTRA MAIN
DRY_RUN=

fail() {
  echo "error: $(basename "$0"): $*" >&2
  exit 1
}

# The comment at the head of the script is its help.
show_help() {
  sed -n '2,/^$/{s/^# \{0,1\}//;/^$/!p;/^$/p}' "$0"
}

parse() {
  local name
  while (($#)); do
    # What is run is printed and read as lines.
    [[ $1 != *$'\n'* ]] || fail "an argument holds a line break."
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
  [[ ${EXTRA[*]} != *$'\n'* ]] || fail "an argument holds a line break."
  check_given "${REQUIRED[@]}"
}

# Fails unless arguments have a value.
check_given() {
  local name missing=()
  for name in "$@"; do
    [[ -n ${ARG[$name]} ]] || missing+=("--$name=...")
  done
  ((${#missing[@]} == 0)) || fail "needs ${missing[*]}; see --help."
}

# Fails unless an argument is a whole number from 1 on.
check_count() {
  [[ ${ARG[$1]} =~ ^[1-9][0-9]*$ ]] ||
    fail "--$1=${ARG[$1]}: not a whole number from 1 on."
}

# Fails unless an argument matches a pattern, which the third word describes.
check_form() {
  [[ ${ARG[$1]} =~ ^($2)$ ]] || fail "--$1=${ARG[$1]}: not $3."
}

# A word as a shell would read it, quoted only where it must be.
quote() {
  if [[ $1 =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
    printf '%s' "$1"
  else
    printf "'%s'" "${1//\'/\'\\\'\'}"
  fi
}

# Words as a shell would read them, in a line.
words() {
  local word line=
  for word in "$@"; do
    line+="$(quote "$word") "
  done
  printf '%s' "${line% }"
}

# Runs a command, or with --dry_run prints it.
run() {
  if [[ -z $DRY_RUN ]]; then
    exec "$@"
  fi
  words "$@"
  echo
}

# Runs a text as a shell script, or with --dry_run prints it: what is printed
# is what would run.
run_text() {
  if [[ -z $DRY_RUN ]]; then
    exec bash -c "$1"
  fi
  printf '%s\n' "$1"
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

# Sets MAIN to the command of the stages that train, run by the Python that the
# first argument names, with the others as further flags.
set_main() {
  MAIN=(
    "$1" -m retrieval_aug.main
    "--config=${ARG[config]}"
    "--workdir=${ARG[workdir]}"
    "--stages=${ARG[stages]}"
    "${@:2}"
    "${EXTRA[@]}"
  )
}

# Shell text that runs MAIN, and again as long as it ends with code 75, which
# says that it was told to stop and has saved, or with 143, when it had nothing
# to save. A signal to this shell is one to MAIN, and the last: then it is not
# run again. $code is left as its last code.
#
# MAIN runs in the background because a shell that waits for a command in the
# foreground sees no signal. A signal ends `wait` early, so it is called until
# the process is gone, and once more for its code, which the shell keeps.
main_again() {
  cat <<END
stop=
trap 'stop=yes; kill -TERM \$! 2>/dev/null' TERM INT HUP
while :; do
  $(words "${MAIN[@]}") &
  [ -z "\$stop" ] || kill -TERM \$!
  while kill -0 \$! 2>/dev/null; do wait \$!; done
  wait \$!
  code=\$?
  case \$stop\$code in 75 | 143) ;; *) break ;; esac
done
END
}
