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

from retrieval_aug.models import MAM, MeanKNN, RetFormer, unstack_layers
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
  # Whether without neighbors the query comes back, and all the weight is on
  # neighbors otherwise.
  keeps_query: bool = True

  def inputs(self, seed=0, **sizes):
    """`make_inputs` with a width that the heads divide."""
    sizes["d"] = sizes.get("d", D) * dict(self.options).get("num_heads", 1)
    return make_inputs(seed, **sizes)

  def module(self, **more):
    return self.make(**dict(self.options), **more)

  def expected(self, params, *inputs):
    options = dict(self.options)
    # What changes only how things start or are stored.
    for name in ("qk_init", "remat", "scan_layers"):
      options.pop(name, None)
    if "layers" in params:
      params = unstack_layers(params)
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


def _retformer(**options):
  options = {"num_layers": L, "max_neighbors": K, **options}
  return Case(
    RetFormer,
    reference.retformer,
    tuple(options.items()),
    layers=options["num_layers"],
    keeps_query=False,
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
  "mam_heads": _mam(num_heads=3, qk_init="lecun_normal"),
  "mam_norm": _mam(norm="qk", num_heads=2),
  "mam_temperature": _mam(attention_temperature=0.3, norm="qk"),
  "mam_learned_temperature": _mam(attention_temperature="learned", num_heads=2),
  "mam_remat": _mam(remat=True),
  "mam_scan": _mam(scan_layers=True, num_layers=3),
  "mam_scan_shared_remat": _mam(
    scan_layers=True, remat=True, share_layers=True, residual="previous"
  ),
  "retformer": _retformer(),
  "retformer_unordered": _retformer(position="none"),
  "retformer_vanilla": _retformer(
    block="vanilla", num_heads=2, position="none", feedforward_dim=3
  ),
  "retformer_self": _retformer(text_stream="self", num_layers=3),
  "retformer_image_only": _retformer(streams="image_only", num_heads=2),
  "retformer_text_only": _retformer(
    streams="text_only", position="none", value_scale="none"
  ),
}
# For what no option has a say in: one row of each way to compute.
# XLA's compile time is what the full table costs, so that it is kept for the
# equations and their gradients.
CORE = (
  "mean_knn_sqrt_d",
  "mam_scaled_values",
  "mam_scan_shared_remat",
  "retformer_vanilla",
)
core_cases = pytest.mark.parametrize("case", [CASES[n] for n in CORE], ids=CORE)
# RetFormer reads class tokens, which are never masked.
KEEPERS = [n for n in CORE if CASES[n].keeps_query]
query_cases = pytest.mark.parametrize(
  "case", [CASES[n] for n in KEEPERS], ids=KEEPERS
)
PLAIN = ("mean_knn", "mam", "retformer")
plain_cases = pytest.mark.parametrize(
  "case", [CASES[n] for n in PLAIN], ids=PLAIN
)
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
  """Random parameters of the module's shapes and types.

  Not its initial ones: no bias is zero by luck, and compiling initialisers for
  every shape is what would take the time here.
  """
  init = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
  rng = np.random.default_rng(seed + 1)
  # Of about the length that initialisers give, so that softmaxes do not peak.
  fill = lambda x: rng.normal(size=x.shape) / max(1, x.shape[0]) ** 0.5
  return jax.tree.map(lambda x: jnp.asarray(fill(x), x.dtype), init)


def run(module, params, inputs, **options):
  return module.apply(
    {"params": params}, *inputs, return_attention=True, **options
  )


@every_case
def test_forward_equals_equations_in_float64(case):
  with jax.enable_x64(True):
    inputs = case.inputs(0, dtype=np.float64)
    module = case.module(dtype=jnp.float64, param_dtype=jnp.float64)
    params = make_params(module, inputs)
    refined, attention = jax.jit(functools.partial(run, module))(params, inputs)
  expected, weights = case.expected(params, *inputs)
  np.testing.assert_allclose(refined, expected, **FLOAT64)
  np.testing.assert_allclose(attention, weights, **FLOAT64)


@core_cases
def test_forward_equals_equations_in_float32(case):
  inputs = case.inputs(3)
  module = case.module()
  params = make_params(module, inputs)
  refined, attention = run(module, params, inputs)
  expected, weights = case.expected(params, *inputs)
  assert refined.dtype == attention.dtype == jnp.float32
  assert attention.shape == (B, case.layers, K)
  np.testing.assert_allclose(refined, expected, **FLOAT32)
  np.testing.assert_allclose(attention, weights, **FLOAT32)


@core_cases
def test_bfloat16_compute_is_close_and_returns_float32(case):
  inputs = case.inputs(3)
  module = case.module(dtype=jnp.bfloat16)
  params = make_params(module, inputs)
  refined, attention = run(module, params, inputs)
  expected, weights = case.expected(params, *inputs)
  assert refined.dtype == attention.dtype == jnp.float32
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
  np.testing.assert_allclose(refined, expected, **BFLOAT16)
  np.testing.assert_allclose(attention, weights, **BFLOAT16)
  if case.keeps_query:
    # Sums stay in float32 although the factors are short.
    np.testing.assert_allclose(attention.sum(-1)[0], 1.0, **FLOAT32)


@core_cases
@pytest.mark.parametrize("width", [np.float16, jnp.bfloat16])
def test_stored_half_precision_inputs_need_no_cast_by_the_caller(case, width):
  inputs = case.inputs(4)
  short = [x if x.dtype == bool else x.astype(width) for x in inputs]
  module = case.module()
  params = make_params(module, inputs)
  refined, _ = run(module, params, short)
  expected, _ = case.expected(params, *short)
  np.testing.assert_allclose(refined, expected, **FLOAT32)


@every_case
def test_gradient_equals_central_differences_of_the_equations(case):
  with jax.enable_x64(True):
    inputs = case.inputs(5, k=3, d=3, dv=2, dtype=np.float64)
    module = case.module(dtype=jnp.float64, param_dtype=jnp.float64)
    params = make_params(module, inputs)
    # Twice as wide as the query, for fusions whose output is.
    width = 2 * inputs[0].shape[-1]
    probe = np.random.default_rng(6).normal(size=(B, width))

    def loss(params, query):
      out = module.apply({"params": params}, query, *inputs[1:])
      return jnp.sum(out * probe[:, : out.shape[-1]])

    got, got_query = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, inputs[0])

  def numeric(params):
    out = case.expected(params, *inputs)[0]
    return np.sum(out * probe[:, : out.shape[-1]])

  def numeric_query(query):
    out = case.expected(params, query, *inputs[1:])[0]
    return np.sum(out * probe[:, : out.shape[-1]])

  wanted = reference.numeric_gradient(numeric, reference.to_numpy(params))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, **GRADIENT), got, wanted
  )
  np.testing.assert_allclose(
    got_query, reference.numeric_gradient(numeric_query, inputs[0]), **GRADIENT
  )


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
  case=st.sampled_from(list(CASES.values())),
  b=st.integers(1, 4),
  k=st.integers(1, 6),
  d=st.integers(1, 5),
  dv=st.integers(1, 5),
  seed=st.integers(0, 99),
)
def test_any_shape_equals_equations(case, b, k, d, dv, seed):
  inputs = case.inputs(seed, b=b, k=k, d=d, dv=dv)
  module = case.module()
  params = make_params(module, inputs, seed)
  refined, attention = jax.jit(functools.partial(run, module))(params, inputs)
  expected, weights = case.expected(params, *inputs)
  np.testing.assert_allclose(refined, expected, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(attention, weights, rtol=1e-4, atol=1e-4)


@core_cases
def test_mask_equals_subset(case):
  kept = np.array([5, 1, 2])
  query, keys, values, _ = case.inputs(7)
  mask = np.zeros((B, K), bool)
  mask[:, kept] = True
  module = case.module()
  params = make_params(module, (query, keys, values, mask))
  # Whatever stands in hidden slots must not matter.
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


@core_cases
def test_no_mask_equals_all_true(case):
  query, keys, values, _ = case.inputs(8)
  full = np.ones((B, K), bool)
  module = case.module()
  params = make_params(module, (query, keys, values, full))
  with_mask, _ = run(module, params, (query, keys, values, full))
  without, _ = run(module, params, (query, keys, values, None))
  np.testing.assert_array_equal(with_mask, without)


@query_cases
@pytest.mark.parametrize("k", [0, K])
def test_all_masked_returns_the_query_exactly(case, k):
  query, keys, values, _ = case.inputs(9)
  mask = np.zeros((B, K), bool)
  module = case.module()
  params = make_params(module, (query, keys, values, mask))
  inputs = (query, keys[:, :k], values[:, :k], mask[:, :k])
  refined, attention = run(module, params, inputs)
  np.testing.assert_array_equal(refined, query)
  assert not np.any(attention)


@core_cases
def test_gradient_is_finite_for_zero_vectors_and_empty_rows(case):
  inputs = [np.zeros_like(x) for x in case.inputs(10)]
  inputs[3][0] = True  # neighbors, all zero; the other rows have none
  module = case.module()
  params = make_params(module, inputs)

  def loss(params, query, keys, values):
    out = module.apply({"params": params}, query, keys, values, inputs[3])
    return jnp.sum(out**2)

  gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(params, *inputs[:3])
  assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(gradient))


@core_cases
@pytest.mark.parametrize("size", [1e-15, 1e15])
def test_finite_at_extreme_lengths(case, size):
  query, keys, values, mask = case.inputs(11)
  inputs = (query * np.float32(size), keys * np.float32(size), values, mask)
  module = case.module()
  params = make_params(module, inputs)
  refined, attention = run(module, params, inputs)
  assert np.all(np.isfinite(refined))
  assert np.all(np.isfinite(attention))
  if case.keeps_query:
    np.testing.assert_allclose(attention[0].sum(-1), 1.0, **FLOAT32)


@core_cases
def test_order_of_neighbors_does_not_matter(case):
  query, keys, values, mask = case.inputs(12)
  order = np.random.default_rng(0).permutation(K)
  module = case.module()
  params = make_params(module, (query, keys, values, mask))
  refined, attention = run(module, params, (query, keys, values, mask))
  moved, moved_attention = run(
    module, params, (query, keys[:, order], values[:, order], mask[:, order])
  )
  np.testing.assert_allclose(moved, refined, **FLOAT32)
  np.testing.assert_allclose(moved_attention, attention[..., order], **FLOAT32)


@core_cases
def test_batch_equals_one_at_a_time(case):
  inputs = case.inputs(13)
  module = case.module()
  params = make_params(module, inputs)
  together, _ = run(module, params, inputs)
  for i in range(B):
    alone, _ = run(module, params, [x[i : i + 1] for x in inputs])
    np.testing.assert_allclose(alone[0], together[i], **FLOAT32)


@core_cases
def test_jit_equals_no_jit_and_compiles_once(case):
  inputs = case.inputs(14)
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
  jitted(params, *case.inputs(15))
  assert len(traces) == 1


@core_cases
def test_attention_can_be_left_out(case):
  inputs = case.inputs(16)
  module = case.module()
  params = make_params(module, inputs)
  refined, _ = run(module, params, inputs)
  np.testing.assert_array_equal(
    module.apply({"params": params}, *inputs), refined
  )


@core_cases
def test_dropouts_act_in_training_only_and_need_their_rng(case):
  inputs = case.inputs(17)
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
  if case.keeps_query:
    np.testing.assert_array_equal(first[1], inputs[0][1])  # no neighbors
    total = np.asarray(attention.sum(-1))
    assert np.all(np.isclose(total, 1.0) | (total == 0.0))
  with pytest.raises(Exception, match="dropout"):
    train()


@query_cases
def test_query_dropout_acts_on_the_residual_alone(case):
  inputs = case.inputs(19, d=401)
  module = case.module(query_dropout=0.25)
  params = make_params(module, inputs)
  quiet, weights = run(module, params, inputs)
  refined, same = run(
    module, params, inputs, train=True, rngs={"dropout": jax.random.key(0)}
  )
  np.testing.assert_array_equal(weights, same)
  # What is left of z, after what the neighbors add is taken off.
  left = np.asarray(refined) - (np.asarray(quiet) - inputs[0])
  dropped = np.abs(left) < 1e-4
  assert 0.2 < dropped.mean() < 0.3
  np.testing.assert_allclose(
    left[~dropped], (inputs[0] / 0.75)[~dropped], rtol=1e-4, atol=1e-4
  )


@core_cases
def test_neighbor_dropout_hides_at_the_given_rate(case):
  count = 401
  query, keys, values, _ = case.inputs(18, b=2, k=count)
  mask = np.ones((2, count), bool)
  module = case.module(neighbor_dropout=0.3)
  inputs = (query, keys, values, mask)
  params = make_params(module, inputs)
  _, attention = run(
    module, params, inputs, train=True, rngs={"dropout": jax.random.key(0)}
  )
  hidden = np.asarray(attention) == 0.0
  # A weight can also underflow, hence only the rate's order is asserted.
  assert 0.25 < hidden[:, 0].mean() < 0.36
  assert np.all(hidden == hidden[:, :1])  # the same ones in all layers


@plain_cases
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
  inputs = list(case.inputs())
  inputs[index] = np.zeros(shape, inputs[index].dtype)
  with pytest.raises(ValueError, match=message):
    case.module().init(jax.random.key(0), *inputs)


@plain_cases
def test_mask_that_is_not_bool_is_refused(case):
  *inputs, mask = case.inputs()
  with pytest.raises(ValueError, match="`mask` has type float32"):
    case.module().init(jax.random.key(0), *inputs, mask.astype(np.float32))
