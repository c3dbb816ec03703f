"""A memory that changes: every edit is whole or not at all, and is known."""

import fcntl
import json
import os
import pathlib
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from retrieval_aug.common import files, manifest
from retrieval_aug.common.errors import UserError
from retrieval_aug.datasets import vectors
from retrieval_aug.memory import __main__ as command
from retrieval_aug.memory import edits, table, table_report, versions

D, DV = 5, 3
BASE = (4, 3)  # rows of the shards of the memory: a0..a3 and b0..b2


def _rows(seed, rows, dims):
  return np.random.default_rng(seed).normal(size=(rows, dims))


def _write(folder, ids, *, encoder="e", columns=None, keys=None, stored=False):
  """A finished table; one shard for each list of ids."""
  artifact = manifest.Artifact(
    folder, table.KIND, {"encoder": {"name": encoder}, "items": str(ids)}
  )
  artifact.start()
  for index, own in enumerate(ids):
    # What a row holds follows from its id alone.
    made = np.stack([_rows(sum(i.encode()), 1, D + DV)[0] for i in own])
    made = made.astype(np.float16)
    if keys is not None:
      made[:, :D] = keys
    meta = {"id": own, "text": [f"a {i}" for i in own]}
    meta |= {n: [f(i) for i in own] for n, f in (columns or {}).items()}
    place = None
    if stored:
      # Every second row of a file.
      path = folder.parent / f"{folder.name}_{index}.npy"
      np.save(path, np.repeat(made[:, :D], 2, axis=0))
      place = vectors.describe(str(path), "stat")
      place = {"": place.take(np.arange(0, 2 * len(own), 2))}
    table.write_shard(
      artifact,
      index,
      keys=None if stored else made[:, :D],
      values={"text": made[:, D:]},
      metadata=meta,
      stored=place,
    )
  names = [table.shard_name(i) for i in range(len(ids))]
  artifact.finish(names, {"key_dims": D, "value_dims": {"text": DV}})
  return folder


def _key(item):
  return _rows(sum(item.encode()), 1, D + DV)[0, :D].astype(np.float16)


BASE_IDS = [[f"a{i}" for i in range(4)], [f"b{i}" for i in range(3)]]
COLUMNS = {
  "source": lambda i: "web" if i[0] == "a" else "own",
  "label": lambda i: "odd" if int(i[1]) % 2 else "even",
}


@pytest.fixture
def folder(tmp_path):
  return _write(tmp_path / "memory", BASE_IDS, columns=COLUMNS)


@pytest.fixture
def other(tmp_path):
  ids = [["c0", "c1"], ["c2"]]
  return _write(tmp_path / "other", ids, columns=COLUMNS)


@pytest.fixture
def stored(tmp_path):
  return _write(tmp_path / "stored", [["s0", "s1", "s2"]], stored=True)


def _refusal(call):
  with pytest.raises(UserError) as caught:
    call()
  message = str(caught.value)
  assert "\n" not in message
  return message


def _live(folder):
  """Ids that can be found; every row of the table is what its id says."""
  opened = table.Table(folder)
  ids = opened.column("id")
  np.testing.assert_array_equal(opened.keys(), np.stack([*map(_key, ids)]))
  assert opened.values("text").shape == (opened.rows, DV)
  assert opened.column("text") == [f"a {i}" for i in ids]
  assert table_report.verify(folder) == []
  return [x for i, x in enumerate(ids) if i not in set(opened.removed.tolist())]


def _names(folder):
  return {p.name for p in folder.iterdir()} - {files.LOCK}


class TestRemove:
  def test_leaves_every_row_its_number(self, folder):
    done = edits.remove(folder, ["b1", "a2", "b1"])
    assert (done.rows.tolist(), done.live) == ([2, 5], 5)
    opened = table.Table(folder)
    assert opened.rows == 7
    assert opened.removed.tolist() == [2, 5]
    assert opened.removed.dtype == np.int64
    assert opened.column("id") == sum(BASE_IDS, [])
    assert _live(folder) == ["a0", "a1", "a3", "b0", "b2"]

  def test_is_known_by_the_fingerprint_and_not_by_the_inputs(self, folder):
    before = table.Table(folder)
    edits.remove(folder, ["a0"])
    once = table.Table(folder)
    edits.remove(folder, ["b0"])
    twice = table.Table(folder)
    found = {t.fingerprint for t in (before, once, twice)}
    assert len(found) == 3
    assert before.inputs == twice.inputs
    artifact = manifest.Artifact(folder, table.KIND, before.inputs)
    assert artifact.is_complete()
    assert before.fingerprint == artifact.fingerprint

  @pytest.mark.parametrize(
    ("where", "ids"),
    [
      ({"source": "web"}, ["a0", "a1", "a2", "a3"]),
      ({"label": "odd"}, ["a1", "a3", "b1"]),
      ({"label": "odd", "source": "web"}, ["a1", "a3"]),
      ({"label": "even", "source": "own", "id": "b2"}, ["b2"]),
    ],
  )
  def test_where_all_columns_have_their_value(self, folder, where, ids):
    edits.remove(folder, where=where)
    assert _live(folder) == [x for x in sum(BASE_IDS, []) if x not in ids]

  def test_where_compares_numbers_as_texts(self, tmp_path):
    folder = _write(
      tmp_path / "memory", BASE_IDS, columns={"year": lambda i: int(i[1])}
    )
    edits.remove(folder, where={"year": "2"})
    assert _live(folder) == ["a0", "a1", "a3", "b0", "b1"]

  @pytest.mark.parametrize(
    ("choice", "message"),
    [
      ({"ids": ["a0", "x", "y"]}, "'x' is not in the memory (2 of the 3 ids"),
      ({"ids": ["a3", "a1"]}, "'a3' is removed already (1 of the 2 ids"),
      ({"ids": []}, "nothing is chosen; give ids, or column=value"),
      ({}, "nothing is chosen; give ids, or column=value"),
      ({"where": {"source": "x"}}, "no row has source=x, or all that have are"),
      ({"where": {"id": "a3"}}, "no row has id=a3, or all that have are"),
      ({"where": {"nam": "x"}}, "has no column 'nam', only id, label, source"),
      (
        {"ids": ["a0"], "where": {"label": "odd"}},
        "ids and column=value are both given",
      ),
      (
        {"ids": [i for i in sum(BASE_IDS, []) if i != "a3"]},
        "this would remove all 6 rows that are left",
      ),
    ],
  )
  def test_refuses_what_it_cannot_do_and_changes_nothing(
    self, folder, choice, message
  ):
    edits.remove(folder, ["a3"])
    before = {n: (folder / n).read_bytes() for n in _names(folder)}
    assert message in _refusal(lambda: edits.remove(folder, **choice))
    assert before == {n: (folder / n).read_bytes() for n in _names(folder)}

  def test_of_queries_is_refused(self, tmp_path):
    artifact = manifest.Artifact(tmp_path / "q", table.KIND, {})
    artifact.start()
    meta = {"id": ["a", "b"], "split": ["train", "test"]}
    keys = np.ones((2, D))
    table.write_shard(artifact, 0, keys=keys, values={}, metadata=meta)
    artifact.finish(["00000"], {"key_dims": D, "value_dims": {}})
    message = _refusal(lambda: edits.remove(tmp_path / "q", ["a"]))
    assert "a table of the examples to classify" in message


class TestRestore:
  def test_gives_the_original_fingerprint_again(self, folder):
    original = table.Table(folder).fingerprint
    edits.remove(folder, ["a1", "b2"])
    edits.remove(folder, ["a0"])
    edits.restore(folder, ["b2"])
    assert table.Table(folder).fingerprint != original
    assert _live(folder) == ["a2", "a3", "b0", "b1", "b2"]
    done = edits.restore(folder, where={"source": "web"})
    assert (done.rows.tolist(), done.live) == ([0, 1], 7)
    assert table.Table(folder).fingerprint == original
    assert table.Table(folder).removed.size == 0

  @pytest.mark.parametrize(
    ("choice", "message"),
    [
      ({"ids": ["a1", "a0"]}, "'a0' is not removed (1 of the 2 ids"),
      ({"ids": ["x"]}, "'x' is not in the memory"),
      ({"where": {"label": "even"}}, "no removed row has label=even"),
    ],
  )
  def test_refuses_what_is_not_removed(self, folder, choice, message):
    edits.remove(folder, ["a1"])
    assert message in _refusal(lambda: edits.restore(folder, **choice))

  def test_of_an_id_that_was_added_since_is_refused(self, folder, tmp_path):
    edits.remove(folder, ["a1"])
    again = _write(tmp_path / "again", [["a1"]])
    edits.add(folder, again)
    message = _refusal(lambda: edits.restore(folder, ["a1"]))
    assert "an item 'a1' was added since that row was removed" in message
    # Of two removed rows of one id the last is restored.
    edits.remove(folder, ["a1"])
    assert edits.restore(folder, ["a1"]).rows.tolist() == [7]


class TestAdd:
  def test_appends_shards_and_keeps_their_facts(self, folder, other):
    done = edits.add(folder, other)
    assert (done.rows.tolist(), done.live) == ([7, 8, 9], 10)
    assert _live(folder) == [*sum(BASE_IDS, []), "c0", "c1", "c2"]
    shutil.rmtree(other)
    opened = table.Table(folder)
    assert opened.column("source")[-3:] == ["own"] * 3
    assert list(opened.shards) == ["00000", "00001", "00002", "00003"]
    opened.verify()

  def test_in_place_embeddings_stay_in_place(self, folder, stored):
    edits.add(folder, stored)
    shutil.rmtree(stored)
    assert _live(folder) == [*sum(BASE_IDS, []), "s0", "s1", "s2"]
    assert not (folder / "keys_00002.npy").exists()
    # ... where a change of them is noticed.
    (folder.parent / "stored_0.npy").unlink()
    assert "stored_0.npy: missing" in _refusal(table.Table(folder).verify)

  def test_fills_columns_that_one_side_lacks(self, tmp_path):
    folder = _write(tmp_path / "memory", BASE_IDS, columns=COLUMNS)
    extra = {"group": lambda i: f"of {i}", "year": lambda i: 1999}
    edits.add(folder, _write(tmp_path / "more", [["c0"]], columns=extra))
    opened = table.Table(folder)
    ids = opened.column("id")
    assert opened.column("source") == ["web"] * 4 + ["own"] * 3 + ["memory"]
    assert opened.column("label")[-2:] == ["even", ""]
    assert opened.column("group") == [*ids[:7], "of c0"]
    assert opened.column("year") == [None] * 7 + [1999]
    assert opened.column_rows("group", np.array([7, 0])) == ["of c0", "a0"]
    assert opened.column_rows("source", np.array([7, 6, 7]))[0] == "memory"
    # What is removed for good takes its columns along.
    edits.remove(folder, ["c0"])
    edits.compact(folder)
    assert not table.Table(folder).has_column("group")

  def test_twice_is_refused_until_the_rows_are_removed(self, folder, other):
    edits.add(folder, other)
    message = _refusal(lambda: edits.add(folder, other))
    assert f"'c0' is in {folder} already (3 of its 3 ids); was it" in message
    edits.remove(folder, ["c0", "c1", "c2"])
    edits.add(folder, other)
    assert _live(folder) == [*sum(BASE_IDS, []), "c0", "c1", "c2"]
    assert table.Table(folder).rows == 13

  @pytest.mark.parametrize(
    ("options", "message"),
    [
      ({"ids": [["c0"]], "encoder": "f"}, "other encoders than"),
      ({"ids": [["c0", "c1"], ["c0"]]}, "the id 'c0' is there twice"),
      ({"ids": [["c0"]], "columns": {"label": len}}, "'label' holds int64"),
      ({"ids": [["c0", "c1"]], "keys": 0.0}, "row 0 is zero and has no"),
    ],
  )
  def test_refuses_what_does_not_fit(self, folder, tmp_path, options, message):
    bad = _write(tmp_path / "bad", **options)
    assert message in _refusal(lambda: edits.add(folder, bad))
    assert not (folder / versions.NAME).exists()
    assert table.Table(folder).rows == 7

  def test_refuses_values_of_another_encoder_or_width(self, folder, other):
    path = other / manifest.NAME
    found = json.loads(path.read_text())
    found["info"]["value_dims"] = {"text": 4}
    path.write_text(json.dumps(found))
    message = _refusal(lambda: edits.add(folder, other))
    assert "value_dims.text: 3 -> 4" in message
    found["info"]["value_dims"] = {"t5": 4}
    path.write_text(json.dumps(found))
    assert "has no values of text" in _refusal(lambda: edits.add(folder, other))

  def test_refuses_itself_and_unfinished_or_older_tables(self, folder, other):
    message = _refusal(lambda: edits.add(folder, folder))
    assert "cannot be added to itself" in message
    path = other / manifest.NAME
    found = json.loads(path.read_text())
    path.write_text(json.dumps(found | {"complete": False}))
    assert "this table is not finished" in _refusal(
      lambda: edits.add(folder, other)
    )
    path.write_text(json.dumps(found | {"format_version": 0}))
    message = _refusal(lambda: edits.add(folder, other))
    assert "format_version: 0 -> 1" in message
    assert f"delete {other} to have it made again" in message

  def test_refuses_nan_and_a_shard_cut_short(self, folder, other, truncate):
    path = other / "values_text_00001.npy"
    values = np.load(path)
    values[0, 1] = np.nan
    np.save(path, values)
    found = json.loads((other / manifest.NAME).read_text())
    found["shards"]["00001"]["files"][path.name] = manifest.digest(path)
    (other / manifest.NAME).write_text(json.dumps(found))
    message = _refusal(lambda: edits.add(folder, other))
    assert f"{path}: row 0 holds NaN or infinity" in message
    truncate(path)
    message = _refusal(lambda: edits.add(folder, other))
    assert f"{path}: not a whole .npy file" in message
    assert _live(folder) == sum(BASE_IDS, [])

  def test_refuses_damaged_metadata(self, folder, other, flip_bit):
    flip_bit(other / "metadata_00001.parquet", 20)
    message = _refusal(lambda: edits.add(folder, other))
    assert "metadata_00001.parquet: its bytes are not those" in message

  def test_refuses_removed_rows_until_they_are_compacted(self, folder, other):
    edits.remove(other, ["c1"])
    message = _refusal(lambda: edits.add(folder, other))
    assert "1 of its rows are removed; compact it first" in message
    edits.compact(other)
    edits.add(folder, other)
    assert _live(folder) == [*sum(BASE_IDS, []), "c0", "c2"]

  def test_a_full_disk_is_found_before_anything_is_copied(
    self, folder, other, monkeypatch
  ):
    usage = shutil.disk_usage(folder)._replace(free=700)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    before = _names(folder)
    message = _refusal(lambda: edits.add(folder, other))
    assert "are to be written" in message and "make space" in message
    edits.remove(folder, ["a0"])
    assert "make space" in _refusal(lambda: edits.compact(folder))
    assert "keys_00002.npy" not in before | _names(folder)

  def test_a_disk_that_fills_up_leaves_the_memory_as_it_was(
    self, folder, other, monkeypatch
  ):
    def full(source, target):
      pathlib.Path(target).write_bytes(b"some")
      raise OSError(28, "No space left on device")

    before = _names(folder)
    with monkeypatch.context() as patch:
      patch.setattr(shutil, "copyfile", full)
      message = _refusal(lambda: edits.add(folder, other))
    assert "cannot be written (No space left on device)" in message
    assert _names(folder) == before

  def test_a_copy_that_went_wrong_is_noticed(self, folder, other, monkeypatch):
    def wrong(source, target):
      data = pathlib.Path(source).read_bytes()
      pathlib.Path(target).write_bytes(data[:-1] + b"?")

    with monkeypatch.context() as patch:
      patch.setattr(shutil, "copyfile", wrong)
      message = _refusal(lambda: edits.add(folder, other))
    assert f"is not what {other}/metadata_00000.parquet is" in message
    assert _live(folder) == sum(BASE_IDS, [])


class TestCompact:
  def test_drops_rows_and_files_and_keeps_the_rest(self, folder):
    edits.remove(folder, ["a0", "a2", "b0", "b1", "b2"])
    done = edits.compact(folder)
    assert (done.rows.tolist(), done.live) == ([0, 2, 4, 5, 6], 2)
    assert _live(folder) == ["a1", "a3"]
    opened = table.Table(folder)
    assert (opened.rows, opened.removed.size) == (2, 0)
    assert opened.column("label") == ["odd", "odd"]
    held = {n for n in _names(folder) if n.endswith((".npy", ".parquet"))}
    assert {n for n in held if not n.startswith(("edit", "removed"))} == {
      "keys_00003.npy",
      "values_text_00003.npy",
      "metadata_00003.parquet",
    }
    message = _refusal(lambda: edits.compact(folder))
    assert "no row is removed" in message
    message = _refusal(lambda: edits.restore(folder, ["a0"]))
    assert "'a0' is not in the memory" in message

  def test_leaves_whole_shards_alone(self, folder):
    before = (folder / "keys_00000.npy").stat().st_ino
    edits.remove(folder, ["b1"])
    edits.compact(folder)
    assert (folder / "keys_00000.npy").stat().st_ino == before
    assert _live(folder) == ["a0", "a1", "a2", "a3", "b0", "b2"]

  def test_of_what_was_added_gives_the_original_fingerprint(
    self, folder, other
  ):
    original = table.Table(folder).fingerprint
    edits.add(folder, other)
    edits.remove(folder, ["c0", "c1", "c2"])
    edits.compact(folder)
    assert table.Table(folder).fingerprint == original
    # Unlike a memory that lacks a shard of the base.
    edits.remove(folder, ["b0", "b1", "b2"])
    edits.compact(folder)
    assert table.Table(folder).fingerprint != original

  def test_of_stored_embeddings_writes_row_numbers_only(self, stored):
    edits.remove(stored, ["s1"])
    edits.compact(stored)
    assert _live(stored) == ["s0", "s2"]
    assert not list(stored.glob("keys_*"))
    assert np.load(next(stored.glob("rows_keys_*"))).tolist() == [0, 4]

  def test_who_has_the_table_open_never_reads_other_rows(self, folder):
    opened = table.Table(folder)
    edits.remove(folder, ["a0"])
    edits.compact(folder)
    assert "keys_00000.npy: missing" in _refusal(lambda: opened.key_rows([1]))


EDITS = {
  "remove": lambda folder, other: edits.remove(folder, ["b0"]),
  "restore": lambda folder, other: edits.restore(folder, ["a1"]),
  "add": edits.add,
  "compact": lambda folder, other: edits.compact(folder),
}


@pytest.mark.parametrize("kind", EDITS)
def test_a_kill_before_the_commit_leaves_the_old_version(
  folder, other, kind, monkeypatch
):
  edits.remove(folder, ["a1"])
  before, names = table.Table(folder), _names(folder)
  held = {n: (folder / n).read_bytes() for n in names}

  def killed(source, target):
    if pathlib.Path(target).name == versions.NAME:
      raise KeyboardInterrupt
    rename(source, target)

  rename = os.replace
  with monkeypatch.context() as patch:
    patch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
      EDITS[kind](folder, other)
  after = table.Table(folder)
  assert after.fingerprint == before.fingerprint
  assert {n: (folder / n).read_bytes() for n in names} == held
  assert _names(folder) > names
  # The next edit takes away what was left, even one that is refused; one that
  # is not leaves its own files alone.
  _refusal(lambda: edits.remove(folder, ["x"]))
  assert _names(folder) == names
  edits.remove(folder, ["a0"])
  assert _live(folder) == ["a2", "a3", "b0", "b1", "b2"]
  stems = [n.rsplit("_", 1)[0] for n in _names(folder) - names]
  assert sorted(stems) == ["edit", "removed"]


@pytest.mark.parametrize("kind", EDITS)
def test_a_kill_after_the_commit_leaves_the_new_version(
  folder, other, kind, monkeypatch
):
  edits.remove(folder, ["a1"])
  (folder / "keys_of_mine.npy").write_bytes(b"not ours to delete")

  def killed(version):
    write(version)
    raise KeyboardInterrupt

  write = versions.write
  with monkeypatch.context() as patch:
    patch.setattr(versions, "write", killed)
    with pytest.raises(KeyboardInterrupt):
      EDITS[kind](folder, other)
  found = _live(folder)
  edits.remove(folder, ["a0"])
  assert _live(folder) == [x for x in found if x != "a0"]
  needed = table.Table(folder).version.files()
  assert _names(folder) - needed == {
    "manifest.json",
    "edits.json",
    "keys_of_mine.npy",
  }


@pytest.mark.parametrize("kind", EDITS)
def test_a_dry_run_writes_nothing_and_says_the_same(folder, other, kind):
  edits.remove(folder, ["a1"])
  held = {n: (folder / n).read_bytes() for n in _names(folder)}
  calls = {
    "remove": lambda **x: edits.remove(folder, ["b0"], **x),
    "restore": lambda **x: edits.restore(folder, ["a1"], **x),
    "add": lambda **x: edits.add(folder, other, **x),
    "compact": lambda **x: edits.compact(folder, **x),
  }
  told = calls[kind](dry_run=True)
  assert {n: (folder / n).read_bytes() for n in _names(folder)} == held
  done = calls[kind]()
  assert (told.rows.tolist(), told.live) == (done.rows.tolist(), done.live)


def test_two_processes_at_once_are_refused(folder):
  with open(folder / files.LOCK, "a+") as f:
    fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    message = _refusal(lambda: edits.remove(folder, ["a0"]))
  assert f"{folder}: another process is writing here" in message
  edits.remove(folder, ["a0"])


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda x: x | {"format_version": 0}, "format_version: 0 -> 1"),
    (lambda x: x | {"base": "of another"}, "base: of another -> "),
    (lambda x: {"kind": x["kind"]}, "not a whole file of edits (KeyError"),
    (lambda x: [], "not a whole file of edits"),
  ],
)
def test_edits_of_another_table_or_format_are_refused(folder, change, message):
  edits.remove(folder, ["a0"])
  path = folder / versions.NAME
  path.write_text(json.dumps(change(json.loads(path.read_text()))))
  for call in (
    lambda: table.Table(folder),
    lambda: edits.remove(folder, ["a1"]),
  ):
    found = _refusal(call)
    assert f"{path}: " in found and message in found and "delete" in found
  assert len(table_report.verify(folder)) == 1


def test_damaged_tombstones_are_refused(folder, flip_bit):
  edits.remove(folder, ["a0"])
  path = next(folder.glob("removed_*"))
  flip_bit(path)
  message = _refusal(lambda: table.Table(folder))
  assert f"{path}: its bytes are not" in message
  assert f"put a copy of that file back, or delete {folder}" in message


class TestSince:
  """Checked against ids, which say the same without any row number."""

  def _snapshot(self, folder):
    opened = table.Table(folder)
    return opened.fingerprint, opened.column("id"), opened.removed.tolist()

  def _check(self, folder, then):
    fingerprint, ids, removed = then
    opened = table.Table(folder)
    changes = opened.since(fingerprint)
    new_ids = opened.column("id")
    live = {i for i in range(len(ids)) if i not in removed}
    new_live = set(range(opened.rows)) - set(opened.removed.tolist())
    renumber = np.arange(len(ids))
    if changes.renumber is not None:
      renumber = changes.renumber
      assert (renumber.dtype, renumber.shape) == (np.int64, (len(ids),))
    kept = set()
    for row, now in enumerate(renumber.tolist()):
      if now >= 0:
        assert new_ids[now] == ids[row]
        if now in new_live and row in live:
          kept.add((row, now))
    lost = live - {row for row, _ in kept}
    gained = new_live - {now for _, now in kept}
    assert changes.lost.tolist() == sorted(lost)
    assert changes.gained.tolist() == sorted(gained)
    if changes.renumber is not None:
      dead = [r for r in range(len(ids)) if renumber[r] < 0]
      assert set(dead) >= lost
      assert set(renumber[renumber >= 0].tolist()) <= new_live
    # Lists of neighbours, which name live rows only.
    lists = np.array([[*sorted(live)[:2], -1], [*sorted(live)[-2:], -1]])
    now = dict(kept)
    wanted = [[now.get(r, -1) for r in row] for row in lists.tolist()]
    assert changes.renumbered(lists).tolist() == wanted

  def test_knows_what_changed_since_every_version(self, folder, tmp_path):
    more = iter(range(9))

    def add(ids):
      edits.add(folder, _write(tmp_path / f"more{next(more)}", [ids]))

    steps = [
      lambda: edits.remove(folder, ["a1", "b0"]),
      lambda: add(["c0", "c1", "a1"]),
      lambda: edits.remove(folder, ["c1", "b2"]),
      lambda: edits.restore(folder, ["b0"]),
      lambda: edits.compact(folder),
      lambda: edits.remove(folder, ["a0", "c0"]),
      lambda: add(["c1", "d0"]),
      lambda: edits.restore(folder, ["a0"]),
      lambda: edits.remove(folder, ["d0", "a3"]),
      lambda: edits.compact(folder),
      lambda: edits.remove(folder, ["b1"]),
    ]
    seen = [self._snapshot(folder)]
    for step in steps:
      step()
      for then in seen:
        self._check(folder, then)
      seen.append(self._snapshot(folder))
    assert _live(folder) == ["a0", "a2", "b0", "a1", "c1"]
    # The base, counted by hand: a0 a1 a2 a3 b0 b1 b2.
    changes = table.Table(folder).since(seen[0][0])
    assert changes.renumber.tolist() == [0, -1, 1, -1, 2, -1, -1]
    assert changes.lost.tolist() == [1, 3, 5, 6]
    assert changes.gained.tolist() == [4, 5]

  def test_now_nothing_changed(self, folder):
    for _ in range(2):
      opened = table.Table(folder)
      changes = opened.since(opened.fingerprint)
      assert changes.renumber is None
      assert changes.lost.size == changes.gained.size == 0
      edits.remove(folder, ["a0"])
      edits.restore(folder, ["a0"])

  def test_rows_keep_their_numbers_without_compaction(self, folder, other):
    before = table.Table(folder).fingerprint
    edits.remove(folder, ["a1"])
    edits.add(folder, other)
    changes = table.Table(folder).since(before)
    assert changes.renumber is None
    assert changes.lost.tolist() == [1]
    assert changes.gained.tolist() == [7, 8, 9]

  def test_an_unknown_version_is_none(self, folder, other):
    edits.remove(folder, ["a1"])
    unknown = table.Table(other).fingerprint
    assert table.Table(folder).since(unknown) is None
    assert table.Table(other).since("") is None

  def test_a_damaged_history_is_refused(self, folder, flip_bit):
    before = table.Table(folder).fingerprint
    edits.remove(folder, ["a1"])
    flip_bit(next(folder.glob("edit_*")))
    opened = table.Table(folder)
    for call in (lambda: opened.since(before), opened.verify):
      assert "edit_00002.npy: its bytes are not" in _refusal(call)


class TestVerify:
  def test_names_all_faults(self, folder, other, flip_bit, truncate):
    edits.add(folder, other)
    edits.remove(folder, ["a0"])
    truncate(folder / "keys_00002.npy")
    flip_bit(folder / "metadata_00000.parquet", 20)
    (folder / "values_text_00003.npy").unlink()
    flip_bit(next(folder.glob("edit_*")))
    faults = table_report.verify(folder)
    names = [f.split(": ")[0].rsplit("/", 1)[1] for f in faults]
    assert names == [
      "metadata_00000.parquet",
      "keys_00002.npy",
      "values_text_00003.npy",
      "edit_00004.npy",
    ]

  def test_reads_every_row(self, tmp_path):
    ids = [["a", "b", "c"], ["d"]]
    keys = np.ones((3, D), np.float16)
    folder = _write(tmp_path / "memory", ids)
    keys[1], keys[2] = 0, np.nan
    found = json.loads((folder / manifest.NAME).read_text())
    np.save(folder / "keys_00000.npy", keys)
    pq.write_table(
      pq.read_table(folder / "metadata_00000.parquet"),
      folder / "metadata_00001.parquet",
    )
    for shard, name in (
      ("00000", "keys_00000.npy"),
      ("00001", "metadata_00001.parquet"),
    ):
      record = found["shards"][shard]["files"]
      record[name] = manifest.digest(folder / name)
    (folder / manifest.NAME).write_text(json.dumps(found))
    faults = table_report.verify(folder)
    assert len(faults) == 3
    assert "keys_00000.npy: row 2 holds NaN or infinity (1 such" in faults[0]
    assert "row 1 is zero and has no direction (1 such" in faults[1]
    assert "metadata_00001.parquet: holds 3 rows where its shard" in faults[2]

  def test_ids_must_be_unique_unless_removed(self, tmp_path):
    folder = _write(tmp_path / "memory", [["a", "b"], ["b", "c", "c"]])
    assert table_report.verify(folder) == [
      f"{folder}: the id 'b' stands in two rows; remove it, and restore one "
      "of them."
    ]
    edits.remove(folder, ["b", "c"])
    assert table_report.verify(folder) == []

  def test_embeddings_elsewhere_are_compared_with_their_stamp(self, stored):
    path = stored.parent / "stored_0.npy"
    np.save(path, np.zeros((9, D)))
    (fault,) = table_report.verify(stored)
    assert f"{path}: changed since it was read in place" in fault


class TestCommand:
  """`python -m retrieval_aug.memory`."""

  def _run(self, capsys, *arguments):
    status = command.main([*map(str, arguments)])
    found = capsys.readouterr()
    errors = [x for x in found.err.split("\n") if x.startswith("error: ")]
    return status, found.out, errors

  def test_edits_a_workdir_or_a_table(self, folder, other, tmp_path, capsys):
    run = lambda *x: self._run(capsys, *x)
    (tmp_path / "bad.txt").write_text("a0\n\nb 1\n")
    assert run("remove", tmp_path, "a0", "b1") == (
      0,
      f"{folder}: 2 rows removed, 5 live.\nNext: run the main job again: only "
      "affected queries are searched anew, nothing is retrained.\n",
      [],
    )
    assert run("restore", folder, "--where", "source=web")[0] == 0
    status, out, _ = run("remove", folder, f"--ids={tmp_path}/bad.txt")
    assert status == 1
    (tmp_path / "bad.txt").write_text("a3\r\na2")
    status, out, _ = run(
      "remove", folder, f"--ids={tmp_path}/bad.txt", "--dry_run"
    )
    assert run("remove", folder, "--dry_run", "a2", "a3")[1] == out
    assert (status, out) == (
      0,
      f"{folder}: 2 rows would be removed, 4 live.\nNothing was changed.\n",
    )
    assert run("compact", tmp_path)[0] == 0
    assert run("add", tmp_path, other)[0] == 0
    assert _live(folder) == [*BASE_IDS[0], "b0", "b2", "c0", "c1", "c2"]
    assert run("verify", tmp_path) == (
      0,
      f"{folder}: every file and every row is sound.\n",
      [],
    )
    status, out, _ = run("stat", tmp_path)
    assert out.split("\n")[1:-1] == [
      "rows     9 in 4 shards",
      "removed  0",
      "live     9",
      "keys     5 dims",
      "values   text 3 dims",
      "columns  id string, text string, source string, label string",
      "sources  own 5, web 4",
      f"files    {table_report.stat(folder)['bytes']:,} bytes",
      "edits    remove 2, restore 1, compact 1, add 3",
    ]

  @pytest.mark.parametrize(
    ("arguments", "message"),
    [
      (["remove", "DIR"], "nothing is chosen"),
      (["remove", "DIR", "x"], "'x' is not in the memory"),
      (["remove", "DIR", "--where", "source"], "must be COLUMN=VALUE"),
      (
        ["remove", "DIR", "--where", "id=a0", "--where", "id=a1"],
        "id is 'a0' already, and no row has both",
      ),
      (["remove", "DIR", "--ids=none.txt"], "cannot be read (No such file"),
      (["remove", "DIR", "--ids=none.txt", "a0"], "give one"),
      (["stat", "DIR/none"], "neither a table (it has no manifest.json)"),
      (["add", "DIR", "DIR"], "cannot be added to itself"),
    ],
  )
  def test_a_mistake_is_one_line(self, folder, arguments, message, capsys):
    arguments = [x.replace("DIR", str(folder)) for x in arguments]
    status, out, errors = self._run(capsys, *arguments)
    assert (status, out, len(errors)) == (1, "", 1)
    assert message in errors[0]

  def test_verify_fails_with_a_line_a_fault(self, folder, flip_bit, capsys):
    flip_bit(folder / "keys_00000.npy")
    flip_bit(folder / "keys_00001.npy")
    status, out, errors = self._run(capsys, "verify", folder)
    assert (status, out, len(errors)) == (1, "", 2)

  @pytest.mark.parametrize(
    "arguments", [["stat", "x", "y"], ["remove", "x", "--force"], []]
  )
  def test_an_unknown_argument_is_refused(self, arguments):
    with pytest.raises(SystemExit) as end:
      command.main(arguments)
    assert end.value.code == 2

  @pytest.mark.parametrize("arguments", [["--help"], ["remove", "--help"]])
  def test_help_has_examples(self, arguments, capsys):
    with pytest.raises(SystemExit) as end:
      command.main(arguments)
    assert end.value.code == 0
    assert "--where source=web" in capsys.readouterr().out
