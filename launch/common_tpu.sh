# shellcheck shell=bash
# What tpu_vm.sh and tpu_pod.sh share: the text that they run. They set ARG,
# and in HOSTS and FLAGS what is different on a slice of several hosts.

declare -a HOSTS FLAGS

# On every host: the code is in ~/retrieval_aug, with the log of what runs. The
# number of its process is kept in memory, for after a restart of the machine
# it would be another's.
PID=/dev/shm/retrieval_aug.pid

# Copied to the hosts; enough to install the package and find its configs.
SOURCES=(setup.py pyproject.toml README.md retrieval_aug configs)

check_tpu() {
  local step
  DO=",${ARG[do]},"
  for step in ${ARG[do]//,/ }; do
    [[ " create setup run stop delete " == *" $step "* ]] ||
      fail "--do=${ARG[do]}: $step is none of create, setup, run, stop," \
        "delete."
  done
  [[ -n ${ARG[do]//,/} ]] || fail "--do=${ARG[do]}: names nothing to do."
  if [[ $DO == *,create,* ]]; then
    check_given accelerator_type runtime_version
  fi
  check_form queued 'yes|no' "yes or no"
  if [[ -n ${ARG[nfs]} ]]; then
    check_form nfs '[^:]+:/.*' "HOST:/SHARE"
    check_form mount_at '/.*' "an absolute path"
  fi
  if [[ $DO == *,run,* ]]; then
    check_given config workdir
    check_form workdir '/.*' "an absolute path, which is of the VM"
    [[ ${ARG[config]} == configs/* ]] ||
      fail "--config=${ARG[config]}: give a file in configs/, which is copied."
    if [[ -n ${ARG[nfs]} ]]; then
      [[ ${ARG[workdir]} == "${ARG[mount_at]%/}"/?* ]] ||
        fail "--workdir=${ARG[workdir]}: not below" \
          "--mount_at=${ARG[mount_at]}, where --nfs is mounted."
    fi
  fi
  if [[ $DO == *,setup,* ]]; then
    [[ -f setup.py && -d retrieval_aug ]] ||
      fail "start it in the root of the repository, which is copied."
  fi
}

# gcloud's words for the VM: "tpu-vm describe", for example, then flags.
gcloud_tpu() {
  words gcloud compute tpus "$1" "$2" "${ARG[name]}" \
    "--project=${ARG[project]}" "--zone=${ARG[zone]}" "${@:3}"
}

# A command that runs a text on the hosts. What ssh does not hear from for two
# minutes has gone.
on_hosts() {
  gcloud_tpu tpu-vm ssh "${HOSTS[@]}" \
    --ssh-flag=-oServerAliveInterval=30 --ssh-flag=-oServerAliveCountMax=4 \
    "--command=$1"
}

# The text of each step: a shell function of its name. None of them goes on
# after a command that failed.

state_text() {
  echo "state() {
  $(gcloud_tpu tpu-vm describe "--format=value(state)") 2>/dev/null || echo NONE
}"
}

# Leaves a VM that is ready. One that was preempted is deleted and made anew.
create_text() {
  local flags
  read -ra flags <<<"${ARG[create_flags]}"
  echo "create() {
  while :; do
    case \$(state) in
      READY) return ;;
      NONE) $(gcloud_tpu tpu-vm create \
        "--accelerator-type=${ARG[accelerator_type]}" \
        "--version=${ARG[runtime_version]}" "${flags[@]}") || return ;;
      STOPPED) $(gcloud_tpu tpu-vm start) || return ;;
      PREEMPTED | TERMINATED) $(gcloud_tpu tpu-vm delete --quiet) || return ;;
      *) echo 'waiting for the VM' >&2; sleep 30 ;;
    esac
  done
}"
}

# The same by a queued resource of the same name, which waits for its turn.
create_queued_text() {
  local flags
  read -ra flags <<<"${ARG[create_flags]}"
  echo "request() {
  $(gcloud_tpu queued-resources describe "--format=value(state.state)") 2>/dev/null || echo NONE
}
create() {
  while :; do
    case \$(request) in
      ACTIVE) [ \"\$(state)\" != READY ] || return 0; sleep 30 ;;
      NONE) $(gcloud_tpu queued-resources create "--node-id=${ARG[name]}" \
        "--accelerator-type=${ARG[accelerator_type]}" \
        "--runtime-version=${ARG[runtime_version]}" "${flags[@]}") || return ;;
      SUSPENDED) $(gcloud_tpu queued-resources delete --force --quiet) || return ;;
      FAILED) $(gcloud_tpu queued-resources describe) >&2; return 1 ;;
      *) echo 'waiting for the queued resource' >&2; sleep 30 ;;
    esac
  done
}"
}

# Mounts the file system, copies the code and installs it. The Python of the
# VM may be too old for the package: uv brings one. Where a VM has just
# started, apt may be at work.
setup_text() {
  local first="set -eu"$'\n'"mkdir -p retrieval_aug" at workdir
  if [[ -n ${ARG[nfs]} ]]; then
    at=$(quote "${ARG[mount_at]}")
    first+="
if ! mountpoint -q $at; then
  apt='sudo apt-get -qqy -o DPkg::Lock::Timeout=600'
  command -v mount.nfs >/dev/null || { \$apt update; \$apt install nfs-common; }
  sudo mkdir -p $at
  sudo mount -t nfs -o hard,lookupcache=positive,acdirmax=3 $(quote "${ARG[nfs]}") $at
fi"
  fi
  if [[ -n ${ARG[prepare]} ]]; then
    first+=$'\n'"${ARG[prepare]}"
  fi
  if [[ -n ${ARG[workdir]} ]]; then
    workdir=$(quote "${ARG[workdir]}")
    first+="
[ -w $workdir ] || { sudo mkdir -p $workdir; sudo chown \"\$(id -u)\" $workdir; }"
  fi
  echo "setup() {
  $(on_hosts "$first") &&
  $(words gcloud compute tpus tpu-vm scp --recurse "${SOURCES[@]}" \
    "${ARG[name]}:retrieval_aug/" \
    "--project=${ARG[project]}" "--zone=${ARG[zone]}" "${HOSTS[@]}") &&
  $(on_hosts "set -eu
cd retrieval_aug
pip='python3 -m pip install --quiet --user uv'
python3 -m uv --version || \$pip || \$pip --break-system-packages
[ -x .venv/bin/python ] || python3 -m uv venv --python=3.11 .venv
python3 -m uv pip install --python=.venv/bin/python -e '.[run]' 'jax[tpu]'")
}"
}

# Starts training, apart from the connection, where it does not run yet, and
# follows its log. A lost connection costs nothing: gcloud connects again, with
# the same command. Its code is that of the training.
train_text() {
  echo "train() {
  $(on_hosts "cd retrieval_aug || exit
if ! kill -0 \"\$(cat $PID 2>/dev/null)\" 2>/dev/null; then
  rm -f train.code
  cat >train.sh <<\\END
$(main_again)
echo \"\$code\" >train.code
END
  nohup setsid bash train.sh >train.log 2>&1 </dev/null &
  echo \$! >$PID
fi
tail --pid=\"\$(cat $PID)\" -n 100 -F train.log 2>/dev/null
exit \"\$(cat train.code || echo 1)\"")
}"
}

# Tells training to save and end, and waits for it.
stop_text() {
  echo "stop() {
  $(on_hosts "kill -TERM \"\$(cat $PID)\" && tail --pid=\"\$(cat $PID)\" -f /dev/null")
}"
}

delete_text() {
  local delete=(tpu-vm delete --quiet)
  if [[ ${ARG[queued]} == yes ]]; then
    delete=(queued-resources delete --force --quiet)
  fi
  echo "delete() {
  $(gcloud_tpu "${delete[@]}")
}"
}

# Does the steps of --do. A VM that this made is made again when it was
# preempted, and training goes on.
run_tpu() {
  local step text="" calls=""
  check_tpu
  set_main .venv/bin/python "${FLAGS[@]}"
  for step in create setup run stop delete; do
    [[ $DO == *,$step,* ]] || continue
    case $step in
      create)
        text+=$(state_text)$'\n'
        if [[ ${ARG[queued]} == yes ]]; then
          text+=$(create_queued_text)$'\n'
        else
          text+=$(create_text)$'\n'
        fi
        ;;
      setup) text+=$(setup_text)$'\n' ;;
      run) text+=$(train_text)$'\n' ;;
      stop) text+=$(stop_text)$'\n' ;;
      delete) text+=$(delete_text)$'\n' ;;
    esac
    calls+="${step/run/train} || exit"$'\n'
  done
  if [[ $DO == *,create,* && $DO == *,run,* ]]; then
    local setup=
    [[ $DO != *,setup,* ]] || setup="setup && "
    calls="while :; do
  create || exit
  code=0
  ${setup}train || code=\$?
  [ \"\$code\" != 0 ] || break
  [ \"\$(state)\" != READY ] || exit \"\$code\"
  echo 'the VM is gone: making it anew' >&2
done
${calls#*train || exit$'\n'}"
  fi
  run_text "$text${calls%$'\n'}"
}
