"""Files appear whole or not at all, and a folder has one writer."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from retrieval_aug.common import files
from retrieval_aug.common.errors import UserError


def _names(folder):
  return sorted(p.name for p in folder.iterdir())


def test_atomic_path_becomes_the_target(tmp_path):
  target = tmp_path / "new" / "a.bin"
  with files.atomic_path(target) as temporary:
    temporary.write_bytes(b"whole")
    assert not target.exists()
  assert target.read_bytes() == b"whole"
  assert _names(target.parent) == ["a.bin"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_atomic_path_leaves_the_target_as_it_was_on_an_exception(
  tmp_path, error
):
  target = tmp_path / "a.bin"
  target.write_bytes(b"old")
  with pytest.raises(error):
    with files.atomic_path(target) as temporary:
      temporary.write_bytes(b"half of the n")
      raise error
  assert target.read_bytes() == b"old"
  assert _names(tmp_path) == ["a.bin"]


def test_atomic_path_makes_no_target_on_an_exception(tmp_path):
  with pytest.raises(ValueError):
    with files.atomic_path(tmp_path / "a.bin"):
      raise ValueError
  assert _names(tmp_path) == []


def test_atomic_path_keeps_the_suffix_for_writers_that_add_their_own(tmp_path):
  with files.atomic_path(tmp_path / "a.npy") as temporary:
    assert temporary.suffix == ".npy"
    temporary.write_bytes(b"")


def test_a_written_file_is_readable_by_others(tmp_path):
  files.write_bytes(tmp_path / "a", b"x")
  assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644


def test_json_has_sorted_keys_and_comes_back(tmp_path):
  value = {"b": [1, 2.5, None], "a": {"é": True}}
  files.write_json(tmp_path / "a.json", value)
  text = (tmp_path / "a.json").read_text()
  assert text.index('"a"') < text.index('"b"') and text.endswith("}\n")
  assert files.read_json(tmp_path / "a.json") == value


def test_json_refuses_nan_and_keeps_the_old_file(tmp_path):
  files.write_json(tmp_path / "a.json", 1)
  with pytest.raises(ValueError):
    files.write_json(tmp_path / "a.json", float("nan"))
  assert files.read_json(tmp_path / "a.json") == 1


@pytest.mark.parametrize("text", ['{"a": 1', "", "\xff\xfe"])
def test_broken_json_is_a_user_error_that_names_the_file(tmp_path, text):
  path = tmp_path / "a.json"
  path.write_bytes(text.encode("latin-1"))
  with pytest.raises(UserError, match="cannot be read as JSON") as caught:
    files.read_json(path)
  message = str(caught.value)
  assert str(path) in message and "delete" in message and "\n" not in message


def test_missing_json_is_a_user_error_that_names_the_file(tmp_path):
  with pytest.raises(UserError, match="a.json: cannot be read as JSON"):
    files.read_json(tmp_path / "a.json")


def test_sha256_is_that_of_the_bytes(tmp_path):
  (tmp_path / "a").write_bytes(b"abc")
  assert files.sha256_file(tmp_path / "a").startswith("ba7816bf8f01cfea")


_HOLDER = """
import sys
from retrieval_aug.common import files
with files.lock(sys.argv[1]):
  print("held", flush=True)
  sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path):
  """Another process that holds the lock of `tmp_path`."""
  with subprocess.Popen(
    [sys.executable, "-c", _HOLDER, str(tmp_path)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
    cwd=pathlib.Path(__file__).parents[2],
  ) as process:
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()


def test_lock_refuses_a_second_process_and_ends_with_a_killed_one(
  tmp_path, holder
):
  with pytest.raises(UserError) as caught:
    with files.lock(tmp_path):
      pytest.fail("two processes held the folder")
  message = str(caught.value)
  assert str(tmp_path) in message
  assert "another process is writing here" in message
  assert "--workdir" in message
  holder.kill()
  holder.wait()
  with files.lock(tmp_path):
    assert tmp_path.is_dir()


def test_a_refused_lock_removes_nothing(tmp_path, holder):
  leftover = tmp_path / ".tmp-being-written"
  leftover.write_bytes(b"x")
  with pytest.raises(UserError):
    with files.lock(tmp_path):
      pass
  assert leftover.exists()


def test_lock_removes_what_a_killed_writer_left_and_nothing_else(tmp_path):
  (tmp_path / "inner").mkdir()
  leftovers = [tmp_path / ".tmp-a", tmp_path / "inner" / ".tmp-b.npy"]
  kept = [tmp_path / "a.npy", tmp_path / "inner" / "tmp-b.npy"]
  for path in leftovers + kept:
    path.write_bytes(b"x")
  with files.lock(tmp_path):
    assert not any(p.exists() for p in leftovers)
    assert all(p.exists() for p in kept)


def test_lock_removes_what_a_killed_atomic_path_left(tmp_path):
  code = (
    "import os, signal\n"
    "from retrieval_aug.common import files\n"
    f"with files.atomic_path({str(tmp_path / 'a.npy')!r}) as path:\n"
    "  path.write_bytes(b'half')\n"
    "  os.kill(os.getpid(), signal.SIGKILL)\n"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=pathlib.Path(__file__).parents[2]
  )
  assert done.returncode == -9
  assert len(_names(tmp_path)) == 1 and not (tmp_path / "a.npy").exists()
  with files.lock(tmp_path):
    assert _names(tmp_path) == [".lock"]


def test_lock_makes_the_folder(tmp_path):
  with files.lock(tmp_path / "a" / "b"):
    assert (tmp_path / "a" / "b").is_dir()


def test_cache_is_the_folder_that_the_environment_names(tmp_path, monkeypatch):
  monkeypatch.setenv("RETRIEVAL_AUG_CACHE", str(tmp_path / "c"))
  assert files.cache_dir() == tmp_path / "c"
  assert (tmp_path / "c").is_dir()


def test_cache_is_else_in_the_users_cache(tmp_path, monkeypatch):
  monkeypatch.delenv("RETRIEVAL_AUG_CACHE", raising=False)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  assert files.cache_dir() == tmp_path / "retrieval_aug"


def test_write_bytes_survives_a_reader_of_the_old_file(tmp_path):
  """A rename, not an overwrite: an open file keeps its bytes."""
  files.write_bytes(tmp_path / "a", b"old")
  with open(tmp_path / "a", "rb") as f:
    files.write_bytes(tmp_path / "a", json.dumps("new").encode())
    assert f.read() == b"old"
  assert os.listdir(tmp_path) == ["a"]
