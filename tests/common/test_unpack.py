"""Reading archives that may be hostile or broken."""

import io
import tarfile

import pytest

from retrieval_aug.common import unpack
from retrieval_aug.common.errors import UserError


def _archive(path, members):
  """Writes a .tgz; a str member is a link to that target."""
  with tarfile.open(path, "w:gz") as archive:
    for name, content in members:
      info = tarfile.TarInfo(name)
      if isinstance(content, str):
        info.type, info.linkname = tarfile.SYMTYPE, content
        archive.addfile(info)
      else:
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
  return path


def test_only_the_named_members_are_read(tmp_path):
  path = _archive(
    tmp_path / "a.tgz",
    [("package/a.json", b"one"), ("package/b.json", b"two"), ("c", b"three")],
  )
  assert unpack.read_members(path, ["c", "package/a.json"]) == {
    "package/a.json": b"one",
    "c": b"three",
  }


def test_members_that_point_outside_do_nothing(tmp_path):
  outside = tmp_path / "outside"
  folder = tmp_path / "deep" / "folder"
  folder.mkdir(parents=True)
  path = _archive(
    folder / "a.tgz",
    [
      ("../../outside", b"bad"),
      (str(outside), b"bad"),
      ("package/link", "../../outside"),
      ("package/a.json", b"good"),
    ],
  )
  before = sorted(tmp_path.rglob("*"))
  assert unpack.read_members(path, ["package/a.json"]) == {
    "package/a.json": b"good"
  }
  assert sorted(tmp_path.rglob("*")) == before


def test_a_link_in_place_of_a_member_is_refused(tmp_path):
  (tmp_path / "secret").write_text("secret")
  path = _archive(tmp_path / "a.tgz", [("package/a.json", "../secret")])
  with pytest.raises(UserError, match=r"a\.tgz.*not a regular file.*delete"):
    unpack.read_members(path, ["package/a.json"])


@pytest.mark.parametrize("wanted", ["package/a.json", "package/huge"])
def test_an_archive_that_inflates_beyond_the_limit_is_refused(tmp_path, wanted):
  path = _archive(
    tmp_path / "a.tgz",
    [("package/huge", bytes(5 * 2**20)), ("package/a.json", b"good")],
  )
  assert path.stat().st_size < 10_000
  with pytest.raises(UserError, match=r"more than 1,048,576 bytes.*huge"):
    unpack.read_members(path, [wanted], limit=2**20)


def test_a_missing_member_is_named(tmp_path):
  path = _archive(tmp_path / "a.tgz", [("package/a.json", b"good")])
  with pytest.raises(UserError, match=r"a\.tgz: holds no package/b\.json"):
    unpack.read_members(path, ["package/a.json", "package/b.json"])


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.9])
def test_a_truncated_archive_is_named(tmp_path, keep):
  noise = bytes((i * i * 7919 >> 3) % 251 for i in range(20_000))
  path = _archive(tmp_path / "a.tgz", [("package/a.json", noise)])
  whole = path.read_bytes()
  path.write_bytes(whole[: int(keep * len(whole))])
  with pytest.raises(UserError, match=r"a\.tgz: .*delete it"):
    unpack.read_members(path, ["package/a.json"])
