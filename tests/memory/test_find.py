"""The search stage as a job: shards, groups, edits, and who must not be found.

Whatever way the work is cut, the lists are those of one exact search.
"""

import json
import types

import numpy as np
import pytest

from retrieval_aug import config as configs
from retrieval_aug.common import manifest
from retrieval_aug.common.errors import UserError
from retrieval_aug.memory import (
  edits,
  find,
  jobs,
  neighbors,
  search,
  searchers,
  table,
)
from retrieval_aug.memory.update import Previous, Without

M, N, D, K = 83, 37, 11, 5
SPLITS = [("train", "val", "test")[i % 3] for i in range(N)]
SEARCH = configs.defaults().search.to_dict() | {
  "searcher": "exact",
  "k": K,
  "recall_sample": 13,
  "shard_rows": 7,
}
ENCODER = {"name": "tiny"}
NONE = np.zeros(0, np.int64)


def _table(folder, keys, ids, **columns):
  artifact = manifest.Artifact(
    folder, table.KIND, {"items": folder.name, "encoder": ENCODER, "values": {}}
  )
  artifact.start()
  cuts = [0, len(keys) // 3, len(keys)]
  for number, (first, end) in enumerate(zip(cuts, cuts[1:])):
    part = slice(first, end)
    table.write_shard(
      artifact,
      number,
      keys=keys[part],
      values={},
      metadata={"id": ids[part], **{n: c[part] for n, c in columns.items()}},
    )
  artifact.finish(["00000", "00001"], {"key_dims": D, "value_dims": {}})
  return table.Table(folder)


def _draw(n, seed):
  return np.random.default_rng(seed).normal(size=(n, D)) + 1


def _memory(folder, n=M, seed=1, first=0):
  ids = [f"memory/{i}" for i in range(first, first + n)]
  label = ["even" if i % 2 == 0 else "odd" for i in range(first, first + n)]
  return _table(folder, _draw(n, seed), ids, label=label)


@pytest.fixture
def queries(tmp_path):
  ids = [f"queries/{i}" for i in range(N)]
  labels = [i % 4 for i in range(N)]
  return _table(
    tmp_path / "queries", _draw(N, 0), ids, label=labels, split=SPLITS
  )


@pytest.fixture
def memory(tmp_path):
  return _memory(tmp_path / "memory")


def _find(folder, queries, memory, *, previous=None, without=None, **changes):
  settings = SEARCH | changes
  artifact = neighbors.neighbors_artifact(folder, queries, memory, settings)
  job = find.SearchJob(artifact, queries, memory, settings, previous, without)
  jobs.run(job)
  return artifact


def _lists(artifact):
  parts = [neighbors.read_split(artifact, s) for s in neighbors.SPLITS]
  return search.SearchResult(*(np.concatenate(x) for x in zip(*parts)))


def _same(one, other):
  for a, b in zip(_lists(one), _lists(other)):
    np.testing.assert_array_equal(a, b)


def _refusal(call):
  with pytest.raises(UserError) as caught:
    call()
  assert "\n" not in str(caught.value)
  return str(caught.value)


class TestIndexShards:
  @pytest.fixture
  def whole(self, tmp_path, queries, memory):
    return _find(tmp_path / "whole", queries, memory)

  @pytest.mark.parametrize(
    ("index_rows", "groups"), [(M - 1, 1), (20, 1), (20, 2), (7, 5), (7, 100)]
  )
  def test_change_no_bit(
    self, tmp_path, queries, memory, whole, index_rows, groups
  ):
    options = {"index_rows": index_rows, "groups": groups}
    parts = _find(tmp_path / "parts", queries, memory, **options)
    assert parts.info()["index_shards"] == -(-M // index_rows)
    for name in parts.shards():
      if name.startswith("neighbors"):
        one, other = (a.folder / f"{name}.tfrecord" for a in (whole, parts))
        assert one.read_bytes() == other.read_bytes()
    assert parts.info()["recall"] == whole.info()["recall"] == 1.0
    assert not (parts.folder / "partial").exists()

  def test_how_the_work_is_dealt_names_nothing_else(self, tmp_path, queries):
    memory = _memory(tmp_path / "memory")
    make = lambda **changes: neighbors.neighbors_artifact(
      tmp_path / "x", queries, memory, SEARCH | changes
    )
    for same in ({"groups": 3}, {"memory_gb": 1.0}, {"on_low_recall": "warn"}):
      assert make(**same).fingerprint == make().fingerprint
    assert make(index_rows=7).fingerprint != make().fingerprint

  def test_equal_keys_in_different_shards_are_ordered_by_row(
    self, tmp_path, queries
  ):
    keys = np.tile(_draw(3, 5), (21, 1))
    ids = [str(i) for i in range(len(keys))]
    memory = _table(tmp_path / "memory", keys, ids)
    found = _lists(
      _find(tmp_path / "parts", queries, memory, index_rows=4, groups=3)
    )
    same = found.scores[:, 1:] == found.scores[:, :-1]
    assert same.any()
    assert (np.diff(found.ids, axis=1)[same] > 0).all()

  def test_a_group_goes_on_after_its_last_index_shard(
    self, tmp_path, queries, memory, whole, monkeypatch
  ):
    built, real = [], searchers.build

    def build(*arguments):
      built.append(1)
      if len(built) == 4:
        raise KeyboardInterrupt
      return real(*arguments)

    monkeypatch.setattr(searchers, "build", build)
    with pytest.raises(KeyboardInterrupt):
      _find(tmp_path / "parts", queries, memory, index_rows=14)
    before = len(built)
    _same(_find(tmp_path / "parts", queries, memory, index_rows=14), whole)
    # Six shards, of which the tuning run built the first, and truth is
    # measured without `build`.
    assert len(built) - before == 6 - (before - 1)

  def test_a_broken_partial_is_made_again(
    self, tmp_path, queries, memory, whole, truncate
  ):
    settings = SEARCH | {"index_rows": 20}
    artifact = neighbors.neighbors_artifact(
      tmp_path / "parts", queries, memory, settings
    )
    make = lambda: find.SearchJob(artifact, queries, memory, settings)
    artifact.start()
    for phase in ("prepare", "search"):
      job = make()
      for unit in job.units(phase):
        job.do(phase, unit, lambda _: None)
    for path in sorted((artifact.folder / "partial").iterdir())[:2]:
      truncate(path)
    jobs.run(make())
    _same(artifact, whole)


@pytest.mark.parametrize("kind", searchers.KINDS)
class TestEverySearcher:
  @pytest.fixture(autouse=True)
  def installed(self, kind):
    module = {"scann": "scann", "faiss_hnsw": "faiss", "faiss_ivf": "faiss"}
    if kind in module:
      pytest.importorskip(module[kind], reason=f"{kind} is an extra")

  def test_no_training_example_finds_itself_or_a_copy(
    self, tmp_path, queries, kind
  ):
    """With duplicates, ties and vectors of any length, in several shards."""
    raw = queries.keys().astype(np.float64)
    lengths = np.random.default_rng(2).uniform(0.5, 2, size=(3 * N, 1))
    # Each example three times: itself, a copy of its group, and a stranger
    # with the very same direction, who may be found.
    keys = np.concatenate([raw, raw, raw]) * lengths
    ids = [*queries.column("id"), *(f"copy/{i}" for i in range(2 * N))]
    groups = [f"g{i % N}" for i in range(2 * N)] + [f"s{i}" for i in range(N)]
    own = _table(
      tmp_path / "grouped",
      raw,
      queries.column("id"),
      label=queries.column("label"),
      split=SPLITS,
      group=[f"g{i}" for i in range(N)],
    )
    memory = _table(tmp_path / "memory", keys, ids, group=groups)
    artifact = _find(
      tmp_path / "found",
      own,
      memory,
      searcher=kind,
      index_rows=50,
      recall_target=0.9,
    )
    shards = neighbors.layout(SPLITS, SEARCH["shard_rows"])
    for shard in shards:
      found = neighbors.read_lists(artifact, shard.name)
      for row, ids_found in zip(shard.rows, found.ids):
        if SPLITS[row] == "train":
          assert not {row, N + row} & set(ids_found)
        assert 2 * N + row in ids_found
        assert len(set(ids_found)) == K

  def test_removed_rows_are_not_found(self, tmp_path, queries, memory, kind):
    edits.remove(memory.folder, where={"label": "odd"})
    memory = table.Table(memory.folder)
    assert len(memory.removed) == M // 2
    artifact = _find(
      tmp_path / "found", queries, memory, searcher=kind, recall_target=0.9
    )
    found = _lists(artifact).ids
    assert (found % 2 == 0).all()


class TestEditedMemory:
  """Neighbours of an edited memory, brought up to date, and found anew."""

  @pytest.fixture
  def before(self, tmp_path, queries, memory):
    return _find(tmp_path / "before", queries, memory)

  def _check(self, tmp_path, queries, memory, before):
    """Both ways; returns how many queries searched all keys again."""
    now = table.Table(memory.folder)
    changes = now.since(before.inputs["memory"])
    updated = _find(
      tmp_path / "updated",
      queries,
      now,
      previous=Previous(before, changes),
      index_rows=30,
      groups=2,
    )
    anew = _find(tmp_path / "anew", queries, now)
    _same(updated, anew)
    assert updated.info()["recall"] == 1.0
    return updated.info()["searched_anew"]

  def test_rows_removed(self, tmp_path, queries, memory, before):
    gone = ["memory/3", "memory/40", "memory/41"]
    edits.remove(memory.folder, ids=gone)
    concerned = np.isin(_lists(before).ids, [3, 40, 41]).any(axis=1).sum()
    assert 0 < concerned < N
    assert self._check(tmp_path, queries, memory, before) == concerned

  def test_rows_added(self, tmp_path, queries, memory, before):
    other = _memory(tmp_path / "other", n=9, seed=8, first=1000)
    edits.add(memory.folder, other.folder)
    assert self._check(tmp_path, queries, memory, before) == 0

  def test_all_kinds_of_edits(self, tmp_path, queries, memory, before):
    other = _memory(tmp_path / "other", n=9, seed=8, first=1000)
    edits.remove(memory.folder, ids=[f"memory/{i}" for i in range(20, 30)])
    edits.add(memory.folder, other.folder)
    edits.compact(memory.folder)
    edits.remove(memory.folder, ids=["memory/1001", "memory/5", "memory/6"])
    edits.restore(memory.folder, ids=["memory/5"])
    assert self._check(tmp_path, queries, memory, before) > 0

  def test_removed_and_restored(self, tmp_path, queries, memory, before):
    edits.remove(memory.folder, ids=["memory/3"])
    edits.restore(memory.folder, ids=["memory/3"])
    now = table.Table(memory.folder)
    assert now.fingerprint == memory.fingerprint

  def test_the_key_transform_stays(self, tmp_path, queries, memory):
    pca = {"key_transform": "pca", "key_dims": 4}
    before = _find(tmp_path / "before", queries, memory, **pca)
    edits.remove(memory.folder, ids=["memory/3"])
    now = table.Table(memory.folder)
    changes = now.since(before.inputs["memory"])
    updated = _find(
      tmp_path / "updated",
      queries,
      now,
      previous=Previous(before, changes),
      **pca,
    )
    one, other = (a.folder / neighbors.TRANSFORM for a in (before, updated))
    assert one.read_bytes() == other.read_bytes()

  def test_rows_and_pairs_left_out(self, tmp_path, queries, memory, before):
    """As leaks are: from everybody, or from one example."""
    old = _lists(before)
    rows = np.unique(old.ids[:, 0])[:3]
    asker = int(neighbors.layout(SPLITS, 7)[0].rows[0])
    best = [x for x in old.ids[0] if x not in rows][0]
    without = Without(rows, np.array([[asker, best]]))
    unchanged = table.Table(memory.folder).since(memory.fingerprint)
    found = _lists(
      _find(
        tmp_path / "left_out",
        queries,
        memory,
        previous=Previous(before, unchanged),
        without=without,
        index_rows=40,
      )
    )
    assert not np.isin(found.ids, rows).any()
    assert best not in found.ids[0]
    assert (found.ids >= 0).all()
    whole = _find(tmp_path / "whole", queries, memory, k=M)
    for ids, everything in zip(found.ids[1:], _lists(whole).ids[1:]):
      expected = [x for x in everything if x not in rows][:K]
      assert ids.tolist() == expected

  def test_without_any_row_there_is_nothing_to_search(
    self, tmp_path, queries, memory
  ):
    before = _find(tmp_path / "before", queries, memory)
    unchanged = Previous(before, memory.since(memory.fingerprint))
    everything = Without(np.arange(M), np.zeros((0, 2), np.int64))
    message = _refusal(
      lambda: _find(
        tmp_path / "x",
        queries,
        memory,
        previous=unchanged,
        without=everything,
      )
    )
    assert "every row is removed" in message
    assert "python -m retrieval_aug.memory" in message


class TestRecall:
  @pytest.fixture
  def lossy(self, monkeypatch):
    """A search that loses the best neighbor of everybody."""
    real = search.search

    def loses(searcher, keys, queries, k, *, exclude=None):
      found = real(searcher, keys, queries, k + 1, exclude=exclude)
      return search.SearchResult(found.ids[:, 1:], found.scores[:, 1:])

    # What measures the truth goes another way.
    truth = types.SimpleNamespace(**vars(search) | {"search": loses})
    monkeypatch.setattr(find, "searching", truth)

  @pytest.mark.parametrize("index_rows", [0, 20])
  def test_a_miss_fails_the_stage(
    self, tmp_path, queries, memory, lossy, index_rows
  ):
    changes = {"k": 1, "index_rows": index_rows, "recall_sample": N}
    message = _refusal(
      lambda: _find(tmp_path / "x", queries, memory, **changes)
    )
    lost = {0: "0.000", 20: "0."}[index_rows]
    assert f"exact search reached recall@1 {lost}" in message
    assert "config.search.recall_target=0.95" in message
    assert "--config.search.on_low_recall=warn" in message

  def test_unless_it_is_told_to_warn(
    self, tmp_path, queries, memory, lossy, capfd
  ):
    changes = {"k": 1, "on_low_recall": "warn"}
    artifact = _find(tmp_path / "x", queries, memory, **changes)
    assert artifact.info()["recall"] == 0.0
    assert "reached recall@1 0.000" in capfd.readouterr().err

  def test_what_was_measured_is_in_the_manifest(
    self, tmp_path, queries, memory
  ):
    artifact = _find(tmp_path / "x", queries, memory)
    info = json.loads((artifact.folder / "manifest.json").read_text())["info"]
    assert info["recall"] == 1.0 and info["recall_queries"] >= 13
    for name in ("queries_per_second", "build_seconds", "bytes_per_key"):
      assert info["measured"][name] >= 0


@pytest.mark.parametrize(
  ("changes", "text"),
  [
    ({"groups": 0}, "config.search.groups=0: must be at least 1"),
    ({"shard_rows": 0}, "config.search.shard_rows=0: must be at least 1"),
    ({"on_low_recall": "cry"}, "on_low_recall='cry': not fail or warn"),
    ({"searcher": "annoy"}, "config.search.searcher='annoy': not one of"),
    ({"recall_target": 1.5}, "config.search.recall_target=1.5"),
  ],
)
def test_a_setting_without_sense_is_refused(
  tmp_path, queries, memory, changes, text
):
  assert text in _refusal(
    lambda: _find(tmp_path / "x", queries, memory, **changes)
  )
