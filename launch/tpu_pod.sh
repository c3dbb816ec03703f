#!/usr/bin/env bash
# Trains on a slice of a TPU pod: several hosts, each with a process, which
# find each other by the slice's metadata. It needs gcloud, and the key of its
# connections in the agent: ssh-add ~/.ssh/google_compute_engine. Start it in
# the root of the repository.
#
#   launch/tpu_pod.sh --config=configs/FILE --workdir=/DIR --name=SLICE
#       --project=P --zone=Z --nfs=HOST:/SHARE [--do=create,setup,run]
#       [--accelerator_type=v6e-32 --runtime_version=v2-alpha-tpuv6e]
#       [--create_flags='--spot'] [--queued=no]
#       [--mount_at=/mnt/retrieval_aug] [--prepare=COMMAND]
#       [--stages=train,evaluate,report] [--dry_run] [-- FLAGS OF main]
#
#   --do                any of the following, by default run:
#       create   has the slice made, where there is none that is ready
#       setup    on every host: mounts --nfs, copies the code, installs it
#       run      on every host: starts training, or finds that it runs, and
#                follows its log; Ctrl-C here ends following, not training
#       stop     tells training to save and end, and waits for it
#       delete   deletes the slice, after training that ended well
#   --workdir           in --mount_at: what embed and search left there
#   --nfs               a file system (Filestore) to mount at --mount_at; may
#                       be empty if --prepare mounts another one
#   --accelerator_type  as in `gcloud compute tpus accelerator-types list`
#   --runtime_version   as in `gcloud compute tpus tpu-vm versions list`
#   --create_flags      of gcloud, to create it: --spot, --network=N, ...
#   --queued            yes: by a queued resource, which waits for capacity
#   --prepare           a shell command of yours for setup, before the code
#   --stages            embed and search run before, on one machine that has
#                       the file system mounted at the same path
#   --dry_run           prints what would run, as a shell script
#
# With create and run, a slice that was preempted is made anew and training
# goes on with what it saved.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$(dirname "${BASH_SOURCE[0]}")/common_tpu.sh"

ARG=(
  [config]="" [workdir]="" [name]="" [project]="" [zone]=""
  [do]=run [accelerator_type]="" [runtime_version]="" [create_flags]=""
  [queued]=no [nfs]="" [mount_at]=/mnt/retrieval_aug [prepare]=""
  [stages]="train,evaluate,report"
)
REQUIRED=(name project zone)
parse "$@"
HOSTS=(--worker=all)
FLAGS=(--distributed)
for stage in embed search; do
  [[ ",${ARG[stages]}," != *",$stage,"* ]] ||
    fail "--stages=${ARG[stages]}: $stage runs before, on one machine."
done
if [[ ",${ARG[do]}," == *,setup,* && -z ${ARG[nfs]}${ARG[prepare]} ]]; then
  fail "all hosts need one file system: give --nfs=... or --prepare=..."
fi
run_tpu
