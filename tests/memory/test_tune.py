"""The choice of a searcher, on data for which the truth is known."""

import sys

import numpy as np
import pytest

from retrieval_aug.common.errors import UserError
from retrieval_aug.memory import search, searchers, tune
from retrieval_aug.memory.searchers import costs, ivf

K = 50


def _clustered(n, seed):
  rng = np.random.default_rng(seed)
  centers = np.random.default_rng(0).normal(size=(150, 32))
  x = centers[rng.integers(150, size=n)] + 0.7 * rng.normal(size=(n, 32))
  return search.normalize(x, "vectors")


def _gaussian(n, seed):
  return search.normalize(np.random.default_rng(seed).normal(size=(n, 24)), "x")


@pytest.fixture(scope="module")
def keys():
  return _clustered(30_011, 1)


@pytest.fixture(scope="module")
def queries():
  return _clustered(3001, 2)


def _choose(searcher, keys, queries, given=None, **changes):
  job = {"n_keys": len(keys), "n_queries": len(queries), "recall_target": 0.95}
  return tune.choose(searcher, given or {}, keys, queries, K, **(job | changes))


def _recall(choice, keys, queries, exclude=None):
  found = search.search(choice.engine, keys, queries, K, exclude=exclude)
  return search.measure_recall(found, keys, queries, K, 500, exclude)


@pytest.fixture
def slow(monkeypatch):
  """A machine on which products are dear, so that jobs are large."""
  monkeypatch.setattr(costs, "seconds_a_product", lambda dims: 1e-6)


class TestAuto:
  def test_a_small_job_is_exact(self, keys, queries):
    choice = _choose("auto", keys[:2000], queries[:300])
    assert choice.kind == choice.engine.name == "exact"
    assert choice.measured["recall"] == 1.0
    assert "300 queries in 2,000 keys" in choice.why

  def test_a_large_job_is_an_inverted_file_that_reaches_the_target(
    self, slow, keys, queries
  ):
    choice = _choose("auto", keys, queries, n_queries=10**6)
    assert choice.kind == "ivf"
    others = _clustered(500, 3)
    recall = _recall(choice, keys, others)
    assert recall >= 0.945
    assert choice.parameters["probes"] < choice.parameters["lists"] / 2
    assert choice.measured.keys() == {
      "recall",
      "queries_per_second",
      "build_seconds",
      "bytes_per_key",
      "tuning_seconds",
    }
    assert choice.measured["recall"] == pytest.approx(recall, abs=0.01)
    assert "where exact search takes" in choice.why

  def test_keys_without_clusters_are_searched_exactly(self, slow):
    """In 24 even dims nearly every list holds neighbors of a query."""
    keys, queries = _gaussian(20_000, 1), _gaussian(2000, 2)
    job = {"n_queries": 10**6, "recall_target": 0.999}
    choice = _choose("auto", keys, queries, **job)
    assert choice.kind == "exact" and "lists hold" in choice.why

  def test_an_accelerator_searches_exactly(self, monkeypatch, keys, queries):
    monkeypatch.setattr(tune.jax, "default_backend", lambda: "gpu")
    choice = _choose("auto", keys, queries[:100], n_queries=10**9)
    assert choice.kind == "exact"
    assert choice.why.startswith("exact search: a gpu is at hand")

  def test_an_index_that_does_not_fit_is_not_chosen(self, slow, keys, queries):
    fits = 30_011 * (2 * 4 * 32 + 4) / 1e9
    of = lambda gb: _choose(
      "auto", keys, queries, n_queries=10**6, memory_gb=gb
    )
    assert of(1.01 * fits).kind == "ivf"
    choice = of(0.99 * fits)
    assert choice.kind == "exact" and "memory_gb" in choice.why

  def test_nothing_to_search_is_exact(self, keys, queries):
    for some, asked in ((keys[:0], queries), (keys, queries[:0])):
      choice = _choose("auto", some, asked)
      assert choice.kind == "exact"
      found = search.search(choice.engine, some, asked, K)
      assert (found.ids == -1).all()

  def test_probes_are_tuned_to_what_is_left_after_exclusion(self, slow, keys):
    """Queries that are keys are sure to be in the first list probed."""
    own = keys[:2000]
    exclude = search.Groups(np.arange(2000), np.arange(len(keys)))
    choice = _choose("auto", keys, own, n_queries=10**6, exclude=exclude)
    assert choice.kind == "ivf"
    assert _recall(choice, keys, own, exclude) >= 0.945


class TestByName:
  @pytest.mark.parametrize("kind", searchers.KINDS)
  def test_it_is_tuned_to_the_target_on_other_queries(
    self, kind, keys, queries
  ):
    if kind.startswith("faiss"):
      pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    if kind == "scann" and sys.platform != "linux":
      pytest.skip("ScaNN has wheels for Linux only")
    choice = _choose(kind, keys, queries)
    assert choice.kind == choice.engine.name == kind
    assert choice.why.startswith(f"{kind} search, as config.search.searcher")
    assert _recall(choice, keys, _clustered(500, 3)) >= 0.945

  def test_given_options_are_taken_as_they_are(self, keys, queries):
    given = {"ivf": {"lists": 40, "probes": 3}, "scann": {"leaves": 7}}
    choice = _choose("ivf", keys, queries, given, recall_target=1.0)
    assert choice.parameters == {"lists": 40, "probes": 3}
    recall = choice.measured["recall"]
    assert recall == pytest.approx(_recall(choice, keys, queries), abs=0.03)

  def test_more_lists_than_keys_are_as_many(self, keys, queries):
    given = {"ivf": {"lists": 10**6, "probes": 10**6}}
    choice = _choose("ivf", keys[:99], queries[:99], given)
    assert choice.parameters == {"lists": 99, "probes": 99}
    assert choice.measured["recall"] == 1.0

  def test_a_target_of_one_probes_all_that_hold_neighbors(self, keys, queries):
    choice = _choose("ivf", keys, queries, recall_target=1.0)
    assert choice.measured["recall"] == 1.0
    assert _recall(choice, keys, queries) >= 0.999

  def test_an_index_that_does_not_fit_is_refused(self, keys, queries):
    with pytest.raises(UserError, match="memory_gb=0.001: a ivf index of 30,"):
      _choose("ivf", keys, queries, memory_gb=0.001)
    assert _choose("exact", keys, queries, memory_gb=0.001).kind == "exact"

  def test_an_unknown_kind_is_refused_with_the_known_ones(self, keys, queries):
    with pytest.raises(UserError) as caught:
      _choose("hnsw", keys, queries)
    assert str(caught.value) == (
      "config.search.searcher='hnsw': not one of auto, exact, ivf, scann, "
      "faiss_hnsw, faiss_ivf."
    )

  @pytest.mark.parametrize("target", [0, -1, 1.01])
  def test_a_target_that_is_no_share_is_refused(self, keys, queries, target):
    with pytest.raises(UserError, match="recall_target="):
      _choose("exact", keys, queries, recall_target=target)


def test_costs_grow_with_what_is_searched():
  cost = costs.Costs(1e-9, 10**6, 10**5)
  assert cost.exact() > cost.lists(300, 3)
  assert cost.lists(300, 30) > cost.lists(300, 3)
  assert cost._replace(queries=10**6).lists(300, 3) > cost.lists(300, 3)


def test_default_lists_grow_with_the_job_and_leave_keys_in_each():
  jobs = [(10**6, q) for q in (10**3, 10**4, 10**5)]
  counts = [ivf.default_lists(*job) for job in jobs]
  assert counts == sorted(set(counts))
  assert ivf.default_lists(640, 10**9) <= 10
  assert ivf.default_lists(1, 1) == 1
