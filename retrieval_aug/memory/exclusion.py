"""What a training example is not to find, because it is in the memory.

A training example that finds itself, or a near copy, learns to trust a
neighbour that no test example has. Left out is what has its `group`, and where
the memory has no groups, its id. The other splits get all they find: one of
them in the memory is a leak, which hiding from it alone would not mend.
"""

import functools

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from retrieval_aug.common.errors import UserError
from retrieval_aug.memory.search import Groups
from retrieval_aug.memory.table import Table


class Exclusion:
  """Near copies of the training examples, looked up for some of the keys.

  Nothing is held of the memory: of 10^9 rows only those asked for are read.
  """

  def __init__(
    self, queries: Table, memory: Table, pairs: np.ndarray | None = None
  ):
    """Nothing is read yet.

    Args:
      queries: table of the downstream examples.
      memory: table of the memory.
      pairs: int64 [p, 2], rows of the two that are near copies beside those
        of one group or id.
    """
    self._queries, self._memory = queries, memory
    self._pairs = pairs if pairs is not None and len(pairs) else None

  def groups(self, rows: range | np.ndarray) -> Groups | None:
    """Groups of all queries and of some keys; None where no query has any.

    Args:
      rows: of the memory, ascending.

    Raises:
      UserError: one id stands in two groups.
    """
    names = self._names(rows)
    keys = _codes(names, self._train_names)
    present = np.isin(self._query_codes, keys[keys >= 0])
    groups = np.where(present, self._query_codes, -1)
    pairs = self._pairs_of(rows)
    if pairs is None and not present.any():
      return None
    return Groups(groups, keys, pairs)

  def _pairs_of(self, rows: range | np.ndarray) -> np.ndarray | None:
    """The single pairs, with keys numbered by their place in `rows`."""
    if self._pairs is None or not len(rows):
      return None
    rows = np.asarray(rows)
    place = np.searchsorted(rows, self._pairs[:, 1])
    place = np.minimum(place, len(rows) - 1)
    here = rows[place] == self._pairs[:, 1]
    if not here.any():
      return None
    return np.stack([self._pairs[here, 0], place[here]], axis=1)

  def _names(self, rows: range | np.ndarray) -> pa.Array:
    """What the memory's rows go by: their group, or their id."""
    ids = pa.array(self._memory.column_rows("id", rows), pa.string())
    if not self._grouped:
      return ids
    names = pa.array(self._memory.column_rows("group", rows), pa.string())
    which = _codes(ids, self._query_ids)
    both = np.flatnonzero(which >= 0)
    here, there = names.take(both), self._own_names.take(which[both])
    wrong = np.flatnonzero(pc.not_equal(here, there).to_numpy(False))
    if wrong.size:
      at = int(wrong[0])
      raise UserError(
        f"{ids[int(both[at])].as_py()!r} has the group {there[at].as_py()!r} "
        f"in {self._queries.folder} and {here[at].as_py()!r} in "
        f"{self._memory.folder}; near copies must have one name in both."
      )
    return names

  @functools.cached_property
  def _grouped(self) -> bool:
    return self._memory.has_column("group")

  @functools.cached_property
  def _query_ids(self) -> pa.Array:
    return pa.array(self._queries.column("id"), pa.string())

  @functools.cached_property
  def _own_names(self) -> pa.Array:
    if self._grouped and self._queries.has_column("group"):
      return pa.array(self._queries.column("group"), pa.string())
    return self._query_ids

  @functools.cached_property
  def _train(self) -> np.ndarray:
    return np.asarray(self._queries.column("split")) == "train"

  @functools.cached_property
  def _train_names(self) -> pa.Array:
    """Distinct names of the training examples; a code is a place in it."""
    return pc.unique(self._own_names.filter(pa.array(self._train)))

  @functools.cached_property
  def _query_codes(self) -> np.ndarray:
    codes = _codes(self._own_names, self._train_names)
    return np.where(self._train, codes, -1)


def _codes(names: pa.Array, known: pa.Array) -> np.ndarray:
  """Place of each name among the known ones, int64; -1 for another."""
  found = pc.index_in(names, value_set=known, skip_nulls=True)
  return pc.fill_null(found, -1).to_numpy(False).astype(np.int64)
