"""One conformance table for all searchers, with brute force as the oracle.

Vectors have an intrinsic dimension of 5, so that neighbours mean something
and recall is not a matter of luck.
"""

import importlib.util
import json
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest

from retrieval_aug.common.errors import UserError
from retrieval_aug.memory import search, searchers
from retrieval_aug.memory.searchers import exact, ivf, running, scann_tree
from tests.memory.plane import D, K, N, Q, oracle, vectors

needs_scann = pytest.mark.skipif(
  sys.platform != "linux", reason="ScaNN has wheels for Linux only"
)
needs_faiss = pytest.mark.skipif(
  importlib.util.find_spec("faiss") is None,
  reason="faiss-cpu is not installed (extra 'scale')",
)
# So much that at this size each looks everywhere.
EVERYTHING = {
  "ivf": {"lists": 5, "probes": 5},
  "faiss_hnsw": {"ef_construction": 211, "ef_search": 211},
  "faiss_ivf": {"lists": 5, "probes": 5},
}
KINDS = [
  "exact",
  "ivf",
  pytest.param("scann", marks=needs_scann),
  pytest.param("faiss_hnsw", marks=needs_faiss),
  pytest.param("faiss_ivf", marks=needs_faiss),
]


@pytest.fixture
def keys():
  return vectors(N, seed=1)


@pytest.fixture
def queries():
  return vectors(Q, seed=2)


def _build(kind, keys, k, exclude=None):
  k = search.wanted(k, len(keys), exclude)
  return searchers.build(kind, keys, k, EVERYTHING.get(kind))


def _search(kind, keys, queries, k, exclude=None):
  engine = _build(kind, keys, k, exclude)
  return search.search(engine, keys, queries, k, exclude=exclude)


@pytest.mark.parametrize("kind", KINDS)
class TestEverySearcher:
  def test_finds_what_brute_force_finds(self, kind, keys, queries):
    found = _search(kind, keys, queries, K)
    ids, scores = oracle(keys, queries, K)
    assert found.ids.dtype == np.int64 and found.scores.dtype == np.float32
    np.testing.assert_array_equal(found.ids, ids)
    np.testing.assert_allclose(found.scores, scores, rtol=0, atol=1e-7)

  def test_equal_scores_are_ordered_by_id(self, kind, keys, queries):
    keys[[190, 3, 77, 101]] = keys[50]
    found = _search(kind, keys, keys[50:51], 5)
    assert found.ids.tolist() == [[3, 50, 77, 101, 190]]
    assert len(set(found.scores[0])) == 1

  def test_more_neighbors_than_keys_are_padded(self, kind, keys, queries):
    found = _search(kind, keys[:5], queries, K)
    ids, scores = oracle(keys[:5], queries, 5)
    assert found.ids.shape == found.scores.shape == (Q, K)
    np.testing.assert_array_equal(found.ids[:, :5], ids)
    assert (found.ids[:, 5:] == -1).all()
    assert (found.scores[:, 5:] == -np.inf).all()
    assert np.isfinite(found.scores[:, :5]).all()

  def test_one_key_is_everyones_neighbor(self, kind, keys, queries):
    found = _search(kind, keys[:1], queries, 1)
    assert (found.ids == 0).all()

  @pytest.mark.parametrize("size", [1, 2, 41])
  def test_keys_of_a_querys_group_are_not_found_and_none_is_missing(
    self, kind, keys, queries, size
  ):
    """Groups of many keys push the neighbors far down the list."""
    groups = np.arange(len(keys)) // size
    groups[3] = -1  # not in any group
    own = groups[:Q].copy()
    own[5] = -1  # has nothing to leave out
    exclude = search.Groups(own, groups)
    found = _search(kind, keys, keys[:Q], K, exclude=exclude)
    ids, _ = oracle(keys, keys[:Q], len(keys))
    for i in range(Q):
      expected = [x for x in ids[i] if own[i] < 0 or groups[x] != own[i]][:K]
      assert found.ids[i].tolist() == expected
    assert 3 in found.ids[3] and 5 in found.ids[5]
    recall = search.measure_recall(found, keys, keys[:Q], K, Q, exclude)
    assert recall == 1.0

  def test_a_smaller_k_is_a_view(self, kind, keys, queries):
    large = _search(kind, keys, queries, K)
    small = _search(kind, keys, queries, 3)
    np.testing.assert_array_equal(large.ids[:, :3], small.ids)
    np.testing.assert_array_equal(large.scores[:, :3], small.scores)

  def test_each_query_is_on_its_own(self, kind, keys, queries):
    together = _search(kind, keys, queries, K)
    alone = [_search(kind, keys, queries[i : i + 1], K) for i in (0, 17)]
    for row, single in zip((0, 17), alone):
      np.testing.assert_array_equal(together.ids[row], single.ids[0])
      np.testing.assert_array_equal(together.scores[row], single.scores[0])

  def test_nothing_to_search_gives_padding(self, kind, keys, queries):
    engine = _build(kind, keys, K)
    found = search.search(engine, keys, queries[:0], K)
    assert found.ids.shape == (0, K)

  def test_another_width_is_refused_with_both(self, kind, keys, queries):
    with pytest.raises(UserError) as caught:
      _search(kind, keys, queries[:, :11], K)
    assert str(caught.value) == (
      "queries have 11 dims, keys 13: both must come from one encoder and one "
      "key_transform; embed them again."
    )

  def test_single_pairs_are_not_found_beside_groups(self, kind, keys, queries):
    ids, _ = oracle(keys, queries, N)
    pairs = np.array([[4, ids[4, 0]], [4, ids[4, 2]], [9, ids[9, 1]]])
    none = np.full(Q, -1)
    exclude = search.Groups(none, np.full(N, -1), pairs)
    found = _search(kind, keys, queries, K, exclude=exclude)
    for i in range(Q):
      left = [x for x in ids[i] if [i, x] not in pairs.tolist()]
      assert found.ids[i].tolist() == left[:K]

  def test_identical_keys_are_all_neighbors(self, kind, keys, queries):
    keys[:] = keys[0]
    found = _search(kind, keys, queries, K)
    assert (np.diff(found.ids, axis=1) > 0).all()
    assert search.measure_recall(found, keys, queries, K, Q) == 1.0

  def test_no_keys_give_padding(self, kind, keys, queries):
    found = _search(kind, keys[:0], queries, K)
    assert found.ids.tolist() == [[-1] * K] * Q
    assert (found.scores == -np.inf).all()

  @pytest.mark.parametrize("dtype", [np.float64, np.float16, ">f4"])
  def test_other_types_and_strides_are_the_same_keys(
    self, kind, keys, queries, dtype
  ):
    wide = np.zeros((N, 2 * D), dtype)
    wide[:, ::2] = keys
    strided = wide[:, ::2]
    expected = _search(kind, strided.astype(np.float32), queries, K)
    engine = _build(kind, strided, K)
    found = engine.candidates(queries.astype(np.float64), K)
    # float16 rounds scores into near ties.
    kept = [len(set(a) & set(b)) for a, b in zip(found, expected.ids)]
    assert min(kept) >= K - 1 and np.mean(kept) > K - 0.2

  @pytest.mark.parametrize("bad", [np.nan, 0.0, 3.0])
  def test_rows_that_are_not_of_unit_length_are_refused(
    self, kind, keys, queries, bad
  ):
    engine = _build(kind, keys, K)
    for rows, what in ((keys, "keys"), (queries, "queries")):
      rows[11, 3] = bad
      rows[11] *= 1.2
      with pytest.raises(UserError) as caught:
        if what == "keys":
          _build(kind, rows, K)
        else:
          engine.candidates(rows, K)
      assert str(caught.value) == (
        f"{what}: row 11 is not of unit length (1 such rows); call "
        "retrieval_aug.memory.search.normalize first."
      )

  def test_what_it_holds_is_told(self, kind, keys, queries):
    engine = _build(kind, keys, K)
    assert engine.name == kind and engine.bytes_per_key >= 4 * D
    for name, value in EVERYTHING.get(kind, {}).items():
      assert engine.parameters[name] == value
    told = json.loads(json.dumps(engine.parameters))
    again = searchers.build(kind, keys[:100], K, told)
    assert again.parameters.keys() == told.keys()


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize(
  ("key_block", "query_block"), [(1, 64), (50, 7), (211, 1), (1000, 1000)]
)
def test_block_sizes_change_no_bit(
  keys, queries, key_block, query_block, jitted
):
  # Equal keys in different blocks: ties must not depend on the blocks.
  keys[[2, 100, 210]] = keys[60]
  queries[3] = keys[60]
  whole = _search("exact", keys, queries, K)
  engine = exact.Exact(
    keys, key_block=key_block, query_block=query_block, jitted=jitted
  )
  parts = search.search(engine, keys, queries, K)
  np.testing.assert_array_equal(parts.ids, whole.ids)
  np.testing.assert_array_equal(parts.scores, whole.scores)


def test_approximate_top_k_of_accelerators_is_exact_on_a_cpu(keys, queries):
  engine = exact.Exact(keys, jitted=True, approximate=True, key_block=50)
  assert engine.parameters == {"approximate": True}
  found = search.search(engine, keys, queries, K)
  np.testing.assert_array_equal(found.ids, oracle(keys, queries, K)[0])


def test_the_last_block_of_queries_compiles_nothing_new(keys, queries):
  engine = exact.Exact(keys, query_block=8, jitted=True)
  search.search(engine, keys, queries[:8], K)
  compiled = exact._merge_block._cache_size()
  search.search(engine, keys, queries, K)
  assert exact._merge_block._cache_size() == compiled


def test_best_marks_the_first_of_equal_scores():
  scores = np.array([[1, 3, 3, 3, 0], [5, 5, 5, 5, 5]], np.float32)
  assert running.best(scores, 2).astype(int).tolist() == [
    [0, 1, 1, 0, 0],
    [1, 1, 0, 0, 0],
  ]


@pytest.mark.parametrize("tile", [1, 37, 1 << 20])
def test_running_top_k_is_that_of_all_keys_however_they_stream(
  monkeypatch, keys, queries, tile
):
  monkeypatch.setattr(running, "_TILE", tile * Q)
  found = running.Running(queries, K)
  odd, even = np.arange(1, Q, 2), np.arange(0, Q, 2)
  for start in range(0, N, 50):
    found.visit(even, keys[start : start + 50], start)
  found.visit(odd, keys, 0)
  expected, scores = oracle(keys, queries, K)
  np.testing.assert_array_equal(np.sort(found.ids()), np.sort(expected))
  np.testing.assert_allclose(found.bounds, scores[:, -1], atol=1e-6)


class TestIvf:
  @pytest.fixture
  def many(self):
    return vectors(20_011, 4, dims=61), vectors(307, 5, dims=61)

  def test_all_lists_are_exact_search(self, many):
    keys, queries = many
    engine = ivf.Ivf(keys, lists=41, probes=41)
    found = search.search(engine, keys, queries, K)
    expected = _search("exact", keys, queries, K)
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_array_equal(found.scores, expected.scores)

  def test_two_builds_give_the_same_ids(self, many):
    keys, queries = many
    a, b = (ivf.Ivf(keys, lists=41, probes=3) for _ in range(2))
    np.testing.assert_array_equal(
      a.candidates(queries, K), b.candidates(queries, K)
    )

  def test_candidates_are_the_best_of_the_lists_probed(self, many):
    keys, queries = many
    engine = ivf.Ivf(keys, lists=41, probes=3)
    own = ivf.nearest(keys, engine._centers, 1)[:, 0]
    probed = ivf.nearest(queries, engine._centers, 3)
    seen = (own[None, None] == probed[:, :, None]).any(axis=1)
    scores = np.where(seen, queries @ keys.T, -np.inf)
    expected = np.argsort(-scores, axis=1)[:, :K]
    found = engine.candidates(queries, K)
    np.testing.assert_array_equal(np.sort(found), np.sort(expected))

  def test_more_probes_find_more(self, many):
    keys, queries = many
    engine = searchers.build("ivf", keys, 30, {"lists": 200})
    recalls = []
    for engine.effort in (1, 4, 16, 1000):
      found = search.search(engine, keys, queries, 30)
      recalls.append(search.measure_recall(found, keys, queries, 30, 307))
    assert engine.effort == 200 and engine.parameters["probes"] == 200
    assert recalls[0] < recalls[1] < recalls[2] <= recalls[3] == 1.0

  def test_lists_that_are_too_short_are_padded(self, keys, queries):
    engine = ivf.Ivf(keys, lists=N, probes=1)
    found = search.search(engine, keys, queries, K)
    assert ((found.ids == -1) == (found.scores == -np.inf)).all()
    assert (found.ids == -1).any()

  def test_recall_of_index_shards_is_that_of_one_index(self, many):
    keys, queries = many
    whole = ivf.Ivf(keys, lists=64, probes=24)
    one = search.search(whole, keys, queries, 30)
    merged = None
    for start in range(0, len(keys), 5003):
      part = keys[start : start + 5003]
      engine = ivf.Ivf(part, lists=32, probes=12)
      found = search.search(engine, part, queries, 30)
      ids = np.where(found.ids < 0, -1, found.ids + start)
      found = found._replace(ids=ids)
      merged = search.merge(merged, found, 30) if merged else found
    recalls = [
      search.measure_recall(x, keys, queries, 30, 307) for x in (one, merged)
    ]
    assert abs(recalls[0] - recalls[1]) < 0.005 and recalls[0] > 0.95


def test_an_unknown_kind_is_refused_with_the_known_ones(keys):
  with pytest.raises(UserError) as caught:
    searchers.build("hnsw", keys, K)
  assert str(caught.value) == (
    "config.search.searcher='hnsw': not one of exact, ivf, scann, faiss_hnsw, "
    "faiss_ivf."
  )


@needs_scann
def test_scann_tree_reaches_its_recall_on_a_memory_worth_an_index():
  keys, queries = vectors(20_011, 4, dims=61), vectors(53, 5, dims=61)
  engine = searchers.build("scann", keys, K + search.MARGIN)
  # At least 150 rows a leaf: with fewer ScaNN's recall collapses in silence.
  assert engine.parameters["leaves"] <= 20_011 / 150
  engine.effort = 40
  found = search.search(engine, keys, queries, K)
  assert search.measure_recall(found, keys, queries, K, 53) >= 0.95
  # Whatever it finds is scored and ordered exactly.
  scores = search.exact_scores(keys, queries, found.ids)
  np.testing.assert_array_equal(found.scores, scores)
  assert (np.diff(found.scores, axis=1) <= 0).all()


@needs_scann
def test_scanns_short_results_become_pads_not_item_zero(keys, queries):
  """ScaNN fills up with id 0 and a NaN distance, and may be narrower than k."""
  engine = scann_tree.ScannTree(keys, k=K)
  engine._searcher = types.SimpleNamespace(
    search_batched_parallel=lambda q, **_: (
      np.array([[4, 0, 0]] * len(q), np.uint32),
      np.array([[0.9, np.nan, np.nan]] * len(q), np.float32),
    )
  )
  found = search.search(engine, keys, queries, 3)
  assert found.ids.tolist() == [[4, -1, -1]] * Q


@needs_scann
def test_an_unknown_reorder_type_is_refused(keys):
  with pytest.raises(UserError, match="'fp8': not one of float32, bfloat16"):
    searchers.build("scann", keys, K, {"reorder_type": "fp8"})


_SCANN = """
import sys
import numpy as np
from retrieval_aug.common.errors import UserError
from retrieval_aug.memory import search, searchers
from retrieval_aug.memory.searchers import scann_tree

scann_tree.import_scann()
print("tensorflow" in sys.modules)
rng = np.random.default_rng(0)
x = rng.normal(size=(20_011, 5)) @ rng.normal(size=(5, 13))
x = search.normalize(x + 0.01 * rng.normal(size=x.shape), "x")
bad = x.copy()
bad[12345, 3] = np.nan
for name in ("build", "normalize"):
  try:
    if name == "build":
      searchers.build("scann", bad, 7)
    else:
      search.normalize(bad, "keys of DIR")
  except UserError as error:
    print(error)
# More leaves than keys, SOAR, 8-bit keys, and reorder below k.
engine = searchers.build(
  "scann", x, 40, {"leaves": 10**6, "soar": True, "reorder_type": "int8",
                   "reorder": 3})
print(engine.parameters["leaves"], engine.parameters["reorder"])
engine.effort = 10**9
found = search.search(engine, x, x[:50], 10)
print((found.ids >= 0).all(), search.measure_recall(found, x, x[:50], 10, 50))
engine.effort = 1
found = search.search(engine, x, x[:50], 500)
print(((found.ids < 0) == np.isinf(found.scores)).all(), (found.ids < 0).any(),
      max(np.unique(r[r >= 0], return_counts=True)[1].max() for r in found.ids))
"""


@needs_scann
def test_scanns_aborts_and_paddings_are_guarded():
  """In a child: without the guards NaN kills the process by SIGABRT."""
  done = subprocess.run(
    [sys.executable, "-c", _SCANN],
    capture_output=True,
    text=True,
    cwd=pathlib.Path(__file__).parents[2],
  )
  assert done.returncode == 0, done.stderr
  lines = [x for x in done.stdout.splitlines() if x]
  tensorflow, build, normalize, tree, full, short = lines
  assert tensorflow == "False"
  assert build.startswith("keys: row 12345 is not of unit length")
  assert normalize.startswith("keys of DIR: row 12345 is zero, NaN")
  assert tree == "133 40"
  everything, recall = full.split()
  assert everything == "True" and float(recall) >= 0.6
  # Pads where one leaf has fewer keys, never an id twice (as 0 would be).
  assert short == "True True 1"


@pytest.mark.parametrize(
  ("module", "kind", "extra"),
  [
    ("scann", "scann", "run"),
    ("faiss", "faiss_hnsw", "scale"),
    ("faiss", "faiss_ivf", "scale"),
  ],
)
def test_without_its_library_the_error_says_what_to_install(
  monkeypatch, keys, module, kind, extra
):
  monkeypatch.setitem(sys.modules, module, None)
  with pytest.raises(UserError) as caught:
    searchers.build(kind, keys, K)
  message = str(caught.value)
  assert f"pip install 'retrieval_aug[{extra}]'" in message
  assert "--config.search.searcher=auto" in message
