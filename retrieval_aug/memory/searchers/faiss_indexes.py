"""faiss: a graph (HNSW) and an inverted file, both with the keys as they are.

The graph is what RetFormer searches with. Threads insert into it side by
side, so that two builds on several cores are not the same graph; with
`faiss.omp_set_num_threads(1)` they are. The inverted file is deterministic.
"""

from typing import Any

import numpy as np

from retrieval_aug.common.errors import UserError

_BLOCK = 4096


def _import_faiss():
  try:
    import faiss
  except ImportError as error:
    raise UserError(
      f"faiss cannot be imported ({error}); pip install "
      "'retrieval_aug[scale]', or set --config.search.searcher=auto."
    ) from error
  return faiss


def _search(index, queries: np.ndarray, k: int) -> np.ndarray:
  out = np.empty((len(queries), k), np.int64)
  starts = range(0, len(queries), _BLOCK)
  for start in starts:
    part = slice(start, start + _BLOCK)
    _, out[part] = index.search(queries[part], k)
  return out


class Hnsw:
  """A graph of near keys, walked from hubs.

  Args:
    keys: float32 [n, d], unit rows.
    k: neighbors that will be asked for.
    m: links of a key.
    ef_construction: keys held in view while linking.
    ef_search: keys held in view while searching; 0 takes 2 k.
  """

  name = "faiss_hnsw"

  def __init__(
    self,
    keys: np.ndarray,
    *,
    k: int,
    m: int = 32,
    ef_construction: int = 64,
    ef_search: int = 0,
  ):
    faiss = _import_faiss()
    n, self._dims = keys.shape
    self._m, self._ef_construction = m, ef_construction
    self._index = faiss.IndexHNSWFlat(self._dims, m, faiss.METRIC_INNER_PRODUCT)
    self._index.hnsw.efConstruction = ef_construction
    self._index.add(keys)
    # Beyond a quarter of the keys brute force is faster.
    self.most_effort = int(max(n // 4, 4 * k, 1))
    self.effort = ef_search or 2 * k

  @property
  def parameters(self) -> dict[str, Any]:
    """As given, and what is in use."""
    return {
      "m": self._m,
      "ef_construction": self._ef_construction,
      "ef_search": self.effort,
    }

  @property
  def bytes_per_key(self) -> float:
    """Of a key, and its links (twice m on the ground level, in 32 bits)."""
    return 4.0 * self._dims + 4 * 2 * self._m + 12

  def candidates(self, queries: np.ndarray, k: int) -> np.ndarray:
    """Probably the best k."""
    self._index.hnsw.efSearch = max(self.effort, k)
    return _search(self._index, queries, k)


class Ivf:
  """Inverted lists, scanned query by query.

  Args:
    keys: float32 [n, d], unit rows.
    k: neighbors that will be asked for.
    lists: number of lists; 0 takes 2 sqrt(n).
    probes: lists that a query looks into; 0 takes sqrt(lists).
  """

  name = "faiss_ivf"

  def __init__(
    self, keys: np.ndarray, *, k: int, lists: int = 0, probes: int = 0
  ):
    faiss = _import_faiss()
    n, self._dims = keys.shape
    lists = lists or round(2 * n**0.5)
    lists = max(1, min(lists, n // 16))
    self._coarse = faiss.IndexFlatIP(self._dims)
    self._index = faiss.IndexIVFFlat(
      self._coarse, self._dims, lists, faiss.METRIC_INNER_PRODUCT
    )
    # Its defaults train much longer, for no more recall.
    self._index.cp.niter = 5
    self._index.cp.max_points_per_centroid = 64
    self._index.cp.min_points_per_centroid = 1
    self._index.cp.spherical = True
    self._index.train(keys)
    self._index.add(keys)
    self._lists = self.most_effort = lists
    self.effort = probes or max(1, round(lists**0.5))

  @property
  def parameters(self) -> dict[str, Any]:
    """Lists and probes in use."""
    return {"lists": self._lists, "probes": min(self.effort, self._lists)}

  @property
  def bytes_per_key(self) -> float:
    """Of a key and its 64-bit number, and the centers."""
    n = self._index.ntotal
    return 4.0 * self._dims + 8 + 4.0 * self._dims * self._lists / n

  def candidates(self, queries: np.ndarray, k: int) -> np.ndarray:
    """The best k in the lists probed; -1 where these hold fewer."""
    self._index.nprobe = min(self.effort, self._lists)
    return _search(self._index, queries, k)
