"""The working set: each memory row that a neighbour list names, once."""

import numpy as np
import pytest

from retrieval_aug.common import manifest
from retrieval_aug.common.errors import UserError
from retrieval_aug.memory import (
  jobs,
  key_transform,
  neighbors,
  search,
  table,
  working_set,
)

M, N, D, DV, DIMS = 53, 31, 11, 7, 3
ENCODER = {"name": "tiny", "weights_sha256": "00"}


def _table(folder, rows, dims, *, values=None, **columns):
  artifact = manifest.Artifact(
    folder, table.KIND, {"items": folder.name, "encoder": ENCODER}
  )
  rng = np.random.default_rng(len(folder.name))
  artifact.start()
  # Two shards, so that rows of both are wanted.
  cuts = [0, rows // 3, rows]
  for number, (first, end) in enumerate(zip(cuts, cuts[1:])):
    part = slice(first, end)
    table.write_shard(
      artifact,
      number,
      keys=rng.normal(size=(end - first, dims)) + 3,
      values={n: v[part] for n, v in (values or {}).items()},
      metadata={
        "id": [f"{folder.name}/{i}" for i in range(first, end)],
        **{n: v[part] for n, v in columns.items()},
      },
    )
  value_dims = {n: v.shape[1] for n, v in (values or {}).items()}
  artifact.finish(
    ["00000", "00001"], {"key_dims": dims, "value_dims": value_dims}
  )
  return table.Table(folder)


@pytest.fixture
def queries(tmp_path):
  return _table(tmp_path / "queries", N, D)


@pytest.fixture
def memory(tmp_path):
  values = {"text": np.random.default_rng(1).normal(size=(M, DV))}
  return _table(tmp_path / "memory", M, D, values=values)


def _transform():
  rng = np.random.default_rng(5)
  return key_transform.KeyTransform(
    rng.normal(size=D).astype(np.float32),
    rng.normal(size=(D, DIMS)).astype(np.float32),
  )


def _shards(folder, lists):
  """Neighbour shards with these lists."""
  artifact = manifest.Artifact(folder, neighbors.KIND, {"memory": "x"})
  artifact.start()
  _transform().save(folder / neighbors.TRANSFORM)
  artifact.record("key_transform", [neighbors.TRANSFORM])
  names = ["key_transform"]
  for i, ids in enumerate(lists):
    names.append(f"neighbors-train-{i:05d}-of-{len(lists):05d}")
    neighbors.write_shard(
      folder / f"{names[-1]}.tfrecord",
      [f"{i}/{j}" for j in range(len(ids))],
      [0] * len(ids),
      np.ones((len(ids), DIMS)),
      search.SearchResult(ids, np.zeros(ids.shape, np.float32)),
    )
    artifact.record(names[-1], [f"{names[-1]}.tfrecord"])
  artifact.finish(names, {"k": 3, "dims": DIMS})
  return artifact


def _refusal(call):
  with pytest.raises(UserError) as caught:
    call()
  message = str(caught.value)
  assert "\n" not in message
  return message


class TestSourcesAndLabels:
  def _working_set(self, tmp_path, queries, memory):
    found = _shards(tmp_path / "lists", [np.array([[41, 3, -1]])])
    artifact = working_set.working_set_artifact(
      tmp_path / "set", found, ["text"]
    )
    working_set.gather(artifact, found, queries, memory, ["text"])
    return working_set.load_working_set(artifact)

  def test_are_those_of_the_rows(self, tmp_path):
    values = {"text": np.ones((M, DV))}
    memory = _table(
      tmp_path / "own",
      M,
      D,
      values=values,
      source=["web" if i % 2 else "books" for i in range(M)],
      label=["owl" if i > 9 else "nothing known" for i in range(M)],
    )
    queries = _table(
      tmp_path / "asks",
      N,
      D,
      label=[i % 2 for i in range(N)],
      class_name=["fox" if i % 2 == 0 else "owl" for i in range(N)],
    )
    made = self._working_set(tmp_path, queries, memory)
    assert made.rows.tolist() == [3, 41]
    assert made.source_names == ["books", "web"]
    assert made.sources.tolist() == [1, 1] and made.sources.dtype == np.int32
    assert made.labels.tolist() == [-1, 1] and made.labels.dtype == np.int32

  def test_a_memory_without_them_is_one_source_without_classes(
    self, tmp_path, queries, memory
  ):
    made = self._working_set(tmp_path, queries, memory)
    assert made.sources.tolist() == [0, 0] and len(made.source_names) == 1
    assert made.labels.tolist() == [-1, -1]


class TestWorkingSet:
  LISTS = [np.array([[41, 3, -1], [3, 52, 0]]), np.array([[17, -1, -1]])]
  ROWS = [0, 3, 17, 41, 52]

  @pytest.fixture
  def found(self, tmp_path):
    return _shards(tmp_path / "lists", self.LISTS)

  @pytest.fixture
  def made(self, tmp_path, found, queries, memory):
    artifact = working_set.working_set_artifact(
      tmp_path / "working_set", found, ["text"]
    )
    working_set.gather(artifact, found, queries, memory, ["text"])
    return artifact

  def test_holds_each_named_row_once(self, made, memory):
    loaded = working_set.load_working_set(made)
    assert loaded.rows.tolist() == self.ROWS
    assert loaded.keys.shape == (5, DIMS)
    np.testing.assert_array_equal(
      loaded.values["text"], memory.values("text")[self.ROWS]
    )
    keys = _transform()(memory.keys()[self.ROWS]).astype(np.float16)
    np.testing.assert_array_equal(loaded.keys, keys)

  def test_parts_make_the_same(
    self, tmp_path, made, found, queries, memory, monkeypatch
  ):
    """Of a killed job finished parts are kept, whoever gathers the others."""
    monkeypatch.setattr(working_set, "_PART_ROWS", 2)
    other = working_set.working_set_artifact(
      tmp_path / "other", found, ["text"]
    )
    make = lambda: working_set.GatherJob(
      other, found, queries, memory, ["text"]
    )
    other.start()
    ignore = lambda _: None
    make().do("rows", "rows", ignore)
    assert make().units("gather") == ["00000", "00001", "00002"]
    make().do("gather", "00001", ignore)
    assert make().units("gather") == ["00000", "00002"]
    jobs.run(make())
    assert other.shards() == made.shards()
    names = sorted(p.name for p in made.folder.glob("*.npy"))
    assert names == sorted(p.name for p in other.folder.glob("*.npy"))

  def test_renumbers_table_rows_and_keeps_pads(self, made):
    loaded = working_set.load_working_set(made)
    found = loaded.renumber(self.LISTS[0])
    assert found.dtype == np.int32
    assert found.tolist() == [[3, 1, -1], [1, 4, 0]]

  @pytest.mark.parametrize("strange", [1, 53, 10**12])
  def test_a_row_that_it_does_not_hold_is_refused(self, made, strange):
    loaded = working_set.load_working_set(made)
    message = _refusal(lambda: loaded.renumber(np.array([[3, strange]])))
    assert f"neighbour row {strange} is not in the working set" in message
    assert "delete the working_set folder" in message

  @pytest.mark.parametrize("name", ["keys.npy", "values_text.npy", "rows.npy"])
  @pytest.mark.parametrize("damage", ["truncate", "flip_bit", "delete"])
  def test_a_damaged_file_is_named_with_the_remedy(
    self, made, name, damage, truncate, flip_bit
  ):
    act = {"truncate": truncate, "flip_bit": flip_bit}
    act.get(damage, lambda p: p.unlink())(made.folder / name)
    message = _refusal(lambda: working_set.load_working_set(made))
    assert str(made.folder / name) in message
    assert f"delete {made.folder} to have it made again" in message

  def test_values_of_another_encoder_are_another_working_set(
    self, tmp_path, made, found
  ):
    other = working_set.working_set_artifact(made.folder, found, ["t5"])
    assert 'values: ["text"] -> ["t5"]' in _refusal(other.is_complete)
