"""Commands of launch/, each with a golden file of its --dry_run."""

import pathlib

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "launch"

BASE = ["--config=configs/emoji.py", "--workdir=/mnt/memory"]
DATAFLOW = ["--project=p", "--region=europe-west4", "--bucket=gs://b"]
DATAFLOW += ["--image=europe-west4-docker.pkg.dev/p/r/retrieval_aug:1"]
PROCESS = '--environment_config={"command": "/opt/apache/beam/boot"}'

# What embeds and searches, on Beam.
BEAM = {
  "local": ["beam_local", *BASE, "--workers=4"],
  "local_more": [
    "beam_local",
    "--config=configs/own_data.py:it's",
    "--workdir=my memory",
    "--workers=4",
    "--groups=2",
    "--stages=search",
    "--",
    "--config.search.k=5",
  ],
  "dask": ["beam_dask", *BASE, "--workers=4"],
  "dask_address": [
    "beam_dask",
    *BASE,
    "--workers=8",
    "--address=tcp://scheduler:8786",
  ],
  "dataflow": ["beam_dataflow", *BASE, *DATAFLOW],
  "dataflow_more": [
    "beam_dataflow",
    *BASE,
    *DATAFLOW,
    "--workers=64",
    "--machine_type=n2-highmem-16",
    "--disk_gb=50",
    "--network=files",
    "--groups=32",
  ],
  "flink": ["beam_flink", *BASE, "--master=flink:8081"],
  "flink_endpoint": [
    "beam_flink",
    *BASE,
    "--job_endpoint=server:8099",
    "--environment_type=PROCESS",
    PROCESS,
    "--parallelism=32",
  ],
}

# What every shell on the way must hand on as it is.
CONFIG = "--config=configs/own_data.py:it's"
WORKDIR = "--workdir=/mnt/files/my runs"
FLAGS = ['--config.memory.text=a $(photo) of "{label}"', "--config.train.k=5"]

VM = ["--project=p", "--zone=us-central2-b", "--name=my-tpu"]
NEW = ["--accelerator_type=v6e-8", "--runtime_version=v2-alpha-tpuv6e"]
FILES = ["--nfs=10.0.0.2:/vol1", "--mount_at=/mnt/files"]
JOB = ["--name=mam", "--image=r/retrieval_aug:1", "--claim=memory"]
JOB += ["--mount_at=/mnt/files"]
TPU = ["--tpu=tpu-v6e-slice", "--topology=4x4"]

# What trains. Those of several processes have the flags of one of them beside.
TRAIN = {
  "gpu": ["gpu", *BASE],
  "gpu_more": [
    "gpu",
    CONFIG,
    WORKDIR,
    "--gpus=0,1",
    "--memory_fraction=.75",
    "--xla_flags=",
    "--",
    *FLAGS,
  ],
  "gpu_nodes": [
    "gpu",
    CONFIG,
    WORKDIR,
    "--nodes=2",
    "--node_rank=1",
    "--coordinator=10.0.0.2:8476",
    "--",
    *FLAGS,
  ],
  "slurm": ["slurm", *BASE],
  "slurm_cpu": ["slurm", *BASE, "--nodes=2", "--gpus_per_node=0"],
  "slurm_more": [
    "slurm",
    CONFIG,
    WORKDIR,
    "--nodes=4",
    "--gpus_per_node=8",
    "--cpus_per_node=32",
    "--time=1-12:00:00",
    "--partition=gpu",
    "--account=lab",
    "--job_name=mam",
    "--save_seconds=300",
    "--sbatch_flags=--qos=high --mem=0",
    "--setup=module load python; source '.venv/bin/activate'",
    "--",
    *FLAGS,
  ],
  "tpu_vm": ["tpu_vm", *BASE, *VM],
  "tpu_vm_more": [
    "tpu_vm",
    CONFIG,
    WORKDIR,
    *VM,
    *NEW,
    *FILES,
    "--do=create,setup,run,delete",
    "--create_flags=--spot --network=files",
    "--prepare=echo 'it is ready'",
    "--",
    *FLAGS,
  ],
  "tpu_vm_stop": ["tpu_vm", *VM, "--do=stop,delete"],
  "tpu_pod": ["tpu_pod", *BASE, *VM],
  "tpu_pod_more": [
    "tpu_pod",
    CONFIG,
    WORKDIR,
    *VM,
    *NEW,
    *FILES,
    "--do=create,setup,run,delete",
    "--create_flags=--spot",
    "--queued=yes",
    "--",
    *FLAGS,
  ],
  "gke_tpu": ["gke", *BASE[:1], "--workdir=/mnt/files/run", *JOB, *TPU],
  "gke_tpu_host": [
    "gke",
    *BASE[:1],
    "--workdir=/mnt/files/run",
    *JOB,
    "--tpu=tpu-v5-lite-podslice",
    "--topology=2x4",
    "--chips_per_node=8",
  ],
  "gke_gpu": [
    "gke",
    CONFIG,
    WORKDIR,
    *JOB,
    "--gpu=nvidia-h100-80gb",
    "--nodes=4",
    "--namespace=lab",
    "--node_selector=cloud.google.com/gke-spot=true,zone=a",
    "--grace_seconds=20",
    "--max_restarts=0",
    "--",
    *FLAGS,
  ],
}

COMMANDS = BEAM | TRAIN
