"""Reading parts of a table's shards: some rows, or a column block by block."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from retrieval_aug.common.errors import UserError
from retrieval_aug.datasets import vectors

# Rows are copied in blocks of this size, so that no more than what was asked
# for is ever in memory.
_BLOCK_BYTES = 64 << 20


def normalize(
  rows: slice | range | np.ndarray, count: int
) -> range | np.ndarray:
  """Row numbers as a range of step 1, or int64.

  Args:
    rows: a slice, a range, or integers in any order.
    count: of the rows that there are.

  Raises:
    ValueError: there is no such row.
  """
  if isinstance(rows, slice):
    rows = range(*rows.indices(count))
  if isinstance(rows, range) and rows.step != 1:
    rows = np.array(rows, np.int64)
  if not len(rows):
    return range(0)
  if isinstance(rows, range):
    low, high = rows.start, rows.stop - 1
  else:
    rows = np.asarray(rows)
    if rows.ndim != 1 or rows.dtype.kind not in "iu":
      raise ValueError(f"rows are {rows.dtype} {list(rows.shape)}")
    rows = rows.astype(np.int64, copy=False)
    low, high = int(rows.min()), int(rows.max())
  if low < 0 or high >= count:
    raise ValueError(f"rows {low} to {high} are asked for, of {count}")
  return rows


def as_array(places: slice | np.ndarray) -> np.ndarray:
  """Numbers that a slice stands for."""
  if isinstance(places, slice):
    return np.arange(places.start, places.stop)
  return places


def column_blocks(
  file: pq.ParquetFile, name: str, kind: str, wanted: np.ndarray | None
) -> Iterator[tuple[int, pa.Array]]:
  """A metadata column of one shard in blocks.

  Args:
    file: of the shard's metadata, which may lack the column.
    name: of the column.
    kind: its type in the shards that have it.
    wanted: ascending rows; blocks without one are passed over. None: all.

  Yields:
    First row of a block, within the shard, and the block.
  """
  there = file.schema_arrow.names
  read = "id" if name == "group" and name not in there else name
  first = 0
  for index in range(file.num_row_groups):
    last = first + file.metadata.row_group(index).num_rows
    if wanted is None or np.diff(np.searchsorted(wanted, [first, last])):
      if read in there:
        chunks = file.read_row_group(index, columns=[read]).column(0).chunks
      else:
        chunks = [_filling(name, kind, last - first)]
      start = first
      for chunk in chunks:
        yield start, chunk
        start += len(chunk)
    first = last


def _filling(name: str, kind: str, count: int) -> pa.Array:
  if kind not in ("string", "large_string"):
    return pa.nulls(count)
  return pa.repeat("memory" if name == "source" else "", count)


def gather(
  matrix: vectors.Matrix,
  places: slice | np.ndarray,
  rows: range | np.ndarray,
  out: np.ndarray,
  remedy: str,
) -> None:
  """Copies rows of a matrix to their places, and finds them finite.

  Args:
    matrix: of an `.npy` file.
    places: where in `out` the rows belong.
    rows: ascending numbers among `matrix.rows`; may be there twice.
    out: of the matrix's width.
    remedy: ends a message.

  Raises:
    UserError: a row holds NaN or infinity; it is named.
  """
  array = vectors.open_in_place(matrix, remedy)
  step = max(1, _BLOCK_BYTES // (array.itemsize * matrix.dims))
  for start in range(0, len(rows), step):
    chosen = in_file(matrix.rows, rows[start : start + step])
    block = array[chosen]
    finite = np.isfinite(block).all(axis=1)
    if not finite.all():
      row = as_array(chosen)[np.flatnonzero(~finite)[0]]
      raise UserError(
        f"{matrix.path}: row {row} holds NaN or infinity "
        f"({int((~finite).sum())} such rows); {remedy}."
      )
    if isinstance(places, slice):
      first = places.start + start
      out[first : first + len(block)] = block
    else:
      out[places[start : start + step]] = block


def in_file(
  meant: range | np.ndarray, rows: range | np.ndarray
) -> slice | np.ndarray:
  """Where in a file rows are.

  Args:
    meant: rows of the file that a matrix consists of.
    rows: numbers among these.
  """
  if isinstance(rows, range):
    if isinstance(meant, range):
      return slice(meant.start + rows.start, meant.start + rows.stop)
    return np.asarray(meant[rows.start : rows.stop])
  if isinstance(meant, range):
    return rows + meant.start
  return np.asarray(meant[rows])
