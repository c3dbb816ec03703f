"""Neighbour shards and the working set, from writing to reading back."""

import json

import numpy as np
import pytest

from retrieval_aug import config as configs
from retrieval_aug.common import manifest
from retrieval_aug.common.errors import UserError
from retrieval_aug.common.tf import import_tensorflow
from retrieval_aug.memory import (
  exclusion,
  find,
  neighbors,
  partial,
  search,
  table,
)
from retrieval_aug.training import input_pipeline

M, N, D, DV, K, DIMS = 53, 31, 11, 7, 5, 3
SPLITS = ["train"] * 17 + ["val"] * 5 + ["test"] * 9
# A split's rows are not together in the table.
SPLITS = [SPLITS[i] for i in np.random.default_rng(0).permutation(N)]
SEARCH = configs.defaults().search.to_dict() | {
  "searcher": "exact",
  "k": K,
  "key_transform": "pca",
  "key_dims": DIMS,
  "recall_sample": 13,
  "recall_target": 0.95,
  "shard_rows": 7,
}
ENCODER = {"name": "tiny", "weights_sha256": "00"}


def _table(folder, rows, dims, *, encoder=ENCODER, values=None, **columns):
  artifact = manifest.Artifact(
    folder, table.KIND, {"items": folder.name, "encoder": encoder}
  )
  rng = np.random.default_rng(len(folder.name))
  artifact.start()
  table.write_shard(
    artifact,
    0,
    keys=rng.normal(size=(rows, dims)) + 3,
    values=values or {},
    metadata={"id": [f"{folder.name}/{i}" for i in range(rows)], **columns},
  )
  value_dims = {n: v.shape[1] for n, v in (values or {}).items()}
  artifact.finish(["00000"], {"key_dims": dims, "value_dims": value_dims})
  return table.Table(folder)


@pytest.fixture
def queries(tmp_path):
  labels = [i % 4 for i in range(N)]
  return _table(tmp_path / "queries", N, D, label=labels, split=SPLITS)


@pytest.fixture
def memory(tmp_path):
  values = {"text": np.random.default_rng(1).normal(size=(M, DV))}
  return _table(tmp_path / "memory", M, D, values=values)


def _artifact(tmp_path, queries, memory, **changes):
  return neighbors.neighbors_artifact(
    tmp_path / "neighbors", queries, memory, SEARCH | changes
  )


@pytest.fixture
def found(tmp_path, queries, memory):
  """The finished neighbour shards."""
  artifact = _artifact(tmp_path, queries, memory)
  find.find(artifact, queries, memory, SEARCH)
  return artifact


def _rows(split):
  return [i for i, s in enumerate(SPLITS) if s == split]


def _read(artifact, split="train", paths=None, **changes):
  rows = _rows(split)
  arguments = {
    "ids": [f"queries/{i}" for i in rows],
    "labels": [i % 4 for i in rows],
    "dims": DIMS,
    "k": K,
  } | changes
  return input_pipeline.read(
    paths or neighbors.shard_paths(artifact, split), **arguments
  )


def _refusal(call):
  with pytest.raises(UserError) as caught:
    call()
  message = str(caught.value)
  assert "\n" not in message
  return message


def _transformed(queries, memory):
  """Unit queries and keys after the transform, by NumPy alone."""
  keys = memory.keys().astype(np.float64)
  mean = keys.mean(axis=0)
  _, _, directions = np.linalg.svd(keys - mean, full_matrices=False)
  directions = directions[:DIMS].T
  q = (queries.keys().astype(np.float64) - mean) @ directions
  k = (keys - mean) @ directions
  unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
  return unit(q), unit(k)


class TestRoundTrip:
  @pytest.mark.parametrize("split", neighbors.SPLITS)
  def test_every_split_is_joined_with_its_true_neighbors(
    self, found, queries, memory, split
  ):
    examples = _read(found, split)
    rows = _rows(split)
    q, k = _transformed(queries, memory)
    scores = q[rows] @ k.T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :K]
    assert examples.ids == [f"queries/{i}" for i in rows]
    assert examples.labels.tolist() == [i % 4 for i in rows]
    assert examples.labels.dtype == np.int32
    np.testing.assert_array_equal(examples.neighbors, order)
    np.testing.assert_allclose(
      examples.scores, np.take_along_axis(scores, order, axis=1), atol=1e-4
    )

  def test_queries_are_stored_after_the_transform_with_their_length(
    self, found, queries, memory
  ):
    examples = _read(found)
    keys = memory.keys().astype(np.float64)
    raw = queries.keys()[_rows("train")].astype(np.float64) - keys.mean(axis=0)
    lengths = np.linalg.norm(examples.queries, axis=1)
    assert examples.queries.shape == (17, DIMS)
    assert (lengths <= np.linalg.norm(raw, axis=1) + 1e-2).all()
    assert lengths.std() > 0.1  # not normalised

  def test_shards_are_as_long_as_asked_and_named_by_their_count(self, found):
    names = [p.name for p in neighbors.shard_paths(found, "train")]
    assert names == [
      f"neighbors-train-0000{i}-of-00003.tfrecord" for i in range(3)
    ]
    rows = [found.shards()[n.split(".")[0]]["info"]["rows"] for n in names]
    assert rows == [6, 6, 5]

  def test_shards_of_another_length_hold_the_same(
    self, tmp_path, found, queries, memory
  ):
    changes = {"shard_rows": 1000}
    other = neighbors.neighbors_artifact(
      tmp_path / "other", queries, memory, SEARCH | changes
    )
    find.find(other, queries, memory, SEARCH | changes)
    for one, two in zip(_read(found), _read(other)):
      np.testing.assert_array_equal(one, two)

  def test_the_same_search_writes_the_same_bytes(self, found):
    """Golden: protobuf alone would order features by chance, a process."""
    path = neighbors.shard_paths(found, "val")[0]
    names = [b"example_id", b"label", b"neighbor_ids", b"neighbor_scores"]
    first = path.read_bytes()[: path.stat().st_size // 5]
    places = [first.index(n) for n in [*names, b"query"]]
    assert places == sorted(places)

  def test_more_neighbors_than_memory_are_padded(
    self, tmp_path, queries, memory
  ):
    artifact = _artifact(tmp_path, queries, memory, k=M + 6)
    find.find(artifact, queries, memory, SEARCH | {"k": M + 6})
    examples = _read(artifact, k=M + 6)
    assert (np.sort(examples.neighbors[:, :M]) == np.arange(M)).all()
    assert (examples.neighbors[:, M:] == -1).all()
    assert (examples.scores[:, M:] == -np.inf).all()

  def test_recall_and_searcher_are_in_the_manifest(self, found):
    info = found.info()
    assert info["searcher"] == "exact" and info["recall"] == 1.0
    assert info["recall_queries"] >= SEARCH["recall_sample"]
    assert neighbors.describe(found) == (
      f"exact search, recall@{K} 1.0000 measured on "
      f"{info['recall_queries']} queries"
    )

  def test_a_killed_search_goes_on_after_its_last_shard(
    self, tmp_path, queries, memory, monkeypatch
  ):
    artifact = _artifact(tmp_path, queries, memory)
    real, calls = partial.save, []

    def dies(*arguments):
      calls.append(1)
      if len(calls) == 4:
        raise KeyboardInterrupt
      real(*arguments)

    monkeypatch.setattr(partial, "save", dies)
    with pytest.raises(KeyboardInterrupt):
      find.find(artifact, queries, memory, SEARCH)
    assert not artifact.is_complete()
    find.find(artifact, queries, memory, SEARCH)
    # Three shards, a fault, and the other three of 3 + 1 + 2.
    assert len(calls) == 4 + 3
    assert _read(artifact).neighbors.shape == (17, K)


class TestJoin:
  def test_a_missing_example_is_named(self, found):
    ids = [f"queries/{i}" for i in _rows("train")]
    message = _refusal(
      lambda: _read(found, ids=[*ids, "queries/new"], labels=[0] * 18)
    )
    assert "1 missing ['queries/new'], 0 surplus []" in message
    assert "neighbors-train-00000-of-00003.tfrecord" in message
    assert f"delete {found.folder} to have it made again" in message

  def test_a_surplus_example_is_named(self, found):
    ids = [f"queries/{i}" for i in _rows("train")]
    message = _refusal(lambda: _read(found, ids=ids[1:], labels=[0] * 16))
    assert f"0 missing [], 1 surplus ['{ids[0]}']" in message

  def test_another_id_is_missing_and_surplus(self, found):
    ids = [f"queries/{i}" for i in _rows("train")]
    message = _refusal(lambda: _read(found, ids=["other", *ids[1:]]))
    assert f"1 missing ['other'], 1 surplus ['{ids[0]}']" in message

  def test_another_order_is_refused(self, found):
    ids = [f"queries/{i}" for i in _rows("train")]
    message = _refusal(lambda: _read(found, ids=ids[::-1]))
    assert "0 missing [], 0 surplus [], or in another order" in message

  def test_another_label_is_named_with_both(self, found):
    rows = _rows("train")
    labels = [i % 4 for i in rows]
    labels[3] = 77
    message = _refusal(lambda: _read(found, labels=labels))
    assert (
      f"example 'queries/{rows[3]}' has label {rows[3] % 4} there and 77 in "
      "the dataset; delete" in message
    )

  @pytest.mark.parametrize(
    ("changes", "reason"),
    [
      ({"dims": 13}, f"query has {DIMS} numbers, not 13"),
      ({"k": 13}, f"neighbor_ids has {K} numbers, not 13"),
    ],
  )
  def test_another_width_is_refused_with_both(self, found, changes, reason):
    assert reason in _refusal(lambda: _read(found, **changes))


class TestDamage:
  def _path(self, found):
    return found.folder / "neighbors-train-00001-of-00003.tfrecord"

  @pytest.mark.parametrize("damage", ["truncate", "flip_bit", "delete"])
  def test_a_damaged_shard_is_named_before_it_is_read(
    self, found, damage, truncate, flip_bit
  ):
    path = self._path(found)
    act = {"truncate": truncate, "flip_bit": flip_bit}
    act.get(damage, lambda p: p.unlink())(path)
    message = _refusal(lambda: neighbors.shard_paths(found, "train"))
    assert str(path) in message and f"delete {found.folder}" in message
    # Other splits do not suffer.
    assert len(neighbors.shard_paths(found, "test")) == 2

  @pytest.mark.parametrize("damage", ["truncate", "flip_bit"])
  def test_a_shard_damaged_while_it_is_read_is_a_user_error(
    self, found, damage, truncate, flip_bit
  ):
    """After its digest was checked: TFRecord's own checksums find it."""
    paths = neighbors.shard_paths(found, "train")
    {"truncate": truncate, "flip_bit": flip_bit}[damage](paths[1])
    message = _refusal(lambda: _read(found, paths=paths))
    assert paths[1].name in message and "cannot be read" in message
    assert "delete" in message

  def test_shards_without_records_are_a_user_error(self, found):
    paths = neighbors.shard_paths(found, "train")
    for path in paths:
      path.write_bytes(b"")
    message = _refusal(lambda: _read(found, paths=paths))
    assert paths[0].name in message
    assert "no examples where there should be 17; delete" in message

  def test_a_record_of_another_kind_is_a_user_error(self, found):
    tf = import_tensorflow()
    paths = neighbors.shard_paths(found, "train")
    with tf.io.TFRecordWriter(str(paths[0])) as writer:
      writer.write(tf.train.Example().SerializeToString())
    message = _refusal(lambda: _read(found, paths=paths))
    assert "cannot be read" in message


class TestInputs:
  def test_tables_of_two_encoders_are_refused_and_what_differs_named(
    self, tmp_path, memory
  ):
    other = _table(
      tmp_path / "others", N, D, encoder=ENCODER | {"weights_sha256": "ff"}
    )
    message = _refusal(lambda: _artifact(tmp_path, other, memory))
    assert f"{memory.folder} and {other.folder}" in message
    assert "weights_sha256: 00 -> ff" in message
    assert "delete the wrong one" in message
    assert not (tmp_path / "neighbors").exists()

  def test_tables_of_two_widths_are_refused_with_both(self, tmp_path, memory):
    other = _table(tmp_path / "others", N, 13, label=[0] * N, split=SPLITS)
    artifact = _artifact(tmp_path, other, memory)
    message = _refusal(lambda: find.find(artifact, other, memory, SEARCH))
    assert "queries have 13 dims" in message
    assert f"the keys of {memory.folder} 11" in message
    assert not artifact.is_complete()

  def test_a_key_without_direction_is_refused_with_its_row(
    self, tmp_path, queries
  ):
    memory = _table(tmp_path / "memory", M, D)
    keys = np.ones((M, D), np.float16)
    keys[29] = 0
    np.save(memory.folder / "keys_00000.npy", keys)
    path = memory.folder / "manifest.json"
    text = json.loads(path.read_text())
    text["shards"]["00000"]["files"]["keys_00000.npy"] = manifest.digest(
      memory.folder / "keys_00000.npy"
    )
    path.write_text(json.dumps(text))
    memory = table.Table(memory.folder)
    options = SEARCH | {"key_transform": "none"}
    artifact = _artifact(tmp_path, queries, memory, key_transform="none")
    message = _refusal(lambda: find.find(artifact, queries, memory, options))
    assert f"keys of {memory.folder}: row 29 is zero" in message

  @pytest.mark.parametrize(
    ("name", "value"), [("k", 0), ("k", -1), ("recall_sample", 0)]
  )
  def test_a_setting_without_sense_is_refused_by_name(
    self, tmp_path, queries, memory, name, value
  ):
    changes = {name: value}
    artifact = _artifact(tmp_path, queries, memory, **changes)
    message = _refusal(
      lambda: find.find(artifact, queries, memory, SEARCH | changes)
    )
    assert f"config.search.{name}={value}: must be at least 1" in message

  def test_low_recall_ends_the_search_with_what_to_do(
    self, tmp_path, queries, memory, monkeypatch
  ):
    monkeypatch.setattr(search, "recall", lambda *_: 0.5)
    artifact = _artifact(tmp_path, queries, memory)
    message = _refusal(lambda: find.find(artifact, queries, memory, SEARCH))
    assert f"exact search reached recall@{K} 0.500" in message
    assert "config.search.recall_target=0.95" in message
    assert "--config.search.searcher=exact" in message
    assert not artifact.is_complete()

  def test_other_settings_do_not_reuse_a_finished_search(
    self, tmp_path, found, queries, memory
  ):
    other = _artifact(tmp_path, queries, memory, key_dims=2)
    message = _refusal(other.is_complete)
    assert "search.key_dims: 3 -> 2" in message


class TestMemoryThatHoldsTheTrainingExamples:
  """Every third query, of any split, is also in the memory."""

  GROUPS = [f"g{i // 2}" for i in range(N)]

  @pytest.fixture
  def shared(self, tmp_path):
    labels = [i % 4 for i in range(N)]
    queries = _table(
      tmp_path / "queries", N, D, label=labels, split=SPLITS, group=self.GROUPS
    )
    chosen = list(range(0, N, 3))
    artifact = manifest.Artifact(
      tmp_path / "both", table.KIND, {"items": "both", "encoder": ENCODER}
    )
    artifact.start()
    rng = np.random.default_rng(9)
    keys = np.concatenate([queries.keys()[chosen], rng.normal(size=(M, D)) + 3])
    ids = [f"queries/{i}" for i in chosen] + [f"both/{i}" for i in range(M)]
    groups = [self.GROUPS[i] for i in chosen] + [f"m{i}" for i in range(M)]
    return queries, artifact, keys, ids, groups, chosen

  def _finish(self, shared, **columns):
    queries, artifact, keys, ids, _, _ = shared
    table.write_shard(
      artifact, 0, keys=keys, values={}, metadata={"id": ids, **columns}
    )
    artifact.finish(["00000"], {"key_dims": D, "value_dims": {}})
    return queries, table.Table(artifact.folder)

  def _find(self, tmp_path, queries, memory):
    artifact = _artifact(tmp_path, queries, memory)
    find.find(artifact, queries, memory, SEARCH)
    assert artifact.info()["recall"] == 1.0
    return artifact

  @pytest.mark.parametrize("by", ["id", "group"])
  def test_no_training_example_finds_itself_or_a_near_copy(
    self, tmp_path, shared, by
  ):
    *_, ids, groups, chosen = shared
    columns = {"group": groups} if by == "group" else {}
    queries, memory = self._finish(shared, **columns)
    artifact = self._find(tmp_path, queries, memory)
    own = {}
    for position, row in enumerate(chosen):
      own.setdefault(self.GROUPS[row] if by == "group" else row, []).append(
        position
      )
    q, k = _transformed(queries, memory)
    for split in neighbors.SPLITS:
      found = _read(artifact, split).neighbors
      for row, list_ in zip(_rows(split), found):
        hidden = own.get(self.GROUPS[row] if by == "group" else row, [])
        scores = k @ q[row]
        if split == "train":
          assert not set(hidden) & set(list_)
          scores[hidden] = -np.inf
        # A test example in the memory is a leak, which hiding would not mend.
        expected = np.argsort(-scores, kind="stable")[:K]
        assert set(list_) == set(expected)
    in_memory = [r for r in _rows("train") if r in chosen]
    if by == "id":
      assert artifact.info()["examples_in_memory"] == len(in_memory)

  def test_one_id_in_two_groups_is_refused(self, tmp_path, shared):
    *_, groups, _ = shared
    queries, memory = self._finish(shared, group=["other", *groups[1:]])
    near_copies = exclusion.Exclusion(queries, memory)
    message = _refusal(lambda: near_copies.groups(range(memory.rows)))
    assert "'queries/0' has the group 'g0'" in message
    assert "'other'" in message

  def test_recall_is_measured_on_no_more_queries_than_there_are(
    self, tmp_path, queries, memory
  ):
    search_all = SEARCH | {"recall_sample": 1000}
    artifact = neighbors.neighbors_artifact(
      tmp_path / "neighbors", queries, memory, search_all
    )
    find.find(artifact, queries, memory, search_all)
    assert artifact.info()["recall_queries"] == N

  def test_a_memory_of_other_items_hides_nothing(self, queries, memory):
    near_copies = exclusion.Exclusion(queries, memory)
    assert near_copies.groups(range(memory.rows)) is None
