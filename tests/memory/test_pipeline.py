"""Beam does what the plain loop does, whatever happens to its workers."""

import functools
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from retrieval_aug.common.errors import UserError
from retrieval_aug.memory import beam_runners, jobs, pipeline

HERE = pathlib.Path(__file__).parent

pytest.importorskip("apache_beam", reason="needs apache-beam")


@pytest.fixture
def tiny(monkeypatch):
  monkeypatch.syspath_prepend(HERE)
  import tiny_job

  return tiny_job


@pytest.fixture
def faults(tmp_path):
  folder = tmp_path / "faults"
  folder.mkdir()
  return folder


@pytest.fixture
def run(tiny, tmp_path, faults):
  """Runs the job in threads of this process."""
  return lambda *options: pipeline.run(
    functools.partial(tiny.make, tmp_path / "out", faults), options
  )


@pytest.fixture
def run_child(tmp_path, faults):
  """Runs the job in a process with workers; returns what it said, bars apart.

  Nothing but progress bars and an error may be there.
  """

  def run(*options):
    done = subprocess.run(
      [sys.executable, HERE / "tiny_job.py", "out", "faults", *options],
      cwd=tmp_path,
      env=os.environ | {"PYTHONPATH": str(HERE)},
      capture_output=True,
      text=True,
    )
    assert done.stdout == ""
    lines = re.split(r"[\r\n]+", done.stderr)
    lines = [x for x in lines if x and not x.startswith("tiny: ")]
    assert len(lines) == (done.returncode != 0), done.stderr
    return lines[0] if lines else ""

  return run


def _contents(folder):
  return {
    path.relative_to(folder).as_posix(): path.read_bytes()
    for path in folder.rglob("*")
    if path.is_file()
  }


@pytest.fixture
def plain(tiny, tmp_path):
  """What the plain loop writes."""
  (tmp_path / "no_faults").mkdir()
  jobs.run(tiny.make(tmp_path / "plain", tmp_path / "no_faults"))
  return _contents(tmp_path / "plain")


def test_in_memory_is_the_plain_loop(
  run, tiny, tmp_path, faults, plain, capsys
):
  run()
  assert _contents(tmp_path / "out") == plain
  order = list(tiny.began(faults))
  assert sorted(order[:6]) == tiny.unit_names("square")
  assert sorted(order[6:]) == tiny.unit_names("sum")
  said = capsys.readouterr().err
  assert "60/60" in said and "20/20" in said
  # One job in the process, the driver's, which alone closes it.
  assert (faults / "closed").read_text() == f"{os.getpid()}\n"


def test_dead_units_are_listed_and_all_others_done(
  run, tiny, tmp_path, faults, plain
):
  out = tmp_path / "out"
  for unit in ("square-4", "square-1"):
    (faults / unit).write_text("user")
  with pytest.raises(UserError) as caught:
    run()
  assert str(caught.value) == (
    f"{out}/dead_units.jsonl: 2 units failed (square-1: square-1.txt: bad; "
    "mend it; square-4: square-4.txt: bad; mend it); what else could be done "
    "is done. Mend what the file names and run the same command again."
  )
  lines = (out / "dead_units.jsonl").read_text().splitlines()
  assert [json.loads(line) for line in lines] == [
    {"phase": "square", "unit": u, "reason": f"{u}.txt: bad; mend it."}
    for u in ("square-1", "square-4")
  ]
  # Of the next phase none has begun.
  assert tiny.began(faults) == dict.fromkeys(tiny.unit_names("square"), 1)
  for path in faults.iterdir():
    path.unlink()
  run()
  assert set(tiny.began(faults)) == {"square-1", "square-4", "sum-0", "sum-1"}
  assert _contents(out) == plain


def test_a_phase_whose_units_cannot_be_listed_is_dead(run, faults):
  (faults / "sum").write_text("user")
  with pytest.raises(UserError, match=r"1 unit failed \(sum: sum.txt: bad"):
    run()


def test_a_bug_is_the_runners_error_and_loses_nothing(run, tiny, faults):
  (faults / "square-3").write_text("bug")
  with pytest.raises(ZeroDivisionError, match="a bug"):
    run()
  done = set(tiny.began(faults)) - {"square-3"}
  assert done
  (faults / "square-3").unlink()
  (faults / "log").unlink()
  run()
  assert not done & set(tiny.began(faults))


def test_a_worker_that_does_not_see_the_folder_says_so(run, faults):
  (faults / "square-3").write_text("blind")
  with pytest.raises(UserError, match="all workers need --workdir at the same"):
    run()


def test_a_full_disk_of_a_worker_is_told(run, faults):
  (faults / "square-3").write_text("full")
  with pytest.raises(UserError, match="no space left .No space left on device"):
    run()


def test_two_processes_are_the_plain_loop_and_a_killed_one_costs_its_unit(
  run_child, run, tiny, tmp_path, faults, plain
):
  (faults / "square-2").write_text("kill")
  error = run_child("--direct_num_workers=2")
  assert error == (
    "error: out: a Beam worker died in the middle of a unit (killed, or out of "
    "memory); the same command goes on and redoes no finished unit. If it "
    "dies again, use fewer workers or smaller shards."
  )
  records = (tmp_path / "out" / ".shards").glob("*.json")
  done = {path.stem for path in records}
  assert done and "square-2" not in done
  for name in ("log", "closed"):
    (faults / name).unlink(missing_ok=True)
  (faults / "square-2").write_text("lock")
  (faults / "sum-1").write_text("user")
  error = run_child("--direct_num_workers=2")
  assert error.startswith("error: out/dead_units.jsonl: 1 unit failed (sum-1")
  every = {u for p in tiny.COUNTS for u in tiny.unit_names(p)}
  assert set(tiny.began(faults)) == every - done
  assert not (faults / "square-2").exists()  # the folder was locked
  # Each worker closes its job, and the driver its own.
  pids = (faults / "closed").read_text().split()
  assert len(pids) == len(set(pids)) and 2 <= len(pids) <= 3
  (faults / "sum-1").unlink()
  run()
  assert _contents(tmp_path / "out") == plain


def test_dask_does_the_unit_of_a_killed_worker_again(
  run_child, tiny, tmp_path, faults, plain
):
  pytest.importorskip("distributed", reason="needs dask[distributed]")
  # One of two partitions has square-1, -3 and -5, of which the first is done.
  (faults / "square-3").write_text("kill")
  options = ["--dask_workers=2", "--dask_npartitions=2"]
  assert run_child("--runner=DaskRunner", *options) == ""
  assert tiny.began(faults).pop("square-3") == 2
  assert set(tiny.began(faults).values()) == {1, 2}
  assert [u for u, n in tiny.began(faults).items() if n == 2] == ["square-3"]
  assert _contents(tmp_path / "out") == plain


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (["direct_num_workers=2"], "'direct_num_workers=2': write it as --name="),
    (
      ["--direct_num_worker=2"],
      "--direct_num_worker: unknown; did you mean --direct_num_workers",
    ),
    (["--direct_num_workers=two"], "invalid int value: 'two'"),
    (["--direct_running_mode=threads"], "invalid choice: 'threads'"),
    (["--dask_workers=2"], "--dask_workers: goes with --runner=DaskRunner"),
    (
      ["--runner=DaskRunner", "--dask_workers=0"],
      "--dask_workers=0: not a number from 1 on",
    ),
    (["--runner=NoRunner"], "Unexpected pipeline runner: NoRunner"),
    (
      [
        "--runner=DaskRunner",
        "--dask_client_address=tcp://127.0.0.1:9",
        "--dask_connection_timeout=1",
      ],
      "the cluster cannot be reached .*127.0.0.1:9",
    ),
  ],
  ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_wrong_options_are_told(run, options, message, capfd):
  with pytest.raises(UserError, match=message):
    run(*options)
  assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
  ("module", "options"),
  [("apache_beam", []), ("distributed", ["--runner=DaskRunner"])],
)
def test_a_missing_package_is_named_with_its_remedy(
  run, monkeypatch, module, options
):
  monkeypatch.setitem(sys.modules, module, None)
  with pytest.raises(UserError, match=r"pip install 'retrieval_aug\[scale\]'"):
    run(*options)


def test_workers_share_the_cores():
  two = beam_runners.parse(["--direct_num_workers=2"])
  assert two.workers == 2 and beam_runners._PROCESSES in two.flags
  every = beam_runners.parse(["--direct_num_workers=0"])
  assert every.workers == beam_runners.cores()
  before = dict(os.environ)
  with two.started():
    share = str(max(1, beam_runners.cores() // 2))
    assert os.environ["OMP_NUM_THREADS"] == share
  assert dict(os.environ) == before
