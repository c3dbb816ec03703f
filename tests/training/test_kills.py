"""A killed training loses nothing and does nothing twice, whenever it is."""

import json
import os
import pathlib
import subprocess
import sys

KILLS, STOPS, SEED = 4, 1, 0


def test_ended_at_random_moments_the_bytes_are_the_same(tmp_path):
  done = subprocess.run(
    [sys.executable, "-m", "tests.training.killed_training"]
    + [str(tmp_path), str(KILLS), str(STOPS), str(SEED)],
    cwd=pathlib.Path(__file__).parents[2],
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
