#!/usr/bin/env bash
# Embeds and searches on Google Cloud Dataflow (pip install 'apache-beam[gcp]').
# Run it on a machine that has --workdir mounted where the image mounts it.
#
#   launch/beam_dataflow.sh --config=FILE --workdir=/mnt/DIR --project=P
#       --region=R --bucket=gs://B --image=IMAGE [--workers=16]
#       [--machine_type=n2-highmem-8] [--disk_gb=100] [--network=N]
#       [--groups=N] [--stages=embed,search] [--dry_run] [-- FLAGS OF main]
#
#   --bucket        for Dataflow's own temporary files
#   --image         with this package, and with the file system of --workdir
#                   mounted at the same path; see docs/beam.md
#   --workers       machines, each with one worker process on all its cores
#   --machine_type  its memory bounds the rows of an index shard
#   --disk_gb       of each machine, for the image; data are in --workdir
#   --network       of the file system, if it is not the default one
#   --groups        units of the search, each with a running top-k; as --workers
#   --dry_run       prints the command instead

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

ARG=(
  [config]="" [workdir]="" [project]="" [region]="" [bucket]="" [image]=""
  [workers]=16 [machine_type]=n2-highmem-8 [disk_gb]=100
  [network]="" [groups]=""
  [stages]="embed,search"
)
REQUIRED=(config workdir project region bucket image)
parse "$@"
check_count workers
check_count disk_gb
[[ ${ARG[bucket]} == gs://* ]] ||
  fail "--bucket=${ARG[bucket]}: write it as gs://NAME."
[[ ${ARG[workdir]} == /* ]] ||
  fail "--workdir=${ARG[workdir]}: workers need an absolute, mounted path."
: "${ARG[groups]:=${ARG[workers]}}"

# One process a machine: a unit uses all cores, and each would hold an encoder
# or an index of its own. A fixed number of machines: units are few and long.
options=(
  --runner=DataflowRunner
  "--project=${ARG[project]}"
  "--region=${ARG[region]}"
  "--temp_location=${ARG[bucket]}/temp"
  "--staging_location=${ARG[bucket]}/staging"
  "--sdk_container_image=${ARG[image]}"
  --sdk_location=container
  "--num_workers=${ARG[workers]}"
  --autoscaling_algorithm=NONE
  "--worker_machine_type=${ARG[machine_type]}"
  "--disk_size_gb=${ARG[disk_gb]}"
  --experiments=no_use_multiple_sdk_containers
  --number_of_worker_harness_threads=1
)
if [[ -n ${ARG[network]} ]]; then
  options+=("--network=${ARG[network]}")
fi

run_main "${options[@]}"
