"""Versions of a table: its shards and tombstones, and what led to them.

A table that was edited has an `edits.json` beside its manifest. It holds the
whole state: which shards there are and in which order, which rows are removed,
and every edit so far. To commit an edit is to replace this one file, so there
is no moment at which half an edit can be seen. The manifest stays as the embed
stage wrote it.

Files of an edit have numbers that are never used again: who has the table open
while it is edited finds the bytes it knows, or none.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from retrieval_aug.common import files, manifest
from retrieval_aug.common.errors import UserError

NAME = "edits.json"
KIND = "edits of an embedding table"
# Raise when what stands in `edits.json` changes its meaning.
FORMAT_VERSION = 1

_NONE = np.zeros(0, np.int64)
_NONE.flags.writeable = False


@dataclasses.dataclass(frozen=True)
class Version:
  """One state of a table.

  Attributes:
    folder: of the table.
    base: fingerprint of what the embed stage wrote.
    base_shards: how many shards that are.
    shards: record of each shard by name, in the order of their rows.
    added: names of those that the embed stage did not write.
    removed: file of the removed rows, and its digest; None of none.
    history: one JSON value an edit, oldest first: `edit`, its name; the
      `fingerprint` and the number of `rows` before it; `count`, of the rows it
      was about; and `file`, which holds them, where they are not the last.
    next: number of the next new file.
  """

  folder: pathlib.Path
  base: str
  base_shards: int
  shards: dict[str, dict]
  added: frozenset[str]
  removed: dict[str, Any] | None
  history: tuple[dict[str, Any], ...]
  next: int

  @property
  def rows(self) -> int:
    """Rows in all, removed ones included."""
    return sum(record["info"]["rows"] for record in self.shards.values())

  @property
  def fingerprint(self) -> str:
    """Of the state, however it was reached; the base's if that is the state."""
    # Without added ones there are the base's, less those that were dropped.
    if not (self.added or self.removed or len(self.shards) < self.base_shards):
      return self.base
    shards = [
      record if name in self.added else name
      for name, record in self.shards.items()
    ]
    removed = self.removed and self.removed["sha256"]
    return manifest.fingerprint([self.base, shards, removed])

  def removed_rows(self) -> np.ndarray:
    """Rows that are removed: int64, ascending."""
    if self.removed is None:
      return _NONE
    return self.load(self.removed)

  def load(self, record: dict[str, Any]) -> np.ndarray:
    """Rows from a file of `save_rows`.

    Raises:
      UserError: the file is damaged.
    """
    path = self.folder / record["file"]
    manifest.check_file(path, record, remedy(self.folder))
    return np.load(path, allow_pickle=False)

  def files(self) -> set[str]:
    """Names of all files in the folder that this version needs."""
    names = {n for record in self.shards.values() for n in record["files"]}
    kept = [self.removed, *self.history]
    return names | {r["file"] for r in kept if r and "file" in r}


@dataclasses.dataclass(frozen=True)
class Changes:
  """What became of the rows of an earlier version.

  Attributes:
    renumber: int64 `[rows then]`, its row now, -1 if it is gone or removed;
      None if every row has its number still.
    lost: ascending rows, numbered as they were, that cannot be found any more.
    gained: ascending rows, numbered as they are, that could not be found then.
  """

  renumber: np.ndarray | None
  lost: np.ndarray
  gained: np.ndarray

  def renumbered(self, rows: np.ndarray) -> np.ndarray:
    """Rows of then as rows of now: -1 for what is lost, and for -1.

    Args:
      rows: int64 of any shape, for example lists of neighbours.
    """
    if self.renumber is None:
      return np.where(np.isin(rows, self.lost), -1, rows)
    return np.where(rows < 0, -1, self.renumber[np.maximum(rows, 0)])


def remedy(folder: pathlib.Path) -> str:
  """What to do about damage in a table that was edited."""
  return (
    f"put a copy of that file back, or delete {folder} to have the table made "
    "again without its edits"
  )


def read(
  folder: pathlib.Path, base: str, shards: Mapping[str, dict]
) -> Version:
  """The version that a folder holds.

  Args:
    folder: of a table.
    base: fingerprint of its manifest.
    shards: those that its manifest records, in order.

  Raises:
    UserError: the edits are of another table or format, or damaged.
  """
  path = folder / NAME
  if not path.exists():
    count = len(shards)
    # A shard whose items all failed left its number out.
    number = 1 + max(map(int, shards), default=-1)
    return Version(
      folder, base, count, dict(shards), frozenset(), None, (), number
    )
  try:
    found = json.loads(path.read_text())
    facts = {n: found[n] for n in ("kind", "format_version", "base")}
    own = found["shards"]
    records = {n: own[n] if n in own else shards[n] for n in found["order"]}
    version = Version(
      folder,
      base,
      len(shards),
      records,
      frozenset(own),
      found["removed"],
      tuple(found["history"]),
      found["next"],
    )
  except (ValueError, OSError, KeyError, TypeError) as error:
    raise UserError(
      f"{path}: not a whole file of edits ({type(error).__name__}: {error}); "
      f"{remedy(folder)}."
    ) from error
  wanted = {"kind": KIND, "format_version": FORMAT_VERSION, "base": base}
  differing = manifest.differences(facts, wanted)
  if differing:
    raise UserError(
      f"{path}: these edits were made to another table, or by another version "
      f"of this program ({'; '.join(differing)}); delete {path} to have the "
      "table without them."
    )
  return version


def write(version: Version) -> None:
  """Commits a version: from now on the folder holds this one."""
  files.write_json(
    version.folder / NAME,
    {
      "kind": KIND,
      "format_version": FORMAT_VERSION,
      "base": version.base,
      "order": list(version.shards),
      "shards": {n: version.shards[n] for n in version.added},
      "removed": version.removed,
      "history": list(version.history),
      "next": version.next,
    },
  )


def save_rows(
  folder: pathlib.Path, name: str, rows: np.ndarray
) -> dict[str, Any]:
  """Writes row numbers to a new file; says which, with its digest."""
  path = folder / f"{name}.npy"
  with files.atomic_path(path) as temporary:
    np.save(temporary, rows)
  return {"file": path.name, **manifest.digest(path)}


def since(version: Version, fingerprint: str) -> Changes | None:
  """What changed since an earlier version.

  The edits are undone one by one, from the last to the first after that
  version; everything is about sorted sets of rows.

  Args:
    version: the present one.
    fingerprint: of the earlier one.

  Returns:
    The changes; None if that version is not known.

  Raises:
    UserError: a file of the history is damaged.
  """
  if fingerprint == version.fingerprint:
    return Changes(None, _NONE, _NONE)
  places = [
    i
    for i, edit in enumerate(version.history)
    if edit["fingerprint"] == fingerprint
  ]
  if not places:
    return None
  edits = version.history[places[-1] :]
  now = version.removed_rows()
  # All three in the numbering before the edit that was last undone: what was
  # removed by then; what is removed today; what compaction has dropped.
  then, dead, gone = now, now, _NONE
  for edit in reversed(edits):
    kind = edit["edit"]
    if kind == "add":
      dead, gone = dead[dead < edit["rows"]], gone[gone < edit["rows"]]
      continue
    rows = version.load(edit)
    if kind == "remove":
      then = np.setdiff1d(then, rows, assume_unique=True)
    elif kind == "restore":
      then = np.union1d(then, rows)
    else:
      then = rows
      dead = np.union1d(_before_compaction(dead, rows), rows)
      gone = np.union1d(_before_compaction(gone, rows), rows)
  count = edits[0]["rows"]
  renumber = None
  if gone.size:
    renumber = np.arange(count)
    renumber -= np.searchsorted(gone, renumber)
    renumber[dead] = -1
  back = np.setdiff1d(then, dead, assume_unique=True)
  back = back - np.searchsorted(gone, back)
  # Rows keep their order, so all that were added come after all that were not.
  new = np.arange(count - len(gone), version.rows)
  new = np.setdiff1d(new, now, assume_unique=True)
  return Changes(
    renumber,
    lost=np.setdiff1d(dead, then, assume_unique=True),
    gained=np.concatenate([back, new]),
  )


def _before_compaction(rows: np.ndarray, dropped: np.ndarray) -> np.ndarray:
  """The numbers that rows had before `dropped`, ascending, were left out."""
  passed = dropped - np.arange(len(dropped))
  return rows + np.searchsorted(passed, rows, side="right")
