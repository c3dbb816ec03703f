"""The same neighbours, whoever searches: plain loop, Beam, Dask, index shards.

  python -m benchmarks.same_neighbors --config=configs/emoji.py
    --workdir=workdir/emoji [--stages=embed,search]

Runs the search stage on the embedding tables of a finished workdir in each way,
each in a folder of its own, and compares ids and scores with those of the plain
loop. With --stages=embed,search the tables are made in each way, too.
"""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np

from retrieval_aug.memory import neighbors
from retrieval_aug.memory.table import Table

PROCESSES = (
  "--runner=FnApiRunner --direct_running_mode=multi_processing "
  "--direct_num_workers=2"
)
DASK = "--runner=DaskRunner --dask_workers=2"
# What is given beside --config.search.searcher=exact.
WAYS = {
  "plain loop": [],
  "4 index shards": ["--config.search.index_rows={quarter}"],
  "Beam, 2 processes, 4 index shards": [
    "--config.search.index_rows={quarter}",
    "--config.search.groups=2",
    f"--beam={PROCESSES}",
  ],
  "Dask cluster, 2 workers, 4 index shards": [
    "--config.search.index_rows={quarter}",
    "--config.search.groups=2",
    f"--beam={DASK}",
  ],
  "ivf": ["--config.search.searcher=ivf"],
  "ScaNN": ["--config.search.searcher=scann"],
  "ScaNN, 4 index shards": [
    "--config.search.searcher=scann",
    "--config.search.index_rows={quarter}",
  ],
}


def main() -> None:
  """Prints a line for each way."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--config", required=True)
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--stages", default="search")
  flags = parser.parse_args()
  rows = Table(flags.workdir / "memory").rows
  print(
    f"{'way':<40} {'same lists':>10} {'same scores':>11} {'overlap':>8} "
    f"{'recall':>7} {'seconds':>8}"
  )
  with tempfile.TemporaryDirectory() as temporary:
    first = None
    for number, (way, options) in enumerate(WAYS.items()):
      folder = pathlib.Path(temporary) / str(number)
      folder.mkdir()
      if "embed" not in flags.stages:
        for name in ("queries", "memory"):
          shutil.copytree(
            flags.workdir / name, folder / name, copy_function=os.link
          )
      command = [sys.executable, "-m", "retrieval_aug.main"]
      command += [f"--config={flags.config}", f"--workdir={folder}"]
      command += [f"--stages={flags.stages}", "--config.memory.leak_sample=0"]
      command += ["--config.search.searcher=exact", "--config.model.name=mam"]
      command += [x.format(quarter=-(-rows // 4)) for x in options]
      begin = time.monotonic()
      done = subprocess.run(command, capture_output=True, text=True)
      spent = time.monotonic() - begin
      if done.returncode:
        print(f"{way:<40} failed: {done.stderr.strip().splitlines()[-1]}")
        continue
      artifact = neighbors.found_in(folder / "neighbors")
      parts = [neighbors.read_split(artifact, s) for s in neighbors.SPLITS]
      ids, scores = (np.concatenate(x) for x in zip(*parts))
      if first is None:
        first = ids, scores
      overlap = np.mean(
        [len(np.intersect1d(a, b)) / len(b) for a, b in zip(ids, first[0])]
      )
      print(
        f"{way:<40} {(ids == first[0]).all(axis=1).mean():>10.4f} "
        f"{(scores == first[1]).all(axis=1).mean():>11.4f} {overlap:>8.4f} "
        f"{artifact.info()['recall']:>7.4f} {spent:>8.1f}",
        flush=True,
      )


if __name__ == "__main__":
  main()
