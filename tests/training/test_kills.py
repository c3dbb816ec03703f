"""A training that is ended loses nothing and does nothing twice."""

import errno
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from retrieval_aug.training.checkpoint import Checkpoints

ROOT = pathlib.Path(__file__).parents[2]
KILLS, STOPS, SEED = 3, 1, 0


def test_ended_at_random_moments_the_bytes_are_the_same(tmp_path):
  done = subprocess.run(
    [sys.executable, "-m", "tests.training.killed_training"]
    + [str(tmp_path), str(KILLS), str(STOPS), str(SEED)],
    cwd=ROOT,
    # What is compiled runs a few times: optimizing it takes longer.
    env=os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"},
    capture_output=True,
    text=True,
  )
  # The moments are printed, too.
  assert done.returncode == 0, done.stdout + done.stderr[-4000:]
  told = json.loads(done.stdout.splitlines()[-1])
  assert told.pop("finished") >= 1
  assert told.pop("-9") == KILLS and sum(told.values()) == STOPS


@pytest.fixture
def small_disk(tmp_path):
  """A file system of 2 MB."""
  folder = tmp_path / "disk"
  folder.mkdir()
  mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder]
  try:
    done = subprocess.run(mount, capture_output=True)
  except OSError:
    pytest.skip("there is no mount command")
  if done.returncode:
    pytest.skip("mounting a file system is not permitted here")
  yield folder
  subprocess.run(["umount", "--lazy", folder], check=True)


def _state(number):
  return {"kernel": np.random.default_rng(number).normal(size=(100, 100))}


def _save(folder, number):
  with Checkpoints(folder / "checkpoints") as checkpoints:
    checkpoints.save(number, _state(number))


# In a process of its own, as main ends after it, too: threads of Orbax clean up
# for a while after a save that failed.
_SAVE = """
import os, pathlib, sys
from tests.training import test_kills

try:
  test_kills._save(pathlib.Path(sys.argv[1]), 2)
except OSError as error:
  os._exit(error.errno)
"""


@pytest.mark.parametrize("kilobytes", [0, 10, 60])
def test_a_full_disk_is_told_and_the_last_checkpoint_stays(
  small_disk, kilobytes
):
  """Whatever is the first that there is no room for."""
  _save(small_disk, 1)
  filler = small_disk / "filler"
  with pytest.raises(OSError), open(filler, "wb", buffering=0) as f:
    while True:
      f.write(bytes(1024))
  os.truncate(filler, filler.stat().st_size - 1024 * kilobytes)
  done = subprocess.run(
    [sys.executable, "-c", _SAVE, small_disk], cwd=ROOT, capture_output=True
  )
  # Which the main program explains.
  assert done.returncode == errno.ENOSPC, done.stderr
  filler.unlink()
  with Checkpoints(small_disk / "checkpoints") as checkpoints:
    step, state = checkpoints.restore(_state(0))
  assert step == 1
  np.testing.assert_array_equal(state["kernel"], _state(1)["kernel"])
  _save(small_disk, 3)
  with Checkpoints(small_disk / "checkpoints") as checkpoints:
    assert checkpoints.restore(_state(0))[0] == 3
