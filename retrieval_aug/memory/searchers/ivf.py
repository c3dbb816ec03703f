"""An inverted file that is searched list by list, made for one large job.

Keys are put into lists by their nearest center (spherical k-means), and a
query looks into the lists of its nearest centers. A library that serves one
query after another reads a list anew for each; here all queries of a block
that visit a list meet it in one matrix product, which the processor does at
full speed. Everything is deterministic.
"""

import concurrent.futures
import os
from typing import Any

import numpy as np

from retrieval_aug.memory.searchers import running

# Of k-means. More rows or rounds improve recall less than one probe more does.
_ROUNDS, _ROWS_A_LIST = 4, 48
# Queries side by side. More of them make larger products of each list, for
# some 4 kB of buffer each.
_QUERY_BLOCK = 16384


def default_lists(n: int, queries: int) -> int:
  """Lists to begin with, of which build and search take about as long.

  Both take n lists products a key or a query, and a query n probes / lists
  more. If few probes are enough, however many lists there are, the sum is
  least at a root of this kind; its factor is measured.

  Args:
    n: keys.
    queries: of the whole job.
  """
  least = (24 * n * queries / (1.5 * n + 2.5 * queries)) ** 0.5
  return int(np.clip(least, 1, max(1, n // 64)))


def train(keys: np.ndarray, lists: int) -> np.ndarray:
  """Centers of spherical k-means on a sample.

  Args:
    keys: float32 [n, d], unit rows.
    lists: number of centers, at most n.

  Returns:
    float32 [lists, d], unit rows.
  """
  rng = np.random.default_rng(0)
  # On small memories training is not to cost more than the lists themselves.
  rows = max(12 * lists, min(_ROWS_A_LIST * lists, len(keys) // _ROUNDS))
  rows = min(rows, len(keys))
  sample = keys[rng.choice(len(keys), rows, replace=False, shuffle=True)]
  centers = sample[:lists].copy()
  for _ in range(_ROUNDS):
    own = nearest(sample, centers, 1)[:, 0]
    order = np.argsort(own, kind="stable")
    counts = np.bincount(own, minlength=lists)
    used = np.flatnonzero(counts)
    starts = (np.cumsum(counts) - counts)[used]
    sums = np.add.reduceat(sample[order], starts, axis=0)
    norms = np.linalg.norm(sums, axis=1, keepdims=True)
    # Opposite rows may cancel out; a list without a mean keeps its center.
    centers[used] = np.where(
      norms > 1e-6, sums / np.maximum(norms, 1e-6), centers[used]
    )
  return centers


def nearest(x: np.ndarray, centers: np.ndarray, count: int) -> np.ndarray:
  """Numbers of the nearest centers, best first: int32 [n, count]."""
  lists = len(centers)
  out = np.empty((len(x), count), np.int32)
  step = max(16, min(4096, (1 << 21) // lists))
  scores = np.empty((step, lists), np.float32)

  for start in range(0, len(x), step):
    part = x[start : start + step]
    s = np.matmul(part, centers.T, out=scores[: len(part)])
    if count == 1:
      out[start : start + step, 0] = s.argmax(axis=1)
      continue
    if count < lists:
      s *= -1
      some = np.argpartition(s, count - 1, axis=1)[:, :count]
      some_scores = np.take_along_axis(s, some, axis=1)
      order = np.argsort(some_scores, axis=1, kind="stable")
      out[start : start + step] = np.take_along_axis(some, order, axis=1)
    else:
      out[start : start + step] = np.argsort(-s, axis=1, kind="stable")
  return out


class Ivf:
  """Inverted file over unit keys [n, d].

  Args:
    keys: float32 [n, d], unit rows.
    k: unused; every engine is told.
    lists: number of lists; 0 takes `default_lists`.
    probes: lists that a query looks into; 0 takes sqrt(lists).
    queries: of the whole job, for `default_lists`.
    centers: of `train`, float32 [lists, d]; None trains them.
  """

  name = "ivf"

  def __init__(
    self,
    keys: np.ndarray,
    *,
    k: int = 0,
    lists: int = 0,
    probes: int = 0,
    queries: int = 10_000,
    centers: np.ndarray | None = None,
  ):
    n = len(keys)
    with running.one_blas_thread():
      if centers is None:
        lists = min(lists or default_lists(n, queries), n)
        centers = train(keys, lists)
      own = in_threads(
        lambda part: nearest(part, centers, 1)[:, 0], keys, 1 << 16
      )
    lists = len(centers)
    self._centers = centers
    # Rows of a list stay in ascending order. Sorting 16-bit integers is linear.
    small = own.astype(np.uint16) if lists <= 1 << 16 else own
    self._rows = np.argsort(small, kind="stable").astype(np.int32)
    self._keys = keys[self._rows]
    self._counts = np.bincount(own, minlength=lists)
    self._starts = np.cumsum(self._counts) - self._counts
    self.most_effort = lists
    self.effort = min(probes or max(1, round(lists**0.5)), lists)

  @property
  def parameters(self) -> dict[str, Any]:
    """Lists and probes in use."""
    return {"lists": self.most_effort, "probes": self.effort}

  @property
  def bytes_per_key(self) -> float:
    """Of keys, their numbers and the centers."""
    held = (self._keys, self._rows, self._centers)
    return sum(x.nbytes for x in held) / len(self._keys)

  def candidates(self, queries: np.ndarray, k: int) -> np.ndarray:
    """The best k in the lists probed; -1 where these hold fewer."""
    probes = min(self.effort, len(self._centers))
    with running.one_blas_thread():
      lists = in_threads(
        lambda part: nearest(part, self._centers, probes), queries, 4096
      )
      # Neighbors in a block share lists, which makes larger products.
      order = np.argsort(lists[:, 0], kind="stable")
      out = np.full((len(queries), k), -1, np.int64)
      blocks = -(-len(queries) // _QUERY_BLOCK)
      cores = min(len(order), os.cpu_count() or 1)
      blocks = -(-blocks // cores) * cores
      blocks = np.array_split(order, max(1, blocks))

      def search(rows: np.ndarray) -> None:
        out[rows] = self._search(queries[rows], lists[rows], k)

      with concurrent.futures.ThreadPoolExecutor(cores) as pool:
        list(pool.map(search, blocks))
    return out

  def _search(
    self, queries: np.ndarray, lists: np.ndarray, k: int
  ) -> np.ndarray:
    found = running.Running(queries, k)
    start, probes = 0, lists.shape[1]
    # Near lists first: they raise the bounds that the far ones must exceed.
    while start < probes:
      end = min(probes, 4 * start + 1)
      for rows, number in self._visits(lists[:, start:end]):
        first = self._starts[number]
        keys = self._keys[first : first + self._counts[number]]
        found.visit(rows, keys, first)
      found.tighten()
      start = end
    ids = found.ids()
    return np.where(ids < 0, -1, self._rows[ids])

  def _visits(self, lists: np.ndarray):
    """For each list the rows of queries that look into it."""
    flat = lists.ravel()
    small = flat.astype(np.uint16) if len(self._centers) <= 1 << 16 else flat
    rows = np.argsort(small, kind="stable") // lists.shape[1]
    ends = np.cumsum(np.bincount(flat, minlength=len(self._centers)))
    first = 0
    for number, end in enumerate(ends):
      if end > first and self._counts[number]:
        yield rows[first:end], number
      first = end


def in_threads(f, x: np.ndarray, block: int) -> np.ndarray:
  """Maps blocks of rows in threads, one a core; keeps their order."""
  cores = os.cpu_count() or 1
  block = max(1, min(block, -(-len(x) // cores)))
  parts = [x[i : i + block] for i in range(0, len(x), block)]
  with concurrent.futures.ThreadPoolExecutor(cores) as pool:
    return np.concatenate(list(pool.map(f, parts)))
