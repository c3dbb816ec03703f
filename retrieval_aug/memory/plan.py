"""Who searches what: which queries, which index shards, and who is checked.

In a first search all queries see all keys. In an update those that lost a
neighbour do, and the rest of them see what is new.
"""

import functools

import numpy as np

from retrieval_aug.memory import index_shards, neighbors
from retrieval_aug.memory.index_shards import IndexShard
from retrieval_aug.memory.search import even_sample
from retrieval_aug.memory.table import Table
from retrieval_aug.memory.update import Previous, Update, Without

# Which queries search an index shard: all, or of an update those that lost a
# neighbour, or the rest of them.
ALL, LOST, REST = "all", "lost", "rest"


class Plan:
  """The work of a search, equal in every process; nothing is searched for it.

  Attributes:
    update: what there is of an earlier search; None of a first one.
  """

  def __init__(
    self,
    queries: Table,
    memory: Table,
    shard_rows: int,
    recall_sample: int,
    previous: Previous | None,
    without: Without | None,
  ):
    """Nothing is read yet.

    Args:
      queries: table of the downstream examples.
      memory: table of the memory.
      shard_rows: examples a neighbour shard.
      recall_sample: queries on which recall is measured.
      previous: of an earlier version of the memory.
      without: what is left out beside the rows that the table has removed.
    """
    self._queries, self._memory = queries, memory
    self._shard_rows, self._recall_sample = shard_rows, recall_sample
    self._without = without
    self.update = Update(previous, without) if previous is not None else None

  @functools.cached_property
  def shards(self) -> dict[str, neighbors.Shard]:
    """The neighbour shards by name."""
    found = neighbors.layout(self._queries.column("split"), self._shard_rows)
    return {shard.name: shard for shard in found}

  @functools.cached_property
  def gone(self) -> np.ndarray:
    """Rows of the memory that nobody is to find, ascending."""
    if self._without is None:
      return self._memory.removed
    return np.union1d(self._memory.removed, self._without.rows)

  @functools.cached_property
  def gained(self) -> np.ndarray:
    """Of an update: rows that are new since the earlier search, ascending."""
    return np.setdiff1d(self.update.gained, self.gone)

  def index(self, index_rows: int) -> list[IndexShard]:
    """The index shards, of at most so many rows."""
    everything = range(self._memory.rows)
    if self.update is None:
      return index_shards.cut(everything, index_rows, ALL)
    found = []
    if len(self.chosen(LOST)):
      found += index_shards.cut(everything, index_rows, LOST)
    if len(self.gained) and len(self.chosen(REST)):
      found += index_shards.cut(self.gained, index_rows, REST)
    return found

  def mask(self, shard: neighbors.Shard, queries: str) -> np.ndarray:
    """Which queries of a neighbour shard are meant: bool [n]."""
    if queries == ALL or self.update is None:
      whole = queries == ALL and self.update is None
      return np.full(len(shard.rows), whole)
    lost = self.update.lost(shard)
    return lost if queries == LOST else ~lost

  def chosen(self, queries: str) -> np.ndarray:
    """Rows of the query table that are meant, ascending."""
    rows = [s.rows[self.mask(s, queries)] for s in self.shards.values()]
    return np.sort(np.concatenate(rows))

  def sample(self, shard: neighbors.Shard) -> np.ndarray:
    """Places in a neighbour shard of queries whose recall is measured."""
    n = len(shard.rows)
    return even_sample(n, -(-self._recall_sample * n // self._queries.rows))
