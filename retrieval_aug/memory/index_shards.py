"""Index shards: the rows of a memory, cut and dealt to workers."""

import os
from typing import NamedTuple

import numpy as np

from retrieval_aug.common import free_memory

Rows = range | np.ndarray

# Of the free memory, for the keys and the index of a shard.
_PART = 0.5

# Fewer are not worth an index of their own.
_FEWEST = 1024


class IndexShard(NamedTuple):
  """Keys that one index is built over.

  Attributes:
    rows: of the memory, ascending; those removed are among them.
    queries: which of the queries search it, by a name of the job.
  """

  rows: Rows
  queries: str


def cut(rows: Rows, index_rows: int, queries: str) -> list[IndexShard]:
  """Index shards of nearly equal size, at most `index_rows` each."""
  count = -(-len(rows) // index_rows)
  ends = [len(rows) * i // count for i in range(count + 1)]
  return [IndexShard(rows[a:b], queries) for a, b in zip(ends, ends[1:])]


def deal(count: int, groups: int) -> dict[str, list[int]]:
  """Deals index shards to groups of neighbours.

  Args:
    count: of index shards.
    groups: at most so many.

  Returns:
    Numbers of index shards by the name of a group, which says which they are:
    what a group has done means nothing to another way to deal.
  """
  parts = np.array_split(np.arange(count), max(min(groups, count), 1))
  return {
    f"{p[0]:05d}-{p[-1]:05d}": [int(i) for i in p] for p in parts if len(p)
  }


def without(rows: Rows, gone: np.ndarray) -> Rows:
  """Ascending rows but those that are gone; a range where none of them is.

  Args:
    rows: ascending.
    gone: int64, ascending.
  """
  if not len(rows):
    return rows
  low, high = np.searchsorted(gone, [rows[0], rows[-1] + 1])
  if low == high:
    return rows
  return np.setdiff1d(np.asarray(rows), gone[low:high], assume_unique=True)


def rows_that_fit(
  memory_gb: float,
  raw_dims: int,
  dims: int,
  num_queries: int,
  groups: int = 1,
) -> int:
  """Rows an index shard that a worker has the memory for.

  Args:
    memory_gb: in 10^9 bytes; 0 is a share of half of what is free.
    raw_dims: of a key as it is stored, in float16.
    dims: after the key transform.
    num_queries: that the worker holds, too.
    groups: how many work at a time, as far as is known on this machine.
  """
  workers = min(groups, os.cpu_count() or 1)
  budget = memory_gb * 1e9 or _PART * free_memory.of_machine() / workers
  # As stored, of unit length, and up to two copies in an index.
  row = 2 * raw_dims + 3 * 4 * dims
  return max(int((budget - 4 * dims * num_queries) / row), _FEWEST)
