"""Items of a memory that cannot be embedded: left out, and listed with why.

With `config.memory.on_error=skip` the table has fewer rows than there are
items, and its folder a `dead_letters.jsonl` with id, place and reason of each
item that is missing. A shard's letters are recorded before the shard is, so
that a killed run loses none, whichever process did the shard.

`retry` has the shards that miss items made again by the next run.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from retrieval_aug.common import files, manifest, progress
from retrieval_aug.common.errors import UserError
from retrieval_aug.datasets import images, memories, pairs_shard
from retrieval_aug.datasets.on_error import ON_ERROR
from retrieval_aug.datasets.types import ImageItems
from retrieval_aug.memory import versions
from retrieval_aug.memory.table import KIND

NAME = "dead_letters.jsonl"

# What else than to mend an item can be done.
HINT = "Such items are left out with --config.memory.on_error=skip."

# Letters that a message shows.
_SHOWN = 3


class Letter(NamedTuple):
  """An item that could not be embedded.

  Attributes:
    id: of the item; of a whole file, the beginning of its items' ids.
    place: what it was to be read from.
    reason: in one line.
  """

  id: str
  place: str
  reason: str


@dataclasses.dataclass(frozen=True)
class Policy:
  """What becomes of items that cannot be embedded.

  Attributes:
    on_error: "fail": the first one raises; "skip": they are left out.
    max_errors: share of all items that may be left out.
  """

  on_error: str = "fail"
  max_errors: float = 0.01

  def __post_init__(self):
    if self.on_error not in ON_ERROR:
      raise UserError(
        f"config.memory.on_error={self.on_error}: not {' or '.join(ON_ERROR)}."
      )

  @property
  def skip(self) -> bool:
    """Whether they are left out."""
    return self.on_error == "skip"


def place(items: ImageItems, index: int) -> str:
  """Where an item is read from: its file, as far as the reader tells."""
  reader, row = memories.origin(items.image, index)
  if isinstance(reader, images.ImageFiles):
    return reader.paths[row]
  if isinstance(reader, pairs_shard.PackedImages):
    return reader.path
  return f"{items.name}, item {index}"


def not_finite(arrays: Mapping[str, np.ndarray]) -> dict[int, str]:
  """Rows that a table cannot hold, and why.

  Args:
    arrays: `[rows, dims]` by name, "" of the keys.
  """
  found: dict[int, str] = {}
  for name, array in arrays.items():
    with np.errstate(over="ignore"):
      finite = np.isfinite(np.asarray(array).astype(np.float16)).all(axis=1)
    what = f"its value of {name}" if name else "its key"
    for row in np.flatnonzero(~finite).tolist():
      found.setdefault(
        row, f"{what} is not finite in float16; check the encoder's weights"
      )
  return found


def refuse(folder: pathlib.Path, letters: list[Letter]) -> None:
  """Raises a `UserError` that names the first of some letters."""
  first, more = letters[0], len(letters) - 1
  raise UserError(
    f"{folder}: item {first.id!r} ({first.place}) cannot be embedded: "
    f"{first.reason.rstrip('.')}{f' ({more:,} more in its shard)' * (more > 0)}"
    f"; mend or remove it. Nothing of its shard was written. {HINT}"
  )


def _record_name(unit: str) -> str:
  return f"letters_{unit}"


def record(
  artifact: manifest.Artifact,
  unit: str,
  rows: int,
  letters: list[Letter],
  **facts: Any,
) -> None:
  """Notes what became of the items of a shard, before the shard is written.

  Args:
    artifact: the table.
    unit: the shard, or any other part of the work.
    rows: items that are embedded.
    letters: of the others.
    **facts: further JSON values, for `recorded`.
  """
  info = {"rows": rows, "letters": [list(x) for x in letters], **facts}
  artifact.record(_record_name(unit), [], info)


def recorded(artifact: manifest.Artifact, unit: str) -> dict[str, Any] | None:
  """What `record` was told of a part of the work; None if nothing."""
  found = artifact.recorded(_record_name(unit))
  return found and found["info"]


def gather(
  artifact: manifest.Artifact,
  units: Iterable[str],
  items: int | None,
  policy: Policy,
) -> dict[str, Any]:
  """Writes the letters of all parts to one file, and counts.

  Args:
    artifact: the table, all of whose shards are written.
    units: parts of the work, in order.
    items: how many there are in all; None if only the parts know.
    policy: how many letters there may be.

  Returns:
    Facts for the table's manifest: `failed`, the number of letters, and
    `left_out`, a digest of their ids; nothing if there are none.

  Raises:
    UserError: too many letters, or no row is left.
  """
  path = artifact.folder / NAME
  rows = failed = 0
  first: list[Letter] = []
  ids = hashlib.sha256()
  with files.atomic_path(path) as temporary:
    with open(temporary, "w", encoding="utf-8") as f:
      for unit in units:
        found = recorded(artifact, unit)
        rows += found["rows"]
        for letter in map(Letter._make, found["letters"]):
          f.write(json.dumps({**letter._asdict(), "unit": unit}) + "\n")
          ids.update(json.dumps(letter.id).encode())
          failed += 1
          if len(first) < _SHOWN:
            first.append(letter)
  if items is not None and rows + failed != items:
    raise UserError(
      f"{artifact.folder}: {rows:,} rows and {failed:,} items left out are not "
      f"all {items:,} items; {artifact.remedy}."
    )
  if not failed:
    path.unlink()
    return {}
  _check(path, rows, failed, first, policy)
  return {"failed": failed, "left_out": ids.hexdigest()[:32]}


def _check(
  path: pathlib.Path,
  rows: int,
  failed: int,
  first: list[Letter],
  policy: Policy,
) -> None:
  """Refuses too many letters, and tells of the others."""
  told = "; ".join(f"{x.id}: {x.reason.rstrip('.')}" for x in first)
  text = f"{path}: {failed:,} of {rows + failed:,} items cannot be embedded"
  if not policy.skip:
    raise UserError(
      f"{text}, and an earlier run left them out ({told}); set "
      f"--config.memory.on_error=skip again, or delete {path.parent} to have "
      "all items tried again."
    )
  share = failed / (rows + failed)
  if share > policy.max_errors:
    raise UserError(
      f"{text}, a share of {share:.2g}, and config.memory.max_errors is "
      f"{policy.max_errors:g} (first: {told}); allow more, which redoes no "
      f"finished shard, or mend them and delete {path.parent}."
    )
  if not rows:
    raise UserError(f"{text} (first: {told}): there is nothing to search in.")
  progress.note(f"{text}, and are left out (first: {told})")


def read(folder: pathlib.Path) -> Iterator[dict[str, str]]:
  """The lines of a table's dead letters, in order: `Letter`, and its `unit`.

  Raises:
    UserError: the file was changed.
  """
  path = folder / NAME
  if not path.exists():
    return
  with open(path, encoding="utf-8") as f:
    for number, line in enumerate(f, 1):
      try:
        yield json.loads(line)
      except ValueError as error:
        raise UserError(
          f"{path} line {number}: not JSON ({error}); delete {folder} to have "
          "the table made again."
        ) from error


def retry(folder: str | pathlib.Path) -> int:
  """Reopens a table, so that the next run tries its dead letters again.

  That run makes the shards again that miss items, and no other; rows get other
  numbers where one has more rows then.

  Args:
    folder: of a finished table.

  Returns:
    How many items will be tried again; with 0 nothing was changed.

  Raises:
    UserError: the table is damaged or not finished, or was edited since.
  """
  folder = pathlib.Path(folder)
  path = folder / manifest.NAME
  if not path.exists():
    raise UserError(f"{path}: missing; name the folder of a table.")
  if (folder / versions.NAME).exists():
    raise UserError(
      f"{folder / versions.NAME}: the table was edited, and its rows cannot be "
      "renumbered any more; embed the items of its dead letters as a table of "
      "their own, and add that."
    )
  with files.lock(folder):
    found = files.read_json(path)
    table = manifest.Artifact(folder, KIND, found.get("inputs", {}))
    if not table.is_complete():
      raise UserError(
        f"{folder}: this table is not finished; run --stages=embed."
      )
    letters = list(read(folder))
    if not letters:
      return 0
    table.verify()
    again = {letter["unit"] for letter in letters}
    kept = {n: r for n, r in table.shards().items() if n not in again}
    for name, shard in kept.items():
      record(table, name, shard["info"]["rows"], [])
      table.record(name, list(shard["files"]), shard["info"])
    # From here on the table is unfinished.
    path.unlink()
    table.start()
    for name in set(found["shards"]) & again:
      for file in found["shards"][name]["files"]:
        (folder / file).unlink(missing_ok=True)
  return len(letters)
