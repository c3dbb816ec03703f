"""What the scripts of launch/ do when they run, without --dry_run.

The programs that they start (gcloud, kubectl, sbatch, srun, python) are
replaced by ones that tell what they were called with. A TPU VM is a folder
here, and what is sent to it by ssh runs in it.
"""

import shlex
import signal
import subprocess
import sys
import time

import pytest
import yaml

from tests import launch_fakes
from tests.launch_commands import CONFIG, FLAGS, GOLDEN, ROOT, TRAIN, WORKDIR


@pytest.fixture
def fakes(tmp_path):
  return launch_fakes.make(tmp_path)


def _words(*flags, stages="train,evaluate,report"):
  """The words of main, with odd ones."""
  job = ["-m", "retrieval_aug.main", CONFIG, WORKDIR, f"--stages={stages}"]
  return [*job, *flags, *FLAGS]


def test_beam_starts_main_with_every_word_whole(fakes):
  assert fakes.launch("local_more").returncode == 0
  golden = shlex.split((GOLDEN / "local_more.txt").read_text())
  assert fakes.calls() == [golden]


_OTHERS = ["--coordinator=10.0.0.2:8476", "--num_processes=2", "--process_id=1"]


@pytest.mark.parametrize(
  ("name", "flags"), [("gpu_more", []), ("gpu_nodes", _OTHERS)]
)
def test_gpu_starts_main_with_every_word_whole(fakes, name, flags):
  done = fakes.launch(name)
  assert (done.returncode, done.stdout) == (0, "this is main\n")
  assert fakes.calls() == [["python", *_words(*flags)]]


@pytest.mark.parametrize(
  ("codes", "last"),
  [(["75", "143", "0"], 0), (["75", "1", "0"], 1), (["137", "0"], 137)],
)
def test_what_has_saved_is_started_again_and_nothing_else(fakes, codes, last):
  done = fakes.launch("gpu", codes=codes)
  assert done.returncode == last
  assert len(fakes.calls()) == codes.index(str(last)) + 1


def _until(happened):
  for _ in range(500):
    if happened():
      return
    time.sleep(0.02)
  raise AssertionError("waited too long")


@pytest.mark.parametrize("told", [signal.SIGTERM, signal.SIGINT])
def test_a_launcher_that_is_told_to_stop_tells_main_and_waits(fakes, told):
  fakes.write("record.codes", "wait\n0\n")
  script, *arguments = TRAIN["gpu"]
  # Tests that run in the background ignore SIGINT, and hand that down: a small
  # Python hears it again and becomes the launcher (`preexec_fn` would fork this
  # process with jax's threads in it).
  heard = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "os.execv(sys.argv[1], sys.argv[1:])"
  )
  process = subprocess.Popen(
    [
      *(sys.executable, "-c", heard),
      *(ROOT / "launch" / f"{script}.sh", *arguments),
    ],
    env=fakes.env,
    cwd=ROOT,
  )
  _until(lambda: fakes.is_there("record.waits"))
  process.send_signal(told)
  assert process.wait(timeout=60) == 75
  assert len(fakes.calls()) == 1  # it is not started again


@pytest.mark.parametrize("name", ["gpu_more", "slurm_more", "gke_gpu"])
def test_what_dry_run_prints_is_what_runs(fakes, name):
  seen = []
  for run in (
    lambda: fakes.launch(name),
    lambda: fakes.run(["bash", GOLDEN / f"{name}.txt"]),
  ):
    assert run().returncode == 0
    seen.append(
      (fakes.calls(), fakes.is_there("record.stdin") and fakes.stdin())
    )
  assert seen[0] == seen[1]


@pytest.mark.parametrize(
  ("code", "queued_again"), [(0, False), (1, False), (75, True), (143, True)]
)
def test_slurm_queues_a_job_again_that_has_saved(fakes, code, queued_again):
  assert fakes.launch("slurm_more").returncode == 0
  assert fakes.calls() == [["sbatch"]]
  script = fakes.stdin()
  assert script.startswith("#!/bin/bash\n#SBATCH --job-name=mam\n")
  # What the nodes would run; the sandbox has no `module` and no environment.
  script = "module() { :; }; source() { :; }\n" + script
  env = {"CODE": str(code), "SLURM_JOB_ID": "7"}
  assert fakes.run(["bash", "-c", script], **env).returncode == code
  (call,) = fakes.calls_of("srun")
  assert call[-len(_words("--distributed")) :] == _words("--distributed")
  again = [["requeue", "7"]] if queued_again else []
  assert fakes.calls_of("scontrol") == again


def _jobset(fakes, name):
  assert fakes.launch(name).returncode == 0
  (call,) = fakes.calls()
  assert call[:2] == ["kubectl", "apply"] and "--filename=-" in call
  return yaml.safe_load(fakes.stdin())


def _pod(jobset):
  (job,) = jobset["spec"]["replicatedJobs"]
  return job["template"]["spec"], job["template"]["spec"]["template"]["spec"]


def test_gke_makes_a_jobset_that_is_started_anew_after_saving(fakes):
  jobset = _jobset(fakes, "gke_gpu")
  assert (jobset["apiVersion"], jobset["kind"]) == (
    "jobset.x-k8s.io/v1alpha2",
    "JobSet",
  )
  assert jobset["metadata"] == {"name": "mam"}
  job, pod = _pod(jobset)
  # No other pod takes the place of one that ended: all are made anew.
  assert (job["backoffLimit"], pod["restartPolicy"]) == (0, "Never")
  assert (job["completionMode"], job["completions"]) == ("Indexed", 4)
  assert job["parallelism"] == 4
  saved, taken = job["podFailurePolicy"]["rules"]
  assert saved["onExitCodes"] == {
    "containerName": pod["containers"][0]["name"],
    "operator": "In",
    "values": [75, 143],
  }
  # A string: Kubernetes refuses a boolean there.
  assert taken["onPodConditions"] == [
    {"type": "DisruptionTarget", "status": "True"}
  ]
  assert saved["action"] == taken["action"] == "FailJob"
  policy = jobset["spec"]["failurePolicy"]
  assert policy == {
    "maxRestarts": 0,
    "rules": [
      {
        "action": "RestartJobSetAndIgnoreMaxRestarts",
        "onJobFailureReasons": ["PodFailurePolicy"],
      }
    ],
  }
  assert pod["terminationGracePeriodSeconds"] == 20
  assert pod["nodeSelector"] == {
    "cloud.google.com/gke-accelerator": "nvidia-h100-80gb",
    "cloud.google.com/gke-spot": "true",
    "zone": "a",
  }


def test_gke_gives_main_every_word_whole(fakes):
  _, pod = _pod(_jobset(fakes, "gke_gpu"))
  (container,) = pod["containers"]
  first = ["--coordinator=mam-train-0-0.mam:8476", "--num_processes=4"]
  # $$ is how Kubernetes writes a $ that it must leave alone.
  words = [w.replace("$(photo)", "$$(photo)") for w in _words(*first)]
  index = "--process_id=$(JOB_COMPLETION_INDEX)"
  assert container["command"] == ["python", *words, index]
  assert container["resources"] == {"limits": {"nvidia.com/gpu": 8}}
  mounts = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}
  assert mounts == {"work": "/mnt/files", "shared-memory": "/dev/shm"}
  volumes = {v.pop("name"): v for v in pod["volumes"]}
  assert volumes["work"] == {"persistentVolumeClaim": {"claimName": "memory"}}
  assert volumes["shared-memory"] == {"emptyDir": {"medium": "Memory"}}


@pytest.mark.parametrize(
  ("name", "nodes", "chips", "distributed"),
  [("gke_tpu", 4, 4, True), ("gke_tpu_host", 1, 8, False)],
)
def test_gke_counts_the_nodes_of_a_slice(
  fakes, name, nodes, chips, distributed
):
  jobset = _jobset(fakes, name)
  job, pod = _pod(jobset)
  assert (job["completions"], job["parallelism"]) == (nodes, nodes)
  (container,) = pod["containers"]
  assert container["resources"] == {"limits": {"google.com/tpu": chips}}
  assert ("--distributed" in container["command"]) == distributed
  # All pods in one slice, where there are several.
  assert ("annotations" in jobset["metadata"]) == distributed
  assert set(pod["nodeSelector"]) == {
    "cloud.google.com/gke-tpu-accelerator",
    "cloud.google.com/gke-tpu-topology",
  }


def _steps(fakes):
  """The commands of gcloud, as "tpu-vm create"."""
  return [" ".join(call[2:4]) for call in fakes.calls_of("gcloud")]


def test_a_tpu_vm_that_is_preempted_is_made_anew(fakes):
  fakes.write("record.lost")
  done = fakes.launch("tpu_vm_more")
  assert (done.returncode, done.stdout.count("this is main")) == (0, 1)
  made = ["tpu-vm create", "tpu-vm describe"]
  ready = ["tpu-vm ssh", "tpu-vm scp", "tpu-vm ssh", "tpu-vm ssh"]
  assert _steps(fakes) == [
    "tpu-vm describe",
    *made,
    *ready,  # the last of which is cut
    "tpu-vm describe",
    "tpu-vm describe",
    "tpu-vm delete",
    "tpu-vm describe",
    *made,
    *ready,
    "tpu-vm delete",
  ]
  create = fakes.calls_of("gcloud")[1]
  assert create[-4:] == [
    "--accelerator-type=v6e-8",
    "--version=v2-alpha-tpuv6e",
    "--spot",
    "--network=files",
  ]
  assert fakes.calls_of("python") == [_words()]
  (mount, *_) = [c for c in fakes.calls_of("sudo") if c[0] == "mount"]
  assert mount[-2:] == ["10.0.0.2:/vol1", "/mnt/files"]
  assert ["mkdir", "-p", "/mnt/files/my runs"] in fakes.calls_of("sudo")


def test_a_tpu_vm_goes_on_until_it_is_told_to_stop(fakes):
  fakes.write("record.codes", "75\nwait\n")
  python = fakes.folder / "home" / "retrieval_aug" / ".venv/bin/python"
  python.parent.mkdir(parents=True)
  python.write_text(launch_fakes.FAKE)
  python.chmod(0o755)
  pod = [ROOT / "launch" / "tpu_pod.sh", *TRAIN["tpu_pod"][1:]]
  follow = lambda: subprocess.Popen(
    [*pod, "--", *FLAGS], env=fakes.env, cwd=ROOT, stdout=subprocess.PIPE
  )
  following = [follow()]
  _until(lambda: fakes.is_there("record.waits"))
  # One who comes later follows what runs, and starts nothing.
  following.append(follow())
  assert following[1].stdout.readline() == b"this is main\n"
  stop = [*pod, "--do=stop"]
  subprocess.run(stop, env=fakes.env, cwd=ROOT, check=True, timeout=60)
  outputs = [process.communicate(timeout=60)[0] for process in following]
  assert [process.returncode for process in following] == [75, 75]
  assert outputs[0] == b"this is main\n" * 2
  assert len(fakes.calls_of("python")) == 2
  assert fakes.calls_of("python")[0][-3:] == ["--distributed", *FLAGS]
  assert all("--worker=all" in c for c in fakes.calls_of("gcloud"))


def test_a_vm_that_cannot_be_made_ends_it(fakes):
  # The request failed for good.
  fakes.write("record.vm", "FAILED")
  done = fakes.launch("tpu_pod_more")
  assert (done.returncode, done.stderr) == (1, "FAILED")
  assert _steps(fakes) == ["queued-resources describe"] * 2
