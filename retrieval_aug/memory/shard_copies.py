"""Shards of a table written anew: those of another one, or some of its rows."""

import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from retrieval_aug.common import files, manifest, progress
from retrieval_aug.common.errors import UserError
from retrieval_aug.datasets import vectors
from retrieval_aug.memory.table import Table, stem


def check_fit(table: Table, new: Table) -> None:
  """Refuses a table that cannot be added to another.

  Raises:
    UserError: the encoders, the values or the metadata differ, or rows of the
      new one are removed.
  """
  remedy = f"embed it with the encoders of {table.folder}"
  names = table.value_names
  lacking = sorted(set(names) - set(new.value_names))
  if lacking:
    raise UserError(
      f"{new.folder}: has no values of {', '.join(lacking)}, as "
      f"{table.folder} has; {remedy}."
    )
  differing = manifest.differences(_made_by(table), _made_by(new, names))
  if differing:
    raise UserError(
      f"{new.folder}: was embedded by other encoders than {table.folder} "
      f"({'; '.join(differing[:3])}): their vectors cannot be compared; "
      f"{remedy}."
    )
  if new.removed.size:
    raise UserError(
      f"{new.folder}: {len(new.removed):,} of its rows are removed; compact it "
      "first."
    )
  for name in sorted(table.columns.keys() | new.columns.keys()):
    kinds = [t.columns.get(name, "null") for t in (table, new)]
    if kinds[0] != kinds[1] and "null" not in kinds:
      raise UserError(
        f"{new.folder}: its column {name!r} holds {kinds[1]}, that of "
        f"{table.folder} {kinds[0]}; write the new one's as {kinds[0]}."
      )
  if table.has_column("text") != new.has_column("text"):
    bare = new if table.has_column("text") else table
    raise UserError(
      f"{bare.folder}: has no texts, and the other table has; embed it with "
      "its texts."
    )


def _made_by(table: Table, names: Sequence[str] | None = None) -> dict:
  """Encoders of keys and of some values, and the widths of what they made."""
  names = table.value_names if names is None else names
  values = table.inputs.get("values", {})
  return {
    "encoder": table.inputs["encoder"],
    "values": {n: values.get(n) for n in names},
    "key_dims": table.dims,
    "value_dims": {n: table.info["value_dims"][n] for n in names},
  }


def check_rows(table: Table, value_names: Sequence[str]) -> None:
  """Reads all rows: they must be finite, and a key have a direction.

  Raises:
    UserError: names the first faulty row.
  """
  with progress.bar(total=table.rows, what="check rows", unit="row") as bar:
    for shard, record in table.shards.items():
      for name in ("", *value_names):
        matrix = table.matrix(shard, name)
        for rows, block in vectors.blocks(matrix, table.remedy):
          if name:
            continue
          zero = np.flatnonzero(~block.any(axis=1))
          if zero.size:
            raise UserError(
              f"{matrix.path}: row {int(matrix.rows[rows][zero[0]])} is zero "
              "and has no direction, so nothing is near it; leave that item "
              "out, or embed it again."
            )
      bar.update(record["info"]["rows"])


def check_space(folder: pathlib.Path, needed: int) -> None:
  """Refuses to write more bytes than a folder's disk has free.

  Raises:
    UserError: says how many are missing.
  """
  free = shutil.disk_usage(folder).free
  if needed > free:
    raise UserError(
      f"{folder}: {needed / 1e9:.1f} GB are to be written, and "
      f"{free / 1e9:.1f} GB are free; make space. The memory is as it was."
    )


def _files(table: Table, shard: str, value_names: Sequence[str]) -> list[str]:
  """Files of a shard without those of other values."""
  names = [f"metadata_{shard}.parquet"]
  for name in ("", *value_names):
    names += [f"{stem(name)}_{shard}.npy", f"rows_{stem(name)}_{shard}.npy"]
  return [n for n in names if n in table.shards[shard]["files"]]


def bytes_to_copy(table: Table, new: Table) -> int:
  """What `copy` writes."""
  return sum(
    record["files"][name]["bytes"]
    for shard, record in new.shards.items()
    for name in _files(new, shard, table.value_names)
  )


def copy(table: Table, new: Table, number: int) -> dict[str, dict]:
  """Copies the shards of another table into the folder of a table.

  Args:
    table: whose values are copied.
    new: the other one.
    number: of the first new shard.

  Returns:
    Records of the new shards by name.

  Raises:
    UserError: a file is damaged.
  """
  out = {}
  with progress.bar(total=new.rows, what="add", unit="row") as bar:
    for index, (shard, record) in enumerate(new.shards.items(), number):
      name = f"{index:05d}"
      digests = {}
      for file in _files(new, shard, table.value_names):
        target = table.folder / _renamed(file, shard, name)
        with files.atomic_path(target) as temporary:
          shutil.copyfile(new.folder / file, temporary)
          digests[target.name] = manifest.digest(temporary)
        if digests[target.name] != record["files"][file]:
          manifest.check_file(
            new.folder / file, record["files"][file], new.remedy
          )
          raise UserError(
            f"{target}: is not what {new.folder / file} is; its disk may be "
            "damaged. The memory is as it was."
          )
      info: dict[str, Any] = {"rows": record["info"]["rows"]}
      info["columns"] = new.shard_columns(shard)
      places = record["info"].get("stored", {})
      places = {
        n: p | {"rows": _renamed(p["rows"], shard, name)}
        for n, p in places.items()
        if not n or n in table.value_names
      }
      if places:
        info["stored"] = places
      out[name] = {"files": digests, "info": info}
      bar.update(info["rows"])
  return out


def _renamed(file: Any, shard: str, name: str) -> Any:
  """A file's name as part of another shard; what is no name stays."""
  if not isinstance(file, str):
    return file
  start, end = file.rsplit(f"_{shard}.", 1)
  return f"{start}_{name}.{end}"


def _touched(table: Table) -> dict[str, np.ndarray]:
  """Rows that stay, within their shard, of shards with removed rows."""
  out, start = {}, 0
  for shard, record in table.shards.items():
    rows = record["info"]["rows"]
    low, high = np.searchsorted(table.removed, [start, start + rows])
    if low < high:
      keep = np.ones(rows, bool)
      keep[table.removed[low:high] - start] = False
      out[shard] = np.flatnonzero(keep)
    start += rows
  return out


def bytes_to_rewrite(table: Table) -> int:
  """About what `without_removed` writes."""
  return sum(
    sum(d["bytes"] for d in table.shards[shard]["files"].values())
    * len(kept)
    // table.shards[shard]["info"]["rows"]
    for shard, kept in _touched(table).items()
  )


def without_removed(table: Table, number: int) -> dict[str, dict]:
  """Writes each shard that has removed rows as a new one without them.

  Args:
    table: of the shards.
    number: of the first new shard.

  Returns:
    Records of all shards by name, in the order of their rows.

  Raises:
    UserError: a file is damaged.
  """
  touched, out = _touched(table), {}
  with progress.bar(total=len(touched), what="compact", unit="shard") as bar:
    for shard, record in table.shards.items():
      kept = touched.get(shard)
      if kept is None:
        out[shard] = record
        continue
      if kept.size:
        name = f"{number:05d}"
        out[name] = _rewrite(table, shard, kept, name)
        number += 1
      bar.update(1)
  return out


def _rewrite(table: Table, shard: str, kept: np.ndarray, name: str) -> dict:
  """One shard's rows that stay, as a shard of another name; its record."""
  folder, old = table.folder, table.shards[shard]
  info: dict[str, Any] = {"rows": len(kept)}
  info["columns"] = table.shard_columns(shard)
  digests, places = {}, {}

  def write(file: str, save) -> None:
    with files.atomic_path(folder / file) as temporary:
      save(temporary)
      digests[file] = manifest.digest(temporary)

  for values in ("", *table.value_names):
    matrix = table.matrix(shard, values).take(kept)
    if values in old["info"].get("stored", {}):
      file = None
      if not isinstance(matrix.rows, range):
        file = f"rows_{stem(values)}_{name}.npy"
        write(file, lambda path, rows=matrix.rows: np.save(path, rows))
      places[values] = vectors.to_record(matrix, file)
      continue
    write(
      f"{stem(values)}_{name}.npy",
      lambda path, matrix=matrix: _save_matrix(path, matrix, table.remedy),
    )
  if places:
    info["stored"] = places
  write(
    f"metadata_{name}.parquet",
    lambda path: _save_metadata(
      path, folder / f"metadata_{shard}.parquet", kept
    ),
  )
  return {"files": digests, "info": info}


def _save_matrix(
  path: pathlib.Path, matrix: vectors.Matrix, remedy: str
) -> None:
  """Writes rows of a matrix block by block."""
  kind = vectors.open_in_place(matrix, remedy).dtype
  header = {
    "descr": np.lib.format.dtype_to_descr(kind),
    "fortran_order": False,
    "shape": (len(matrix), matrix.dims),
  }
  # Not memory-mapped: on a full disk that ends the program.
  with open(path, "wb") as f:
    np.lib.format.write_array_header_1_0(f, header)
    for _, block in vectors.blocks(matrix, remedy):
      f.write(np.ascontiguousarray(block).data)


def _save_metadata(
  path: pathlib.Path, source: pathlib.Path, kept: np.ndarray
) -> None:
  """Writes rows of a Parquet file, one group of rows after the other."""
  with pq.ParquetFile(source) as file:
    with pq.ParquetWriter(path, file.schema_arrow) as writer:
      first = 0
      for index in range(file.num_row_groups):
        group = file.read_row_group(index)
        low, high = np.searchsorted(kept, [first, first + len(group)])
        if low < high:
          writer.write_table(group.take(pa.array(kept[low:high] - first)))
        first += len(group)
