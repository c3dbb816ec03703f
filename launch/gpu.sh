#!/usr/bin/env bash
# Trains on the GPUs of this machine, or on those of several machines. One
# process a machine uses all its GPUs. First: pip install 'jax[cuda13]', or
# cuda12 for an older driver, beside this package.
#
#   launch/gpu.sh --config=FILE --workdir=DIR [--gpus=0,1]
#       [--nodes=N --node_rank=I --coordinator=HOST:PORT]
#       [--memory_fraction=0.9] [--xla_flags=FLAGS]
#       [--stages=train,evaluate,report] [--dry_run] [-- FLAGS OF main]
#
#   --gpus             which to use; all that are visible, if it is not given
#   --nodes            machines; start this on each, with one --workdir that
#                      all have mounted at the same path
#   --node_rank        of this machine, from 0 on
#   --coordinator      the machine of rank 0 and a free port on it
#   --memory_fraction  of each GPU, that JAX takes when it starts
#   --xla_flags        of XLA, before those of XLA_FLAGS; may be empty
#   --stages           embed and search run before, without --nodes
#   --dry_run          prints what would run, as a shell script
#
# Told to stop (SIGTERM or Ctrl-C), it saves and ends with code 75; the same
# command goes on. If only the process of `main` is told so, or that of another
# machine, it is started again at once.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

ARG=(
  [config]="" [workdir]=""
  [gpus]="" [nodes]=1 [node_rank]="" [coordinator]=""
  [memory_fraction]=0.9
  [xla_flags]="--xla_gpu_enable_latency_hiding_scheduler=true"
  [stages]="train,evaluate,report"
)
REQUIRED=(config workdir)
parse "$@"
check_count nodes
check_form memory_fraction '0?\.[0-9]*[1-9][0-9]*|1(\.0*)?' \
  "a number above 0, at most 1"
if [[ -n ${ARG[gpus]} ]]; then
  check_form gpus '[A-Za-z0-9-]+(,[A-Za-z0-9-]+)*' "numbers of GPUs, as in 0,1"
fi
flags=()
if ((ARG[nodes] > 1)); then
  check_given node_rank coordinator
  check_form node_rank '0|[1-9][0-9]*' "a whole number from 0 on"
  ((ARG[node_rank] < ARG[nodes])) ||
    fail "--node_rank=${ARG[node_rank]}: ranks of --nodes=${ARG[nodes]} end" \
      "before it."
  check_form coordinator '[^:]+:[0-9]+' "HOST:PORT"
  flags=(
    "--coordinator=${ARG[coordinator]}"
    "--num_processes=${ARG[nodes]}"
    "--process_id=${ARG[node_rank]}"
  )
elif [[ -n ${ARG[node_rank]}${ARG[coordinator]} ]]; then
  fail "--node_rank and --coordinator are of several machines; give --nodes=..."
fi
set_main python "${flags[@]}"

environment="export XLA_CLIENT_MEM_FRACTION=${ARG[memory_fraction]}"
if [[ -n ${ARG[gpus]} ]]; then
  environment+=$'\n'"export CUDA_VISIBLE_DEVICES=${ARG[gpus]}"
fi
if [[ -n ${ARG[xla_flags]} ]]; then
  environment+=$'\n'"export XLA_FLAGS=$(quote "${ARG[xla_flags]}")"
  environment+="\"\${XLA_FLAGS:+ \$XLA_FLAGS}\""
fi

run_text "$environment
$(main_again)
exit \"\$code\""
