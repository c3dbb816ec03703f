"""One conformance table: every fusion, against its equations and the others.

A new fusion, or a new option of one, is a new row of `CASES`.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval_aug.models import MAM, MeanKNN
from tests.models import reference

# Every size another prime, so that no swapped axis can pass.
B, K, D, DV, L = 3, 7, 5, 11, 2

# Written once; not to be relaxed in passing.
FLOAT64 = {"rtol": 1e-10, "atol": 1e-12}
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}
BFLOAT16 = {"rtol": 0.05, "atol": 0.1}
GRADIENT = {"rtol": 1e-6, "atol": 1e-8}


@dataclasses.dataclass(frozen=True)
class Case:
  """A fusion, its options, and the reference that knows the same options."""

  make: Callable
  reference: Callable
  options: tuple = ()
  layers: int = 1

  def module(self, **more):
    return self.make(**dict(self.options), **more)

  def expected(self, params, *inputs):
    options = dict(self.options)
    options.pop("qk_init", None)
    params = reference.to_numpy(params)
    inputs = [
      np.asarray(x, bool if x.dtype == bool else np.float64) for x in inputs
    ]
    return self.reference(params, *inputs, **options)


def _mam(**options):
  options = {"num_layers": L, **options}
  return Case(
    MAM, reference.mam, tuple(options.items()), layers=options["num_layers"]
  )


CASES = {
  "mean_knn": Case(MeanKNN, reference.mean_knn),
  "mean_knn_sqrt_d": Case(
    MeanKNN, reference.mean_knn, (("value_scale", "sqrt_d"),)
  ),
  "mam_one_layer": _mam(num_layers=1),
  "mam": _mam(),
  "mam_lecun": _mam(qk_init="lecun_normal"),
  "mam_previous": _mam(residual="previous"),
  "mam_shared": _mam(share_layers=True),
  "mam_shared_previous": _mam(share_layers=True, residual="previous"),
  "mam_unscaled": _mam(input_scale="none"),
  "mam_scaled_values": _mam(value_scale="sqrt_d"),
  "mam_deep": _mam(num_layers=5),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def make_inputs(seed=0, b=B, k=K, d=D, dv=DV, dtype=np.float32):
  """Random inputs whose second row has no neighbor and third exactly one."""
  rng = np.random.default_rng(seed)
  mask = rng.random((b, k)) < 0.6
  mask[0, 0] = True
  if b > 1:
    mask[1] = False
  if b > 2:
    mask[2] = np.arange(k) == k - 1
  return (
    rng.normal(size=(b, d)).astype(dtype),
    rng.normal(size=(b, k, d)).astype(dtype),
    rng.normal(size=(b, k, dv)).astype(dtype),
    mask,
  )


def make_params(module, inputs, seed=0):
  """Initial parameters with noise, so that no bias is zero by luck."""
  params = module.init(jax.random.key(seed), *inputs)["params"]
  rng = np.random.default_rng(seed + 1)
  return jax.tree.map(
    lambda x: x + jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype), params
  )


def run(module, params, inputs, **options):
  return module.apply(
    {"params": params}, *inputs, return_attention=True, **options
  )


@every_case
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_forward_equals_equations_in_float64(case, seed):
  with jax.enable_x64(True):
    inputs = make_inputs(seed, dtype=np.float64)
    module = case.module(dtype=jnp.float64, param_dtype=jnp.float64)
    params = make_params(module, inputs, seed)
    refined, attention = run(module, params, inputs)
  expected, weights = case.expected(params, *inputs)
  np.testing.assert_allclose(refined, expected, **FLOAT64)
  np.testing.assert_allclose(attention, weights, **FLOAT64)


@every_case
def test_forward_equals_equations_in_float32(case):
  inputs = make_inputs(3)
  module = case.module()
  params = make_params(module, inputs)
  refined, attention = run(module, params, inputs)
  expected, weights = case.expected(params, *inputs)
  assert refined.dtype == attention.dtype == jnp.float32
  assert attention.shape == (B, case.layers, K)
  np.testing.assert_allclose(refined, expected, **FLOAT32)
  np.testing.assert_allclose(attention, weights, **FLOAT32)


@every_case
def test_bfloat16_compute_is_close_and_returns_float32(case):
  inputs = make_inputs(3)
  module = case.module(dtype=jnp.bfloat16)
  params = make_params(module, inputs)
  refined, attention = run(module, params, inputs)
  expected, weights = case.expected(params, *inputs)
  assert refined.dtype == attention.dtype == jnp.float32
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
  np.testing.assert_allclose(refined, expected, **BFLOAT16)
  np.testing.assert_allclose(attention, weights, **BFLOAT16)
  # Sums stay in float32 although the factors are short.
  np.testing.assert_allclose(
    attention.sum(-1)[0], np.ones(case.layers), **FLOAT32
  )


@every_case
@pytest.mark.parametrize("width", [np.float16, jnp.bfloat16])
def test_stored_half_precision_inputs_need_no_cast_by_the_caller(case, width):
  inputs = make_inputs(4)
  short = [x if x.dtype == bool else x.astype(width) for x in inputs]
  module = case.module()
  params = make_params(module, inputs)
  refined, _ = run(module, params, short)
  expected, _ = case.expected(params, *short)
  np.testing.assert_allclose(refined, expected, **FLOAT32)


@every_case
def test_gradient_equals_central_differences_of_the_equations(case):
  with jax.enable_x64(True):
    inputs = make_inputs(5, k=3, d=3, dv=2, dtype=np.float64)
    module = case.module(dtype=jnp.float64, param_dtype=jnp.float64)
    params = make_params(module, inputs)
    probe = np.random.default_rng(6).normal(size=inputs[0].shape)

    def loss(params, query):
      out = module.apply({"params": params}, query, *inputs[1:])
      return jnp.sum(out * probe)

    got, got_query = jax.grad(loss, argnums=(0, 1))(params, inputs[0])

  def numeric(params):
    return np.sum(case.expected(params, *inputs)[0] * probe)

  def numeric_query(query):
    return np.sum(case.expected(params, query, *inputs[1:])[0] * probe)

  wanted = reference.numeric_gradient(numeric, reference.to_numpy(params))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, **GRADIENT), got, wanted
  )
  np.testing.assert_allclose(
    got_query, reference.numeric_gradient(numeric_query, inputs[0]), **GRADIENT
  )


@every_case
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
  b=st.integers(1, 4),
  k=st.integers(1, 6),
  d=st.integers(1, 5),
  dv=st.integers(1, 5),
  seed=st.integers(0, 99),
)
def test_any_shape_equals_equations(case, b, k, d, dv, seed):
  inputs = make_inputs(seed, b, k, d, dv)
  module = case.module()
  params = make_params(module, inputs, seed)
  refined, attention = run(module, params, inputs)
  expected, weights = case.expected(params, *inputs)
  np.testing.assert_allclose(refined, expected, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(attention, weights, rtol=1e-4, atol=1e-4)


@every_case
def test_mask_equals_subset(case):
  query, keys, values, _ = make_inputs(7)
  kept = np.array([5, 1, 2])
  mask = np.zeros((B, K), bool)
  mask[:, kept] = True
  module = case.module()
  params = make_params(module, (query, keys, values, mask))
  # What stands in hidden slots must not matter.
  hidden = ~mask[..., None]
  masked, attention = run(
    module,
    params,
    (
      query,
      np.where(hidden, np.float32(1e6), keys),
      np.where(hidden, np.float32(-1e6), values),
      mask,
    ),
  )
  subset, small = run(
    module, params, (query, keys[:, kept], values[:, kept], None)
  )
  np.testing.assert_allclose(masked, subset, **FLOAT32)
  np.testing.assert_allclose(attention[..., kept], small, **FLOAT32)
  assert not np.any(np.delete(attention, kept, axis=-1))


@every_case
def test_no_mask_equals_all_true(case):
  query, keys, values, _ = make_inputs(8)
  full = np.ones((B, K), bool)
  module = case.module()
  params = make_params(module, (query, keys, values, full))
  with_mask, _ = run(module, params, (query, keys, values, full))
  without, _ = run(module, params, (query, keys, values, None))
  np.testing.assert_array_equal(with_mask, without)


@every_case
@pytest.mark.parametrize("k", [0, 1, K])
def test_all_masked_returns_the_query_exactly(case, k):
  query, keys, values, _ = make_inputs(9)
  mask = np.zeros((B, K), bool)
  module = case.module()
  params = make_params(module, (query, keys, values, mask))
  inputs = (query, keys[:, :k], values[:, :k], mask[:, :k])
  refined, attention = run(module, params, inputs)
  np.testing.assert_array_equal(refined, query)
  assert not np.any(attention)


@every_case
def test_gradient_is_finite_for_zero_vectors_and_empty_rows(case):
  inputs = [np.zeros_like(x) for x in make_inputs(10)]
  inputs[3][0] = True  # neighbors, all zero; the other rows have none
  module = case.module()
  params = make_params(module, inputs)

  def loss(params, query, keys, values):
    out = module.apply({"params": params}, query, keys, values, inputs[3])
    return jnp.sum(out**2)

  gradient = jax.grad(loss, argnums=(0, 1, 2, 3))(params, *inputs[:3])
  assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(gradient))


@every_case
@pytest.mark.parametrize("size", [1e-15, 1e15])
def test_finite_at_extreme_lengths(case, size):
  if dict(case.options).get("input_scale") == "none":
    pytest.skip("unscaled inputs are the caller's business")
  query, keys, values, mask = make_inputs(11)
  inputs = (query * np.float32(size), keys * np.float32(size), values, mask)
  module = case.module()
  params = make_params(module, inputs)
  refined, attention = run(module, params, inputs)
  assert np.all(np.isfinite(refined))
  np.testing.assert_allclose(attention[0].sum(-1), 1.0, **FLOAT32)


@every_case
def test_order_of_neighbors_does_not_matter(case):
  query, keys, values, mask = make_inputs(12)
  order = np.random.default_rng(0).permutation(K)
  module = case.module()
  params = make_params(module, (query, keys, values, mask))
  refined, attention = run(module, params, (query, keys, values, mask))
  moved, moved_attention = run(
    module, params, (query, keys[:, order], values[:, order], mask[:, order])
  )
  np.testing.assert_allclose(moved, refined, **FLOAT32)
  np.testing.assert_allclose(moved_attention, attention[..., order], **FLOAT32)


@every_case
def test_batch_equals_one_at_a_time(case):
  inputs = make_inputs(13)
  module = case.module()
  params = make_params(module, inputs)
  together, _ = run(module, params, inputs)
  for i in range(B):
    alone, _ = run(module, params, [x[i : i + 1] for x in inputs])
    np.testing.assert_allclose(alone[0], together[i], **FLOAT32)


@every_case
def test_jit_equals_no_jit_and_compiles_once(case):
  inputs = make_inputs(14)
  module = case.module()
  params = make_params(module, inputs)
  traces = []

  @jax.jit
  def jitted(params, *inputs):
    traces.append(1)
    return run(module, params, inputs)

  for got, wanted in zip(
    jitted(params, *inputs), run(module, params, inputs), strict=True
  ):
    np.testing.assert_allclose(got, wanted, **FLOAT32)
  jitted(params, *make_inputs(15))
  assert len(traces) == 1


@every_case
def test_attention_can_be_left_out(case):
  inputs = make_inputs(16)
  module = case.module()
  params = make_params(module, inputs)
  refined, _ = run(module, params, inputs)
  np.testing.assert_array_equal(
    module.apply({"params": params}, *inputs), refined
  )


@every_case
def test_dropouts_act_in_training_only_and_need_their_rng(case):
  inputs = make_inputs(17)
  module = case.module(neighbor_dropout=0.5, dropout=0.3)
  params = make_params(module, inputs)
  quiet, _ = run(module, params, inputs)
  plain, _ = run(case.module(), params, inputs)
  np.testing.assert_array_equal(quiet, plain)
  train = functools.partial(run, module, params, inputs, train=True)
  first, attention = train(rngs={"dropout": jax.random.key(0)})
  again, _ = train(rngs={"dropout": jax.random.key(0)})
  other, _ = train(rngs={"dropout": jax.random.key(1)})
  np.testing.assert_array_equal(first, again)
  assert np.any(np.asarray(first) != np.asarray(other))
  assert np.any(np.asarray(first) != np.asarray(quiet))
  np.testing.assert_array_equal(first[1], inputs[0][1])  # no neighbors
  total = np.asarray(attention.sum(-1))
  assert np.all(np.isclose(total, 1.0) | (total == 0.0))
  with pytest.raises(Exception, match="dropout"):
    train()


@every_case
def test_neighbor_dropout_hides_at_the_given_rate(case):
  count = 4_001
  query, keys, values, _ = make_inputs(18, b=2, k=count)
  mask = np.ones((2, count), bool)
  module = case.module(neighbor_dropout=0.3)
  inputs = (query, keys, values, mask)
  params = make_params(module, inputs)
  _, attention = run(
    module, params, inputs, train=True, rngs={"dropout": jax.random.key(0)}
  )
  hidden = np.asarray(attention) == 0.0
  # A weight can also underflow, hence only the rate's order is asserted.
  assert 0.27 < hidden[:, 0].mean() < 0.34
  assert np.all(hidden == hidden[:, :1])  # the same ones in all layers


@every_case
@pytest.mark.parametrize(
  ("index", "shape", "message"),
  [
    (0, (D,), r"`query` has shape \(5,\); expected \[B, d\]"),
    (
      1,
      (B, K, D + 1),
      r"`keys` has shape \(3, 7, 6\); expected \[B, k, d\] = \(3, k, 5\), "
      r"because `query` has shape \(3, 5\)",
    ),
    (
      2,
      (B, K + 1, DV),
      r"`values` has shape \(3, 8, 11\); expected \[B, k, d_v\] = "
      r"\(3, 7, d_v\)",
    ),
    (2, (B, DV), r"`values` has shape \(3, 11\)"),
    (3, (B, K, 1), r"`mask` has shape \(3, 7, 1\); expected \[B, k\]"),
  ],
)
def test_wrong_shape_names_argument_and_both_shapes(
  case, index, shape, message
):
  inputs = list(make_inputs())
  inputs[index] = np.zeros(shape, inputs[index].dtype)
  with pytest.raises(ValueError, match=message):
    case.module().init(jax.random.key(0), *inputs)


@every_case
def test_mask_that_is_not_bool_is_refused(case):
  *inputs, mask = make_inputs()
  with pytest.raises(ValueError, match="`mask` has type float32"):
    case.module().init(jax.random.key(0), *inputs, mask.astype(np.float32))
