"""Embedding tables: what was written is what is read, or an error."""

import json
import os

import numpy as np
import pyarrow.parquet as pq
import pytest

from retrieval_aug.common import manifest
from retrieval_aug.common.errors import UserError
from retrieval_aug.datasets import vectors
from retrieval_aug.memory import table, table_rows

ROWS, D, DV = (5, 3), 7, 11


def _artifact(folder):
  return manifest.Artifact(
    folder, "embedding table", {"encoder": {"name": "e"}}
  )


def _shard(index):
  rng = np.random.default_rng(index)
  rows = ROWS[index]
  return {
    "keys": rng.normal(size=(rows, D)).astype(np.float32),
    "values": {"text": rng.normal(size=(rows, DV)).astype(np.float32)},
    "metadata": {
      "id": [f"{index}/{i}" for i in range(rows)],
      "label": list(range(rows)),
    },
  }


@pytest.fixture
def folder(tmp_path):
  """A finished table of two shards."""
  artifact = _artifact(tmp_path / "memory")
  artifact.start()
  for index in range(2):
    table.write_shard(artifact, index, **_shard(index))
  artifact.finish(
    ["00000", "00001"], {"key_dims": D, "value_dims": {"text": DV}}
  )
  return artifact.folder


def _refusal(call):
  with pytest.raises(UserError) as caught:
    call()
  message = str(caught.value)
  assert "\n" not in message
  return message


def _replace(folder, name, array):
  """Puts another array in place of a file and corrects its digest."""
  np.save(folder / name, array)
  path = folder / "manifest.json"
  found = json.loads(path.read_text())
  for shard in found["shards"].values():
    if name in shard["files"]:
      shard["files"][name] = manifest.digest(folder / name)
  path.write_text(json.dumps(found))


def test_rows_come_back_in_order_as_float16(folder):
  opened = table.Table(folder)
  assert (opened.rows, opened.dims) == (sum(ROWS), D)
  assert opened.value_names == ["text"]
  for found, stem in ((opened.keys(), "keys"), (opened.values("text"), "text")):
    parts = [_shard(i) for i in range(2)]
    wanted = np.concatenate(
      [p["keys"] if stem == "keys" else p["values"][stem] for p in parts]
    ).astype(np.float16)
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, wanted)
  assert opened.column("id") == [
    f"{i}/{j}" for i in range(2) for j in range(ROWS[i])
  ]
  assert opened.column("label") == [0, 1, 2, 3, 4, 0, 1, 2]


def test_shards_have_the_names_of_the_published_layout(folder):
  assert {p.name for p in folder.iterdir()} == {
    "manifest.json",
    *(f"keys_0000{i}.npy" for i in range(2)),
    *(f"values_text_0000{i}.npy" for i in range(2)),
    *(f"metadata_0000{i}.parquet" for i in range(2)),
  }


@pytest.mark.parametrize("part", ["keys", "values"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 70_000.0])
def test_a_row_that_float16_cannot_hold_is_refused_and_nothing_written(
  tmp_path, part, bad
):
  artifact = _artifact(tmp_path / "memory")
  artifact.start()
  shard = _shard(0)
  array = shard["keys"] if part == "keys" else shard["values"]["text"]
  array[3, 2] = bad
  message = _refusal(lambda: table.write_shard(artifact, 0, **shard))
  assert "the embedding of item '0/3' is not finite in float16" in message
  assert f"{part}" in message and "Nothing was written." in message
  assert [p.name for p in artifact.folder.iterdir()] == ["manifest.json"]


def test_a_missing_table_says_which_stage_makes_it(tmp_path):
  message = _refusal(lambda: table.Table(tmp_path / "memory"))
  assert message == (
    f"{tmp_path / 'memory' / 'manifest.json'}: missing; run --stages=embed "
    "first."
  )


def test_an_unfinished_table_says_which_stage_goes_on(tmp_path):
  artifact = _artifact(tmp_path / "memory")
  artifact.start()
  table.write_shard(artifact, 0, **_shard(0))
  message = _refusal(lambda: table.Table(artifact.folder))
  assert "this table is not finished; run --stages=embed" in message


def test_a_foreign_manifest_is_refused(folder):
  (folder / "manifest.json").write_text('{"name": "of another program"}')
  message = _refusal(lambda: table.Table(folder))
  assert "not a manifest of ours" in message


def test_an_artifact_of_another_kind_is_refused(tmp_path):
  artifact = manifest.Artifact(tmp_path / "memory", "working set", {})
  artifact.start()
  message = _refusal(lambda: table.Table(artifact.folder))
  assert "kind: working set -> embedding table" in message


def test_values_of_another_encoder_are_refused_by_name(folder):
  message = _refusal(lambda: table.Table(folder).values("t5"))
  assert "holds no values of 't5', only of ['text']" in message
  assert "delete" in message


READS = {
  "keys_00001.npy": lambda t: t.keys(),
  "values_text_00001.npy": lambda t: t.values("text"),
  "metadata_00001.parquet": lambda t: t.column("id"),
}


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("damage", ["truncate", "flip_bit", "delete"])
def test_a_damaged_file_is_named_with_the_remedy(
  folder, name, damage, truncate, flip_bit
):
  {"truncate": truncate, "flip_bit": flip_bit, "delete": lambda p: p.unlink()}[
    damage
  ](folder / name)
  opened = table.Table(folder)
  for call in (lambda: READS[name](opened), opened.verify):
    message = _refusal(call)
    assert str(folder / name) in message
    assert f"delete {folder} to have it made again" in message


@pytest.mark.parametrize(
  ("name", "read"),
  [("keys_00000.npy", "keys"), ("values_text_00000.npy", "values")],
)
def test_a_table_of_another_width_is_refused_with_both_shapes(
  folder, name, read
):
  _replace(folder, name, np.ones((ROWS[0], 13), np.float16))
  opened = table.Table(folder)
  message = _refusal(
    lambda: (
      opened.keys()
      if read == "keys"
      else READS["values_text_00001.npy"](opened)
    )
  )
  wanted = D if read == "keys" else DV
  assert f"{name}: holds float16 [5, 13]" in message
  assert f"where floats [5, {wanted}] are expected" in message


def test_nan_in_a_stored_table_is_refused_with_its_row(folder):
  keys = _shard(0)["keys"]
  keys[2, 1] = np.nan
  keys[4, 0] = np.inf
  _replace(folder, "keys_00000.npy", keys.astype(np.float16))
  message = _refusal(lambda: table.Table(folder).keys())
  assert "keys_00000.npy: row 2 holds NaN or infinity (2 such rows)" in message


def test_integers_in_place_of_keys_are_refused(folder):
  _replace(folder, "keys_00000.npy", np.ones((ROWS[0], D), np.int64))
  message = _refusal(lambda: table.Table(folder).keys())
  assert "holds int64 [5, 7] where floats" in message


def test_a_pickle_in_place_of_keys_is_never_loaded(folder):
  evil = np.array([{"a": 1}] * ROWS[0], dtype=object)
  np.save(folder / "keys_00000.npy", evil, allow_pickle=True)
  message = _refusal(lambda: table.Table(folder).keys())
  assert "keys_00000.npy: not a whole .npy file" in message


ASKED = {
  "slice": slice(2, 7),
  "slice of steps": slice(6, None, -2),
  "all": slice(None),
  "range": range(5, 8),
  "one": range(4, 5),
  "any order, twice": np.array([7, 0, 4, 7, 5, 0]),
  "int32": np.array([6, 1], np.int32),
  "none": np.zeros(0, np.int64),
  "empty slice": slice(3, 3),
}


def _check_rows(opened, rows):
  """Some rows are those of the whole table."""
  chosen = np.arange(opened.rows)[rows]
  keys = opened.key_rows(rows)
  assert keys.shape == (len(chosen), opened.dims)
  np.testing.assert_array_equal(keys, opened.keys()[chosen])
  for name in opened.value_names:
    values = opened.values(name)
    found = opened.value_rows(name, rows)
    assert found.shape == (len(chosen), values.shape[1])
    np.testing.assert_array_equal(found, values[chosen])
  ids = opened.column("id")
  assert opened.column_rows("id", rows) == [ids[i] for i in chosen]


class TestRows:
  @pytest.mark.parametrize("rows", ASKED.values(), ids=ASKED)
  def test_some_are_those_of_the_whole(self, folder, rows):
    _check_rows(table.Table(folder), rows)

  def test_in_small_blocks_are_the_same(self, folder, monkeypatch):
    # Two rows a block, so that a shard takes several.
    monkeypatch.setattr(table_rows, "_BLOCK_BYTES", 2 * 2 * D)
    for rows in ASKED.values():
      _check_rows(table.Table(folder), rows)

  @pytest.mark.parametrize(
    "rows",
    [np.array([0, 8]), np.array([-1]), range(7, 9), np.array([0.5]), [[1]]],
  )
  def test_that_are_not_there_are_an_error(self, folder, rows):
    opened = table.Table(folder)
    for call in (opened.key_rows, lambda r: opened.column_rows("id", r)):
      with pytest.raises(ValueError, match="rows"):
        call(rows)

  def test_open_only_the_shards_that_hold_them(self, folder):
    for path in folder.glob("*_00000.*"):
      path.unlink()
    opened = table.Table(folder)
    opened.columns = {"id": "string"}
    assert opened.key_rows(range(5, 8)).shape == (3, D)
    assert opened.value_rows("text", np.array([7, 6])).shape == (2, DV)
    assert opened.column_rows("id", np.array([7, 5])) == ["1/2", "1/0"]
    message = _refusal(lambda: opened.key_rows(range(4, 8)))
    assert "keys_00000.npy: missing" in message

  def test_of_a_file_are_checked_by_digest_once(self, folder, monkeypatch):
    seen = []
    check = manifest.check_file

    def counted(path, digest, remedy):
      seen.append(path.name)
      check(path, digest, remedy)

    monkeypatch.setattr(manifest, "check_file", counted)
    opened = table.Table(folder)
    for _ in range(2):
      opened.key_rows(np.array([0, 7]))
      opened.column_rows("id", np.array([0]))
      opened.keys()
      list(opened.column_blocks("id"))
    assert sorted(seen) == [
      "keys_00000.npy",
      "keys_00001.npy",
      "metadata_00000.parquet",
      "metadata_00001.parquet",
    ]

  def test_that_are_not_finite_are_refused_when_they_are_asked_for(
    self, folder
  ):
    keys = _shard(1)["keys"].astype(np.float16)
    keys[2, 1] = np.nan
    _replace(folder, "keys_00001.npy", keys)
    opened = table.Table(folder)
    assert opened.key_rows(range(7)).shape == (7, D)
    for rows in (range(5, 8), np.array([7, 0]), slice(None)):
      message = _refusal(lambda rows=rows: opened.key_rows(rows))
      assert "keys_00001.npy: row 2 holds NaN or infinity (1 such" in message

  def test_of_values_and_columns_that_are_not_there_are_refused(self, folder):
    opened = table.Table(folder)
    message = _refusal(lambda: opened.value_rows("t5", range(2)))
    assert "holds no values of 't5', only of ['text']" in message
    for call in (
      lambda: opened.column("name"),
      lambda: opened.column_rows("name", range(2)),
      lambda: next(opened.column_blocks("name")),
    ):
      assert "has no column 'name', only id, label" in _refusal(call)

  def test_of_a_column_come_in_blocks(self, folder):
    found = list(table.Table(folder).column_blocks("label"))
    assert [first for first, _ in found] == [0, 5]
    assert [b.to_pylist() for _, b in found] == [[0, 1, 2, 3, 4], [0, 1, 2]]

  def test_of_a_column_come_a_group_at_a_time(self, folder):
    path = folder / "metadata_00000.parquet"
    pq.write_table(pq.read_table(path), path, row_group_size=2)
    found = json.loads((folder / "manifest.json").read_text())
    digest = manifest.digest(path)
    found["shards"]["00000"]["files"][path.name] = digest
    (folder / "manifest.json").write_text(json.dumps(found))
    opened = table.Table(folder)
    assert [f for f, _ in opened.column_blocks("id")] == [0, 2, 4, 5]
    for rows in ASKED.values():
      _check_rows(opened, rows)

  def test_none_is_removed_of_a_table_without_edits(self, folder):
    opened = table.Table(folder)
    assert (opened.removed.dtype, opened.removed.shape) == (np.int64, (0,))
    assert opened.fingerprint == _artifact(folder).fingerprint


class TestStored:
  """Embeddings that lie elsewhere, one shard of them with rows left out."""

  @pytest.fixture
  def files(self, tmp_path):
    """Keys in float32 and float16 files, and values in one for both."""
    for index, kind in enumerate((np.float32, np.float16)):
      np.save(tmp_path / f"keys{index}.npy", _shard(index)["keys"].astype(kind))
    values = np.concatenate([_shard(i)["values"]["text"] for i in range(2)])
    np.save(tmp_path / "values.npy", values)
    return tmp_path

  @pytest.fixture
  def opened(self, files, tmp_path):
    artifact = _artifact(tmp_path / "memory")
    artifact.start()
    chosen = [np.array([0, 1, 3]), np.arange(3)]
    for index, rows in enumerate(chosen):
      keys = vectors.describe(str(files / f"keys{index}.npy"), "stat")
      values = vectors.describe(str(files / "values.npy"), "stat")
      values = values.take(np.arange(ROWS[index]) + 5 * index)
      table.write_shard(
        artifact,
        index,
        keys=None,
        values={"own": _shard(index)["values"]["text"][rows]},
        metadata={"id": [f"{index}/{i}" for i in rows]},
        stored={"": keys.take(rows), "text": values.take(rows)},
      )
    dims = {"text": DV, "own": DV}
    artifact.finish(["00000", "00001"], {"key_dims": D, "value_dims": dims})
    return table.Table(artifact.folder)

  def test_are_read_from_there_and_keep_their_type(self, opened):
    keys = [_shard(0)["keys"][[0, 1, 3]], _shard(1)["keys"].astype(np.float16)]
    assert opened.keys().dtype == np.float32
    np.testing.assert_array_equal(opened.keys(), np.concatenate(keys))
    values = [_shard(i)["values"]["text"] for i in range(2)]
    values = np.concatenate([values[0][[0, 1, 3]], values[1]])
    np.testing.assert_array_equal(opened.values("text"), values)
    np.testing.assert_array_equal(
      opened.values("own"), values.astype(np.float16)
    )
    assert opened.column("id")[2] == "0/3"
    opened.verify()

  @pytest.mark.parametrize("rows", [slice(1, 5), np.array([5, 0, 2, 3, 2])])
  def test_some_rows_are_those_of_the_whole(self, opened, rows):
    _check_rows(opened, rows)

  def test_some_rows_of_a_changed_file_are_refused(self, opened, files):
    os.utime(files / "keys1.npy", (5, 5))
    assert opened.key_rows(range(3)).dtype == np.float32
    message = _refusal(lambda: opened.key_rows(range(2, 4)))
    assert f"{files / 'keys1.npy'}: changed since" in message

  def test_are_not_copied(self, opened):
    assert {p.name for p in opened.folder.iterdir()} == {
      "manifest.json",
      *(f"values_own_0000{i}.npy" for i in range(2)),
      *(f"metadata_0000{i}.parquet" for i in range(2)),
      # Which rows of the first shard are items.
      "rows_keys_00000.npy",
      "rows_values_text_00000.npy",
    }

  def test_one_piece_stays_mapped(self, files, tmp_path):
    artifact = _artifact(tmp_path / "one")
    artifact.start()
    keys = vectors.describe(str(files / "keys0.npy"), "stat")
    keys = keys.take(np.arange(1, 4))
    table.write_shard(
      artifact,
      0,
      keys=None,
      values={},
      metadata={"id": list("abc")},
      stored={"": keys},
    )
    artifact.finish(["00000"], {"key_dims": D, "value_dims": {}})
    found = table.Table(artifact.folder).keys()
    assert isinstance(found, np.memmap)
    np.testing.assert_array_equal(found, _shard(0)["keys"][1:4])

  def _both(self, opened, message, call):
    """The whole table, and what is read of it, refuse a change."""
    for check in (opened.verify, call):
      refusal = _refusal(check)
      assert message in refusal
      assert f"delete {opened.folder} to have it made again" in refusal

  def test_a_changed_file_is_refused_with_its_stamps(self, opened, files):
    os.utime(files / "keys1.npy", (5, 5))
    message = f"{files / 'keys1.npy'}: changed since it was read in place (size"
    self._both(opened, message, opened.keys)
    opened.values("text")  # which did not change

  def test_a_missing_file_is_refused(self, opened, files):
    (files / "values.npy").unlink()
    message = f"{files / 'values.npy'}: missing; put it back, or"
    self._both(opened, message, lambda: opened.values("text"))

  def test_damaged_rows_are_refused(self, opened, flip_bit):
    path = opened.folder / "rows_keys_00000.npy"
    flip_bit(path)
    self._both(opened, f"{path}: its bytes are not", opened.keys)

  def test_another_shape_under_the_same_stamp_is_refused(self, opened, files):
    path = files / "keys1.npy"
    before = os.stat(path)
    # The same size, and the time put back.
    np.save(path, _shard(1)["keys"].astype(np.float16).T)
    assert os.stat(path).st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    message = _refusal(opened.keys)
    assert "keys1.npy: holds float16 [7, 3] where floats [3, 7]" in message

  def test_by_content_a_changed_bit_is_refused(self, files, tmp_path, flip_bit):
    artifact = _artifact(tmp_path / "memory")
    artifact.start()
    keys = vectors.describe(str(files / "keys0.npy"), "content")
    table.write_shard(
      artifact,
      0,
      keys=None,
      values={},
      metadata={"id": list("abcde")},
      stored={"": keys},
    )
    artifact.finish(["00000"], {"key_dims": D, "value_dims": {}})
    os.utime(keys.path, (5, 5))
    opened = table.Table(artifact.folder)
    opened.verify()
    flip_bit(files / "keys0.npy")
    self._both(
      opened, "changed since it was read in place (SHA-256", opened.keys
    )

  @pytest.mark.parametrize("row", [0, 2])
  def test_nan_is_refused_where_it_is_an_item(self, files, tmp_path, row):
    keys = _shard(0)["keys"]
    keys[2, 1] = np.nan
    np.save(files / "keys0.npy", keys)
    artifact = _artifact(tmp_path / "memory")
    artifact.start()
    matrix = vectors.describe(str(files / "keys0.npy"), "stat")
    write = lambda: table.write_shard(
      artifact,
      0,
      keys=None,
      values={},
      metadata={"id": ["a"]},
      stored={"": matrix.take(np.array([row]))},
    )
    if row == 2:
      assert "keys0.npy: row 2 holds NaN or infinity" in _refusal(write)
      assert [p.name for p in artifact.folder.iterdir()] == ["manifest.json"]
    else:
      write()
