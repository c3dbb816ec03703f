"""A killed process loses nothing, whenever it is killed."""

import json
import pathlib
import subprocess
import sys

KILLS = 20


def test_killed_at_random_moments_the_bytes_are_the_same(tmp_path):
  done = subprocess.run(
    [sys.executable, "-m", "tests.memory.killed_jobs"]
    + [str(tmp_path), str(KILLS), "0"],
    capture_output=True,
    text=True,
    cwd=pathlib.Path(__file__).parents[2],
  )
  assert done.returncode == 0, done.stderr[-2000:]
  found = json.loads(done.stdout.splitlines()[-1])
  assert found["killed"] == KILLS and found["finished"] >= 1
