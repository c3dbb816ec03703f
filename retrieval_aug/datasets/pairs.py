"""Image-text pairs as img2dataset writes them, read where they lie.

It downloads the images of a list of addresses in shards of some thousands:

| format     | a shard                                                         |
|------------|-----------------------------------------------------------------|
| webdataset | `00000.tar` of `000000000.jpg`, `.txt` and `.json`              |
| files      | a folder `00000` of the same                                    |
| tfrecord   | `00000.tfrecord` of one `tf.train.Example` a pair               |
| parquet    | `00000.parquet` of one row a pair                               |

Beside each lies `00000_stats.json`, and beside all but the last a
`00000.parquet` that repeats the facts without the images. Other tars that
webdataset reads will do too.
"""

import glob
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from retrieval_aug.common import progress
from retrieval_aug.common.errors import UserError
from retrieval_aug.datasets import (
  images,
  manifests,
  memories,
  pairs_files,
  pairs_parquet,
  pairs_shard,
  pairs_tar,
  pairs_tfrecord,
)
from retrieval_aug.datasets.on_error import Faults
from retrieval_aug.datasets.types import MemorySource

# Raised when the same files and options come to mean other items.
_FORMAT = 1

_OPTION = "config.memory.pairs"

# From this number of shards on there is a progress bar.
_MANY = 4

_READERS: dict[str, Callable[..., pairs_shard.Shard]] = {
  "tar": pairs_tar.read,
  "files": pairs_files.read,
  "tfrecord": pairs_tfrecord.read,
  "parquet": pairs_parquet.read,
}


def load(
  paths: str | Iterable[str],
  *,
  on_error: str = "fail",
  max_errors: float = 0.01,
  digest: str = "stat",
) -> MemorySource:
  """The pairs of all shards that are named.

  An item's id is `<source>/<shard>/<key>`, its source the folder in which the
  shards lie, and its text the caption. All else that is known of it is a column
  under its own name; `LICENSE` is `license`.

  At fault are a pair without an image, text or key, one whose text or json
  cannot be read, whose key an earlier pair of the shard has, or whose image
  does not begin as one (in Parquet that is not looked at); and a shard that is
  cut short or broken, as a whole. What is wrong further into an image is not
  found here but where it is decoded, and is an error there whatever `on_error`
  is: img2dataset has decoded every image once, so that only later damage is
  left. Pairs whose download failed, as their status says, are no faults.

  Args:
    paths: shards, or folders of them: a path, a glob, or several with commas.
    on_error: "fail", or "skip" what is at fault.
    max_errors: share of the pairs, and of the shards, that may be skipped.
    digest: how a changed shard is noticed, see `images.stamps`.

  Raises:
    UserError: no shards, or a fault; shard and key are named.
  """
  found = find(paths)
  faults = Faults(_OPTION, on_error, max_errors)
  listed = read(found, faults, digest)
  memory = joined(listed)
  faults.finish(len(memory), len(listed))
  if not len(memory):
    raise UserError(
      f"{_OPTION}={_told(paths)}: no pairs in {len(found):,} shards; see "
      "whether their downloads failed."
    )
  absent = sum(shard.absent for _, shard in listed)
  if absent:
    progress.note(
      f"{_OPTION}: {absent:,} rows of failed downloads are left out"
    )
  return memory


class Found(NamedTuple):
  """A shard on disk.

  Attributes:
    path: absolute.
    kind: of `_READERS`.
    source: the folder in which it lies, as short as it can be told.
    name: that of the file, without its end.
  """

  path: str
  kind: str
  source: str
  name: str

  @property
  def prefix(self) -> str:
    """With which the ids of its pairs begin."""
    return f"{self.source}/{self.name}/"


def joined(
  listed: Sequence[tuple[Found, pairs_shard.Shard]],
) -> MemorySource:
  """The pairs of some shards as one memory; of none, an empty one."""
  shards = [shard for _, shard in listed]
  ids = [name for shard in shards for name in shard.ids]
  sources = [[item.source] * len(shard.ids) for item, shard in listed]
  columns = {
    "source": list(itertools.chain(*sources)),
    **pairs_shard.columns(shards),
  }
  return MemorySource(
    name="pairs",
    ids=ids,
    image=memories.Joined(
      tuple(shard.image for shard in shards),
      tuple(itertools.accumulate(len(shard.ids) for shard in shards)),
    ),
    fingerprint={
      "memory": "pairs",
      "format": _FORMAT,
      "count": len(ids),
      "columns": list(columns),
      "shards": digest_of(
        [item for item, _ in listed],
        [images.digest_rows(shard.stamps) for _, shard in listed],
      ),
    },
    texts=[text for shard in shards for text in shard.texts],
    columns=columns,
  )


def digest_of(found: Sequence[Found], stamps: Sequence[str]) -> str:
  """What names some shards, each with the digest of its stamps."""
  names = [f"{item.source}/{item.name}" for item in found]
  return images.digest_rows(names, [item.kind for item in found], stamps)


def read(
  found: Sequence[Found], faults: Faults, digest: str
) -> list[tuple[Found, pairs_shard.Shard]]:
  """The shards that can be read, with what is in them.

  Args:
    found: some of `find`.
    faults: are told of pairs and shards that cannot be read.
    digest: see `images.stamps`.

  Raises:
    UserError: one cannot be read, if `faults` says so.
  """
  listed, short = [], []
  shards = found
  if len(found) > _MANY:
    shards = progress.bar(
      found, total=len(found), what="list pairs", unit="shard"
    )
  for item in shards:
    before = faults.pairs
    try:
      shard = _READERS[item.kind](item.path, item.prefix, faults, digest)
    except UserError as error:
      faults.shard(error)
      continue
    listed.append((item, shard))
    if len(shard.ids) + faults.pairs - before < _successes(item.path):
      short.append(item.path)
  if short:
    progress.note(
      f"warning: {len(short):,} of {len(listed):,} shards hold fewer pairs "
      f"than their _stats.json says were downloaded (first {short[0]})"
    )
  return listed


def find(paths: str | Iterable[str]) -> list[Found]:
  """The shards that are named, in their order; none is opened.

  Args:
    paths: as for `load`.

  Raises:
    UserError: there are none, or one is named twice.
  """
  kinds: dict[str, str] = {}
  for path, chosen in _named(paths):
    within = _shards_in(path) if os.path.isdir(path) else _kind(path, chosen)
    twice = next((path for path in within if path in kinds), None)
    if twice:
      raise UserError(f"{_OPTION}: {twice} is named twice; name it once.")
    kinds.update(within)
  if not kinds:
    raise UserError(
      f"{_OPTION}={_told(paths)}: no shards of img2dataset; they are .tar, "
      ".tfrecord or .parquet files, or folders of images."
    )
  sources = _source_names({os.path.dirname(path) for path in kinds})
  found, first = [], {}
  for path, kind in kinds.items():
    source = sources[os.path.dirname(path)]
    base = os.path.basename(path)
    name = base if kind == "files" else os.path.splitext(base)[0]
    other = first.setdefault((source, name), path)
    if other != path:
      raise UserError(
        f"{_OPTION}: {other} and {path} are one shard in two formats; name one "
        "of them."
      )
    found.append(Found(path, kind, source, name))
  return found


def _named(paths: str | Iterable[str]) -> list[tuple[str, bool]]:
  """Absolute paths, and whether each is named itself, not by a glob."""
  parts = [paths] if isinstance(paths, str) else list(paths)
  if isinstance(paths, str) and not os.path.exists(paths):
    parts = [part.strip() for part in paths.split(",") if part.strip()]
  found = []
  for part in map(os.path.expanduser, parts):
    if os.path.exists(part):
      found.append((os.path.abspath(part), True))
      continue
    hits = sorted(glob.glob(part, recursive=True))
    # Says what is wrong with a name that stands for nothing.
    hits = hits or manifests.find(_OPTION, [part])
    found += [(os.path.abspath(hit), False) for hit in hits]
  return found


def _shards_in(folder: str) -> dict[str, str]:
  """Shards in a folder, or the folder itself, where images lie in it."""
  if pairs_files.holds_images(folder):
    return {folder: "files"}
  found: dict[str, str] = {}
  for entry in sorted(os.listdir(folder)):
    path = os.path.join(folder, entry)
    if entry.startswith("."):
      continue
    if not os.path.isdir(path):
      found |= _kind(path, False)
    elif pairs_files.holds_images(path):
      found[path] = "files"
  return found


def _kind(path: str, chosen: bool) -> dict[str, str]:
  """A file with its format, if it is a shard; refused if it was chosen."""
  stem, suffix = os.path.splitext(path)
  suffix = suffix.lower()
  if suffix in (".tar", ".tfrecord"):
    return {path: suffix[1:]}
  if suffix == ".parquet":
    beside = [s for s in (".tar", ".tfrecord", "") if os.path.exists(stem + s)]
    if not beside:
      return {path: "parquet"}
    if chosen:
      raise UserError(
        f"{_OPTION}={path}: only facts of the shard {stem}{beside[0]}; name "
        "that."
      )
  if chosen:
    raise UserError(
      f"{_OPTION}={path}: no shard of img2dataset by its name; it must end in "
      ".tar, .tfrecord or .parquet, or be a folder."
    )
  return {}


def _source_names(folders: set[str]) -> dict[str, str]:
  """The shortest ends of paths that tell the folders from each other."""
  parts = {folder: pathlib.PurePath(folder).parts for folder in folders}
  # DataComp's lie in a folder that is called so, which names nothing.
  short = {f: p[:-1] if p[-1] == "shards" else p for f, p in parts.items()}
  if len(set(short.values())) == len(folders):
    parts = short
  depth = 1
  while True:
    names = {f: "/".join(p[-depth:]) for f, p in parts.items()}
    if len(set(names.values())) == len(folders):
      return names
    depth += 1


def _successes(path: str) -> int:
  """Number of pairs that img2dataset says it wrote; 0 if it does not say."""
  stem = path if os.path.isdir(path) else os.path.splitext(path)[0]
  try:
    with open(f"{stem}_stats.json", "rb") as f:
      number = json.load(f)["successes"]
  # Only a warning hangs on it, and many shards come without.
  except (OSError, ValueError, KeyError, TypeError):
    return 0
  return number if isinstance(number, int) else 0


def _told(paths: str | Iterable[str]) -> str:
  return paths if isinstance(paths, str) else ",".join(paths)
