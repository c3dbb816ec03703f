"""How engines scale with the memory: rates at recall 0.95, jobs at 0.99.

  python -m benchmarks.search_scale [--sizes=1e4,1e5,1e6]
    [--queries=1e3,1e4,1e5] [--dim=256] [--neighbors=100] [--keys=FILE.npy]
    [--engines=exact,ivf,...] [--out=FILE]

Two tables. The first: of every engine at recall 0.95, the queries a
core-second and the bytes a key, and how the time of a query grows with the
keys. The second: a whole job, build and search at recall 0.99, of every engine
tuned by hand (its tuning is not counted) and of what `auto` picks. The ratio
of both leaves auto's tuning out, too; in brackets it is counted.

All are given the same threads. Times are core-seconds of this process, which
another process on the machine disturbs less than the clock; wall seconds stand
beside them. An index is built once a size for all numbers of queries, but our
inverted file, whose lists depend on these. Search is timed on at most 2,000
queries (of `auto` on at most 20,000), never on more than the job has, and the
job's time is computed from the rate. Recall is that of 200 queries other than
those that were tuned on. Clustered keys are a mixture on the sphere: 60 keys a
cluster, 200 clusters of clusters, 48 dims of spread.
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from retrieval_aug.common.errors import UserError
from retrieval_aug.memory import search, searchers, tune
from retrieval_aug.memory.searchers import ivf

ENGINES = ("exact", "ivf", "scann", "faiss_hnsw", "faiss_ivf", "hnswlib")
GRAPHS = ("faiss_hnsw", "hnswlib")
RATE_RECALL, JOB_RECALL = 0.95, 0.99
# Keys of a graph that misses the recall, up to which a denser one is built: of
# 10^6 that would take half an hour.
REBUILT = 200_000
TIMED, TIMED_AUTO, CHECKED = 2000, 20_000, 200


class Timed(NamedTuple):
  """Core-seconds and wall seconds."""

  core: float
  wall: float


class Found(NamedTuple):
  """An engine that reaches a recall (or does its best), and its rate.

  Attributes:
    recall: of queries that it was not tuned on.
    effort: probes, leaves or ef.
    query: time of a query.
  """

  recall: float
  effort: int
  query: Timed


class Index(NamedTuple):
  """A built engine and the time of building it."""

  engine: Any
  build: Timed
  label: str


class HnswLib:
  """hnswlib with the interface of our searchers."""

  name = "hnswlib"

  def __init__(self, keys: np.ndarray, threads: int, m: int, construction: int):
    import hnswlib

    self._index = hnswlib.Index(space="ip", dim=keys.shape[1])
    self._index.init_index(
      max_elements=len(keys), ef_construction=construction, M=m
    )
    self._index.set_num_threads(threads)
    self._index.add_items(keys)
    self._threads, self.effort = threads, 200
    self.most_effort = len(keys) // 4
    self.bytes_per_key = 4 * keys.shape[1] + 8 * m + 12

  def candidates(self, queries: np.ndarray, k: int) -> np.ndarray:
    """Probably the best k."""
    self._index.set_ef(max(self.effort, k))
    ids, _ = self._index.knn_query(queries, k, num_threads=self._threads)
    return ids.astype(np.int64)


def clustered(n: int, q: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
  """Keys [n, dim] and queries [q, dim], unit rows of one mixture."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.standard_normal(shape, np.float32)
  coarse = search.normalize(normal(200, dim), "centers")
  count = max(n // 60, 50)
  fine = coarse[rng.integers(200, size=count)]
  fine = fine + 0.8 * normal(count, dim) / math.sqrt(dim)
  spread = 0.8 * normal(48, dim) / math.sqrt(48 * dim)
  out = np.empty((n + q, dim), np.float32)
  for start in range(0, len(out), 1 << 16):
    part = out[start : start + (1 << 16)]
    part[:] = fine[rng.integers(count, size=len(part))]
    part += normal(len(part), 48) @ spread
  unit = search.normalize(out, "points")
  return unit[:n], unit[n:]


def timed(f: Callable[[], Any]) -> tuple[Any, Timed]:
  """What a function returns, and its time."""
  core, wall = time.process_time(), time.perf_counter()
  out = f()
  return out, Timed(time.process_time() - core, time.perf_counter() - wall)


class Bench:
  """Data of one size, and what is measured on it."""

  def __init__(self, keys: np.ndarray, queries: np.ndarray, k: int):
    self.keys, self.queries, self.k = keys, queries, k
    held = queries[-2 * CHECKED :]
    self._checked = held[:CHECKED], held[CHECKED:]
    self._best = [search.best_scores(keys, q, k) for q in self._checked]

  def recall(self, engine: Any, which: int = 1) -> float:
    """Of the queries to tune on (0) or the others (1)."""
    queries = self._checked[which]
    found = search.search(engine, self.keys, queries, self.k)
    return search.recall(found.scores, self._best[which])

  def time_a_query(self, engine: Any, limit: int = TIMED) -> Timed:
    """Of candidates, without their scores, which take all engines the same."""
    some = self.queries[:limit]
    k = search.wanted(self.k, len(self.keys))
    engine.candidates(some[:64], k)  # threads and compilation
    _, time_ = timed(lambda: engine.candidates(some, k))
    return Timed(time_.core / len(some), time_.wall / len(some))

  def tune(self, engine: Any, target: float) -> Found:
    """The least effort that reaches a recall, by doubling and bisection."""

    def reaches(effort: int) -> bool:
      engine.effort = effort
      return self.recall(engine, 0) >= target

    low, high = 0, 1 if engine.name not in GRAPHS else 128
    while not reaches(high) and high < engine.most_effort:
      # A graph that stops to gain will not reach it.
      if engine.name in GRAPHS and high >= 4096:
        break
      low, high = high, min(2 * high, engine.most_effort)
    while high - low > max(1, high // 16):
      middle = (low + high) // 2
      low, high = (low, middle) if reaches(middle) else (middle, high)
    engine.effort = high
    return Found(self.recall(engine), high, self.time_a_query(engine))

  def again(self, engine: Any, found: Found, limit: int) -> Found:
    """The same effort, timed on fewer queries."""
    engine.effort = found.effort
    return found._replace(query=self.time_a_query(engine, limit))


def build(
  name: str, keys: np.ndarray, k: int, threads: int, **options
) -> Index:
  """A hand-tuned index: few rounds of training on a small sample."""
  if name == "hnswlib":
    m, construction = options["m"], options["ef_construction"]
    make = lambda: HnswLib(keys, threads, m, construction)
  else:
    wanted = search.wanted(k, len(keys))
    make = lambda: searchers.build(name, keys, wanted, options)
  engine, time_ = timed(make)
  label = ",".join(f"{n}={v}" for n, v in options.items() if n != "queries")
  return Index(engine, time_, label)


def indexes(
  name: str, keys: np.ndarray, k: int, threads: int, queries: Sequence[int]
) -> list[tuple[int, Index]]:
  """Indexes of an engine to choose from, and the job each is for (0: all)."""
  n = len(keys)
  if name in GRAPHS:
    given = [{"m": 32, "ef_construction": 64}]
    return [(0, build(name, keys, k, threads, **x)) for x in given]
  if name == "ivf":
    lists = {
      max(1, int(ivf.default_lists(n, q) * f))
      for q in queries
      for f in (0.5, 1, 2)
    }
    lists = sorted(x for x in lists if x <= n // 32)
    return [(0, build(name, keys, k, threads, lists=x)) for x in lists]
  if name == "faiss_ivf":
    lists = sorted({max(1, int(n**0.5 * f)) for f in (0.5, 1, 2)})
    return [(0, build(name, keys, k, threads, lists=x)) for x in lists]
  return [(0, build(name, keys, k, threads))]


def job(index: Index, found: Found, queries: int) -> Timed:
  """Time of building an index and searching it."""
  return Timed(*(b + queries * q for b, q in zip(index.build, found.query)))


def auto(bench: Bench, queries: int) -> tuple[tune.Choice, Timed, float, Timed]:
  """What auto picks; time to choose and build; recall; time of a query."""
  asked = bench.queries[:queries]
  choice, first = timed(
    lambda: tune.choose(
      "auto",
      {},
      bench.keys,
      asked,
      bench.k,
      n_keys=len(bench.keys),
      n_queries=queries,
      recall_target=JOB_RECALL,
    )
  )
  query = bench.time_a_query(choice.engine, min(queries, TIMED_AUTO))
  return choice, first, bench.recall(choice.engine), query


def run(
  data: Callable[[int], tuple[np.ndarray, np.ndarray]],
  sizes: Sequence[int],
  jobs: Sequence[int],
  k: int,
  engines: Sequence[str],
  say: Callable[[str], None],
) -> None:
  """Measures all sizes and says the tables' lines as they come."""
  import faiss

  threads = faiss.omp_get_max_threads()
  rates: dict[str, list[tuple[int, float]]] = {}
  say(f"k={k}, {threads} threads; times are core-seconds (wall in brackets)\n")
  for n in sizes:
    keys, queries = data(n)
    bench = Bench(keys, queries, k)
    tables = {}
    say(f"M={n:,}, {keys.shape[1]} dims\n  engine at recall {RATE_RECALL}")
    for name in engines:
      try:
        built = indexes(name, keys, k, threads, jobs)
      except (ImportError, UserError) as error:
        say(f"  {name:11} left out: {error}")
        continue
      at = [(bench.tune(x.engine, RATE_RECALL), x) for _, x in built]
      fine = [x for x in at if x[0].recall >= RATE_RECALL - 0.01] or at
      found, index = min(fine, key=lambda x: x[0].query.core)
      rates.setdefault(name, []).append((n, found.query.core))
      say(
        f"  {name:11} {1 / found.query.core:9,.0f} q/core-s "
        f"({1 / found.query.wall:9,.0f}/s)  recall {found.recall:.3f}  "
        f"{index.engine.bytes_per_key:6,.0f} B/key  build "
        f"{index.build.core:7.1f} ({index.build.wall:.1f})  effort "
        f"{found.effort} {index.label}"
      )
      at = [(bench.tune(x.engine, JOB_RECALL), x) for _, x in built]
      missed = at[0][0].recall < JOB_RECALL - 0.003
      if name in GRAPHS and missed and n <= REBUILT:
        options = {"m": 48, "ef_construction": 200}
        index = build(name, keys, k, threads, **options)
        at.append((bench.tune(index.engine, JOB_RECALL), index))
      tables[name] = at
      del built
    say(f"  job at recall {JOB_RECALL}: build + search")
    for queries_ in jobs:
      lines, times, short = [], {}, set()
      for name, at in tables.items():
        if queries_ < TIMED:
          # Few queries make small blocks, which are slower.
          at = [(bench.again(x.engine, f, queries_), x) for f, x in at]
        fine = [x for x in at if x[0].recall >= JOB_RECALL - 0.003]
        if not fine:
          short.add(name)
        found, index = min(
          fine or at[-1:], key=lambda x: job(x[1], x[0], queries_).core
        )
        time_ = times[name] = job(index, found, queries_)
        lines.append(
          f"    {name:11} {time_.core:9.2f} ({time_.wall:9.2f})  build "
          f"{index.build.core:8.2f}  {1e3 * found.query.core:8.3f} ms/query  "
          f"recall {found.recall:.3f}  effort {found.effort} {index.label}"
        )
      choice, first, recall, query = auto(bench, queries_)
      again = build(choice.kind, keys, k, threads, **choice.parameters)
      alone = again.build.core + queries_ * query.core
      total = first.core + queries_ * query.core
      wall = first.wall + queries_ * query.wall
      kind = f"auto:{choice.kind}"
      lines.append(
        f"    {kind:11} {total:9.2f} ({wall:9.2f})  tune+build "
        f"{first.core:.2f} "
        f"(tuning {choice.measured['tuning_seconds']:.2f} s)  "
        f"{1e3 * query.core:8.3f} ms/query  recall {recall:.3f}  "
        f"{choice.parameters}"
      )
      say(f"   N={queries_:,}")
      for line in lines:
        say(line)
      reached = {x: t for x, t in times.items() if x not in short}
      best = min(reached, key=lambda x: reached[x].core)
      told = [
        f"best hand-tuned ({best}) / auto {times[best].core / alone:.2f} "
        f"({times[best].core / total:.2f} with auto's tuning)"
      ]
      for name in GRAPHS:
        if name in times:
          missed = " (misses the recall)" if name in short else ""
          told.append(
            f"{name}{missed} / auto {times[name].core / alone:.1f} "
            f"({times[name].core / total:.1f})"
          )
      say("    " + ", ".join(told))
      del choice, again
    say("")
    del tables
  if len(sizes) > 1:
    say("growth of a query's time at recall 0.95: M to the power of")
    for name, points in rates.items():
      m, t = np.log(np.array(points, float)).T
      say(f"  {name:11} {np.polyfit(m, t, 1)[0]:.2f}")


def main() -> None:
  """Prints both tables."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--sizes", default="1e4,1e5,1e6")
  parser.add_argument("--queries", default="1e3,1e4,1e5")
  parser.add_argument("--dim", type=int, default=256)
  parser.add_argument("--neighbors", type=int, default=100)
  parser.add_argument("--keys", help="matrix [rows, dims] in place of clusters")
  parser.add_argument("--engines", default=",".join(ENGINES))
  parser.add_argument("--out", help="file that gets the tables too")
  flags = parser.parse_args()
  numbers = lambda text: [int(float(x)) for x in text.split(",")]
  sizes, jobs = numbers(flags.sizes), numbers(flags.queries)
  asked = max(max(jobs), TIMED) + 2 * CHECKED
  if flags.keys:
    stored = np.load(flags.keys, mmap_mode="r", allow_pickle=False)
    order = np.random.default_rng(0).permutation(len(stored))
    # A fifth of the rows at most become queries.
    held = order[: min(asked, len(stored) // 5)]
    rest = order[len(held) :]
    sizes = sorted({min(n, len(rest)) for n in sizes})
    unit = lambda rows: search.normalize(stored[np.sort(rows)], flags.keys)
    shuffled = unit(held)[np.random.default_rng(1).permutation(len(held))]
    jobs = sorted({min(n, len(held) - 2 * CHECKED) for n in jobs})
    data = lambda n: (unit(rest[:n]), shuffled)
  else:
    data = lambda n: clustered(n, asked, flags.dim)
  lines = []

  def say(line: str) -> None:
    print(line, flush=True)
    lines.append(line)

  run(data, sizes, jobs, flags.neighbors, flags.engines.split(","), say)
  if flags.out:
    with open(flags.out, "w") as file:
      file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
  main()
