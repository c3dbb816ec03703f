#!/usr/bin/env bash
# Trains on nodes of a Slurm cluster, one process a node with all its GPUs.
# Start it where the job is to run, with this package and jax[cuda13] (or
# cuda12) in the environment, or brought there by --setup.
#
#   launch/slurm.sh --config=FILE --workdir=DIR [--nodes=1]
#       [--gpus_per_node=1] [--cpus_per_node=8] [--time=24:00:00]
#       [--partition=P] [--account=A] [--job_name=retrieval_aug]
#       [--save_seconds=120] [--sbatch_flags='--qos=Q --mem=0']
#       [--setup='module load python'] [--stages=train,evaluate,report]
#       [--dry_run] [-- FLAGS OF main]
#
#   --workdir        on a file system that all nodes share
#   --gpus_per_node  0 trains on CPUs
#   --cpus_per_node  cores that read, decode and gather for the GPUs
#   --time           limit of one run, as sbatch takes it; jobs of any length
#                    fit, for the job is queued again at the limit
#   --save_seconds   before the limit, when the job is told to save
#   --sbatch_flags   further ones, as --NAME=VALUE with spaces between
#   --setup          shell commands before training, on the first node
#   --stages         embed and search run before, or here with --nodes=1
#   --dry_run        prints what would run, as a shell script
#
# At the limit, or when Slurm wants the nodes back, the job saves, ends with
# code 75 (143 where there is nothing to save) and is queued again under its
# number. `scancel` ends it for good.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

ARG=(
  [config]="" [workdir]=""
  [nodes]=1 [gpus_per_node]=1 [cpus_per_node]=8 [time]=""
  [partition]="" [account]="" [job_name]=retrieval_aug
  [save_seconds]=120 [sbatch_flags]="" [setup]=""
  [stages]="train,evaluate,report"
)
REQUIRED=(config workdir job_name)
parse "$@"
check_count nodes
check_form gpus_per_node '0|[1-9][0-9]*' "a whole number from 0 on"
check_count cpus_per_node
check_count save_seconds
for name in time partition account job_name sbatch_flags; do
  if [[ -n ${ARG[$name]} ]]; then
    check_form "$name" '[][A-Za-z0-9_.,:@%/+= -]+' \
      "something that a line of #SBATCH can hold"
  fi
done
read -ra more <<<"${ARG[sbatch_flags]}"
for flag in "${more[@]}"; do
  [[ $flag == --?* ]] ||
    fail "--sbatch_flags=${ARG[sbatch_flags]}: $flag is not --NAME=VALUE."
done

# Slurm signals the processes that srun started, not the shell. Each run adds
# to the log.
options=(
  "--job-name=${ARG[job_name]}"
  "--nodes=${ARG[nodes]}"
  --ntasks-per-node=1
  "--cpus-per-task=${ARG[cpus_per_node]}"
  "--signal=TERM@${ARG[save_seconds]}"
  --requeue
  --open-mode=append
)
((ARG[gpus_per_node] == 0)) || options+=("--gres=gpu:${ARG[gpus_per_node]}")
for name in time partition account; do
  [[ -z ${ARG[$name]} ]] || options+=("--$name=${ARG[$name]}")
done

# What several processes need. With Slurm, JAX would give each process the GPU
# of its number on the node, so one process would have one.
setup=${ARG[setup]}
flags=()
if ((ARG[nodes] > 1)); then
  flags=(--distributed)
  if ((ARG[gpus_per_node] > 0)); then
    devices=$(seq -s, 0 $((ARG[gpus_per_node] - 1)))
    setup+="${setup:+$'\n'}export JAX_LOCAL_DEVICE_IDS=$devices"
  fi
fi
set_main python "${flags[@]}"

# srun gives the highest code of all processes. It kills none because another
# one has ended, which would hide the 75: they end by themselves.
run_text "sbatch <<\\END
#!/bin/bash
$(printf '#SBATCH %s\n' "${options[@]}" "${more[@]}")
${setup:+$setup$'\n'}code=0
srun --kill-on-bad-exit=0 --wait=0 --cpus-per-task=${ARG[cpus_per_node]} $(words "${MAIN[@]}") || code=\$?
case \$code in 75 | 143) scontrol requeue \"\$SLURM_JOB_ID\" ;; esac
exit \"\$code\"
END"
