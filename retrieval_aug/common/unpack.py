"""Reading an archive without unpacking it: nothing is written to disk."""

import os
import tarfile
import zlib
from collections.abc import Iterable

from retrieval_aug.common.errors import UserError

# The largest archive that is read here holds 30 MB. The limit is on what a
# reader keeps in memory and skips over, so that a small file which inflates
# without end is refused early.
_LIMIT = 256 * 2**20


def read_members(
  path: str | os.PathLike, members: Iterable[str], limit: int = _LIMIT
) -> dict[str, bytes]:
  """Reads some files of a `.tgz` into memory.

  Only members with exactly the names asked for are read, and only if they are
  regular files; so names with `..`, absolute names, links and devices in the
  archive can do nothing. The first of two members with one name is taken.

  Args:
    path: the archive.
    members: names in the archive, for example `package/icons.json`.
    limit: bytes of the inflated archive that are looked at, at the most.

  Returns:
    The bytes of each member, by name.

  Raises:
    UserError: the archive is broken, too large, or lacks a member.
  """
  wanted = set(members)
  found = {}
  try:
    with tarfile.open(path, "r:gz") as archive:
      while wanted and (member := archive.next()) is not None:
        if member.offset_data + member.size > limit:
          raise UserError(
            f"{path}: more than {limit:,} bytes when inflated, at member "
            f"{member.name!r}; this is not the archive that is expected: "
            "delete it and start again."
          )
        if member.name not in wanted:
          continue
        if not member.isreg():
          raise UserError(
            f"{path}: member {member.name!r} is not a regular file; this is "
            "not the archive that is expected: delete it and start again."
          )
        found[member.name] = archive.extractfile(member).read()
        if len(found[member.name]) != member.size:
          raise EOFError("unexpected end of data")
        wanted.remove(member.name)
  except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
    raise UserError(
      f"{path}: cannot be read as a .tgz archive ({error}); delete it and "
      "start again."
    ) from error
  if wanted:
    raise UserError(
      f"{path}: holds no {', '.join(sorted(wanted))}; this is not the archive "
      "that is expected: delete it and start again."
    )
  return found
