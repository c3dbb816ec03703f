"""Key transforms against NumPy in float64."""

import numpy as np
import pytest
import threadpoolctl

from retrieval_aug.common.errors import UserError
from retrieval_aug.memory import key_transform

N, D, DIMS = 101, 7, 3


@pytest.fixture
def keys():
  """Correlated and off the origin, like features of a ReLU network."""
  rng = np.random.default_rng(0)
  mixing = rng.normal(size=(D, D)) * np.arange(1, D + 1)
  return (rng.normal(size=(N, D)) @ mixing + 5).astype(np.float32)


def _svd(keys):
  """(mean, directions [D, D] by variance, variances [D]) by another way."""
  x = keys.astype(np.float64)
  mean = x.mean(axis=0)
  _, singular, directions = np.linalg.svd(x - mean, full_matrices=False)
  return mean, directions.T, singular**2 / len(x)


def test_none_changes_nothing(keys):
  transform = key_transform.fit(keys, "none", 0)
  np.testing.assert_array_equal(transform(keys), keys)
  assert transform.dims == D


def test_center_subtracts_the_mean_of_the_memory(keys):
  transform = key_transform.fit(keys, "center", 0)
  queries = keys[:5] + 1
  expected = queries - keys.astype(np.float64).mean(axis=0)
  np.testing.assert_allclose(transform(queries), expected, atol=1e-5)
  assert transform.dims == D


def test_pca_projects_on_the_directions_of_most_variance(keys):
  transform = key_transform.fit(keys, "pca", DIMS)
  mean, directions, _ = _svd(keys)
  expected = (keys - mean) @ directions[:, :DIMS]
  found = transform(keys)
  assert found.shape == (N, DIMS) and found.dtype == np.float32
  # Up to the sign, which the next test fixes.
  np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-4)
  assert transform.dims == DIMS


def test_signs_do_not_depend_on_the_eigensolver(keys, monkeypatch):
  """The largest entry of each direction is positive, whatever the solver."""
  solve = np.linalg.eigh

  def flipped(matrix):
    variance, directions = solve(matrix)
    return variance, -directions

  first = key_transform.fit(keys, "pca", DIMS)
  monkeypatch.setattr(np.linalg, "eigh", flipped)
  second = key_transform.fit(keys, "pca", DIMS)
  np.testing.assert_array_equal(first.matrix, second.matrix)
  largest = np.abs(first.matrix).argmax(axis=0)
  assert (first.matrix[largest, np.arange(DIMS)] > 0).all()


@pytest.mark.parametrize("kind", ["pca", "whiten"])
def test_fitting_twice_gives_the_same_bits(keys, kind):
  first = key_transform.fit(keys, kind, DIMS)
  second = key_transform.fit(keys.copy(), kind, DIMS)
  np.testing.assert_array_equal(first.matrix, second.matrix)


def test_pca_with_all_dims_keeps_distances(keys):
  found = key_transform.fit(keys, "pca", 0)(keys).astype(np.float64)
  x = keys.astype(np.float64)
  np.testing.assert_allclose(
    np.linalg.norm(found[:11, None] - found[None, :13], axis=-1),
    np.linalg.norm(x[:11, None] - x[None, :13], axis=-1),
    atol=1e-3,
  )


def test_whiten_gives_unit_covariance(keys):
  found = key_transform.fit(keys, "whiten", DIMS)(keys).astype(np.float64)
  np.testing.assert_allclose(found.T @ found / N, np.eye(DIMS), atol=1e-4)


def test_whiten_of_a_direction_without_variance_stays_finite(keys):
  keys[:, -1] = 2 * keys[:, 0]
  found = key_transform.fit(keys, "whiten", D)(keys)
  assert np.isfinite(found).all() and np.abs(found).max() < 1e3


def test_float16_keys_are_accumulated_in_float64():
  keys = np.full((70_001, 2), 300, np.float16)
  keys[::2, 0] = 301
  transform = key_transform.fit(keys, "center", 0)
  expected = keys.astype(np.float64).mean(axis=0)
  np.testing.assert_allclose(transform.mean, expected, rtol=1e-6)


@pytest.mark.parametrize(
  ("n", "dims", "most"), [(N, D + 1, D), (5, 5, 4)], ids=["width", "rank"]
)
@pytest.mark.parametrize("kind", ["pca", "whiten"])
def test_more_dims_than_keys_span_are_refused(keys, kind, n, dims, most):
  with pytest.raises(UserError) as caught:
    key_transform.fit(keys[:n], kind, dims)
  assert str(caught.value) == (
    f"config.search.key_dims={dims}: {n} keys of {D} dims span at most "
    f"{most}; choose a smaller value."
  )


def test_an_unknown_kind_is_refused_with_the_known_ones(keys):
  with pytest.raises(UserError, match="none, center, pca, whiten"):
    key_transform.fit(keys, "zca", 0)


@pytest.mark.parametrize("kind", key_transform.KINDS)
def test_a_saved_transform_comes_back(tmp_path, keys, kind):
  transform = key_transform.fit(keys, kind, 0)
  transform.save(tmp_path / "t.npz")
  loaded = key_transform.load(tmp_path / "t.npz")
  np.testing.assert_array_equal(loaded(keys), transform(keys))
  assert loaded.dims == transform.dims


def test_a_saved_transform_has_the_same_bytes_again(tmp_path, keys):
  """Its digest is in a manifest, and a killed search writes it again."""
  transform = key_transform.fit(keys, "pca", DIMS)
  transform.save(tmp_path / "a.npz")
  transform.save(tmp_path / "b.npz")
  assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


@pytest.mark.parametrize("kind", ["pca", "whiten"])
def test_the_number_of_threads_changes_no_bit(kind):
  """A worker of a cluster has fewer than the machine that plans the search."""
  # Correlated, like features; the last directions have little variance.
  rng = np.random.default_rng(7)
  mixed = rng.normal(size=(2000, 40)) @ rng.normal(size=(40, 700))
  keys = np.maximum(mixed, 0).astype(np.float16)
  whole = key_transform.fit(keys, kind, 0)
  with threadpoolctl.threadpool_limits(1):
    single = key_transform.fit(keys, kind, 0)
  np.testing.assert_array_equal(whole.matrix, single.matrix)
