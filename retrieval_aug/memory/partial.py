"""The running top-k of some queries over the index shards of one worker.

It is written after each index shard, so that a killed search goes on there,
and merged with those of the other workers at the end. It never leaves the
folder of the search: 12 bytes a query and neighbour are all that workers
exchange, whatever the memory's size.
"""

import pathlib
import zipfile
from typing import NamedTuple

import numpy as np

from retrieval_aug.common import files
from retrieval_aug.memory import search as searching


class Partial(NamedTuple):
  """A running top-k.

  Attributes:
    done: index shards that are in it, of those of the worker.
    result: of the queries, [n, k].
    best: float32 [s, k], true best scores of a sample of the queries over the
      same keys, from which recall is measured.
    left_out: bool [n], whether any key was forbidden to a query.
  """

  done: int
  result: searching.SearchResult
  best: np.ndarray
  left_out: np.ndarray

  def plus(
    self,
    result: searching.SearchResult,
    best: np.ndarray,
    left_out: np.ndarray,
    done: int,
  ) -> "Partial":
    """With the findings among other keys, and so many index shards done."""
    k = self.result.ids.shape[1]
    both = -np.sort(-np.concatenate([self.best, best], axis=1), axis=1)
    return Partial(
      done,
      searching.merge(self.result, result, k),
      both[:, :k],
      self.left_out | left_out,
    )


def no_neighbors(n: int, k: int) -> searching.SearchResult:
  """Lists without any neighbour."""
  return searching.SearchResult(
    np.full((n, k), -1, np.int64), np.full((n, k), -np.inf, np.float32)
  )


def empty(n: int, k: int, sample: int) -> Partial:
  """Before any index shard."""
  return Partial(
    0,
    no_neighbors(n, k),
    np.full((sample, k), -np.inf, np.float32),
    np.zeros(n, bool),
  )


def save(path: pathlib.Path, partial: Partial) -> None:
  """Writes it, atomically."""
  with files.atomic_path(path) as temporary, open(temporary, "wb") as f:
    np.savez(
      f,
      done=partial.done,
      ids=partial.result.ids,
      scores=partial.result.scores,
      best=partial.best,
      left_out=partial.left_out,
    )


def done(path: pathlib.Path) -> int:
  """How many index shards are in it; 0 where there is none, or a broken one."""
  try:
    # NumPy leaves a file open that it cannot read.
    with open(path, "rb") as f, np.load(f, allow_pickle=False) as data:
      return int(data["done"])
  except FileNotFoundError:
    return 0
  except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile):
    path.unlink()  # costs what it held, and no result depends on it
    return 0


def load(path: pathlib.Path) -> Partial:
  """Reads what `save` wrote."""
  with np.load(path, allow_pickle=False) as data:
    return Partial(
      int(data["done"]),
      searching.SearchResult(data["ids"], data["scores"]),
      data["best"],
      data["left_out"],
    )
