"""The JSON beside an artifact: what made it, from what, and its digests.

An artifact is a folder of files that one stage writes. Its `manifest.json`
holds the stage's inputs (config part, fingerprints of what it read, digests of
encoder weights), their fingerprint, and the digest of every file. While shards
are being written, each finished one has a record in `.shards/`, so that a
killed stage goes on where it stopped; what is left of that folder in a finished
artifact is deleted.
"""

import dataclasses
import hashlib
import json
import pathlib
import shutil
from typing import Any

from retrieval_aug.common import files
from retrieval_aug.common.errors import UserError

# Raise when the bytes that any stage writes change their meaning.
FORMAT_VERSION = 1

NAME = "manifest.json"  # of the JSON in an artifact's folder
_RECORDS = ".shards"

# What a folder may hold beside its manifest while nothing is made: a lock, and
# what workers of a cluster told of units that failed.
_NOTHING = (files.LOCK, "dead_units.jsonl", ".beam")


def fingerprint(value: Any) -> str:
  """16 hex digits of the SHA-256 of `value` as canonical JSON."""
  text = json.dumps(value, sort_keys=True, separators=(",", ":"))
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(old: Any, new: Any, name: str = "") -> list[str]:
  """Dotted names at which two JSON values differ, as "name: old -> new"."""
  if isinstance(old, dict) and isinstance(new, dict):
    lines = []
    for key in sorted(old.keys() | new.keys()):
      inner = f"{name}.{key}" if name else key
      lines += differences(
        old.get(key, "(absent)"), new.get(key, "(absent)"), inner
      )
    return lines
  if old == new:
    return []
  return [f"{name}: {_short(old)} -> {_short(new)}"]


def _short(value: Any) -> str:
  text = json.dumps(value) if not isinstance(value, str) else value
  return text if len(text) <= 60 else text[:57] + "..."


@dataclasses.dataclass
class Artifact:
  """A folder that one stage writes.

  Attributes:
    folder: where it is.
    kind: what it is, for example "embedding table".
    inputs: JSON value that names everything its bytes depend on.
  """

  folder: pathlib.Path
  kind: str
  inputs: dict

  def __post_init__(self):
    self.folder = pathlib.Path(self.folder)
    # Through JSON once, so that tuples and lists compare equal.
    self.inputs = json.loads(json.dumps(self.inputs))

  @property
  def fingerprint(self) -> str:
    return fingerprint([self.kind, FORMAT_VERSION, self.inputs])

  @property
  def remedy(self) -> str:
    return f"delete {self.folder} to have it made again"

  def is_complete(self) -> bool:
    """Whether the folder holds this artifact, finished.

    Raises:
      UserError: the folder holds something else; names what differs.
    """
    path = self.folder / NAME
    if not path.exists():
      return False
    manifest = self._read()
    if not isinstance(manifest, dict) or "inputs" not in manifest:
      raise UserError(f"{path}: not a manifest of ours; {self.remedy}.")
    found = {"kind": manifest.get("kind")}
    found["format_version"] = manifest.get("format_version")
    wanted = {"kind": self.kind, "format_version": FORMAT_VERSION}
    differing = differences(found, wanted)
    if not differing and self._is_bare(manifest):
      return False
    differing += differences(manifest["inputs"], self.inputs)
    if differing:
      more = len(differing) - 4
      tail = f" and {more} more" if more > 0 else ""
      raise UserError(
        f"{path}: {self.kind} made from other inputs "
        f"({'; '.join(differing[:4])}{tail}); choose another --workdir, or "
        f"{self.remedy}."
      )
    if manifest["complete"]:
      self._clear()  # who finished it may have been killed before that
    return bool(manifest["complete"])

  @property
  def scratch(self) -> pathlib.Path:
    """A folder for what only making it needs; gone when it is finished."""
    return self.folder / _RECORDS

  def start(self) -> None:
    """Says whose folder this is, before its first shard."""
    if not (self.folder / NAME).exists() or self._is_bare(self._read()):
      self._write(complete=False, records={}, info={})

  def _is_bare(self, manifest: dict) -> bool:
    """Whether a stage failed here before it wrote anything.

    What it was to be made from binds nobody: its failure may have been cured
    by other settings.
    """
    inside = {path.name for path in self.folder.iterdir()}
    return not manifest.get("complete") and inside <= {NAME, *_NOTHING}

  def record(self, shard: str, names: list[str], info: Any = None) -> None:
    """Notes that `shard` is finished and consists of the files `names`."""
    record = {"files": {n: digest(self.folder / n) for n in names}}
    record["info"] = info
    files.write_json(self.scratch / f"{shard}.json", record)

  def has(self, shard: str) -> bool:
    """Whether an unfinished artifact has a record of `shard`, unverified."""
    return (self.scratch / f"{shard}.json").exists()

  def recorded(self, shard: str) -> dict | None:
    """The record of a finished shard, its files verified; None if missing."""
    path = self.scratch / f"{shard}.json"
    if not path.exists():
      return None
    record = files.read_json(path)
    self._verify(record["files"])
    return record

  def finish(self, shards: list[str], info: dict | None = None) -> None:
    """Gathers the shards' records and marks the artifact complete.

    Args:
      shards: every shard; readers get them ordered by name.
      info: measurements and facts for readers; not part of the fingerprint.
    """
    records = {}
    for shard in shards:
      path = self.scratch / f"{shard}.json"
      records[shard] = files.read_json(path)
    self._write(complete=True, records=records, info=info or {})
    self._clear()

  def _clear(self) -> None:
    if self.scratch.exists():
      # Another process may do the same, and who only reads need not be able to.
      shutil.rmtree(self.scratch, ignore_errors=True)

  def info(self) -> dict:
    """Measurements and facts that `finish` was given."""
    return self._read()["info"]

  def shards(self) -> dict[str, dict]:
    """Records of a complete artifact's shards, by length of name and name.

    So 100000 comes after 99999.
    """
    found = self._read()["shards"]
    return dict(sorted(found.items(), key=lambda item: (len(item[0]), item[0])))

  def verify(self) -> None:
    """Compares every file with its digest.

    Raises:
      UserError: a file is missing, cut short or changed; names it.
    """
    for record in self.shards().values():
      self._verify(record["files"])

  def _read(self) -> dict:
    return files.read_json(self.folder / NAME)

  def _verify(self, digests: dict[str, dict]) -> None:
    for name, digest in digests.items():
      check_file(self.folder / name, digest, self.remedy)

  def _write(self, *, complete: bool, records: dict, info: dict) -> None:
    files.write_json(
      self.folder / NAME,
      {
        "kind": self.kind,
        "format_version": FORMAT_VERSION,
        "fingerprint": self.fingerprint,
        "inputs": self.inputs,
        "complete": complete,
        "shards": records,
        "info": info,
      },
    )


def digest(path: pathlib.Path) -> dict:
  """Size and SHA-256 of a file, as a record has them."""
  return {"bytes": path.stat().st_size, "sha256": files.sha256_file(path)}


def check_file(path: pathlib.Path, digest: dict, remedy: str) -> None:
  """Raises a `UserError` unless `path` has the recorded size and digest."""
  if not path.exists():
    raise UserError(f"{path}: missing; {remedy}.")
  size = path.stat().st_size
  if size != digest["bytes"]:
    raise UserError(
      f"{path}: holds {size} bytes where its manifest says "
      f"{digest['bytes']}: cut short or overwritten; {remedy}."
    )
  if files.sha256_file(path) != digest["sha256"]:
    raise UserError(
      f"{path}: its bytes are not those that its manifest records: damaged "
      f"or overwritten; {remedy}."
    )
