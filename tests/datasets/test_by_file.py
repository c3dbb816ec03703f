"""Pairs listed file by file are those that are listed all at once."""

import os
import pathlib
import time

import numpy as np
import pytest

from retrieval_aug.common.errors import UserError
from retrieval_aug.datasets import by_file, pairs
from tests.datasets import pair_tars


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  """Indexes of tars are kept in a folder of the test."""
  monkeypatch.setenv("RETRIEVAL_AUG_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def web(tmp_path):
  """Three tars of 3, 4 and 2 pairs; two have one name, and hold one key."""
  pair_tars.write(tmp_path / "a" / "web" / "00000.tar", range(3))
  pair_tars.write(tmp_path / "a" / "web" / "00001.tar", range(3, 7))
  pair_tars.write(tmp_path / "b" / "web" / "00000.tar", range(2))
  return str(tmp_path / "*" / "web")


def test_the_parts_are_the_whole(web):
  whole, files = pairs.load(web), by_file.find(web)
  parts = [files.load(i) for i in range(len(files))]
  assert [len(part.memory) for part in parts] == [3, 4, 2]
  assert sum((part.memory.ids for part in parts), []) == whole.ids
  assert sum((part.memory.texts for part in parts), []) == whole.texts
  assert len(set(whole.ids)) == 9
  sources = sum((part.memory.columns["source"] for part in parts), [])
  assert sources == whole.columns["source"]
  np.testing.assert_array_equal(parts[1].memory.image(3), whole.image(6))
  assert by_file.size(files) == sum(
    os.path.getsize(item.path) for item in files.found
  )


def test_another_order_of_files_is_the_same_memory(web, tmp_path):
  files = by_file.find(web)
  other = by_file.find([f"{tmp_path}/b/web", f"{tmp_path}/a/web"])
  assert other.fingerprint == files.fingerprint
  assert other.found == files.found


def test_what_is_chosen_and_a_changed_file_change_the_fingerprint(web):
  files = by_file.find(web)
  chosen = by_file.find(web, options={"text_min": 3})
  assert chosen.fingerprint != files.fingerprint
  later = time.time() + 5
  os.utime(files.found[1].path, (later, later))
  assert by_file.find(web).fingerprint != files.fingerprint
  with pytest.raises(UserError, match="00001.tar: changed since the files"):
    files.load(1)
  assert len(files.load(0).memory) == 3


def test_all_of_a_file_may_be_left_out(web):
  choose = lambda memory: by_file.taken(memory, {"a/web/00001/3", "other"})
  files = by_file.find(web, choose=choose)
  listed = [files.load(i) for i in range(3)]
  assert [x.memory.ids for x in listed] == [[], ["a/web/00001/3"], []]
  assert [x.found for x in listed] == [3, 4, 2]


def test_faults_fail_or_are_told(web, truncate):
  files = by_file.find(web)
  path = files.found[1].path
  pair_tars.write(path, range(3, 7), without_text={5})
  files = by_file.find(web)
  with pytest.raises(UserError, match="00001.tar: 5: has no text.*=skip"):
    files.load(1)
  listed = files.load(1, "skip")
  assert listed.memory.ids == [f"a/web/00001/{i}" for i in (3, 4, 6)]
  (fault,) = listed.faults
  assert fault == ("a/web/00001/5", f"{path}: 5", "has no text")
  truncate(pathlib.Path(path), os.path.getsize(path) // 2)
  files = by_file.find(web)
  with pytest.raises(UserError, match="00001.tar"):
    files.load(1)
  listed = files.load(1, "skip")
  assert listed.broken and len(listed.memory) == listed.found == 0
  assert [fault.id for fault in listed.faults] == ["a/web/00001/"]


def test_some_items_are_found_again_by_their_ids(web):
  files = by_file.find(web)
  ids = ["b/web/00000/1", "a/web/00001/4", "train/17", "a/web/00001/6"]
  found = files.some(ids)
  assert found.ids == ["a/web/00001/4", "a/web/00001/6", "b/web/00000/1"]
  whole = pairs.load(web)
  for i, name in enumerate(found.ids):
    row = whole.ids.index(name)
    np.testing.assert_array_equal(found.image(i), whole.image(row))
    assert found.texts[i] == whole.texts[row]
  assert files.some(["train/17"]).ids == []


def test_folders_of_images_are_refused(tmp_path):
  pair_tars.write_folder(tmp_path / "web" / "00000", range(2))
  with pytest.raises(UserError, match="00000: a folder of images.*by_file=Fal"):
    by_file.find(str(tmp_path / "web"))
