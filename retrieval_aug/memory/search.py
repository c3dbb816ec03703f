"""Nearest neighbours by cosine, whatever the engine that looks for candidates.

Whatever the engine, a result is the same kind of thing: ids of keys best
first, -1 where there are fewer than k, and scores recomputed from the keys in
float64 and rounded to float32, ordered by (-score, id). So neither blocking,
sharding nor the engine's own arithmetic can change the order of a result.
"""

import concurrent.futures
import os
from typing import NamedTuple

import numpy as np

from retrieval_aug.common.errors import UserError
from retrieval_aug.memory.searchers import Searcher, exact, running

# Candidates taken beyond k, so that float32 rounding at the k-th place cannot
# lose a neighbour whose exact score belongs in the list.
MARGIN = 16

# Rows that are normalized at a time.
_ROWS = 1 << 16
# Scores that differ by less are equal, where recall is counted.
_TIE = 1e-6


class SearchResult(NamedTuple):
  """Neighbours of queries.

  Attributes:
    ids: int64 [n, k], rows of the keys, best first; -1 pads.
    scores: float32 [n, k], cosine; -inf pads.
  """

  ids: np.ndarray
  scores: np.ndarray


class Groups(NamedTuple):
  """What queries are not to find: near copies, which are keys of their group.

  Attributes:
    queries: int64 [q], group of each query; -1 has none.
    keys: int64 [n], group of each key; -1 has none.
    pairs: int64 [p, 2], single rows of a query and a key beside the groups.
  """

  queries: np.ndarray
  keys: np.ndarray
  pairs: np.ndarray | None = None

  def of(self, rows: slice | np.ndarray) -> "Groups":
    """The groups of some of the queries."""
    rows = np.arange(len(self.queries))[rows]
    pairs = None
    if self.pairs is not None:
      own, keys = self.pairs[np.argsort(self.pairs[:, 0], kind="stable")].T
      first, last = (np.searchsorted(own, rows, s) for s in ("left", "right"))
      counts = last - first
      starts = np.cumsum(counts) - counts
      where = np.arange(counts.sum()) + np.repeat(first - starts, counts)
      own = np.repeat(np.arange(len(rows)), counts)
      pairs = np.stack([own, keys[where]], axis=1)
    return Groups(self.queries[rows], self.keys, pairs)

  def of_keys(self, rows: np.ndarray) -> "Groups":
    """The groups of some of the keys, whose rows [m] ascend."""
    pairs = None
    if self.pairs is not None:
      own, keys = self.pairs[np.isin(self.pairs[:, 1], rows)].T
      pairs = np.stack([own, np.searchsorted(rows, keys)], axis=1)
    return Groups(self.queries, self.keys[rows], pairs)

  def forbidden(self, ids: np.ndarray | None = None) -> np.ndarray:
    """Whether a query must not get a key: bool [q, j] of rows [q, j].

    Without rows it is that of all keys, [q, n].
    """
    own = self.queries[:, None]
    found = self.keys[None, :] if ids is None else self.keys[ids]
    out = (own >= 0) & (found == own)
    if self.pairs is None or not len(self.pairs):
      return out
    if ids is None:
      out[tuple(self.pairs.T)] = True
      return out
    # A pair is one number; only rows that have pairs are compared.
    rows = np.unique(self.pairs[:, 0])
    n = len(self.keys)
    pairs = self.pairs[:, 0] * n + self.pairs[:, 1]
    named = np.isin(rows[:, None] * n + ids[rows], pairs) & (ids[rows] >= 0)
    out[rows] |= named
    return out

  def most(self) -> int:
    """The most keys that any query has to leave out, or a few more."""
    most = 0
    named = np.isin(self.keys, self.queries[self.queries >= 0])
    if named.any():
      most = int(np.unique(self.keys[named], return_counts=True)[1].max())
    if self.pairs is not None and len(self.pairs):
      most += int(np.bincount(self.pairs[:, 0]).max())
    return most


def normalize(x: np.ndarray, what: str) -> np.ndarray:
  """Rows of unit length, float32.

  Raises:
    UserError: a row is zero or not finite; such a row has no direction, and
      ScaNN kills the process on a NaN.
  """
  if np.ndim(x) != 2:
    raise UserError(
      f"{what}: {list(np.shape(x))} is not a matrix [rows, dims]."
    )
  out = np.empty(x.shape, np.float32)
  bad = []
  for start in range(0, len(x), _ROWS):
    part = np.ascontiguousarray(x[start : start + _ROWS], np.float32)
    # From float64, so that a huge or tiny vector does not lose its direction.
    norms = np.sqrt(np.einsum("nd,nd->n", part, part, dtype=np.float64))
    fine = np.isfinite(norms) & (norms > 0)
    bad.append(start + np.flatnonzero(~fine))
    norms[~fine] = 1
    out[start : start + _ROWS] = part / norms[:, None]
  bad = np.concatenate([*bad, np.empty(0, np.int64)])
  if bad.size:
    raise UserError(
      f"{what}: row {int(bad[0])} is zero, NaN or infinite ({bad.size} such "
      "rows) and has no direction to search by; remove those items and embed "
      "again."
    )
  return out


def search(
  searcher: Searcher,
  keys: np.ndarray,
  queries: np.ndarray,
  k: int,
  *,
  exclude: Groups | None = None,
) -> SearchResult:
  """The k nearest keys of each query.

  Args:
    searcher: built over these keys.
    keys: float32 [n, d], unit rows.
    queries: float32 [q, d], unit rows.
    k: neighbours wanted.
    exclude: what a query must not get; that many keys more are asked for, so
      that k are left.

  Raises:
    UserError: queries and keys differ in width.
  """
  if keys.shape[1] != queries.shape[1]:
    raise UserError(
      f"queries have {queries.shape[1]} dims, keys {keys.shape[1]}: both must "
      "come from one encoder and one key_transform; embed them again."
    )
  if not len(keys) or not len(queries):
    return _padded(np.empty((len(queries), 0), np.int64), None, k)
  ids = searcher.candidates(queries, wanted(k, len(keys), exclude))
  if exclude is not None:
    ids = np.where((ids < 0) | exclude.forbidden(ids), -1, ids)
  ids = np.sort(ids, axis=1)  # rows of keys are then read in order
  return _best(ids, exact_scores(keys, queries, ids), k)


def wanted(k: int, n: int, exclude: Groups | None = None) -> int:
  """Candidates that a searcher of n keys is asked for."""
  return min(k + MARGIN + (exclude.most() if exclude else 0), n)


def merge(a: SearchResult, b: SearchResult, k: int) -> SearchResult:
  """The best k of two lists over different keys, by (-score, id).

  Args:
    a: ids and scores [n, i].
    b: ids and scores [n, j], of none of a's keys.
    k: neighbours wanted.
  """
  ids = np.concatenate([a.ids, b.ids], axis=1)
  scores = np.concatenate([a.scores, b.scores], axis=1)
  order = np.argsort(ids, axis=1, kind="stable")
  ids = np.take_along_axis(ids, order, axis=1)
  return _best(ids, np.take_along_axis(scores, order, axis=1), k)


def _best(ids: np.ndarray, scores: np.ndarray, k: int) -> SearchResult:
  """The best k of rows whose ids ascend, by (-score, id); pads last."""
  order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
  ids = np.take_along_axis(ids, order, axis=1)
  return _padded(ids, np.take_along_axis(scores, order, axis=1), k)


def _padded(ids, scores, k: int) -> SearchResult:
  shape = (len(ids), k)
  out = SearchResult(
    np.full(shape, -1, np.int64), np.full(shape, -np.inf, np.float32)
  )
  if scores is not None:
    out.ids[:, : ids.shape[1]] = ids
    out.scores[:, : ids.shape[1]] = scores
  return out


def exact_scores(
  keys: np.ndarray, queries: np.ndarray, ids: np.ndarray
) -> np.ndarray:
  """Cosines of candidates: float32 [q, k], -inf where an id is -1.

  Summed in float64, so that the float32 result does not depend on the order
  in which a platform adds.
  """
  n, k = ids.shape
  out = np.full(ids.shape, -np.inf, np.float32)
  if not out.size or not len(keys):
    return out
  cores = os.cpu_count() or 1
  # Copies of rows in float64 that stay in a core's cache: some 1 MB.
  block = max(1, (1 << 17) // (k * keys.shape[1]))

  def score(rows: range) -> None:
    shape = (block, k, keys.shape[1])
    single, double = np.empty(shape, np.float32), np.empty(shape, np.float64)
    for start in range(rows.start, rows.stop, block):
      part = slice(start, min(start + block, rows.stop))
      some = ids[part]
      few, many = single[: len(some)], double[: len(some)]
      np.take(keys, np.maximum(some, 0), axis=0, out=few, mode="clip")
      many[:] = few
      query = queries[part].astype(np.float64)
      dots = np.matmul(many, query[:, :, None])[:, :, 0]
      out[part] = np.where(some < 0, -np.inf, dots)

  share = max(block, min(4096, -(-n // cores)))
  parts = [range(i, min(i + share, n)) for i in range(0, n, share)]
  with running.one_blas_thread():
    with concurrent.futures.ThreadPoolExecutor(cores) as pool:
      list(pool.map(score, parts))
  return out


def best_scores(
  keys: np.ndarray,
  queries: np.ndarray,
  k: int,
  exclude: Groups | None = None,
) -> np.ndarray:
  """The best scores by brute force: float32 [q, k], descending, -inf pads.

  Those of several index shards are merged by sorting them together.
  """
  keys, queries = (np.asarray(x, np.float32) for x in (keys, queries))
  if not len(keys):
    return np.full((len(queries), k), -np.inf, np.float32)
  engine = exact.Exact(keys, approximate=False)
  return search(engine, keys, queries, k, exclude=exclude).scores


def recall(found: np.ndarray, best: np.ndarray) -> float:
  """Tie-aware recall of lists.

  A neighbour counts when its score is at least that of the true k-th one, so
  that swapping equal scores costs nothing. Pads of `best` ask for nothing.

  Args:
    found: scores of neighbours [q, >= k], -inf pads.
    best: the true k best scores [q, k], descending, -inf pads.
  """
  hits, there = recalled(found, best)
  return float(hits.sum() / there.sum()) if there.any() else 1.0


def recalled(
  found: np.ndarray, best: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Neighbours found of each query [q], and those that there are [q]."""
  there = np.isfinite(best).sum(axis=1)
  kth = np.take_along_axis(best, np.maximum(there - 1, 0)[:, None], axis=1)
  found = found[:, : best.shape[1]]
  hits = (np.isfinite(found) & (found >= kth - _TIE)).sum(axis=1)
  return np.minimum(hits, there), there


def measure_recall(
  result: SearchResult,
  keys: np.ndarray,
  queries: np.ndarray,
  k: int,
  sample: int,
  exclude: Groups | None = None,
) -> float:
  """Recall@k on an even sample of queries, against brute force.

  Args:
    result: what a searcher returned for `queries`.
    keys: float32 [n, d], unit rows.
    queries: float32 [q, d], unit rows.
    k: neighbours that count.
    sample: number of queries to check.
    exclude: as in `search`.
  """
  rows = even_sample(len(queries), sample)
  own = exclude.of(rows) if exclude is not None else None
  return recall(result.scores[rows], best_scores(keys, queries[rows], k, own))


def even_sample(n: int, sample: int) -> np.ndarray:
  """Ascending rows, at most `sample`, spread evenly over n."""
  return np.unique(np.linspace(0, max(n - 1, 0), min(sample, n)).astype(int))
