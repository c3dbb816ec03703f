"""Embedding tables: a folder of keys, values and metadata in shards.

Per shard: `keys_00000.npy` (float16, [rows, d], raw: not normalised),
`values_<encoder>_00000.npy` (float16, [rows, d_v]) and
`metadata_00000.parquet` (`id` and what the source has). Rows are addressed by
id; a row's position is only meaningful within one table.

Of embeddings that exist already the manifest says where they lie instead, in
place of either `.npy` file: a path, a stamp of that file, and which of its rows
are meant. They keep their type, and are not copied.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from retrieval_aug.common import files, manifest
from retrieval_aug.common.errors import UserError
from retrieval_aug.datasets import vectors
from retrieval_aug.memory import table_rows, versions
from retrieval_aug.memory.versions import Changes

KIND = "embedding table"


def shard_name(index: int) -> str:
  """The name under which shard `index` is recorded."""
  return f"{index:05d}"


def write_shard(
  artifact: manifest.Artifact,
  index: int,
  *,
  keys: np.ndarray | None,
  values: dict[str, np.ndarray],
  metadata: dict[str, list],
  stored: Mapping[str, vectors.Matrix] | None = None,
) -> None:
  """Writes one shard atomically and records it as finished.

  Args:
    artifact: the table's folder.
    index: number of the shard.
    keys: [rows, d], any float type; None if they are `stored`.
    values: by encoder name, [rows, d_v].
    metadata: columns of length rows; must hold `id`.
    stored: embeddings that stay where they are: keys under "", values under
      their name.

  Raises:
    UserError: NaN or infinite numbers, or a magnitude that float16 cannot
      hold; names the first such row's id.
  """
  arrays = {} if keys is None else {f"keys_{index:05d}.npy": keys}
  arrays |= {f"values_{n}_{index:05d}.npy": v for n, v in values.items()}
  # All are checked before the first is written.
  for name, array in arrays.items():
    with np.errstate(over="ignore"):
      half = np.asarray(array).astype(np.float16)
    bad = np.flatnonzero(~np.isfinite(half).all(axis=1))
    if bad.size:
      raise UserError(
        f"{artifact.folder / name}: the embedding of item "
        f"{metadata['id'][bad[0]]!r} is not finite in float16 ({bad.size} such "
        "rows); check that item and the encoder's weights. Nothing was written."
      )
    arrays[name] = half
  info: dict[str, Any] = {"rows": len(metadata["id"])}
  places = {}
  for name, matrix in (stored or {}).items():
    _check_stored(matrix, metadata["id"])
    rows_file = None
    if not isinstance(matrix.rows, range):
      rows_file = f"rows_{stem(name)}_{index:05d}.npy"
      arrays[rows_file] = matrix.rows
    places[name] = vectors.to_record(matrix, rows_file)
  if places:
    info["stored"] = places
  for name, array in arrays.items():
    with files.atomic_path(artifact.folder / name) as path:
      np.save(path, array)
  names = list(arrays)
  name = f"metadata_{index:05d}.parquet"
  with files.atomic_path(artifact.folder / name) as path:
    pq.write_table(pa.table(metadata), path)
  names.append(name)
  artifact.record(shard_name(index), names, info)


def stem(name: str) -> str:
  """Of a file of values by their name, or of keys, which are called ""."""
  return f"values_{name}" if name else "keys"


def _check_stored(matrix: vectors.Matrix, ids: list[str]) -> None:
  """Reads embeddings once: all must be there, and finite."""
  if len(matrix) != len(ids):
    raise UserError(
      f"{matrix.path}: {len(matrix)} rows for {len(ids)} items; give one per "
      "item."
    )
  remedy = "leave the item out, or write the file again"
  vectors.check_unchanged(matrix, "start again")
  for _ in vectors.blocks(matrix, remedy):
    pass


class Table:
  """A finished table, opened for reading and checked.

  What is asked for is read, and nothing else; the digest of a file is checked
  when it is first read. Of a table that is edited meanwhile this stays the
  version that was opened.

  Attributes:
    folder: where it is.
    fingerprint: of everything its bytes depend on, and of its edits. What was
      removed and restored leaves no trace in it.
    inputs: what it was made from, before any edit.
    info: facts that the embed stage recorded.
    shards: record of each shard by name, in the order of their rows.
    rows: number of rows in all, removed ones included.
    removed: int64, ascending rows that are not to be found any more. They are
      there still: a row keeps its number.
    dims: width of the keys.
    value_names: encoders whose values the table holds.
    remedy: what to do about damage; ends a message.
  """

  def __init__(self, folder: str | pathlib.Path):
    self.folder = pathlib.Path(folder)
    path = self.folder / manifest.NAME
    if not path.exists():
      raise UserError(f"{path}: missing; run --stages=embed first.")
    found = files.read_json(path)
    # It has no inputs that were asked for: whatever a table says of itself is
    # right, and what is no table is refused by `is_complete`.
    inputs = found.get("inputs", {}) if isinstance(found, dict) else {}
    artifact = manifest.Artifact(self.folder, KIND, inputs)
    self.inputs = artifact.inputs
    if not artifact.is_complete():
      raise UserError(
        f"{self.folder}: this table is not finished; run --stages=embed."
      )
    self.info = artifact.info()
    base = artifact.fingerprint
    if self.info.get("failed"):  # other rows than without these faults
      base = manifest.fingerprint([base, self.info["left_out"]])
    self.version = versions.read(self.folder, base, artifact.shards())
    edited = bool(self.version.history)
    self.remedy = versions.remedy(self.folder) if edited else artifact.remedy
    self.fingerprint = self.version.fingerprint
    self.shards = self.version.shards
    rows = [s["info"]["rows"] for s in self.shards.values()]
    self._starts = np.cumsum([0, *rows], dtype=np.int64)
    self.rows = int(self._starts[-1])
    self.removed = self.version.removed_rows()
    self.dims = self.info["key_dims"]
    self.value_names = sorted(self.info["value_dims"])
    self._checked: set[str] = set()

  @property
  def history(self) -> list[str]:
    """Fingerprints of all versions, oldest first, this one last."""
    earlier = [edit["fingerprint"] for edit in self.version.history]
    return [*earlier, self.fingerprint]

  def keys(self) -> np.ndarray:
    """All keys: [rows, d], raw; float16, or as they are stored elsewhere."""
    return self._all("")

  def key_rows(self, rows: slice | range | np.ndarray) -> np.ndarray:
    """Some keys: [len(rows), d], raw, as `keys`, in the order asked for.

    Args:
      rows: a slice, a range, or int64 in any order, also twice.

    Raises:
      UserError: a file that holds one is damaged, or a key is not finite.
      ValueError: there is no such row.
    """
    return self._some("", rows)

  def values(self, name: str) -> np.ndarray:
    """All values of one encoder: [rows, d_v]; of a type as `keys`."""
    self._must_have_values(name)
    return self._all(name)

  def value_rows(
    self, name: str, rows: slice | range | np.ndarray
  ) -> np.ndarray:
    """Some values of one encoder: [len(rows), d_v]; see `key_rows`."""
    self._must_have_values(name)
    return self._some(name, rows)

  def column(self, name: str) -> list:
    """One metadata column, in row order; see `column_blocks`."""
    return [x for _, b in self.column_blocks(name) for x in b.to_pylist()]

  def column_rows(self, name: str, rows: slice | range | np.ndarray) -> list:
    """Some rows of a metadata column, in the order asked for.

    Args:
      name: of the column, see `column_blocks`.
      rows: as for `key_rows`.

    Raises:
      UserError: there is no such column, or a file is damaged.
      ValueError: there is no such row.
    """
    self._must_have(name)
    rows = table_rows.normalize(rows, self.rows)
    out: list[Any] = [None] * len(rows)
    for shard, places, own in self._parts(rows):
      places, own = table_rows.as_array(places), np.asarray(own)
      for first, block in self._blocks(shard, name, own):
        low, high = np.searchsorted(own, [first, first + len(block)])
        found = block.take(pa.array(own[low:high] - first)).to_pylist()
        for place, value in zip(places[low:high].tolist(), found):
          out[place] = value
    return out

  def column_blocks(self, name: str) -> Iterator[tuple[int, pa.Array]]:
    """A metadata column in blocks, of a million rows or a shard at the most.

    Where an added shard has other columns than the rest, a row without a
    `source` is of "memory", one without a `group` has its id, and of any other
    column it has "", or null if that is not of texts.

    Yields:
      Number of a block's first row, and the block.

    Raises:
      UserError: there is no such column, or a file is damaged.
    """
    self._must_have(name)
    for start, shard in zip(self._starts.tolist(), self.shards):
      for first, block in self._blocks(shard, name):
        yield start + first, block

  def has_column(self, name: str) -> bool:
    """Whether the metadata has a column of this name."""
    return name in self.columns

  @functools.cached_property
  def columns(self) -> dict[str, str]:
    """Type of each metadata column by name, in Arrow's words."""
    out: dict[str, str] = {}
    base = None
    for shard, record in self.shards.items():
      found = record["info"].get("columns")
      if found is None:
        # The embed stage writes the same ones to all shards.
        base = found = base or self.shard_columns(shard)
      for name, kind in found.items():
        if out.get(name, "null") == "null":
          out[name] = kind
    return out

  def shard_columns(self, shard: str) -> dict[str, str]:
    """Type of each metadata column that one shard has, in Arrow's words."""
    with self._metadata(shard) as file:
      return {field.name: str(field.type) for field in file.schema_arrow}

  def since(self, fingerprint: str) -> Changes | None:
    """What changed since this table had another fingerprint.

    Returns:
      The changes; None if that is no earlier version of this table.

    Raises:
      UserError: a file of the history is damaged.
    """
    return versions.since(self.version, fingerprint)

  def verify(self) -> None:
    """Compares every file with its digest; raises a `UserError`.

    What lies elsewhere is compared with its stamp.
    """
    for record in self.shards.values():
      for name, digest in record["files"].items():
        manifest.check_file(self.folder / name, digest, self.remedy)
    self.version.removed_rows()
    for edit in self.version.history:
      if "file" in edit:
        self.version.load(edit)
    stamped: set[str] = set()
    for shard, record in self.shards.items():
      for name in record["info"].get("stored", {}):
        matrix = self.matrix(shard, name, check=False)
        if matrix.path not in stamped:
          vectors.check_unchanged(matrix, self.remedy)
          stamped.add(matrix.path)

  def matrix(
    self, shard: str, name: str, *, check: bool = True
  ) -> vectors.Matrix:
    """Where the keys or values of one shard lie.

    Args:
      shard: its name.
      name: of values; "" of keys.
      check: whether the bytes are compared with their digest, unless they were
        already.

    Raises:
      UserError: a file is missing, damaged, or of another shape.
    """
    record = self.shards[shard]
    place = record["info"].get("stored", {}).get(name)
    if place is None:
      dims = self.info["value_dims"][name] if name else self.dims
      path = self.folder / f"{stem(name)}_{shard}.npy"
      if not path.exists():
        raise UserError(f"{path}: missing; {self.remedy}.")
      rows = range(record["info"]["rows"])
      shape = (len(rows), dims)
      matrix = vectors.Matrix(str(path), shape, "", "", rows)
      # First what says most about the fault, then the digest, which only says
      # that there is one.
      vectors.open_in_place(matrix, self.remedy)
      if check:
        self._check(path.name, record)
      return matrix
    if isinstance(place["rows"], str):
      # Mapped, for there may be as many as the memory has items.
      self._check(place["rows"], record)
      rows = np.load(
        self.folder / place["rows"], mmap_mode="r", allow_pickle=False
      )
      place = place | {"rows": [0, 0]}
    else:
      rows = range(*place["rows"])
    matrix = vectors.from_record(self.folder, place, {}, self.remedy)
    matrix = dataclasses.replace(matrix, rows=rows)
    if check and matrix.path not in self._checked:
      vectors.check_unchanged(matrix, self.remedy)
      self._checked.add(matrix.path)
    return matrix

  def _must_have_values(self, name: str) -> None:
    if name not in self.value_names:
      raise UserError(
        f"{self.folder}: holds no values of {name!r}, only of "
        f"{self.value_names}; {self.remedy}."
      )

  def _must_have(self, name: str) -> None:
    if not self.has_column(name):
      raise UserError(
        f"{self.folder}: has no column {name!r}, only "
        f"{', '.join(sorted(self.columns))}; name one of these."
      )

  def _all(self, name: str) -> np.ndarray:
    """Keys, which have no name, or values; one piece elsewhere stays mapped."""
    (shard, record), *others = self.shards.items()
    if not others and name in record["info"].get("stored", {}):
      found = vectors.whole(self.matrix(shard, name), self.remedy)
      if found is not None:
        return found
    return self._some(name, range(self.rows))

  def _some(self, name: str, rows: slice | range | np.ndarray) -> np.ndarray:
    rows = table_rows.normalize(rows, self.rows)
    parts = [
      (self.matrix(shard, name), places, own)
      for shard, places, own in self._parts(rows)
    ]
    kinds = [vectors.open_in_place(m, self.remedy).dtype for m, _, _ in parts]
    dims = self.info["value_dims"][name] if name else self.dims
    kind = np.result_type(*kinds) if kinds else np.float16
    out = np.empty((len(rows), dims), kind)
    for matrix, places, own in parts:
      table_rows.gather(matrix, places, own, out, self.remedy)
    return out

  def _parts(
    self, rows: range | np.ndarray
  ) -> Iterator[tuple[str, slice | np.ndarray, range | np.ndarray]]:
    """Shards that hold some of the rows.

    Yields:
      Name of the shard, places of its rows among those asked for, and their
      ascending numbers within the shard.
    """
    shards = zip(self.shards, self._starts[:-1].tolist(), self._starts[1:])
    if isinstance(rows, range):
      for shard, start, stop in shards:
        low, high = max(rows.start, start), min(rows.stop, int(stop))
        if low < high:
          places = slice(low - rows.start, high - rows.start)
          yield shard, places, range(low - start, high - start)
      return
    # Ascending, so that a disk is read in one direction.
    order = np.argsort(rows, kind="stable")
    rows = rows[order]
    for shard, start, stop in shards:
      low, high = np.searchsorted(rows, [start, stop])
      if low < high:
        yield shard, order[low:high], rows[low:high] - start

  def _blocks(
    self, shard: str, name: str, wanted: np.ndarray | None = None
  ) -> Iterator[tuple[int, pa.Array]]:
    """A metadata column of one shard in blocks, by their first row there.

    Args:
      shard: its name.
      name: of the column, which any shard has.
      wanted: ascending rows; blocks without one are passed over.
    """
    with self._metadata(shard) as file:
      yield from table_rows.column_blocks(
        file, name, self.columns[name], wanted
      )

  def _metadata(self, shard: str) -> pq.ParquetFile:
    name = f"metadata_{shard}.parquet"
    self._check(name, self.shards[shard])
    return pq.ParquetFile(self.folder / name)

  def _check(self, name: str, record: dict) -> None:
    """Compares a file with its digest, when it is first read."""
    if name not in self._checked:
      manifest.check_file(
        self.folder / name, record["files"][name], self.remedy
      )
      self._checked.add(name)
