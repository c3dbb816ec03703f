#!/usr/bin/env bash
# Embeds and searches with several processes of this machine (Beam's
# FnApiRunner; pip install 'retrieval_aug[scale]').
#
#   launch/beam_local.sh --config=FILE --workdir=DIR [--workers=N]
#       [--groups=N] [--stages=embed,search] [--dry_run] [-- FLAGS OF main]
#
#   --workers  processes; as many as there are cores
#   --groups   units of the search, each with a running top-k; as --workers
#   --dry_run  prints the command instead

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

ARG=(
  [config]="" [workdir]="" [workers]="" [groups]="" [stages]="embed,search"
)
REQUIRED=(config workdir)
parse "$@"
: "${ARG[workers]:=$(nproc)}"
check_count workers
: "${ARG[groups]:=${ARG[workers]}}"

run_main \
  --runner=FnApiRunner \
  --direct_running_mode=multi_processing \
  "--direct_num_workers=${ARG[workers]}"
