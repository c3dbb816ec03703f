"""Several processes: what each is, where they wait, and how they stop."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading

import pytest

from retrieval_aug.common import distributed, group
from retrieval_aug.common.errors import UserError

CHILD = pathlib.Path(__file__).with_name("process_group.py")
COUNT = 3
REMEDY = (
  "look at the log there, and give all processes the same command again, which "
  "goes on where this one stopped"
)


def _start(count, folder):
  with socket.create_server(("127.0.0.1", 0)) as server:
    port = server.getsockname()[1]
  # A proxy, as clusters have it, would answer nothing.
  env = {**os.environ, "JAX_PLATFORMS": "cpu", "http_proxy": "http://[::1]:1"}
  env.pop("XLA_FLAGS", None)
  command = [sys.executable, str(CHILD), f"127.0.0.1:{port}", str(count)]
  return [
    subprocess.Popen(
      [*command, str(i), str(folder / f"{i}.json")],
      env=env,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(count)
  ]


@pytest.fixture(scope="module")
def children(tmp_path_factory):
  """(found, three, two): what three real processes found, how they ended, and
  how two others ended; each as (exit code, stderr)."""
  folder = tmp_path_factory.mktemp("processes")
  three, two = _start(3, folder), _start(2, folder)
  try:
    said = [child.communicate(timeout=100)[1] for child in three + two]
  finally:
    for child in three + two:
      child.kill()
  found = [json.loads((folder / f"{i}.json").read_text()) for i in range(3)]
  ends = [(child.returncode, x) for child, x in zip(three + two, said)]
  return found, ends[:3], ends[3:]


@pytest.fixture(scope="module")
def processes(children):
  return children[0]


def _each(processes, name):
  return [found[name] for found in processes]


def test_each_process_knows_its_role_and_the_devices_of_all(processes):
  assert _each(processes, "role") == [
    [0, 3, True],
    [1, 3, False],
    [2, 3, False],
  ]
  assert _each(processes, "total") == [3.0] * COUNT


def test_a_value_that_differs_is_an_error_in_all_that_names_the_odd_one(
  processes,
):
  assert (
    _each(processes, "agree")
    == [
      "the settings: odd in process 1, but usual in processes 0, 2; start all "
      "with the same command and files."
    ]
    * COUNT
  )


def test_barriers_of_two_places_are_not_taken_for_one(processes):
  assert (
    _each(processes, "place")
    == [
      "process 2 is at 'at 2', but process 0 at 'at 1'; start all with the "
      "same command and files."
    ]
    * COUNT
  )


def test_sigterm_to_one_process_stops_all_at_the_same_step(processes):
  (step,) = set(_each(processes, "stopped"))
  assert step > 3
  assert _each(processes, "sigterm") == [False] * COUNT


def test_a_barrier_names_the_missing_process_in_time(processes):
  missing = [1, 0, 1]  # process 1 comes when process 0 no longer waits
  assert _each(processes, "late") == [
    f"waited 0.3 s for process {i} (of 3) at 'late'; {REMEDY}; "
    "--barrier_timeout=SECONDS waits longer."
    for i in missing
  ]
  assert max(_each(processes, "waited")) < 5


def _check_ends(ends, lines):
  for (code, said), line in zip(ends, lines, strict=True):
    assert re.findall("^error: .*", said, re.MULTILINE) == [line]
    assert "Traceback" not in said
    assert "stack trace" not in said
    assert code == 1


def test_the_error_of_one_process_ends_the_others_with_one_line(children):
  # Process 0 is then in a computation that fails, process 2 in one that hangs.
  ended = f"error: process 1 (of 3) ended too early; {REMEDY}."
  own = "error: an error of process 1 alone"
  _check_ends(children[1], [ended, own, ended])


def test_the_error_of_process_0_ends_the_other_with_one_line(children):
  ended = f"error: process 0 (of 2) ended too early; {REMEDY}."
  own = "error: an error of process 0 alone"
  _check_ends(children[2], [own, ended])


def test_one_process_alone_needs_no_start():
  distributed.start()
  distributed.start("host:1", 1, 0)
  assert distributed.process() == 0
  assert distributed.processes() == 1
  assert distributed.is_first()
  distributed.barrier("any", timeout=0)
  distributed.agree(3, "the seed")
  with pytest.raises(ValueError, match="UNAVAILABLE"):
    with distributed.collectives():
      raise ValueError("UNAVAILABLE")
  distributed.shutdown()


@pytest.mark.parametrize(
  "flags, text",
  [
    (("host:1", 2, -1), "--process_id=I missing: several"),
    (("", 0, 0), "--coordinator=HOST:PORT and --num_processes=N missing"),
    (("host:1", 2, 2), "--num_processes=2 --process_id=2: expected"),
    (("host:1", -1, 0), "--num_processes=-1 --process_id=0: expected"),
    (("host", 2, 1), "--coordinator=host: not HOST:PORT"),
  ],
)
def test_flags_that_make_no_sense_are_refused(flags, text):
  with pytest.raises(UserError, match=re.escape(text)):
    distributed.start(*flags)


def test_distributed_with_other_flags_is_refused():
  with pytest.raises(UserError, match="by itself; leave out --coordinator"):
    distributed.start("host:1", 2, 0, auto=True)


@pytest.fixture
def no_cluster(monkeypatch):
  for name in list(os.environ):
    if name.startswith(("SLURM_", "OMPI_", "KUBERNETES_", "JAX_", "TPU_")):
      monkeypatch.delenv(name)


def test_an_environment_without_a_cluster_is_refused(no_cluster):
  with pytest.raises(UserError, match="--distributed: no TPU pod, Slurm"):
    distributed.start(auto=True)


SLURM = {
  "SLURM_JOB_ID": "70001",
  "SLURM_STEP_NODELIST": "node[07-09],other3",
  "SLURM_NTASKS": "4",
  "SLURM_PROCID": "2",
  "SLURM_LOCALID": "1",
}


def test_slurm_says_which_processes_there_are(no_cluster, monkeypatch):
  for name, value in SLURM.items():
    monkeypatch.setenv(name, value)
  assert group.by_environment(1) == ("node07:61809", 4, 2, [1])
  monkeypatch.setenv("SLURM_NTASKS", "many")
  with pytest.raises(UserError, match=r"cannot be read \(ValueError: .*many"):
    distributed.start(auto=True)
  monkeypatch.setenv("SLURM_NTASKS", "1")
  distributed.start(auto=True)
  assert distributed.processes() == 1


@pytest.fixture
def signals():
  """SIGTERM that come through to the handler there was before."""
  came = []
  former = signal.signal(signal.SIGTERM, lambda *_: came.append("former"))
  yield came
  signal.signal(signal.SIGTERM, former)


def test_the_first_sigterm_asks_and_the_second_ends(signals):
  with distributed.Preemption() as preemption:
    assert not preemption.reached(1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert preemption.reached(2)
    assert signals == []
    os.kill(os.getpid(), signal.SIGTERM)
    assert signals == ["former"]
  with distributed.Preemption() as preemption:
    assert not preemption.reached(1)
  os.kill(os.getpid(), signal.SIGTERM)
  assert signals == ["former"] * 2


def test_a_sigterm_after_the_last_step_is_not_lost(signals):
  with distributed.Preemption() as preemption:
    assert not preemption.reached(1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert signals == []
  assert signals == ["former"]


def test_a_thread_leaves_sigterm_alone(signals):
  found = []

  def train():
    with distributed.Preemption() as preemption:
      os.kill(os.getpid(), signal.SIGTERM)
      found.append(preemption.reached(1))

  thread = threading.Thread(target=train)
  thread.start()
  thread.join()
  assert found == [False]
  assert signals == ["former"]


def test_the_exit_code_is_the_one_of_the_system_for_try_again():
  assert distributed.EXIT_PREEMPTED == os.EX_TEMPFAIL
