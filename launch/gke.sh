#!/usr/bin/env bash
# Trains on Google Kubernetes Engine: a JobSet with one pod a node, of TPUs or
# of GPUs. It needs kubectl, a cluster with JobSet, an image with this package,
# and a volume that all nodes can write.
#
#   launch/gke.sh --config=FILE --workdir=/DIR --name=NAME --image=IMAGE
#       --claim=CLAIM
#       --tpu=tpu-v6e-slice --topology=4x4 [--chips_per_node=4]
#       or --gpu=nvidia-h100-80gb [--gpus_per_node=8] [--nodes=1]
#       [--mount_at=/mnt/retrieval_aug] [--namespace=default]
#       [--node_selector=KEY=VALUE,...] [--grace_seconds=120]
#       [--max_restarts=3] [--stages=train,evaluate,report] [--dry_run]
#       [-- FLAGS OF main]
#
#   --config         in the image, from its working folder on
#   --workdir        in --mount_at
#   --claim          PersistentVolumeClaim, ReadWriteMany (Filestore, say)
#   --tpu            cloud.google.com/gke-tpu-accelerator of the nodes
#   --topology       of the slice; with --chips_per_node it gives the nodes
#   --gpu            cloud.google.com/gke-accelerator of the nodes
#   --node_selector  further ones: cloud.google.com/gke-spot=true
#   --grace_seconds  to save in, when a pod is told to end; spot nodes give
#                    15 to 25 seconds at most
#   --max_restarts   of a job that failed; one that saved has any number
#   --stages         embed and search run before, or here on one node
#   --dry_run        prints what would run, as a shell script
#
# A pod that is told to end saves and ends with code 75; the set is started
# anew and goes on. `kubectl delete jobset NAME` ends it for good.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

ARG=(
  [config]="" [workdir]="" [name]="" [image]="" [claim]=""
  [tpu]="" [topology]="" [chips_per_node]=""
  [gpu]="" [gpus_per_node]="" [nodes]=""
  [mount_at]=/mnt/retrieval_aug [namespace]=default [node_selector]=""
  [grace_seconds]=120 [max_restarts]=3 [stages]="train,evaluate,report"
)
REQUIRED=(config workdir name image claim mount_at namespace)
parse "$@"

# A string of YAML.
yaml() {
  printf "'%s'" "${1//\'/\'\'}"
}

# Of the pods' names, which have 63 characters at most.
check_form name '[a-z]([a-z0-9-]{0,38}[a-z0-9])?' \
  "up to 40 small letters, digits and -, a letter first"
check_form mount_at '/.+' "an absolute path"
[[ ${ARG[workdir]} == "${ARG[mount_at]%/}"/?* ]] ||
  fail "--workdir=${ARG[workdir]}: not below --mount_at=${ARG[mount_at]}."
check_count grace_seconds
check_form max_restarts '0|[1-9][0-9]*' "a whole number from 0 on"

# Nodes, what each has, and how its process finds the others.
flags=()
if [[ -n ${ARG[tpu]} && -z ${ARG[gpu]}${ARG[gpus_per_node]}${ARG[nodes]} ]]; then
  check_given topology
  check_form topology '[1-9][0-9]*(x[1-9][0-9]*){1,2}' "sizes, as in 4x4"
  : "${ARG[chips_per_node]:=4}"
  check_count chips_per_node
  chips=$((${ARG[topology]//x/*}))
  ((chips % ARG[chips_per_node] == 0)) ||
    fail "--topology=${ARG[topology]}: its $chips chips are no multiple of" \
      "--chips_per_node=${ARG[chips_per_node]}."
  nodes=$((chips / ARG[chips_per_node]))
  limit="google.com/tpu: ${ARG[chips_per_node]}"
  selectors=(
    "cloud.google.com/gke-tpu-accelerator=${ARG[tpu]}"
    "cloud.google.com/gke-tpu-topology=${ARG[topology]}"
  )
  ((nodes == 1)) || flags=(--distributed)
elif [[ -n ${ARG[gpu]} && -z ${ARG[tpu]}${ARG[topology]}${ARG[chips_per_node]} ]]; then
  : "${ARG[gpus_per_node]:=8}" "${ARG[nodes]:=1}"
  check_count gpus_per_node
  check_count nodes
  nodes=${ARG[nodes]}
  limit="nvidia.com/gpu: ${ARG[gpus_per_node]}"
  selectors=("cloud.google.com/gke-accelerator=${ARG[gpu]}")
  # The pod of index 0, by the name that the JobSet gives it.
  ((nodes == 1)) || flags=(
    "--coordinator=${ARG[name]}-train-0-0.${ARG[name]}:8476"
    "--num_processes=$nodes"
  )
else
  fail "needs --tpu=... --topology=..., or --gpu=..., and not options of both;" \
    "see --help."
fi
IFS=, read -ra more <<<"${ARG[node_selector]}"
for selector in "${more[@]}"; do
  [[ $selector == ?*=* ]] ||
    fail "--node_selector=${ARG[node_selector]}: $selector is not KEY=VALUE."
done
set_main python "${flags[@]}"

# Kubernetes would replace $(NAME) in the command's words; $$ is its $. It does
# so in the last one, where it is meant.
command=
for word in "${MAIN[@]}"; do
  command+=$'\n'"                    - $(yaml "${word//\$(/\$\$(}")"
done
if [[ -n ${ARG[gpu]} ]] && ((nodes > 1)); then
  command+=$'\n'"                    - '--process_id=\$(JOB_COMPLETION_INDEX)'"
fi
node_selector=
for selector in "${selectors[@]}" "${more[@]}"; do
  node_selector+=$'\n'"                $(yaml "${selector%%=*}"): $(yaml "${selector#*=}")"
done
# All pods in one node pool, which is one slice.
annotations=
if [[ -n ${ARG[tpu]} ]] && ((nodes > 1)); then
  annotations="
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool"
fi

# A pod that was told to end (code 75; 143, if it had nothing to save), or whose
# node is taken away, fails its job at once; the set then starts all pods anew,
# and this does not count.
run_text "kubectl apply --namespace=$(quote "${ARG[namespace]}") --filename=- <<\\END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $(yaml "${ARG[name]}")$annotations
spec:
  failurePolicy:
    maxRestarts: ${ARG[max_restarts]}
    rules:
      - action: RestartJobSetAndIgnoreMaxRestarts
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: train
      replicas: 1
      template:
        spec:
          completionMode: Indexed
          completions: $nodes
          parallelism: $nodes
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes:
                  containerName: train
                  operator: In
                  values: [75, 143]
              - action: FailJob
                onPodConditions:
                  - type: DisruptionTarget
                    status: 'True'
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: ${ARG[grace_seconds]}
              nodeSelector:$node_selector
              containers:
                - name: train
                  image: $(yaml "${ARG[image]}")
                  command:$command
                  resources:
                    limits:
                      $limit
                  volumeMounts:
                    - name: work
                      mountPath: $(yaml "${ARG[mount_at]}")
                    - name: shared-memory
                      mountPath: /dev/shm
              volumes:
                - name: work
                  persistentVolumeClaim:
                    claimName: $(yaml "${ARG[claim]}")
                - name: shared-memory
                  emptyDir:
                    medium: Memory
END"
