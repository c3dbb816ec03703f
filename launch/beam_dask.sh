#!/usr/bin/env bash
# Embeds and searches on a Dask cluster: one that is started on this machine and
# ends with the job, or the one at --address.
#
#   launch/beam_dask.sh --config=FILE --workdir=DIR --workers=N
#       [--address=tcp://HOST:PORT] [--groups=N] [--stages=embed,search]
#       [--dry_run] [-- FLAGS OF main]
#
#   --workers  processes of the local cluster, or those that --address has
#   --address  of a scheduler; its workers see --workdir at the same path
#   --groups   units of the search, each with a running top-k; as --workers
#   --dry_run  prints the command instead

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

ARG=(
  [config]="" [workdir]="" [workers]="" [address]="" [groups]=""
  [stages]="embed,search"
)
REQUIRED=(config workdir workers)
parse "$@"
check_count workers
: "${ARG[groups]:=${ARG[workers]}}"

if [[ -n ${ARG[address]} ]]; then
  # Dask deals units beforehand: several parts a worker even out their times.
  cluster=(
    "--dask_client_address=${ARG[address]}"
    "--dask_npartitions=$((4 * ARG[workers]))"
  )
else
  cluster=("--dask_workers=${ARG[workers]}")
fi

run_main --runner=DaskRunner "${cluster[@]}"
