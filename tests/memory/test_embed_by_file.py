"""A memory embedded file by file is the one that is listed at once."""

import pathlib

import numpy as np
import pytest

from retrieval_aug.common.errors import UserError
from retrieval_aug.datasets import by_file, pairs
from retrieval_aug.memory import (
  dead_letters,
  embed,
  embed_by_file,
  jobs,
  table,
)
from tests.datasets import pair_tars
from tests.encoders import pictures
from tests.memory.letters import letters

OPTIONS = {"batch_size": 4, "shard_rows": 3, "threads": 2}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  """Indexes of tars are kept in a folder of the test."""
  monkeypatch.setenv("RETRIEVAL_AUG_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def web(tmp_path):
  """Tars of 7, 4 and 2 pairs; two have one name, and hold one key."""
  pair_tars.write(tmp_path / "a" / "web" / "00000.tar", range(7))
  pair_tars.write(tmp_path / "a" / "web" / "00001.tar", range(7, 11))
  pair_tars.write(tmp_path / "b" / "web" / "00000.tar", range(2))
  return tmp_path


def _find(web, **options):
  return by_file.find(str(web / "*" / "web"), **options)


def _job(folder, files, **changes):
  options = OPTIONS | changes
  encoder, values = pictures.encoder(), [letters()]
  artifact = embed_by_file.artifact(
    folder, files, encoder, values, options["shard_rows"]
  )
  return embed_by_file.ByFileJob(artifact, files, encoder, values, **options)


def _embed(folder, files, **changes):
  jobs.run(_job(folder, files, **changes))
  return table.Table(folder)


def _bytes(folder):
  return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}


def _whole(web, folder):
  """The same memory, listed at once."""
  memory = pairs.load(str(web / "*" / "web"))
  encoder, values = pictures.encoder(), [letters()]
  artifact = embed.table_artifact(folder, memory, encoder, values, 3)
  embed.embed(artifact, memory, encoder, values, **OPTIONS)
  return table.Table(folder)


def test_it_is_the_table_of_what_is_listed_at_once(web, tmp_path, capsys):
  found, whole = _embed(tmp_path / "m", _find(web)), _whole(web, tmp_path / "w")
  for column in ("id", "text", "source"):
    assert found.column(column) == whole.column(column)
  np.testing.assert_array_equal(found.keys(), whole.keys())
  np.testing.assert_array_equal(
    found.values("letters"), whole.values("letters")
  )
  # By file and part, and so are their names.
  rows = {name: s["info"]["rows"] for name, s in found.shards.items()}
  assert list(rows.values()) == [3, 3, 1, 3, 1, 2]
  assert list(rows) == sorted(rows)
  assert found.info["cut_texts"] == whole.info["cut_texts"]
  assert "failed" not in found.info
  assert capsys.readouterr().err.count("texts are cut to 4 tokens") == 2


def test_files_in_any_order_and_after_a_kill_give_the_same_bytes(
  web, tmp_path, monkeypatch
):
  first = _embed(tmp_path / "m", _find(web))
  job = _job(tmp_path / "n", _find(web))
  job.artifact.start()
  one, two, three = job.units("embed")
  job.do("embed", three, lambda _: None)
  written = []

  def killed(artifact, number, **arrays):
    if len(written) == 1:
      raise KeyboardInterrupt
    written.append(number)
    write(artifact, number, **arrays)

  write = table.write_shard
  monkeypatch.setattr(table, "write_shard", killed)
  with pytest.raises(KeyboardInterrupt):
    job.do("embed", one, lambda _: None)
  again = _job(tmp_path / "n", _find(web))
  assert again.units("embed") == [one, two]
  written.clear()
  count = lambda *x, **y: (written.append(x[1]), write(*x, **y))
  monkeypatch.setattr(table, "write_shard", count)
  jobs.run(again)
  assert len(written) == 4  # of six shards
  assert _bytes(first.folder) == _bytes(tmp_path / "n")


def test_columns_that_some_files_have_are_empty_in_others(web, tmp_path):
  path = web / "a" / "web" / "00001.tar"
  pair_tars.write(path, range(7, 11), facts='{"license": "MIT"}')
  found = _embed(tmp_path / "m", _find(web))
  assert found.column("license") == [""] * 7 + ["MIT"] * 4 + [""] * 2


def _some(memory):
  """Leaves out all of a file and some of another."""
  names = {f"a/web/00000/{i}" for i in (1, 4, 5, 6)} | {"b/web/00000/0"}
  return by_file.taken(memory, names)


def test_files_of_which_nothing_is_chosen_have_no_shard(web, tmp_path, capsys):
  files = _find(web, choose=_some, options={"some": True})
  found = _embed(tmp_path / "m", files)
  assert found.column("id") == [
    *(f"a/web/00000/{i}" for i in (1, 4, 5, 6)),
    "b/web/00000/0",
  ]
  assert "filters keep 5 of 13 items" in capsys.readouterr().err
  none = _find(web, choose=lambda m: by_file.taken(m, set()), options={"x": 1})
  with pytest.raises(UserError, match="3 files, 13 pairs and none chosen"):
    _embed(tmp_path / "none", none)


def test_what_cannot_be_read_is_left_out_and_listed(web, tmp_path, truncate):
  first = web / "a" / "web" / "00000.tar"
  pair_tars.write(first, range(7), without_text={2}, broken={4})
  second = web / "a" / "web" / "00001.tar"
  truncate(second, second.stat().st_size // 2)
  files = _find(web)
  with pytest.raises(UserError, match="00000.tar: 2: has no text.*on_error=sk"):
    _embed(tmp_path / "f", files)
  folder = tmp_path / "m"
  skip = {"on_error": "skip", "max_errors": 0.4}
  with pytest.raises(UserError, match="1 of 3 files cannot be read.*0.33"):
    _embed(folder, files, **skip | {"max_errors": 0.3})
  found = _embed(folder, files, **skip)
  left = [f"a/web/00000/{i}" for i in (0, 1, 3, 5, 6)]
  assert found.column("id") == left + ["b/web/00000/0", "b/web/00000/1"]
  lines = list(dead_letters.read(folder))
  assert [(line["id"], line["place"]) for line in lines] == [
    ("a/web/00000/2", f"{first}: 2"),
    ("a/web/00000/4", str(first)),
    ("a/web/00001/", str(second)),
  ]
  assert found.info["failed"] == 3
  # Only shards and files with faults are tried again, which stay what they are.
  before = _bytes(folder)
  assert dead_letters.retry(folder) == 3
  assert not (folder / "keys_100000000001.npy").exists()
  assert (folder / "keys_100000000000.npy").exists()
  _embed(folder, files, **skip)
  assert _bytes(folder) == before


def test_a_changed_file_is_refused(web, tmp_path):
  files = _find(web)
  path = pathlib.Path(files.found[1].path)
  path.write_bytes(path.read_bytes() + b"\0" * 512)
  with pytest.raises(UserError, match="00001.tar: changed since the files"):
    _embed(tmp_path / "m", files)


def test_other_files_are_another_table(web, tmp_path):
  _embed(tmp_path / "m", _find(web))
  pair_tars.write(web / "b" / "web" / "00001.tar", range(3))
  job = _job(tmp_path / "m", _find(web))
  with pytest.raises(UserError, match="items.files: 3 -> 4"):
    job.artifact.is_complete()


def test_missing_items_are_noticed(web, tmp_path):
  job = _job(tmp_path / "m", _find(web))
  job.artifact.start()
  for unit in job.units("embed"):
    job.do("embed", unit, lambda _: None)
  dead_letters.record(job.artifact, "100000000000", 2, [])
  with pytest.raises(UserError, match="file_000000 has 7 items, .* for 6"):
    job.finish()


def test_parts_are_numbered_to_a_limit(web, tmp_path, monkeypatch):
  monkeypatch.setattr(embed_by_file, "_PARTS", 2)
  with pytest.raises(UserError, match="7 items are more than 2 shards; give a"):
    _embed(tmp_path / "m", _find(web))
