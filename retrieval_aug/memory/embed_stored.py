"""Shards of items whose embeddings exist already: says where they lie.

What is written is what cannot be read in place: the values of texts without
stored ones, and lists of a Parquet file.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from retrieval_aug.common import progress
from retrieval_aug.datasets import types, vectors
from retrieval_aug.encoders import Encoder
from retrieval_aug.memory import stand_ins
from retrieval_aug.memory.embed_shard import Shard

# Rows that are looked at together.
_BLOCK = 1 << 14


def made_by(encoder: Encoder, items: types.ImageItems) -> bool:
  """Whether all items' values are those of an encoder, or stand for it."""
  return all(_part_made_by(encoder, part) for part in items.stored)


def _part_made_by(encoder: Encoder, part: types.Part) -> bool:
  if encoder.modality == stand_ins.STORED:
    return True
  made = part.encoders.get(encoder.name)
  return encoder.name in part.values and made == encoder.fingerprint


class Piece(NamedTuple):
  """Rows of a part, which are a shard of the table.

  Attributes:
    part: number of the part.
    own: which of its rows.
    rows: the same, of all items.
  """

  part: int
  own: range
  rows: range


def pieces(
  items: types.ImageItems, reading: Sequence[Encoder], shard_rows: int
) -> list[Piece]:
  """The shards of a table of stored embeddings.

  Without anything to compute, a shard is a part, however large.

  Args:
    items: have embeddings.
    reading: encoders of texts that are still to be embedded.
    shard_rows: most rows of a shard, where there is something to compute.
  """
  found, first = [], 0
  for number, part in enumerate(items.stored):
    step = shard_rows if reading else len(part)
    for start in range(0, len(part), step):
      own = range(start, min(start + step, len(part)))
      rows = range(first + own.start, first + own.stop)
      found.append(Piece(number, own, rows))
    first += len(part)
  return found


@dataclasses.dataclass
class StoredShards:
  """Writes shards in one process; lists of a part are converted once.

  Attributes:
    items: have embeddings.
    there: stand for encoders whose values are stored.
    reading: encoders of texts that are still to be embedded.
  """

  items: types.ImageItems
  there: Sequence[Encoder]
  reading: Sequence[Encoder]

  def __post_init__(self):
    self._lists: tuple[int, dict[str, np.ndarray]] = (-1, {})

  def write(self, shard: Shard, piece: Piece) -> None:
    """Writes one shard.

    Args:
      shard: with the rows of the piece.
      piece: one of `pieces`.

    Raises:
      UserError: an embedding is not finite, or a text cannot be embedded, and
        such items are not to be left out.
    """
    matrices = self._matrices(piece.part)
    lists = self._read_lists(piece.part)
    own = np.arange(piece.own.start, piece.own.stop)
    # Values of lists come before those of texts, as they always did.
    keys = lists[""][own] if "" in lists else None
    values = {name: x[own] for name, x in lists.items() if name}
    values |= shard.embed_texts(self.reading)
    stored = {n: m.take(own) for n, m in matrices.items() if m.in_place}
    if shard.policy is not None and shard.policy.skip:
      for name, matrix in stored.items():
        what = f"its value of {name}" if name else "its key"
        for row in _not_finite(matrix):
          why = f"{what}, in {matrix.path}, is not finite"
          shard.faults.setdefault(shard.rows[row], why)
    shard.write(keys, values, stored)

  def _matrices(self, part: int) -> dict[str, vectors.Matrix]:
    found = self.items.stored[part]
    return {"": found.keys} | {e.name: found.values[e.name] for e in self.there}

  def _read_lists(self, part: int) -> dict[str, np.ndarray]:
    """Lists of a part; those of the last one are kept."""
    if self._lists[0] != part:
      matrices = self._matrices(part)
      found = {
        n: vectors.read_lists(m) for n, m in matrices.items() if not m.in_place
      }
      self._lists = part, found
    return self._lists[1]


def _not_finite(matrix: vectors.Matrix) -> list[int]:
  """Rows of a matrix with NaN or infinity."""
  array = vectors.open_in_place(matrix, "write it again")
  bad: list[int] = []
  for start in range(0, len(matrix), _BLOCK):
    rows = np.asarray(matrix.rows[start : start + _BLOCK])
    finite = np.isfinite(array[rows]).all(axis=1)
    bad += (start + np.flatnonzero(~finite)).tolist()
  return bad


def note_unused(
  items: types.ImageItems, value_encoders: Sequence[Encoder]
) -> None:
  """Says that there are values which nobody asked for."""
  common = set.intersection(*(set(p.values) for p in items.stored))
  if value_encoders and not common & {e.name for e in value_encoders}:
    for name in sorted(common):
      progress.note(
        f"note: {items.name} has values {name!r} too; they are used instead "
        f"of embedding its texts with --config.value_encoders.text.name="
        f"stored:{name}"
      )
