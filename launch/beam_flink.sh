#!/usr/bin/env bash
# Embeds and searches on a Flink cluster, through a job server that Beam starts
# (it needs Java, and downloads its jar) or through a running one.
#
#   launch/beam_flink.sh --config=FILE --workdir=/mnt/DIR
#       (--master=HOST:8081 | --job_endpoint=HOST:8099) [--parallelism=16]
#       [--environment_type=EXTERNAL] [--environment_config=localhost:50000]
#       [--groups=N] [--stages=embed,search] [--dry_run] [-- FLAGS OF main]
#
#   --master              REST address of Flink's job manager
#   --job_endpoint        of a running Beam job server, instead
#   --parallelism         task slots to use
#   --environment_type    where Python runs: EXTERNAL (a worker pool beside each
#                         task manager), PROCESS, DOCKER or LOOPBACK (here)
#   --environment_config  of that type: address of the pool, JSON with the
#                         command of the process, or name of the image
#   --groups              units of the search, each with a running top-k; as
#                         --parallelism
#   --dry_run             prints the command instead

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

ARG=(
  [config]="" [workdir]="" [master]="" [job_endpoint]="" [parallelism]=16
  [environment_type]=EXTERNAL [environment_config]="" [groups]=""
  [stages]="embed,search"
)
REQUIRED=(config workdir)
parse "$@"
check_count parallelism
[[ ${ARG[workdir]} == /* ]] ||
  fail "--workdir=${ARG[workdir]}: workers need an absolute, mounted path."
: "${ARG[groups]:=${ARG[parallelism]}}"

if [[ -n ${ARG[master]} && -n ${ARG[job_endpoint]} ]]; then
  fail "--master and --job_endpoint exclude each other."
elif [[ -n ${ARG[master]} ]]; then
  options=(--runner=FlinkRunner "--flink_master=${ARG[master]}")
elif [[ -n ${ARG[job_endpoint]} ]]; then
  options=(--runner=PortableRunner "--job_endpoint=${ARG[job_endpoint]}")
else
  fail "needs --master=... or --job_endpoint=...; see --help."
fi
options+=(
  "--parallelism=${ARG[parallelism]}"
  "--environment_type=${ARG[environment_type]}"
)

case ${ARG[environment_type]} in
  EXTERNAL) : "${ARG[environment_config]:=localhost:50000}" ;;
  PROCESS | DOCKER)
    [[ -n ${ARG[environment_config]} ]] ||
      fail "this --environment_type needs --environment_config=...; see --help."
    ;;
  LOOPBACK) ;;
  *)
    kinds="EXTERNAL, PROCESS, DOCKER, LOOPBACK"
    fail "--environment_type=${ARG[environment_type]}: not one of $kinds."
    ;;
esac
if [[ -n ${ARG[environment_config]} ]]; then
  # main splits the options as a shell does; a JSON value is one word.
  options+=("$(quote "--environment_config=${ARG[environment_config]}")")
fi

run_main "${options[@]}"
