"""The scripts of launch/: what they would run, and what they refuse.

Golden files: the output of --dry_run, word for word. Regenerate one by running
the command that its test names, in the root of the repository.
"""

import pathlib
import shlex
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "launch"
SCRIPTS = sorted((ROOT / "launch").glob("beam_*.sh"))

BASE = ["--config=configs/emoji.py", "--workdir=/mnt/memory"]
DATAFLOW = ["--project=p", "--region=europe-west4", "--bucket=gs://b"]
DATAFLOW += ["--image=europe-west4-docker.pkg.dev/p/r/retrieval_aug:1"]
PROCESS = '--environment_config={"command": "/opt/apache/beam/boot"}'

COMMANDS = {
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
}


def _launch(script, *arguments):
  return subprocess.run(
    [ROOT / "launch" / f"{script}.sh", *arguments],
    capture_output=True,
    text=True,
    cwd=ROOT,
  )


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_dry_run_prints_the_golden_command(name):
  script, *arguments = COMMANDS[name]
  # Before `--`, after which all goes to the main job.
  done = _launch(script, "--dry_run", *arguments)
  assert (done.returncode, done.stderr) == (0, "")
  assert done.stdout == (GOLDEN / f"{name}.txt").read_text()


def test_every_golden_file_has_its_command():
  assert {path.stem for path in GOLDEN.iterdir()} == set(COMMANDS)


@pytest.mark.parametrize("name", sorted(COMMANDS))
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


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_help_names_every_argument_and_needs_none(path):
  done = _launch(path.stem, "--help")
  assert (done.returncode, done.stderr) == (0, "")
  text = path.read_text()
  known = text.partition("ARG=(\n")[2].partition("\n)")[0]
  names = [word[1:].partition("]")[0] for word in known.split()]
  assert {"config", "workdir", "groups", "stages"} <= set(names)
  assert [n for n in names if f"--{n}=" not in done.stdout] == []
  assert "--dry_run" in done.stdout and "shellcheck" not in done.stdout
  assert "set -euo" not in done.stdout


def test_without_dry_run_the_command_runs(tmp_path):
  python = tmp_path / "python"
  python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
  python.chmod(0o755)
  script, *arguments = COMMANDS["local_more"]
  done = subprocess.run(
    [ROOT / "launch" / f"{script}.sh", *arguments],
    capture_output=True,
    text=True,
    check=True,
    env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
  )
  golden = shlex.split((GOLDEN / "local_more.txt").read_text())
  assert done.stdout.splitlines() == golden[1:]
