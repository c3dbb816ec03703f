"""Edits of a memory that is in use: rows are removed, restored and added.

Nothing is trained for an edit, and no row is embedded: a memory is a table,
and a removed row stays in it with a tombstone until the table is compacted.
An edit writes new files and then replaces `edits.json`, see `versions.py`. A
process that is killed leaves the old version or the new one; files that
neither needs go away with the next edit.
"""

import contextlib
import dataclasses
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from retrieval_aug.common import files
from retrieval_aug.common.errors import UserError
from retrieval_aug.memory import selection, shard_copies, versions
from retrieval_aug.memory.table import Table

# What a table or an edit writes; nothing else in the folder is touched.
_OURS = re.compile(
  r"(keys|values_.+|rows_.+|metadata|edit|removed)_\d{5,}\.(npy|parquet)"
)


@dataclasses.dataclass(frozen=True)
class Edited:
  """What an edit did, or would do.

  Attributes:
    rows: numbers of the rows that were removed, restored or added, int64; of
      compaction those that were dropped, numbered as they were.
    live: rows that can be found now.
  """

  rows: np.ndarray
  live: int


def remove(
  folder: str | pathlib.Path,
  ids: Sequence[str] | None = None,
  where: Mapping[str, str] | None = None,
  *,
  dry_run: bool = False,
) -> Edited:
  """Removes rows: from now on no search finds them.

  Args:
    folder: of the table.
    ids: of the rows; either these,
    where: or the value of each of some metadata columns.
    dry_run: whether nothing is written.

  Raises:
    UserError: an id is not there or removed already, or nothing is chosen or
      would be left.
  """
  with _open(folder, dry_run) as table:
    rows = selection.rows(table, ids, where)
    live = np.setdiff1d(rows, table.removed, assume_unique=True)
    if ids is not None:
      selection.check_ids(table, ids, live, rows, "is removed already")
    if not live.size:
      raise UserError(
        f"{table.folder}: no row has {selection.describe(where)}, or all that "
        "have are removed already; see `stat`."
      )
    removed = np.union1d(table.removed, live)
    if len(removed) == table.rows:
      raise UserError(
        f"{table.folder}: this would remove all {len(live):,} rows that are "
        "left; keep one, or add others first."
      )
    if not dry_run:
      _commit_rows(table, "remove", live, removed)
    return Edited(live, table.rows - len(removed))


def restore(
  folder: str | pathlib.Path,
  ids: Sequence[str] | None = None,
  where: Mapping[str, str] | None = None,
  *,
  dry_run: bool = False,
) -> Edited:
  """Restores removed rows; of several with one id, the last.

  Args:
    folder: of the table.
    ids: of the rows; either these,
    where: or the value of each of some metadata columns.
    dry_run: whether nothing is written.

  Raises:
    UserError: an id is not there or not removed, nothing is chosen, or an item
      of that id was added since.
  """
  with _open(folder, dry_run) as table:
    rows = selection.rows(table, ids, where)
    dead = np.intersect1d(rows, table.removed, assume_unique=True)
    if ids is not None:
      selection.check_ids(table, ids, dead, rows, "is not removed")
    if not dead.size:
      raise UserError(
        f"{table.folder}: no removed row has {selection.describe(where)}; see "
        "`stat`. What compaction dropped can only be added again."
      )
    own = table.column_rows("id", dead)
    last = np.array(sorted({x: i for i, x in enumerate(own)}.values()))
    dead = dead[last]
    clashes = selection.live_rows(table, [own[i] for i in last])
    if clashes.size:
      again = table.column_rows("id", clashes[:1])[0]
      raise UserError(
        f"{table.folder}: an item {again!r} was added since that row was "
        f"removed ({len(clashes):,} such ids); remove it first, or restore "
        "others."
      )
    removed = np.setdiff1d(table.removed, dead, assume_unique=True)
    if not dry_run:
      _commit_rows(table, "restore", dead, removed)
    return Edited(dead, table.rows - len(removed))


def add(
  folder: str | pathlib.Path,
  other: str | pathlib.Path,
  *,
  dry_run: bool = False,
) -> Edited:
  """Appends the rows of another finished table, as new shards.

  Its files are copied; embeddings that it reads in place are read there.

  Args:
    folder: of the table.
    other: of a table of the same encoder, with the values of this one.
    dry_run: whether nothing is written.

  Raises:
    UserError: the tables do not fit together, an id is there already, a row is
      damaged, not finite or a zero key, or the disk is too small.
  """
  with _open(folder, dry_run) as table:
    new = Table(other)
    if new.folder.resolve() == table.folder.resolve():
      raise UserError(f"{table.folder}: a table cannot be added to itself.")
    shard_copies.check_fit(table, new)
    selection.check_new_ids(table, new)
    shard_copies.check_space(
      table.folder, shard_copies.bytes_to_copy(table, new)
    )
    shard_copies.check_rows(new, table.value_names)
    rows = np.arange(table.rows, table.rows + new.rows)
    if not dry_run:
      version = table.version
      copied = shard_copies.copy(table, new, version.next)
      shards = version.shards | copied
      edit = _edit(version, "add", new.rows) | {"table": new.fingerprint}
      _commit(version, version.removed, edit, shards)
    return Edited(rows, table.rows + new.rows - len(table.removed))


def compact(folder: str | pathlib.Path, *, dry_run: bool = False) -> Edited:
  """Writes shards with removed rows again, without them.

  Rows get other numbers; `Table.since` knows which. What was removed before
  cannot be restored any more.

  Args:
    folder: of the table.
    dry_run: whether nothing is written.

  Raises:
    UserError: no row is removed, a file is damaged, or the disk is too small.
  """
  with _open(folder, dry_run) as table:
    if not table.removed.size:
      raise UserError(
        f"{table.folder}: no row is removed, so there is nothing to compact."
      )
    shard_copies.check_space(table.folder, shard_copies.bytes_to_rewrite(table))
    if not dry_run:
      version = table.version
      shards = shard_copies.without_removed(table, version.next)
      edit = _edit(version, "compact", len(table.removed))
      # The tombstones are the rows that it drops.
      _commit(version, None, edit | version.removed, shards)
    return Edited(table.removed, table.rows - len(table.removed))


@contextlib.contextmanager
def _open(folder: str | pathlib.Path, dry_run: bool) -> Iterator[Table]:
  """The memory in a folder, held for this process unless it is only read."""
  table = memory(folder)
  if dry_run:
    yield table
    return
  try:
    with files.lock(table.folder):
      # Another process may have edited it while this one waited.
      table = memory(folder)
      _clean(table.version)
      yield table
  except OSError as error:
    raise UserError(
      f"{table.folder}: cannot be written ({error.strerror or error}); see to "
      "its disk and rights. The memory is as it was."
    ) from error


def memory(folder: str | pathlib.Path) -> Table:
  """Opens a table that is a memory.

  Raises:
    UserError: it is a table of queries, or none.
  """
  table = Table(folder)
  if table.has_column("split") and not table.has_column("text"):
    raise UserError(
      f"{table.folder}: a table of the examples to classify, which are what "
      "the dataset says; name the table of the memory."
    )
  return table


def _clean(version: versions.Version) -> None:
  """Deletes what a killed edit left, and what compaction replaced."""
  needed = version.files()
  for path in version.folder.iterdir():
    if _OURS.fullmatch(path.name) and path.name not in needed:
      # What cannot be deleted now is no fault, and goes with the next edit.
      with contextlib.suppress(OSError):
        path.unlink()


def _edit(version: versions.Version, kind: str, count: int) -> dict[str, Any]:
  """An entry of the history, of an edit that is about to be made."""
  return {
    "edit": kind,
    "fingerprint": version.fingerprint,
    "rows": version.rows,
    "count": count,
  }


def _commit_rows(
  table: Table, kind: str, rows: np.ndarray, removed: np.ndarray
) -> None:
  """Removes or restores rows, so that `removed` are."""
  version, number = table.version, f"{table.version.next:05d}"
  save = lambda stem, rows: versions.save_rows(
    table.folder, f"{stem}_{number}", rows
  )
  edit = _edit(version, kind, len(rows)) | save("edit", rows)
  _commit(
    version,
    save("removed", removed) if removed.size else None,
    edit,
    version.shards,
  )


def _commit(
  version: versions.Version,
  removed: dict[str, Any] | None,
  edit: dict[str, Any],
  shards: dict[str, dict],
) -> None:
  """Makes a version the one that the folder holds; it takes one rename."""
  new = [int(name) for name in shards.keys() - version.shards.keys()]
  after = dataclasses.replace(
    version,
    shards=shards,
    added=frozenset(n for n in shards if n in version.added or int(n) in new),
    removed=removed,
    history=(*version.history, edit),
    next=1 + max([version.next, *new]),
  )
  versions.write(after)
  _clean(after)
