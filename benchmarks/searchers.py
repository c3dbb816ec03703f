"""Core-seconds of our searchers: to build an index, and to search it.

  python -m benchmarks.searchers [--keys=100000] [--queries=1000] [--dim=768]
    [--neighbors=100] [--kinds=exact,ivf,scann]

Prints, for each searcher, the core-seconds a key of building its index, those
a key and query of a search that is compiled already, and the recall of 100
queries. The points are random ones in clusters: easy data, of which the rates
mean more than the recall. Our inverted file is tuned first, to recall 0.95 and
for a job of 185,846 queries (all of ImageNet-LT). What docs/memories.md and
docs/scale.md reckon with comes from here.
"""

import argparse
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from retrieval_aug.memory import search, searchers, tune

# Keys of a cluster, and dims in which they are spread.
CLUSTER, SPREAD = 1000, 48
# What the inverted file is tuned to, and for how many queries.
TARGET, JOB = 0.95, 185_846
# Queries of which the recall is measured.
CHECKED = 100


class Rates(NamedTuple):
  """What a searcher takes, and finds.

  Attributes:
    build: core-seconds a key.
    search: core-seconds a key and query.
    recall: share of the true neighbors that it finds.
    options: that it was built with.
  """

  build: float
  search: float
  recall: float
  options: dict[str, Any]


def measure(
  num_keys: int,
  num_queries: int,
  dim: int,
  k: int,
  kinds: Sequence[str] = ("exact", "ivf", "scann"),
) -> dict[str, Rates]:
  """Builds indexes of random keys, and searches them.

  Args:
    num_keys: in the index.
    num_queries: that are asked.
    dim: of keys and queries.
    k: neighbors of each query.
    kinds: of searchers, see `searchers.KINDS`.

  Returns:
    Rates by searcher.
  """
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.standard_normal(shape, np.float32)
  centers = normal(num_keys // CLUSTER + 1, dim)
  points = centers[rng.integers(len(centers), size=num_keys + num_queries)]
  spread = normal(len(points), SPREAD)
  points += spread @ normal(SPREAD, dim) / np.float32(SPREAD**0.5)
  unit = search.normalize(points, "points")
  keys, queries = unit[:num_keys], unit[num_keys:]
  rates = {}
  for kind in kinds:
    options = {}
    if kind == "ivf":
      options = tune.choose(
        kind,
        {},
        keys,
        queries,
        k,
        n_keys=num_keys,
        n_queries=JOB,
        recall_target=TARGET,
      ).parameters
    start = time.process_time()
    engine = searchers.build(kind, keys, search.wanted(k, num_keys), options)
    build = time.process_time() - start
    engine.candidates(queries, k)  # compiles
    start = time.process_time()
    engine.candidates(queries, k)
    find = time.process_time() - start
    result = search.search(engine, keys, queries, k)
    recall = search.measure_recall(result, keys, queries, k, CHECKED)
    rates[kind] = Rates(
      build / num_keys, find / num_keys / num_queries, recall, options
    )
  return rates


def main() -> None:
  """Prints a line for each searcher."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--keys", type=int, default=100_000)
  parser.add_argument("--queries", type=int, default=1000)
  parser.add_argument("--dim", type=int, default=768)
  parser.add_argument("--neighbors", type=int, default=100)
  parser.add_argument("--kinds", default="exact,ivf,scann")
  flags = parser.parse_args()
  sizes = (flags.keys, flags.queries, flags.dim, flags.neighbors)
  for kind, rates in measure(*sizes, flags.kinds.split(",")).items():
    print(
      f"{kind}: {rates.build:.1e} core-s a key to build, {rates.search:.1e} "
      f"core-s a key and query, recall {rates.recall:.3f} "
      f"{rates.options or ''}",
      flush=True,
    )


if __name__ == "__main__":
  main()
