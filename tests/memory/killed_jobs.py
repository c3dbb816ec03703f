"""Embeds and searches in children that are killed at random moments.

Run as a program by `test_kills.py`. This process imports everything and
computes nothing, so that each child, a fork of it, begins with the work at
once.

  python -m tests.memory.killed_jobs FOLDER KILLS SEED
"""

import hashlib
import json
import os
import pathlib
import signal
import sys
import time

import numpy as np

from retrieval_aug import config as configs
from retrieval_aug.memory import find, neighbors, working_set
from retrieval_aug.memory.table import Table
from tests.training import tiny_images

SEARCH = configs.defaults().search.to_dict() | {
  "searcher": "exact",
  "k": 5,
  "key_transform": "whiten",
  "key_dims": 7,
  "recall_sample": 9,
  "shard_rows": 10,
  "index_rows": 11,
  "groups": 2,
}


def work(folder: pathlib.Path) -> None:
  """All that is missing in a folder."""
  tiny_images.EMBED["shard_rows"] = 5
  tables = tiny_images.embedded(folder)
  found = neighbors.neighbors_artifact(folder / "neighbors", *tables, SEARCH)
  if not found.is_complete():
    find.find(found, *tables, SEARCH)
  rows = working_set.working_set_artifact(folder / "working_set", found, [])
  if not rows.is_complete():
    working_set.gather(rows, found, *tables, [])


def digests(folder: pathlib.Path) -> dict[str, str]:
  """Of all files but manifests, which hold times."""
  return {
    str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(folder.rglob("*"))
    if path.is_file() and path.name not in ("manifest.json", ".lock")
  }


def start(folder: pathlib.Path) -> int:
  """A child at work; its number."""
  pid = os.fork()
  if pid:
    return pid
  code = 1
  try:
    work(folder)
    code = 0
  finally:
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
  folder, kills, seed = pathlib.Path(sys.argv[1]), *map(int, sys.argv[2:])
  rng = np.random.default_rng(seed)
  begin = time.monotonic()
  _, status = os.waitpid(start(folder / "whole"), 0)
  assert status == 0
  whole = time.monotonic() - begin
  expected = digests(folder / "whole")
  number = finished = killed = 0
  while killed < kills or finished < number + 1:
    # A child starts over what the one before left; one that is left alone in
    # the end, or that was quicker than its killer, finishes a folder.
    place = folder / f"killed_{number}"
    pid = start(place)
    if killed < kills:
      time.sleep(rng.uniform(0, whole))
      os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
      assert os.WTERMSIG(status) == signal.SIGKILL
      killed += 1
      continue
    assert status == 0
    finished += 1
    found = digests(place)
    assert found == expected, sorted(set(found.items()) ^ set(expected.items()))
    Table(place / "memory").verify()
    if killed < kills:
      number += 1
  print(json.dumps({"killed": killed, "finished": finished, "whole": whole}))


if __name__ == "__main__":
  main()
