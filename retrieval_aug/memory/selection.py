"""Which rows of a memory an edit is about: by their ids, or their metadata.

Columns are compared block by block; of a large memory nothing is held but the
numbers of the rows that were found.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from retrieval_aug.common.errors import UserError
from retrieval_aug.memory.table import Table


def rows(
  table: Table,
  ids: Sequence[str] | None,
  where: Mapping[str, str] | None,
) -> np.ndarray:
  """Rows of an edit, removed ones too: int64, ascending.

  Args:
    table: the memory.
    ids: of the rows; either these,
    where: or the value, as text, of each of some metadata columns.

  Raises:
    UserError: there is no such column, or it cannot be compared with a text;
      or neither or both are given, or nothing.
  """
  if not ids and not where:
    raise UserError(
      f"{table.folder}: nothing is chosen; give ids, or column=value."
    )
  if ids and where:
    raise UserError(
      f"{table.folder}: ids and column=value are both given; give one."
    )
  if ids:
    return _matching(table, "id", ids)
  found = [_matching(table, name, [value]) for name, value in where.items()]
  out = found[0]
  for other in found[1:]:
    out = np.intersect1d(out, other, assume_unique=True)
  return out


def describe(where: Mapping[str, str] | None) -> str:
  """A choice by metadata, for messages."""
  return " and ".join(f"{n}={v}" for n, v in (where or {}).items())


def live_rows(table: Table, ids: Sequence[str] | pa.Array) -> np.ndarray:
  """Rows with one of some ids that are not removed: int64, ascending."""
  found = _matching(table, "id", ids)
  return np.setdiff1d(found, table.removed, assume_unique=True)


def check_ids(
  table: Table,
  ids: Sequence[str],
  usable: np.ndarray,
  found: np.ndarray,
  otherwise: str,
) -> None:
  """Refuses ids of which there is no row, or none that the edit can be about.

  Args:
    table: the memory.
    ids: that were asked for.
    usable: rows that the edit can be about.
    found: all rows with such an id.
    otherwise: what is wrong with the rest of them.

  Raises:
    UserError: names the first such id.
  """
  there = set(table.column_rows("id", usable))
  missing = [i for i in ids if i not in there]
  if not missing:
    return
  known = set(table.column_rows("id", found))
  unknown = [i for i in missing if i not in known]
  first, count = (unknown or missing)[0], len(unknown or missing)
  if unknown:
    otherwise = "is not in the memory"
  raise UserError(
    f"{table.folder}: {first!r} {otherwise} ({count:,} of the {len(ids):,} ids "
    "asked for); leave these out. Nothing was changed."
  )


def check_new_ids(table: Table, new: Table) -> None:
  """Refuses a table with an id that the memory has, or that it has twice.

  Raises:
    UserError: names the first such id.
  """
  # All at once: what is distinct can only be told of all.
  ids = live_ids(new)
  twice = repeated(ids)
  if twice is not None:
    raise UserError(
      f"{new.folder}: the id {twice!r} is there twice; make the ids unique."
    )
  clashes = live_rows(table, ids)
  if clashes.size:
    first = table.column_rows("id", clashes[:1])[0]
    raise UserError(
      f"{new.folder}: {first!r} is in {table.folder} already ({len(clashes):,} "
      f"of its {new.rows:,} ids); was it added before? Remove these rows "
      "first, or give the new ones other ids."
    )


def repeated(ids: pa.Array) -> str | None:
  """An id that is there more than once."""
  if pc.count_distinct(ids, mode="all").as_py() == len(ids):
    return None
  counts = pc.value_counts(ids)
  again = pc.greater(counts.field("counts"), 1)
  return counts.field("values").filter(again)[0].as_py()


def live_ids(table: Table) -> pa.Array:
  """Ids of the rows that are not removed."""
  return pa.concat_arrays(list(_live(table, "id")))


def counts(table: Table, name: str) -> dict[str, int]:
  """How many rows that are not removed have each value of a column."""
  out: dict[str, int] = {}
  for texts in _live(table, name):
    found = pc.value_counts(texts)
    for value, count in zip(found.field("values"), found.field("counts")):
      text = value.as_py() or ""
      out[text] = out.get(text, 0) + count.as_py()
  return dict(sorted(out.items(), key=lambda x: (-x[1], x[0])))


def _live(table: Table, name: str) -> Iterator[pa.Array]:
  """A column without the rows that are removed, as texts, in blocks."""
  for first, block in table.column_blocks(name):
    low, high = np.searchsorted(table.removed, [first, first + len(block)])
    live = np.ones(len(block), bool)
    live[table.removed[low:high] - first] = False
    yield _texts(block, table, name).filter(pa.array(live))


def _matching(
  table: Table, name: str, wanted: Sequence[str] | pa.Array
) -> np.ndarray:
  """Rows whose column has one of some texts: int64, ascending."""
  # Large strings, whose bytes may be more than 2^31 in all.
  values = pa.array(wanted, pa.large_string())
  parts = [np.zeros(0, np.int64)]
  for first, block in table.column_blocks(name):
    found = pc.is_in(_texts(block, table, name), value_set=values)
    parts.append(first + np.flatnonzero(found.to_numpy(zero_copy_only=False)))
  return np.concatenate(parts)


def _texts(block: pa.Array, table: Table, name: str) -> pa.Array:
  try:
    return block.cast(pa.large_string())
  except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
    raise UserError(
      f"{table.folder}: the column {name!r} holds {block.type}, which cannot "
      "be compared with a text; name another."
    ) from error
