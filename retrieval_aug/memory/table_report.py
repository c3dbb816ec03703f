"""What a memory holds, and everything that is wrong with it."""

import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from retrieval_aug.common import manifest, progress
from retrieval_aug.common.errors import UserError
from retrieval_aug.datasets import vectors
from retrieval_aug.memory import selection, table_rows
from retrieval_aug.memory.table import Table, stem

_BLOCK_ROWS = 1 << 16


def stat(folder: str | pathlib.Path) -> dict[str, Any]:
  """Facts about a table, as one JSON value.

  Returns:
    `fingerprint`; `rows`, of which `removed` and `live`; `shards`; `key_dims`;
    `values`, the width of each; `columns`, the type of each; `sources`, the
    live rows of each; `bytes` in the folder; `history`, oldest first.

  Raises:
    UserError: it is no finished table, or metadata are damaged.
  """
  table = Table(folder)
  live = table.rows - len(table.removed)
  sources = {"memory": live}
  if table.has_column("source"):
    sources = selection.counts(table, "source")
  records = [d for s in table.shards.values() for d in s["files"].values()]
  return {
    "fingerprint": table.fingerprint,
    "rows": table.rows,
    "removed": len(table.removed),
    "live": live,
    "shards": len(table.shards),
    "key_dims": table.dims,
    "values": dict(table.info["value_dims"]),
    "columns": dict(table.columns),
    "sources": sources,
    "bytes": sum(record["bytes"] for record in records),
    "history": [
      {"edit": edit["edit"], "count": edit["count"]}
      for edit in table.version.history
    ],
  }


def verify(folder: str | pathlib.Path) -> list[str]:
  """All that is wrong with a table, one line each; nothing if it is sound.

  Every file is compared with its digest, or its stamp if it lies elsewhere.
  Every row must be finite, and every key have a direction; metadata have one
  row for each, and no two rows that are not removed have one id.
  """
  try:
    table = Table(folder)
  except UserError as error:
    return [str(error)]
  faults, stamps = [], {}
  with progress.bar(total=table.rows, what="verify", unit="row") as bar:
    for shard, record in table.shards.items():
      for fault in _of_shard(table, shard, record, stamps):
        if fault not in faults:  # of a file elsewhere that shards share
          faults.append(fault)
      bar.update(record["info"]["rows"])
  for edit in table.version.history:
    if "file" in edit:
      faults += _raised(lambda edit=edit: table.version.load(edit))
  if not faults:
    # Only what is whole can be compared.
    twice = selection.repeated(selection.live_ids(table))
    if twice is not None:
      faults.append(
        f"{table.folder}: the id {twice!r} stands in two rows; remove it, and "
        "restore one of them."
      )
  return faults


def _raised(check) -> list[str]:
  try:
    check()
  except UserError as error:
    return [str(error)]
  return []


def _of_shard(
  table: Table, shard: str, record: dict, stamps: dict[str, list[str]]
) -> Iterator[str]:
  """What is wrong with one shard.

  Args:
    table: it is of.
    shard: its name.
    record: of it.
    stamps: what is wrong with files elsewhere; is added to.
  """
  damaged = set()
  for file, digest in record["files"].items():
    path = table.folder / file
    found = _raised(
      lambda path=path, digest=digest: manifest.check_file(
        path, digest, table.remedy
      )
    )
    yield from found
    if found:
      damaged.add(file)
  name = f"metadata_{shard}.parquet"
  if name not in damaged:
    yield from _of_metadata(table, table.folder / name, record)
  for values in ("", *table.value_names):
    file = f"{stem(values)}_{shard}.npy"
    if not damaged & {file, f"rows_{file}"}:
      yield from _of_matrix(table, shard, values, stamps)


def _of_metadata(
  table: Table, path: pathlib.Path, record: dict
) -> Iterator[str]:
  try:
    with pq.ParquetFile(path) as file:
      rows, names = file.metadata.num_rows, file.schema_arrow.names
  except (pa.ArrowException, OSError) as error:
    reason = " ".join(str(error).split())[:120]
    yield f"{path}: not a whole Parquet file ({reason}); {table.remedy}."
    return
  if rows != record["info"]["rows"]:
    yield (
      f"{path}: holds {rows} rows where its shard has "
      f"{record['info']['rows']}; {table.remedy}."
    )
  if "id" not in names:
    yield f"{path}: has no column 'id'; {table.remedy}."


def _of_matrix(
  table: Table, shard: str, name: str, stamps: dict[str, list[str]]
) -> Iterator[str]:
  """What is wrong with keys or values, whose bytes in the folder are right."""
  try:
    matrix = table.matrix(shard, name, check=False)
    if matrix.digest and matrix.path not in stamps:
      stamps[matrix.path] = _raised(
        lambda: vectors.check_unchanged(matrix, table.remedy)
      )
    if matrix.digest and stamps[matrix.path]:
      yield from stamps[matrix.path]
      return
    array = vectors.open_in_place(matrix, table.remedy)
  except UserError as error:
    yield str(error)
    return
  bad = {"holds NaN or infinity": [], "is zero and has no direction": []}
  for start in range(0, len(matrix), _BLOCK_ROWS):
    rows = range(start, min(start + _BLOCK_ROWS, len(matrix)))
    chosen = table_rows.in_file(matrix.rows, rows)
    block = array[chosen]
    finite = np.isfinite(block).all(axis=1)
    numbers = table_rows.as_array(chosen)
    bad["holds NaN or infinity"].extend(numbers[~finite])
    if not name:
      zero = ~block.any(axis=1)
      bad["is zero and has no direction"].extend(numbers[zero])
  for what, numbers in bad.items():
    if numbers:
      yield (
        f"{matrix.path}: row {numbers[0]} {what} ({len(numbers)} such rows); "
        f"{table.remedy}."
      )
