"""Exact search: blockwise matrix products and a running top-k.

On accelerators it is jitted, with `approx_max_k` by default, which on a TPU
runs at the speed of the product alone. On CPUs NumPy's BLAS with bounds
(`running.py`) takes half the time of XLA's product and `top_k`.
"""

import concurrent.futures
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from retrieval_aug.memory.searchers import running

# Of `approx_max_k`: the share of the true candidates that it keeps. With the
# margin of candidates the expected loss among the best k is smaller still.
_APPROXIMATE_RECALL = 0.999


class Exact:
  """Finds the best k by float32 scores; misses none.

  Args:
    keys: float32 [n, d], unit rows.
    k: unused; every engine is told.
    jitted: by XLA, not NumPy; None: if the backend is not a CPU.
    approximate: `approx_max_k` in place of `top_k` where jitted; None: if the
      backend is not a CPU.
    key_block: keys of one product.
    query_block: queries of one product.
  """

  name = "exact"
  effort = most_effort = 1

  def __init__(
    self,
    keys: np.ndarray,
    *,
    k: int = 0,
    jitted: bool | None = None,
    approximate: bool | None = None,
    key_block: int = 65536,
    query_block: int = 4096,
  ):
    accelerator = jax.default_backend() != "cpu"
    self._jitted = accelerator if jitted is None else jitted
    approximate = accelerator if approximate is None else approximate
    self._approximate = self._jitted and approximate
    self._n, self._d = keys.shape
    self._query_block = query_block
    block = min(key_block, self._n)
    starts = range(0, self._n, block)
    parts = ((start, keys[start : start + block]) for start in starts)
    if self._jitted:
      # Equal blocks compile once; rows past the end are masked by their number.
      parts = ((s, jnp.asarray(_pad_rows(part, block))) for s, part in parts)
    self._blocks = list(parts)

  @property
  def parameters(self) -> dict[str, Any]:
    """Whether top-k is approximate."""
    return {"approximate": True} if self._approximate else {}

  @property
  def bytes_per_key(self) -> float:
    """Of the keys."""
    return 4.0 * self._d

  def candidates(self, queries: np.ndarray, k: int) -> np.ndarray:
    """The best k by float32 scores, fewer only if there are fewer keys."""
    k = min(k, self._n)
    find = self._find_jitted if self._jitted else self._find
    # One block is in flight on a device, on CPUs one a core.
    cores = 1 if self._jitted else (os.cpu_count() or 1)
    step = min(self._query_block, -(-len(queries) // cores))
    starts = range(0, len(queries), step)
    out = np.empty((len(queries), k), np.int64)

    def search(start: int) -> None:
      part = queries[start : start + step]
      out[start : start + step] = find(part, k, step)

    with concurrent.futures.ThreadPoolExecutor(cores) as pool:
      if self._jitted:
        list(map(search, starts))
      else:
        with running.one_blas_thread():
          list(pool.map(search, starts))
    return out

  def _find(self, queries: np.ndarray, k: int, step: int) -> np.ndarray:
    found = running.Running(queries, k)
    rows = np.arange(len(queries))
    for first, keys in self._blocks:
      found.visit(rows, keys, first)
    return found.ids()

  def _find_jitted(self, queries: np.ndarray, k: int, step: int) -> np.ndarray:
    block = jnp.asarray(_pad_rows(queries, step))
    scores = jnp.full((len(block), k), -jnp.inf, jnp.float32)
    ids = jnp.full((len(block), k), -1, jnp.int32)
    for first, keys in self._blocks:
      scores, ids = _merge_block(
        block,
        keys,
        scores,
        ids,
        first,
        self._n,
        k=k,
        approximate=self._approximate,
      )
    return np.asarray(ids, np.int64)[: len(queries)]


def _pad_rows(x: np.ndarray, rows: int) -> np.ndarray:
  missing = rows - len(x)
  return x if missing <= 0 else np.pad(x, ((0, missing), (0, 0)))


@functools.partial(jax.jit, static_argnames=("k", "approximate"))
def _merge_block(queries, keys, scores, ids, first, n, *, k, approximate):
  """Merges one block of keys into a running top-k.

  queries [q, d], keys [b, d], scores and ids [q, k]. `top_k` keeps the lower
  index of equal scores, and earlier blocks stand first: ties go to lower ids.
  """
  new = jnp.matmul(
    queries,
    keys.T,
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )
  rows = first + jnp.arange(keys.shape[0], dtype=jnp.int32)
  new = jnp.where(rows < n, new, -jnp.inf)
  few = min(k, keys.shape[0])
  if approximate:
    best, where = jax.lax.approx_max_k(
      new, few, recall_target=_APPROXIMATE_RECALL
    )
  else:
    best, where = jax.lax.top_k(new, few)
  all_scores = jnp.concatenate([scores, best], axis=1)
  all_ids = jnp.concatenate([ids, rows[where]], axis=1)
  scores, where = jax.lax.top_k(all_scores, k)
  return scores, jnp.take_along_axis(all_ids, where, axis=1)
