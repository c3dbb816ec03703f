"""The scripts of launch/: what they would run, and what they refuse.

Golden files: the output of --dry_run, word for word. Regenerate one by running
the command that its test names, in the root of the repository.
"""

import mmap
import pathlib
import re
import shlex
import shutil
import subprocess

import pytest

from tests.launch_commands import BEAM, COMMANDS, GOLDEN, PROCESS, ROOT, TRAIN

FILES = sorted((ROOT / "launch").glob("*.sh"))
SCRIPTS = [path for path in FILES if not path.stem.startswith("common")]

_GPU = "gpu --config=c --workdir=w "
_SLURM = "slurm --config=c --workdir=w "
_VM = "tpu_vm --name=n --project=p --zone=z "
_GKE = "gke --config=c --workdir=/m/w --name=n --image=i --claim=c "
_GKE += "--mount_at=/m "

REFUSED = {
  "beam_local": "needs --config=... --workdir=...; see --help.",
  "beam_local --config=c": "needs --workdir=...; see --help.",
  "beam_local --config=c --workdir=w --worker=2": (
    "unknown argument --worker; see --help."
  ),
  "beam_local --config=c --workdir=w --workers": (
    "unexpected --workers; arguments are --name=value, see --help."
  ),
  "beam_local --config=c --workdir=w --workers=two": (
    "--workers=two: not a whole number from 1 on."
  ),
  "beam_local --config=c --workdir=w --workers=2 --groups=0": (
    "--groups=0: not a whole number from 1 on."
  ),
  "beam_dask --config=c --workdir=w": "needs --workers=...; see --help.",
  "beam_dataflow --config=c --workdir=/w": (
    "needs --project=... --region=... --bucket=... --image=...; see --help."
  ),
  "beam_dataflow --config=c --workdir=/w --project=p --region=r --bucket=b "
  "--image=i": "--bucket=b: write it as gs://NAME.",
  "beam_dataflow --config=c --workdir=w --project=p --region=r "
  "--bucket=gs://b --image=i": (
    "--workdir=w: workers need an absolute, mounted path."
  ),
  "beam_flink --config=c --workdir=/w": (
    "needs --master=... or --job_endpoint=...; see --help."
  ),
  "beam_flink --config=c --workdir=/w --master=m --job_endpoint=e": (
    "--master and --job_endpoint exclude each other."
  ),
  "beam_flink --config=c --workdir=/w --master=m --environment_type=DOCKER": (
    "this --environment_type needs --environment_config=...; see --help."
  ),
  "beam_flink --config=c --workdir=/w --master=m --environment_type=VM": (
    "--environment_type=VM: not one of EXTERNAL, PROCESS, DOCKER, LOOPBACK."
  ),
  "gpu": "needs --config=... --workdir=...; see --help.",
  _GPU + "--gpus=0,,1": "--gpus=0,,1: not numbers of GPUs, as in 0,1.",
  _GPU + "--memory_fraction=0.0": (
    "--memory_fraction=0.0: not a number above 0, at most 1."
  ),
  _GPU + "--nodes=2": "needs --node_rank=... --coordinator=...; see --help.",
  _GPU + "--nodes=2 --node_rank=2 --coordinator=h:1": (
    "--node_rank=2: ranks of --nodes=2 end before it."
  ),
  _GPU + "--nodes=2 --node_rank=1 --coordinator=h": (
    "--coordinator=h: not HOST:PORT."
  ),
  _GPU + "--node_rank=1": (
    "--node_rank and --coordinator are of several machines; give --nodes=..."
  ),
  _SLURM + "--nodes=0": "--nodes=0: not a whole number from 1 on.",
  _SLURM + "--gpus_per_node=all": (
    "--gpus_per_node=all: not a whole number from 0 on."
  ),
  _SLURM + "--partition=a;b": (
    "--partition=a;b: not something that a line of #SBATCH can hold."
  ),
  _SLURM + "--sbatch_flags=-q": ("--sbatch_flags=-q: -q is not --NAME=VALUE."),
  "tpu_vm": "needs --name=... --project=... --zone=...; see --help.",
  _VM: "needs --config=... --workdir=...; see --help.",
  _VM + "--do=create": (
    "needs --accelerator_type=... --runtime_version=...; see --help."
  ),
  _VM + "--do=setup,walk": (
    "--do=setup,walk: walk is none of create, setup, run, stop, delete."
  ),
  _VM + "--do=,": "--do=,: names nothing to do.",
  _VM + "--do=stop --queued=1": "--queued=1: not yes or no.",
  _VM + "--config=configs/c.py --workdir=w": (
    "--workdir=w: not an absolute path, which is of the VM."
  ),
  _VM + "--config=c.py --workdir=/w": (
    "--config=c.py: give a file in configs/, which is copied."
  ),
  _VM + "--do=setup --nfs=files": "--nfs=files: not HOST:/SHARE.",
  _VM + "--config=configs/c.py --workdir=/w --nfs=h:/s --mount_at=/m": (
    "--workdir=/w: not below --mount_at=/m, where --nfs is mounted."
  ),
  _VM.replace("vm", "pod") + "--stages=search,train": (
    "--stages=search,train: search runs before, on one machine."
  ),
  _VM.replace("vm", "pod") + "--do=setup": (
    "all hosts need one file system: give --nfs=... or --prepare=..."
  ),
  "gke --config=c --workdir=w": (
    "needs --name=... --image=... --claim=...; see --help."
  ),
  _GKE.replace("=n ", "=N "): (
    "--name=N: not up to 40 small letters, digits and -, a letter first."
  ),
  _GKE.replace("/m/w", "/w"): "--workdir=/w: not below --mount_at=/m.",
  _GKE: (
    "needs --tpu=... --topology=..., or --gpu=..., and not options of both; "
    "see --help."
  ),
  _GKE + "--gpu=g --topology=4x4": (
    "needs --tpu=... --topology=..., or --gpu=..., and not options of both; "
    "see --help."
  ),
  _GKE + "--tpu=t": "needs --topology=...; see --help.",
  _GKE + "--tpu=t --topology=16": "--topology=16: not sizes, as in 4x4.",
  _GKE + "--tpu=t --topology=3x3": (
    "--topology=3x3: its 9 chips are no multiple of --chips_per_node=4."
  ),
  _GKE + "--gpu=g --node_selector=spot": (
    "--node_selector=spot: spot is not KEY=VALUE."
  ),
}


def _launch(script, *arguments):
  return subprocess.run(
    [ROOT / "launch" / f"{script}.sh", *arguments],
    capture_output=True,
    text=True,
    cwd=ROOT,
  )


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_dry_run_prints_the_golden_text(name):
  script, *arguments = COMMANDS[name]
  # Before `--`, after which all goes to the main job.
  done = _launch(script, "--dry_run", *arguments)
  assert (done.returncode, done.stderr) == (0, "")
  assert done.stdout == (GOLDEN / f"{name}.txt").read_text()


def test_every_golden_file_has_its_command():
  assert {path.stem for path in GOLDEN.iterdir()} == set(COMMANDS)


@pytest.mark.parametrize("name", sorted(BEAM))
def test_beam_takes_the_options(name):
  pytest.importorskip("apache_beam", reason="needs apache-beam")
  pytest.importorskip("distributed", reason="needs dask[distributed]")
  from retrieval_aug.memory import beam_runners

  words = shlex.split((GOLDEN / f"{name}.txt").read_text())
  (options,) = [w for w in words if w.startswith("--beam=")]
  options = shlex.split(options.partition("=")[2])
  # Strict, whatever the runner: an option that Beam does not know is an error.
  beam_runners._parse_arguments(
    [o for o in options if not o.startswith(beam_runners._WORKERS)], strict=True
  )
  runner = beam_runners.parse(options)
  assert f"--runner={runner.name}" in options
  if name == "flink_endpoint":
    assert PROCESS in runner.flags


@pytest.mark.parametrize("line", sorted(REFUSED))
def test_refused_in_one_line(line):
  script, *arguments = line.split()
  done = _launch(script, *arguments, "--dry_run")
  assert (done.returncode, done.stdout) == (1, "")
  assert done.stderr == f"error: {script}.sh: {REFUSED[line]}\n"


@pytest.mark.parametrize("where", [["--gpus=0\n1"], ["--", "--config.x=a\nb"]])
def test_line_breaks_are_refused(where):
  done = _launch("gpu", "--dry_run", "--config=c", "--workdir=w", *where)
  assert (done.returncode, done.stdout) == (1, "")
  assert done.stderr == "error: gpu.sh: an argument holds a line break.\n"


def test_tpu_scripts_are_started_in_the_root(tmp_path):
  done = subprocess.run(
    [ROOT / "launch" / "tpu_vm.sh", *_VM.split()[1:]]
    + ["--do=setup", "--dry_run"],
    capture_output=True,
    text=True,
    cwd=tmp_path,
  )
  assert done.returncode == 1
  assert "in the root of the repository" in done.stderr


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_help_names_every_argument_and_needs_none(path):
  done = _launch(path.stem, "--help")
  assert (done.returncode, done.stderr) == (0, "")
  text = path.read_text()
  known = text.partition("ARG=(\n")[2].partition("\n)")[0]
  names = re.findall(r"\[(\w+)\]=", known)
  assert {"config", "workdir", "stages"} <= set(names)
  assert [n for n in names if f"--{n}=" not in done.stdout] == []
  assert "--dry_run" in done.stdout and "shellcheck" not in done.stdout
  assert "set -euo" not in done.stdout


def _told():
  """Commands of the documentation that start a script."""
  pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
  for page in pages:
    yield from re.findall(r"^launch/.*$", page.read_text(), re.MULTILINE)


@pytest.mark.parametrize("command", sorted(set(_told())))
def test_scripts_take_the_commands_of_the_documentation(command):
  before, _, after = command.partition(" -- ")
  text = f"{before} --dry_run" + (f" -- {after}" if after else "")
  done = subprocess.run(
    ["bash", "-c", text], capture_output=True, text=True, cwd=ROOT
  )
  assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_bash_can_read_it(path):
  subprocess.run(["bash", "-n", path], check=True)


def test_shellcheck_finds_nothing():
  if shutil.which("shellcheck") is None:
    pytest.skip("needs shellcheck")
  command = ["shellcheck", "--external-sources", "--source-path=SCRIPTDIR"]
  done = subprocess.run([*command, *FILES], capture_output=True, text=True)
  assert done.stdout == ""


def test_main_has_the_flags_that_are_given():
  main = (ROOT / "retrieval_aug" / "main.py").read_text()
  known = set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', main))
  given = set()
  for name in TRAIN:
    text = (GOLDEN / f"{name}.txt").read_text()
    for command in re.findall(r"-m retrieval_aug\.main(.*)", text):
      given |= set(re.findall(r"\s'?--(\w+)[ =]", command))
  assert {"config", "workdir", "stages", "distributed"} <= given
  assert given <= known


def test_xla_knows_the_flag_that_gpu_sets():
  """An unknown one would end JAX at its start."""
  jaxlib = pytest.importorskip("jaxlib")
  (flag,) = re.findall(r"--(xla_gpu_\w+)=", (GOLDEN / "gpu.txt").read_text())
  library = pathlib.Path(jaxlib.__file__).parent / "libjax_common.so"
  with (
    open(library, "rb") as file,
    mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as binary,
  ):
    assert binary.find(flag.encode()) >= 0
