"""Writing that cannot be half done: atomic files, folder locks, the cache."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

from retrieval_aug.common.errors import UserError

_TEMPORARY = ".tmp-"

# Bytes below which a disk is full.
_LEFT = 1 << 14

LOCK = ".lock"  # the file in a folder that its writer holds


def cache_dir() -> pathlib.Path:
  """The one folder for downloads: `RETRIEVAL_AUG_CACHE` or the user's cache."""
  given = os.environ.get("RETRIEVAL_AUG_CACHE")
  if given:
    path = pathlib.Path(given)
  else:
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    path = pathlib.Path(base) / "retrieval_aug"
  path.mkdir(parents=True, exist_ok=True)
  return path


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Yields a temporary path that becomes `path` if the body succeeds.

  The bytes are flushed to disk before the rename, so that `path` either does
  not exist or is whole, whenever the process is killed. On an exception the
  temporary file goes away and `path` is left as it was.

  Raises:
    OSError: `ENOSPC` where the disk is full, whatever the body's own error:
      NumPy and TensorFlow do not tell.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  # The suffix is kept, for writers that add their own where one is missing.
  descriptor, name = tempfile.mkstemp(
    dir=path.parent, prefix=f"{_TEMPORARY}{path.stem}-", suffix=path.suffix
  )
  os.fchmod(descriptor, 0o644)
  os.close(descriptor)
  temporary = pathlib.Path(name)
  try:
    yield temporary
    with open(temporary, "rb") as f:
      os.fsync(f.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)
  except Exception as error:
    if shutil.disk_usage(path.parent).free >= _LEFT:
      raise
    reason = os.strerror(errno.ENOSPC)
    raise OSError(errno.ENOSPC, reason, os.fspath(path)) from error
  finally:
    temporary.unlink(missing_ok=True)


def _sync_folder(folder: pathlib.Path) -> None:
  """Makes a rename in `folder` itself survive a power cut."""
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
  """Writes `data` to `path` atomically."""
  with atomic_path(path) as temporary:
    temporary.write_bytes(data)


def write_json(path: str | os.PathLike, value: Any) -> None:
  """Writes `value` as indented JSON with sorted keys, atomically."""
  text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"
  write_bytes(path, text.encode())


def read_json(path: str | os.PathLike) -> Any:
  """Reads JSON; a broken file is a `UserError` that names it."""
  try:
    return json.loads(pathlib.Path(path).read_text())
  except (ValueError, OSError) as error:
    raise UserError(
      f"{path}: cannot be read as JSON ({error}); delete it to have it made "
      "again."
    ) from error


def sha256_file(path: str | os.PathLike) -> str:
  """Hex SHA-256 of a file's bytes."""
  with open(path, "rb") as f:
    return hashlib.file_digest(f, "sha256").hexdigest()


@contextlib.contextmanager
def lock(folder: str | os.PathLike) -> Iterator[None]:
  """Holds `folder` for this process; a second process gets a `UserError`.

  The lock is the kernel's and goes with the process, so a killed run leaves
  none behind. What a killed writer left half written is removed on entry.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  with open(folder / LOCK, "a+") as f:
    try:
      fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      raise UserError(
        f"{folder}: another process is writing here; wait for it to end or "
        "choose another --workdir."
      ) from error
    for leftover in folder.rglob(f"{_TEMPORARY}*"):
      if leftover.is_file():
        leftover.unlink()
    yield
