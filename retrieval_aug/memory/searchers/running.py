"""The best k so far of a block of queries, while keys stream past.

A query's k-th best score is its bound: of the next scores only those above it
are kept, which soon are few, so that selection costs little beside the matrix
product. Of equal scores the one that came first stays.
"""

import contextlib
import functools
from collections.abc import Iterator

import numpy as np

# Scores of one matrix product: 4 MB, which stays in a core's share of cache.
_TILE = 1 << 20
# Rows that a buffer holds of a query, in multiples of k.
_SLACK = 3


class Running:
  """Running top-k of queries [q, d].

  Attributes:
    bounds: float32 [q], score that a key must exceed to be kept.
  """

  def __init__(self, queries: np.ndarray, k: int):
    n = len(queries)
    self._queries, self._k, self._width = queries, k, _SLACK * k
    self.bounds = np.full(n, -np.inf, np.float32)
    self._scores = np.full((n, self._width), -np.inf, np.float32)
    self._ids = np.full((n, self._width), -1, np.int32)
    self._fill = np.zeros(n, np.int64)
    # Taken once: a fresh array of this size is zeroed by the kernel each time.
    self._tile = np.empty(_TILE, np.float32)

  def visit(self, rows: np.ndarray, keys: np.ndarray, first: int) -> None:
    """Shows keys to some queries.

    Args:
      rows: int [m], ascending rows of the queries.
      keys: float32 [n, d].
      first: id of the first key; the others follow.
    """
    m, n = min(len(rows), 1024), len(keys)
    step = max(1, min(n, _TILE // m))
    for r in range(0, len(rows), m):
      some = rows[r : r + m]
      queries = self._queries[some]
      for start in range(0, n, step):
        part = keys[start : start + step]
        shape = (len(some), len(part))
        out = self._tile[: shape[0] * shape[1]].reshape(shape)
        np.matmul(queries, part.T, out=out)
        self._keep(some, out, first + start)

  def _keep(self, rows: np.ndarray, scores: np.ndarray, first: int) -> None:
    m, n = scores.shape
    hit = scores > self.bounds[rows, None]
    flat = np.flatnonzero(hit)
    if not len(flat):
      return
    counts = np.bincount(flat // n, minlength=m)
    many = np.flatnonzero(counts > self._k)
    if len(many):
      kept = best(scores[many], self._k)
      hit[many] = kept
      # At least k are as good as the least of these.
      least = np.where(kept, scores[many], np.inf).min(axis=1)
      self.bounds[rows[many]] = least
      flat = np.flatnonzero(hit)
      counts[many] = self._k
    overfull = self._fill[rows] + counts > self._width
    if overfull.any():
      self._compact(rows[overfull])
    ends = np.cumsum(counts)
    shift = rows * self._width + self._fill[rows] - (ends - counts)
    slots = np.repeat(shift, counts) + np.arange(ends[-1])
    column = flat - np.repeat(np.arange(m) * n, counts)
    self._scores.ravel()[slots] = scores.ravel()[flat]
    self._ids.ravel()[slots] = column + first
    self._fill[rows] += counts

  def _compact(self, rows: np.ndarray) -> None:
    """Keeps the best k of rows, in the order in which they came."""
    k = self._k
    for start in range(0, len(rows), 1024):
      some = rows[start : start + 1024]
      scores = self._scores[some]
      keep = np.flatnonzero(best(scores, k)).reshape(len(some), k)
      scores = scores.ravel()[keep]
      self._ids[some, :k] = self._ids[some].ravel()[keep]
      self._ids[some, k:] = -1
      self._scores[some, :k] = scores
      self._scores[some, k:] = -np.inf
      self._fill[some] = np.minimum(self._fill[some], k)
      self.bounds[some] = scores.min(axis=1)

  def tighten(self) -> None:
    """Raises the bounds to the k-th best scores so far."""
    loose = (self._fill == self._k) & np.isinf(self.bounds)
    self._compact(np.flatnonzero(loose | (self._fill > self._k)))

  def ids(self) -> np.ndarray:
    """The best ids, int64 [q, k], in no order; -1 pads."""
    self.tighten()
    return self._ids[:, : self._k].astype(np.int64)


def best(scores: np.ndarray, k: int) -> np.ndarray:
  """Marks the k largest of each row, the first of equal ones: bool [m, n]."""
  n = scores.shape[1]
  kth = np.partition(scores, n - k, axis=1)[:, n - k, None]
  above = scores > kth
  equal = scores == kth
  left = k - np.count_nonzero(above, axis=1)
  tied = np.flatnonzero(np.count_nonzero(equal, axis=1) > left)
  if len(tied):
    some = equal[tied]
    equal[tied] = some & (np.cumsum(some, axis=1) <= left[tied, None])
  return above | equal


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
  """Leaves the cores to threads of ours.

  A BLAS that shares out small products keeps the other cores spinning between
  them; several queries' blocks side by side use the cores better.
  """
  controller = _blas()
  if controller is None:
    yield
  else:
    with controller.limit(limits=1, user_api="blas"):
      yield


@functools.cache
def _blas():
  """Control of the BLAS that NumPy has loaded; None where it cannot be had."""
  try:
    import threadpoolctl
  except ImportError:
    return None
  return threadpoolctl.ThreadpoolController()
