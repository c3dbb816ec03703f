"""Engines that find candidates: one interface, a module an engine.

`build` guards them all alike: what would crash an engine, or make it answer
in silence with something else, never reaches it.
"""

from typing import Any, Protocol

import numpy as np

from retrieval_aug.common.errors import UserError
from retrieval_aug.memory.searchers import (
  exact,
  faiss_indexes,
  ivf,
  scann_tree,
)

KINDS = ("exact", "ivf", "scann", "faiss_hnsw", "faiss_ivf")

_ENGINES = {
  "exact": exact.Exact,
  "ivf": ivf.Ivf,
  "scann": scann_tree.ScannTree,
  "faiss_hnsw": faiss_indexes.Hnsw,
  "faiss_ivf": faiss_indexes.Ivf,
}


class Searcher(Protocol):
  """Finds candidates, which `memory.search.search` scores and orders.

  Attributes:
    name: kind.
    parameters: what it was built and is searched with, for a manifest; `build`
      takes them for the next index shard.
    bytes_per_key: RAM that it holds, its copy of the keys included.
    effort: how much of the index a query looks at, in the engine's own unit
      (probes, leaves, ef); may be set between searches.
    most_effort: the largest effort that makes sense.
  """

  name: str
  parameters: dict[str, Any]
  bytes_per_key: float
  effort: int
  most_effort: int

  def candidates(self, queries: np.ndarray, k: int) -> np.ndarray:
    """Rows of the keys int64 [n, <= k] for unit queries [n, d]; -1 pads."""


def build(
  kind: str,
  keys: np.ndarray,
  k: int,
  parameters: dict[str, Any] | None = None,
) -> Searcher:
  """Builds a searcher.

  Args:
    kind: one of `KINDS`.
    keys: [n, d], unit rows.
    k: the most neighbors that will be asked for.
    parameters: arguments of the engine's class.

  Raises:
    UserError: the kind is not known, its library is not installed, or a row
      is not of unit length (see `search.normalize`).
  """
  check_kind(kind)
  keys = _unit(keys, "keys")
  return _Guarded(kind, keys, min(k, len(keys)), parameters or {})


def check_kind(kind: str, *others: str) -> None:
  """Refuses what is neither a kind nor one of `others`.

  Raises:
    UserError: so.
  """
  known = (*others, *KINDS)
  if kind not in known:
    raise UserError(
      f"config.search.searcher={kind!r}: not one of {', '.join(known)}."
    )


class _Guarded:
  """An engine, or for no keys none, behind checks of what it is asked."""

  def __init__(self, kind, keys, k, parameters):
    self.name = kind
    self._shape = keys.shape
    self._engine = None
    if len(keys):
      self._engine = _ENGINES[kind](keys, k=k, **parameters)

  @property
  def parameters(self) -> dict[str, Any]:
    return self._engine.parameters if self._engine else {}

  @property
  def bytes_per_key(self) -> float:
    return self._engine.bytes_per_key if self._engine else 0.0

  @property
  def most_effort(self) -> int:
    return self._engine.most_effort if self._engine else 1

  @property
  def effort(self) -> int:
    return self._engine.effort if self._engine else 1

  @effort.setter
  def effort(self, value: int) -> None:
    if self._engine:
      self._engine.effort = int(np.clip(value, 1, self.most_effort))

  def candidates(self, queries: np.ndarray, k: int) -> np.ndarray:
    n, dims = self._shape
    if queries.ndim != 2 or queries.shape[1] != dims:
      raise UserError(
        f"queries are {list(queries.shape)}, keys {[n, dims]}: both must come "
        "from one encoder and one key_transform; embed them again."
      )
    k = min(k, n)
    if not k or not len(queries):
      return np.full((len(queries), k), -1, np.int64)
    return self._engine.candidates(_unit(queries, "queries"), k)


def _unit(x: np.ndarray, what: str) -> np.ndarray:
  """C-contiguous float32, checked to be unit rows."""
  if np.ndim(x) != 2:
    raise UserError(
      f"{what}: {list(np.shape(x))} is not a matrix [rows, dims]."
    )
  x = np.ascontiguousarray(x, np.float32)
  squares = np.einsum("nd,nd->n", x, x)
  bad = np.flatnonzero(~(np.abs(squares - 1) < 0.01))
  if bad.size:
    raise UserError(
      f"{what}: row {bad[0]} is not of unit length ({bad.size} such rows); "
      "call retrieval_aug.memory.search.normalize first."
    )
  return x
