"""Which engine searches a job, and how hard it looks: measured on a sample.

Of the engines the exact one and our inverted file are compared by what they
would take: a small product is timed, centers are trained and the true
neighbors of some queries among some keys are looked up, which tells in how
many lists a query must look before anything is built. ScaNN and faiss can be
asked for by name and are tuned to the same recall. For a job that is searched
once they took longer at every size measured (benchmarks/search_scale.py) but
where the whole job takes a second.
"""

import math
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from retrieval_aug.common.errors import UserError
from retrieval_aug.memory import search, searchers
from retrieval_aug.memory.searchers import costs, exact, ivf, running

# Queries of a tuning run at most, and their share of the job.
_QUERIES, _SHARE = 500, 2
# Keys of it at least, and at least every so manieth.
_KEYS, _EVERY = 20_000, 8
# One-sided 95 %: tuned so that other queries probably do not miss the target.
_SURE = 1.645
# Share of the job that a trial of another number of lists may take.
_TRIAL = 0.2
# Of the time of exact search, what lists must promise to be tried.
_PROMISE = 0.7


class Choice(NamedTuple):
  """A searcher that is built and tuned.

  Attributes:
    kind: one of `searchers.KINDS`.
    parameters: what it was built and is searched with.
    why: a sentence or two, with numbers.
    measured: recall (expected, of the tuning run), queries_per_second (of
      the sample), build_seconds, bytes_per_key and tuning_seconds.
    engine: built over the keys.
  """

  kind: str
  parameters: dict[str, Any]
  why: str
  measured: dict[str, float]
  engine: searchers.Searcher


def choose(
  searcher: str,
  given: dict[str, dict[str, Any]],
  keys: np.ndarray,
  queries: np.ndarray,
  k: int,
  *,
  n_keys: int,
  n_queries: int,
  recall_target: float,
  memory_gb: float = 0.0,
  exclude: search.Groups | None = None,
) -> Choice:
  """Builds the searcher of a job over the keys of its first index shard.

  Args:
    searcher: "auto" or one of `searchers.KINDS`.
    given: options by kind, as in config.search; zeros are tuned.
    keys: float32 [n, d], unit rows of the first index shard.
    queries: float32 [q, d], unit rows; some or all of the job's.
    k: neighbors wanted.
    n_keys: of the whole job.
    n_queries: of the whole job.
    recall_target: recall@k that the sample is to reach.
    memory_gb: that an index, its copy of the keys and the keys may take; 0
      does not limit it.
    exclude: what each of `queries` is not to find among `keys`.

  Raises:
    UserError: the searcher is not known, or what it needs does not fit.
  """
  searchers.check_kind(searcher, "auto")
  if not 0 < recall_target <= 1:
    raise UserError(
      f"config.search.recall_target={recall_target}: must be above 0 and at "
      "most 1."
    )
  job = _Job(keys, queries, k, n_keys, n_queries, recall_target, exclude)
  start = time.perf_counter()
  options = dict(given.get(searcher, {}))
  if searcher == "auto":
    options = dict(given.get("ivf", {}))
    kind, options, why, recall = _auto(job, options, memory_gb)
  else:
    kind, recall = searcher, 1.0
    why = f"{kind} search, as config.search.searcher asks"
    if kind == "ivf" and len(keys) and len(queries):
      options, recall, trained = _ivf(job, options)
      why += f": {trained}"
  tuning = time.perf_counter() - start
  engine, build = _build(kind, job, options)
  if searcher == kind and memory_gb:
    _check_memory(kind, engine.bytes_per_key, keys, memory_gb)
  start = time.perf_counter()
  if kind not in ("exact", "ivf") and len(keys) and len(queries):
    recall, told = _by_search(engine, job, options)
    why += f": {told}"
  tuning += time.perf_counter() - start
  measured = {
    "recall": recall,
    "queries_per_second": _rate(engine, job),
    "build_seconds": build,
    "bytes_per_key": engine.bytes_per_key,
    "tuning_seconds": tuning,
  }
  return Choice(kind, engine.parameters, why, measured, engine)


class _Job(NamedTuple):
  """What `choose` was asked for, by its names."""

  keys: np.ndarray
  queries: np.ndarray
  k: int
  n_keys: int
  n_queries: int
  target: float
  exclude: search.Groups | None

  def sample(self) -> tuple[np.ndarray, search.Groups | None]:
    """Rows of the queries of a tuning run, and what these must not find."""
    share = max(50, min(_QUERIES, self.n_queries // _SHARE))
    rows = search.even_sample(len(self.queries), share)
    return rows, None if self.exclude is None else self.exclude.of(rows)


def _auto(
  job: _Job, options: dict[str, Any], memory_gb: float
) -> tuple[str, dict[str, Any], str, float]:
  """Exact search, or lists that were tried before they are built."""
  platform = jax.default_backend()
  if platform != "cpu":
    why = f"exact search: a {platform} is at hand, and exact search misses none"
    return "exact", {}, why, 1.0
  if not len(job.keys) or not len(job.queries):
    return "exact", {}, "exact search: there is nothing to search", 1.0
  n, dims = job.keys.shape
  cost = costs.Costs(costs.seconds_a_product(dims), n, job.n_queries)
  # What is built and searched is built and searched for each index shard.
  shards = job.n_keys / n
  brute = shards * cost.exact()
  size = f"{job.n_queries:,} queries in {job.n_keys:,} keys"
  lists = options.get("lists") or ivf.default_lists(n, job.n_queries)
  tried = cost.trial(_sampled(n), len(job.sample()[0]), lists)
  least = tried + shards * cost.lists(lists, round(lists**0.5))
  if least > _PROMISE * brute:
    why = (
      f"exact search: {_seconds(brute)} for {size}; an index about "
      f"{_seconds(least)}"
    )
    return "exact", {}, why, 1.0
  # The copy of the keys in the index, their numbers, and the keys.
  needed = n * (2 * 4 * dims + 4) / 1e9
  if memory_gb and needed > memory_gb:
    why = (
      f"exact search: an index of {n:,} keys takes {needed:.3g} GB with them, "
      f"more than config.search.memory_gb={memory_gb:g}"
    )
    return "exact", {}, why, 1.0
  options, recall, told = _ivf(job, options)
  index = shards * cost.lists(len(options["centers"]), options["probes"])
  if index > brute:
    why = (
      f"exact search: {_seconds(brute)} for {size}; an index would take "
      f"{_seconds(index)}, for {told}"
    )
    return "exact", {}, why, 1.0
  why = (
    f"inverted file: about {_seconds(index)} for {size}, where exact search "
    f"takes {_seconds(brute)}; {told}"
  )
  return "ivf", options, why, recall


def _ivf(
  job: _Job, options: dict[str, Any]
) -> tuple[dict[str, Any], float, str]:
  """Trained centers and the probes that the target needs; nothing is built.

  The number of lists is halved or doubled as long as the job would take less.

  Returns:
    Options of `ivf.Ivf`, the recall expected, and a clause about both.
  """
  n, dims = job.keys.shape
  cost = costs.Costs(costs.seconds_a_product(dims), n, job.n_queries)
  sample = _sample(job)
  probes = options.get("probes", 0)
  lists = min(options.get("lists") or ivf.default_lists(n, job.n_queries), n)
  best = _try_lists(job, sample, lists, probes)
  for factor in () if options.get("lists") else (2, 0.5):
    first = best
    while True:
      lists = int(factor * len(best.centers))
      now = cost.lists(len(best.centers), best.probes)
      trial = cost.trial(_sampled(n), 0, lists)
      if not 1 < lists <= n // 32 or trial > _TRIAL * now:
        break
      other = _try_lists(job, sample, lists, probes)
      # A few per cent are not worth a third trial.
      if cost.lists(lists, other.probes) > 0.95 * now:
        break
      best = other
    if best is not first:
      break
  told = (
    f"{best.probes} of {len(best.centers)} lists hold {best.recall:.3f} of the "
    f"neighbors of {len(sample.queries)} queries"
  )
  options = {"centers": best.centers, "probes": best.probes}
  return options, best.recall, told


class _Sample(NamedTuple):
  """Some queries and keys, and which of these are the queries' neighbors."""

  queries: np.ndarray
  keys: np.ndarray
  true: np.ndarray


def _sample(job: _Job) -> _Sample:
  """Queries and keys of a trial.

  In every eighth key the k / 8 nearest are as far away as the k nearest of
  all: fewer keys tell as much about lists, in an eighth of the time.
  """
  n = len(job.keys)
  rows, exclude = job.sample()
  size = _sampled(n)
  # Not the seed of `ivf.train`: keys that centers were trained on are nearer
  # to them than others, and must be as rare here as among all.
  rng = np.random.default_rng(1)
  some = np.sort(rng.choice(n, size, replace=False))
  keys, queries = job.keys[some], job.queries[rows]
  k = max(1, round(min(job.k, n) * size / n))
  if exclude is not None:
    exclude = exclude.of_keys(some)
  engine = exact.Exact(keys, approximate=False)
  found = search.search(engine, keys, queries, k, exclude=exclude)
  return _Sample(queries, keys, found.ids)


class _Trial(NamedTuple):
  """Centers, the probes that reach the target, and the recall with them."""

  centers: np.ndarray
  probes: int
  recall: float


def _try_lists(job: _Job, sample: _Sample, lists: int, probes: int) -> _Trial:
  """Trains centers and reads the probes off the ranks of neighbors' lists."""
  with running.one_blas_thread():
    centers = ivf.train(job.keys, lists)
    own = ivf.nearest(sample.keys, centers, 1)[:, 0]
    order = ivf.nearest(sample.queries, centers, lists)
  rank = np.empty_like(order)
  np.put_along_axis(rank, order, np.arange(lists, dtype=np.int32)[None], axis=1)
  true = sample.true
  query, _ = np.nonzero(true >= 0)
  ranks = np.take_along_axis(rank, own[true], axis=1)[true >= 0]
  # Neighbors in the list of each rank, then in all lists up to it.
  found = np.bincount(query * lists + ranks, minlength=len(true) * lists)
  found = np.cumsum(found.reshape(len(true), lists), axis=1)
  found = found[found[:, -1] > 0]
  if not len(found):
    return _Trial(centers, probes or lists, 1.0)
  found = found / found[:, -1:]
  if not probes:
    probes = int(np.argmax(_surely(found) >= job.target)) + 1
  probes = min(probes, lists)
  return _Trial(centers, probes, float(found[:, probes - 1].mean()))


def _sampled(n: int) -> int:
  """Keys of a trial, of n."""
  return min(n, max(_KEYS, n // _EVERY))


def _surely(recalls: np.ndarray) -> np.ndarray:
  """Lower bounds of the mean over queries, of recalls [q, ...]."""
  error = recalls.std(axis=0) / math.sqrt(len(recalls))
  return recalls.mean(axis=0) - _SURE * error


def _by_search(
  engine: searchers.Searcher, job: _Job, options: dict[str, Any]
) -> tuple[float, str]:
  """Raises an engine's effort until a sample of queries reaches the target."""
  rows, exclude = job.sample()
  queries = job.queries[rows]
  best = search.best_scores(job.keys, queries, job.k, exclude)

  def recalls() -> np.ndarray:
    found = search.search(engine, job.keys, queries, job.k, exclude=exclude)
    hits, there = search.recalled(found.scores, best)
    return hits[there > 0] / there[there > 0]

  def reaches(effort: int) -> bool:
    engine.effort = effort
    found = recalls()
    return not len(found) or _surely(found) >= job.target

  effort_given = any(
    options.get(x) for x in ("probes", "ef_search", "leaves_to_search")
  )
  if not effort_given:
    low, high = 0, min(engine.effort, engine.most_effort)
    while not reaches(high) and high < engine.most_effort:
      low, high = high, min(2 * high, engine.most_effort)
    # Within 5 %; a smaller step saves nothing.
    while high - low > max(1, high // 20):
      middle = (low + high) // 2
      low, high = (low, middle) if reaches(middle) else (middle, high)
    engine.effort = high
  found = recalls()
  recall = float(found.mean()) if len(found) else 1.0
  told = f"recall {recall:.3f} of {len(rows)} queries"
  if recall < job.target:
    told += f", below the target of {job.target:g}"
  return recall, told


def _build(
  kind: str, job: _Job, options: dict[str, Any]
) -> tuple[searchers.Searcher, float]:
  start = time.perf_counter()
  k = search.wanted(job.k, len(job.keys), job.exclude)
  engine = searchers.build(kind, job.keys, k, options)
  return engine, time.perf_counter() - start


def _check_memory(
  kind: str, bytes_per_key: float, keys: np.ndarray, memory_gb: float
) -> None:
  needed = len(keys) * (bytes_per_key + keys.shape[1] * 4) / 1e9
  if kind != "exact" and needed > memory_gb:
    raise UserError(
      f"config.search.memory_gb={memory_gb:g}: a {kind} index of {len(keys):,} "
      f"keys takes {needed:.3g} GB with the keys; set a smaller "
      "config.search.index_rows, or more memory."
    )


def _rate(engine: searchers.Searcher, job: _Job) -> float:
  """Queries a second, of a few: whole blocks are faster."""
  if not len(job.queries) or not len(job.keys):
    return 0.0
  few = job.queries[: max(1, min(100, job.n_queries // 100))]
  k = search.wanted(job.k, len(job.keys))
  start = time.perf_counter()
  engine.candidates(few, k)
  return len(few) / max(time.perf_counter() - start, 1e-9)


def _seconds(x: float) -> str:
  return f"{x:.1f} core-s" if x < 3600 else f"{x / 3600:.1f} core-h"
