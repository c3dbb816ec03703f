#!/usr/bin/env bash
# Trains on a TPU VM of Google Cloud: one host with up to 8 chips. It needs
# gcloud. Start it in the root of the repository.
#
#   launch/tpu_vm.sh --config=configs/FILE --workdir=/DIR --name=VM
#       --project=P --zone=Z [--do=create,setup,run]
#       [--accelerator_type=v6e-8 --runtime_version=v2-alpha-tpuv6e]
#       [--create_flags='--spot'] [--queued=no]
#       [--nfs=HOST:/SHARE] [--mount_at=/mnt/retrieval_aug]
#       [--prepare=COMMAND] [--stages=train,evaluate,report] [--dry_run]
#       [-- FLAGS OF main]
#
#   --do                any of the following, by default run:
#       create   has the VM made, where there is none that is ready
#       setup    mounts --nfs, copies the code, installs it
#       run      starts training, or finds that it runs, and follows its log;
#                Ctrl-C here ends following, not training
#       stop     tells training to save and end, and waits for it
#       delete   deletes the VM, after training that ended well
#   --workdir           of the VM; it is lost with the VM, if not in --nfs
#   --accelerator_type  as in `gcloud compute tpus accelerator-types list`
#   --runtime_version   as in `gcloud compute tpus tpu-vm versions list`
#   --create_flags      of gcloud, to create it: --spot, --network=N, ...
#   --queued            yes: by a queued resource, which waits for capacity
#   --nfs               a file system (Filestore) to mount at --mount_at
#   --prepare           a shell command of yours for setup, before the code
#   --stages            of the main job; embed and search can run here too
#   --dry_run           prints what would run, as a shell script
#
# With create and run, a VM that was preempted is made anew and training goes
# on with what it saved in --nfs.

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
run_tpu
