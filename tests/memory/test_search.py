"""What is the same for all engines: scores, order, exclusion, recall."""

import numpy as np
import pytest

from retrieval_aug.common.errors import UserError
from retrieval_aug.memory import search, searchers
from tests.memory.plane import D, K, N, Q, oracle, vectors


@pytest.fixture
def keys():
  return vectors(N, seed=1)


@pytest.fixture
def queries():
  return vectors(Q, seed=2)


def _search(kind, keys, queries, k, **options):
  engine = searchers.build(kind, keys, search.wanted(k, len(keys)))
  return search.search(engine, keys, queries, k, **options)


def test_scores_near_the_kth_are_ordered_by_their_exact_value(queries):
  """Keys that differ by less than float32 matrix products resolve."""
  rng = np.random.default_rng(3)
  key = np.repeat(queries[:1], N, axis=0)
  keys = search.normalize(key + 1e-4 * rng.normal(size=key.shape), "keys")
  found = _search("exact", keys, queries[:1], K)
  # With the margin of 16 the best must be there even if float32 confuses
  # neighbours in rank; the order of those returned is by exact score.
  scores = search.exact_scores(keys, queries[:1], found.ids)
  order = np.lexsort((found.ids, -scores), axis=1)
  np.testing.assert_array_equal(order, np.arange(K)[None])


def test_exact_scores_are_cosines_and_minus_infinity_for_pads(keys, queries):
  ids = np.array([[4, -1, 9]] * Q)
  scores = search.exact_scores(keys, queries, ids)
  expected = np.einsum(
    "qd,qkd->qk", queries, keys[[4, 0, 9]][None].repeat(Q, 0)
  )
  np.testing.assert_allclose(scores[:, [0, 2]], expected[:, [0, 2]], atol=1e-6)
  assert (scores[:, 1] == -np.inf).all()


def test_exact_scores_of_many_blocks_and_threads_are_those_of_each(queries):
  rng = np.random.default_rng(7)
  keys = vectors(N, 8, dims=D)
  many = queries[rng.integers(Q, size=5003)]
  ids = rng.integers(-1, N, (len(many), 11))
  found = search.exact_scores(keys, many, ids)
  rows = keys[ids].astype(np.float64)
  dots = np.matmul(rows, many[:, :, None].astype(np.float64))[:, :, 0]
  expected = np.where(ids < 0, -np.inf, dots).astype(np.float32)
  np.testing.assert_array_equal(found, expected)


class TestNormalize:
  @pytest.mark.parametrize(
    "bad", [0.0, np.nan, np.inf, -np.inf], ids=["zero", "nan", "inf", "-inf"]
  )
  def test_a_row_without_direction_is_named(self, keys, bad):
    keys[[17, 23]] = bad
    with pytest.raises(UserError) as caught:
      search.normalize(keys, "keys of DIR")
    assert str(caught.value) == (
      "keys of DIR: row 17 is zero, NaN or infinite (2 such rows) and has no "
      "direction to search by; remove those items and embed again."
    )

  def test_one_nan_in_a_row_is_enough(self, keys):
    keys[3, 5] = np.nan
    with pytest.raises(UserError, match="row 3 is zero, NaN or infinite"):
      search.normalize(keys, "keys")

  @pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
  def test_huge_and_tiny_rows_keep_their_direction(self, keys, scale):
    scaled = (keys.astype(np.float64) * scale).astype(np.float32)
    found = search.normalize(scaled, "keys")
    np.testing.assert_allclose(found, keys, atol=1e-6)

  def test_what_is_no_matrix_is_refused(self):
    with pytest.raises(UserError, match=r"queries: \[13\] is not a matrix"):
      search.normalize(np.ones(13), "queries")

  def test_blocks_of_rows_are_as_one(self, monkeypatch, keys):
    whole = search.normalize(3 * keys, "keys")
    monkeypatch.setattr(search, "_ROWS", 10)
    np.testing.assert_array_equal(search.normalize(3 * keys, "keys"), whole)
    keys[[17, 23, 205]] = 0
    with pytest.raises(UserError, match=r"row 17 is zero.*\(3 such rows\)"):
      search.normalize(keys, "keys")

  def test_the_caller_keeps_its_array(self, keys):
    before = keys.copy()
    search.normalize(keys, "keys")[:] = 0
    np.testing.assert_array_equal(keys, before)


class TestRecall:
  def _measure(self, ids, keys, queries, k=K, sample=Q):
    scores = search.exact_scores(keys, queries, ids)
    result = search.SearchResult(ids, scores)
    return search.measure_recall(result, keys, queries, k, sample)

  def test_of_exact_search_is_one(self, keys, queries):
    ids, _ = oracle(keys, queries, K)
    assert self._measure(ids, keys, queries) == 1.0

  def test_counts_each_neighbor_that_is_missed(self, keys, queries):
    ids, _ = oracle(keys, queries, N)
    found = ids[:, :K].copy()
    found[:, K - 2 :] = ids[:, -2:]  # the two furthest
    found[0] = -1
    expected = (Q - 1) * (K - 2) / (Q * K)
    assert self._measure(found, keys, queries) == pytest.approx(expected)

  def test_another_of_equal_neighbors_is_as_good(self, keys, queries):
    keys[[150, 151]] = keys[149]
    queries = queries.copy()
    queries[:] = keys[149]
    ids = np.full((Q, 2), 149)
    ids[:, 1] = 151  # not 150, which has the lower id
    assert self._measure(ids, keys, queries, k=2) == 1.0

  def test_the_sample_is_spread_over_all_queries(self, keys, queries):
    ids, _ = oracle(keys, queries, K)
    ids[-1] = -1
    assert self._measure(ids, keys, queries, sample=3) == pytest.approx(2 / 3)

  def test_k_beyond_the_memory_asks_for_what_there_is(self, keys, queries):
    ids = np.full((Q, K), -1)
    ids[:, :5] = oracle(keys[:5], queries, 5)[0]
    assert self._measure(ids, keys[:5], queries) == 1.0

  def test_pads_of_the_truth_ask_for_nothing(self):
    best = np.array([[0.9, 0.5, -np.inf], [-np.inf] * 3], np.float32)
    found = np.array([[0.9, -np.inf, -np.inf], [-np.inf] * 3], np.float32)
    assert search.recall(found, best) == 0.5
    assert search.recall(best, best) == 1.0
    assert search.recall(found[1:], best[1:]) == 1.0

  def test_best_scores_of_shards_are_merged_by_sorting(self, keys, queries):
    whole = search.best_scores(keys, queries, K)
    np.testing.assert_array_equal(whole, oracle(keys, queries, K)[1])
    parts = [
      search.best_scores(x, queries, K) for x in (keys[:3], keys[3:], keys[:0])
    ]
    merged = -np.sort(-np.concatenate(parts, axis=1), axis=1)[:, :K]
    np.testing.assert_array_equal(merged, whole)

  def test_best_scores_leave_out_what_is_excluded(self, keys, queries):
    groups = search.Groups(np.arange(Q), np.arange(N))
    found = search.best_scores(keys, keys[:Q], K, groups)
    scores = keys[:Q].astype(np.float64) @ keys.astype(np.float64).T
    np.fill_diagonal(scores, -np.inf)
    expected = -np.sort(-scores, axis=1)[:, :K]
    np.testing.assert_allclose(found, expected, atol=1e-7)


class TestMerge:
  @pytest.mark.parametrize("cuts", [(50,), (3, 3, 100), tuple(range(1, N, 2))])
  def test_shards_of_any_size_are_one_exact_index(self, keys, queries, cuts):
    keys[[2, 100, 210]] = keys[60]
    queries[3] = keys[60]
    whole = _search("exact", keys, queries, K)
    merged = None
    for first, last in zip((0, *cuts), (*cuts, N)):
      found = _search("exact", keys[first:last], queries, K)
      ids = np.where(found.ids < 0, -1, found.ids + first)
      found = search.SearchResult(ids, found.scores)
      # The order in which shards come must not matter.
      merged = search.merge(found, merged, K) if merged else found
    np.testing.assert_array_equal(merged.ids, whole.ids)
    np.testing.assert_array_equal(merged.scores, whole.scores)

  def test_pads_go_last_and_ties_by_id(self):
    a = search.SearchResult(
      np.array([[7, 2, -1]]), np.array([[0.5, 0.25, -np.inf]], np.float32)
    )
    b = search.SearchResult(
      np.array([[4, -1]]), np.array([[0.5, -np.inf]], np.float32)
    )
    found = search.merge(a, b, 4)
    assert found.ids.tolist() == [[4, 7, 2, -1]]
    assert found.scores.tolist() == [[0.5, 0.5, 0.25, -np.inf]]
    assert search.merge(a, b, 2).ids.tolist() == [[4, 7]]
    assert search.merge(a, b, 9).ids.shape == (1, 9)


class TestGroups:
  @pytest.fixture
  def groups(self):
    pairs = np.array([[2, 5], [0, 1], [2, 0], [1, 6]])
    return search.Groups(
      np.array([3, -1, 4]), np.array([3, 4, -1, 3, 4, 4, -1]), pairs
    )

  def test_forbidden_is_groups_and_pairs(self, groups):
    assert groups.forbidden().astype(int).tolist() == [
      [1, 1, 0, 1, 0, 0, 0],
      [0, 0, 0, 0, 0, 0, 1],
      [1, 1, 0, 0, 1, 1, 0],
    ]
    ids = np.array([[6, 1, 0], [6, 1, 0], [6, 1, 0]])
    assert groups.forbidden(ids).astype(int).tolist() == [
      [0, 1, 1],
      [1, 0, 0],
      [0, 1, 1],
    ]

  @pytest.mark.parametrize(
    "rows",
    [slice(1, 3), np.array([2, 0]), np.array([2, 2, 1]), np.array([], int)],
  )
  def test_some_queries_keep_what_they_must_not_find(self, groups, rows):
    expected = groups.forbidden()[rows]
    np.testing.assert_array_equal(groups.of(rows).forbidden(), expected)

  @pytest.mark.parametrize("rows", [[0, 5, 6], [1], []])
  def test_some_keys_keep_who_must_not_find_them(self, groups, rows):
    rows = np.array(rows, int)
    expected = groups.forbidden()[:, rows]
    np.testing.assert_array_equal(groups.of_keys(rows).forbidden(), expected)

  def test_most_is_enough_for_every_query(self, groups):
    assert groups.most() >= groups.forbidden().sum(axis=1).max()
    assert groups._replace(pairs=None).most() == 3
