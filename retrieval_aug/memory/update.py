"""Neighbours of an edited memory, from those of an earlier version of it.

A query that lost a neighbour searches all keys again, for nobody knows who came
next. Any other one keeps its list, and sees only the keys that are new: the
best of both are its neighbours, as if it had searched all.
"""

from typing import NamedTuple

import numpy as np

from retrieval_aug.common import manifest
from retrieval_aug.memory import neighbors
from retrieval_aug.memory.search import SearchResult
from retrieval_aug.memory.table import Changes


class Previous(NamedTuple):
  """A search of an earlier version of the memory.

  Attributes:
    artifact: its neighbour shards, finished, of the same layout.
    changes: of the memory since then.
  """

  artifact: manifest.Artifact
  changes: Changes


class Without(NamedTuple):
  """What is not to be found beside the rows that the table has removed.

  Attributes:
    rows: int64, ascending, of the memory: by nobody.
    pairs: int64 [p, 2], rows of a query and of the memory: by that query.
  """

  rows: np.ndarray
  pairs: np.ndarray


class Update:
  """What queries keep of an earlier search, and who has to search again."""

  def __init__(self, previous: Previous, without: Without | None):
    """Nothing is read yet."""
    self._previous, self._without = previous, without
    self._lost: dict[str, np.ndarray] = {}

  @property
  def recall(self) -> float:
    """Of the earlier search."""
    return self._previous.artifact.info()["recall"]

  @property
  def transform(self):
    """Path of the key transform that stays: models were trained on it."""
    return self._previous.artifact.folder / neighbors.TRANSFORM

  @property
  def gained(self) -> np.ndarray:
    """Rows of the memory that are new, ascending."""
    return self._previous.changes.gained

  def lost(self, shard: neighbors.Shard) -> np.ndarray:
    """Which queries of a neighbour shard lost any of their list: bool [n]."""
    if shard.name not in self._lost:
      old = neighbors.read_lists(self._previous.artifact, shard.name)
      lost = ((old.ids >= 0) & (self._found(old.ids) < 0)).any(axis=1)
      if self._without is not None and len(self._without.pairs):
        lost |= np.isin(shard.rows, self._without.pairs[:, 0])
      self._lost[shard.name] = lost
    return self._lost[shard.name]

  def kept(self, shard: neighbors.Shard) -> SearchResult:
    """The lists of those that lost nothing, by present rows; else pads."""
    old = neighbors.read_lists(self._previous.artifact, shard.name)
    ids = self._found(old.ids)
    pads = self.lost(shard)[:, None] | (ids < 0)
    return SearchResult(
      np.where(pads, -1, ids),
      np.where(pads, np.float32(-np.inf), old.scores),
    )

  def _found(self, ids: np.ndarray) -> np.ndarray:
    """Earlier neighbours by their present rows, -1 where they are gone."""
    ids = self._previous.changes.renumbered(ids)
    if self._without is not None:
      ids = np.where(np.isin(ids, self._without.rows), -1, ids)
    return ids
