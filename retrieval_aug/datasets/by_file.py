"""Pairs of img2dataset, of which nobody lists all: one file at a time.

    files = by_file.find("web/*.tar")
    listed = files.load(7)

A memory of the web has so many items that no single machine should hold their
ids and texts. Here the files are found, and each is listed by who embeds it.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from retrieval_aug.common.errors import UserError
from retrieval_aug.datasets import images, memories, pairs
from retrieval_aug.datasets.on_error import Faults
from retrieval_aug.datasets.types import MemorySource, validate

# Raised when the same files and options come to mean other items.
_FORMAT = 1

_OPTION = "config.memory.pairs"


class Fault(NamedTuple):
  """A pair, or a whole file, that cannot be read.

  Attributes:
    id: of the pair; of a file, the beginning of its pairs' ids.
    place: file and key.
    reason: in one line.
  """

  id: str
  place: str
  reason: str


class Listed(NamedTuple):
  """What a file holds.

  Attributes:
    memory: its items that are chosen; there may be none.
    found: how many pairs can be read, chosen or not.
    faults: the others; of a file that cannot be read, that one.
    broken: whether the file cannot be read.
  """

  memory: MemorySource
  found: int
  faults: list[Fault]
  broken: bool


class _Faults(Faults):
  """Keeps all faults of a file."""

  def __init__(self, item: pairs.Found, on_error: str):
    super().__init__(_OPTION, on_error, 1.0)
    self._item = item
    self.found: list[Fault] = []
    self.broken = False

  def pair(self, place: str, what: str) -> None:
    super().pair(place, what)
    key = place.removeprefix(f"{self._item.path}: ")
    self.found.append(Fault(self._item.prefix + key, place, what))

  def shard(self, error: UserError) -> None:
    super().shard(error)
    reason = " ".join(str(error).split())
    # What was found in it before is not taken either.
    self.found = [Fault(self._item.prefix, self._item.path, reason)]
    self.broken = True


@dataclasses.dataclass(frozen=True, eq=False)
class PairFiles:
  """Files of pairs; made by `find`.

  Attributes:
    found: the files, ordered by source and name.
    stamps: what tells each from another of its name.
    digest: the kind of stamp, see `images.stamps`.
    choose: what leaves items of a file out, and changes their texts.
    options: JSON value that names what `choose` does.
  """

  found: tuple[pairs.Found, ...]
  stamps: tuple[str, ...]
  digest: str
  choose: Callable[[MemorySource], MemorySource] | None
  options: dict[str, Any]

  name = "pairs"
  # Their images are still to be embedded.
  stored = None

  def __len__(self) -> int:
    """How many files there are."""
    return len(self.found)

  @property
  def fingerprint(self) -> dict[str, Any]:
    """Names all items, of which none is listed."""
    return {
      "memory": "pairs by file",
      "format": _FORMAT,
      "files": len(self),
      "shards": pairs.digest_of(self.found, self.stamps),
      "chosen": self.options,
    }

  def load(self, number: int, on_error: str = "fail") -> Listed:
    """Lists the pairs of one file, and no other.

    Args:
      number: of the file.
      on_error: "fail"; "skip": what cannot be read is told in the result.

    Raises:
      UserError: a pair or the file cannot be read, or it was changed.
    """
    item = self.found[number]
    faults = _Faults(item, on_error)
    listed = pairs.read([item], faults, self.digest)
    for _, shard in listed:
      if shard.stamps != [self.stamps[number]]:
        raise UserError(
          f"{item.path}: changed since the files were listed; start again."
        )
    memory = pairs.joined(listed)
    count = len(memory)
    if count:
      validate(memory)
      if self.choose is not None:
        memory = self.choose(memory)
    return Listed(memory, count, faults.found, faults.broken)

  def some(self, ids: Iterable[str]) -> MemorySource:
    """Items with these ids, as their files hold them, for their pictures.

    Only the files that hold them are listed; ids of other sources are left out.

    Args:
      ids: of items, as a table of these files has them.
    """
    numbers = {item.prefix: i for i, item in enumerate(self.found)}
    wanted: dict[int, set[str]] = {}
    for name in ids:
      cuts = (i + 1 for i, char in enumerate(name) if char == "/")
      number = next(
        (numbers[name[:c]] for c in cuts if name[:c] in numbers), -1
      )
      if number >= 0:
        wanted.setdefault(number, set()).add(name)
    parts = []
    for number, names in sorted(wanted.items()):
      faults = _Faults(self.found[number], "skip")
      listed = pairs.read([self.found[number]], faults, self.digest)
      parts.append(taken(pairs.joined(listed), names))
    return memories.union(parts) if parts else pairs.joined([])


def taken(memory: MemorySource, names: set[str]) -> MemorySource:
  """The items of a memory that have one of these ids, in its order."""
  rows = [i for i, name in enumerate(memory.ids) if name in names]
  return dataclasses.replace(
    memory,
    ids=[memory.ids[i] for i in rows],
    image=memories.Picked(memory.image, np.array(rows, np.int64)),
    texts=[memory.texts[i] for i in rows],
    columns={n: [c[i] for i in rows] for n, c in memory.columns.items()},
  )


def find(
  paths: str | Iterable[str],
  *,
  digest: str = "stat",
  choose: Callable[[MemorySource], MemorySource] | None = None,
  options: dict[str, Any] | None = None,
) -> PairFiles:
  """The files that are named; none is opened.

  An item has the id that `pairs.load` gives it. These differ from file to file,
  whatever the files hold: each id begins with folder and name of its file.

  Args:
    paths: as for `pairs.load`, but for folders of images.
    digest: how a changed file is noticed, see `images.stamps`.
    choose: applied to the items of each file, of which it may leave out all: a
      function of each item alone. None takes all as they are.
    options: JSON value that names what `choose` does.

  Raises:
    UserError: there are none, or one is a folder of images.
  """
  found = sorted(pairs.find(paths), key=lambda x: (x.source, x.name))
  for item in found:
    if item.kind == "files":
      raise UserError(
        f"{item.path}: a folder of images, which would have to be listed to "
        "know whether it was changed; pack it into a tar, or set "
        "--config.embed.by_file=False."
      )
  stamps = images.stamps([item.path for item in found], digest)
  if None in stamps:
    raise UserError(
      f"{found[stamps.index(None)].path}: vanished while the files were "
      "listed; restore it."
    )
  return PairFiles(
    tuple(found), tuple(stamps), digest, choose, dict(options or {})
  )


def size(files: PairFiles) -> int:
  """Bytes of all files together."""
  return sum(os.path.getsize(item.path) for item in files.found)
