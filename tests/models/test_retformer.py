"""What is particular to RetFormer: parameters, ablations, the last layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retrieval_aug.models import RetFormer, build
from tests.models import reference

B, K, D, C, H = 3, 7, 5, 13, 11


def make_inputs(seed=0, b=B, k=K, d=D, dv=D):
  rng = np.random.default_rng(seed)
  return tuple(
    rng.normal(size=shape).astype(np.float32)
    for shape in ((b, d), (b, k, d), (b, k, dv))
  )


def shapes(params):
  return {
    "/".join(str(part.key) for part in path): leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }


def init(module, *inputs):
  return module.init(jax.random.key(0), *(inputs or make_inputs()))["params"]


def stream_tree(stream, layers, max_neighbors):
  tree = {
    f"{stream}_cls": (D,),
    f"{stream}_position": (max_neighbors + 2, D),
    f"{stream}_norm/scale": (D,),
    f"{stream}_norm/bias": (D,),
  }
  for i in range(layers):
    tree |= {
      f"layer_{i}/{stream}_norm/scale": (D,),
      f"layer_{i}/{stream}_norm/bias": (D,),
      f"layer_{i}/{stream}_query/kernel": (D, D),
      f"layer_{i}/{stream}_key/kernel": (D, D),
      f"layer_{i}/{stream}_value/kernel": (D, D),
    }
  return tree


def test_parameter_tree_is_golden():
  params = init(RetFormer(num_layers=2, max_neighbors=K))
  assert shapes(params) == (
    stream_tree("image", 2, K) | stream_tree("text", 2, K)
  )


@pytest.mark.parametrize("stream", ["image", "text"])
def test_one_stream_has_no_parameters_of_the_other(stream):
  params = init(RetFormer(2, streams=f"{stream}_only", max_neighbors=K))
  assert shapes(params) == stream_tree(stream, 2, K)


@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize("max_neighbors", [K, 32])
def test_parameter_count_is_the_arithmetic_of_the_docstring(
  layers, max_neighbors
):
  p = max_neighbors + 2
  count = lambda **options: sum(
    x.size
    for x in jax.tree.leaves(
      init(RetFormer(layers, max_neighbors=max_neighbors, **options))
    )
  )
  literal = layers * (6 * D**2 + 4 * D) + 2 * D + 2 * p * D + 4 * D
  assert count() == literal
  vanilla = layers * 2 * (D**2 + D + 2 * D + D * H + H + H * D + D)
  assert count(block="vanilla", feedforward_dim=H) == literal + vanilla
  assert count(text_stream="self") == literal - layers * D**2
  assert count(position="none") == literal - 2 * p * D


def test_other_text_width_gets_a_dense_layer():
  inputs = make_inputs(dv=11)
  params = init(RetFormer(1, max_neighbors=K), *inputs)
  assert shapes(params["text_input"]) == {"kernel": (11, D), "bias": (D,)}


def test_feedforward_is_four_times_as_wide_by_default():
  params = init(RetFormer(1, block="vanilla"))
  assert params["layer_0"]["image_feedforward_hidden"]["bias"].shape == (4 * D,)


def test_text_of_the_query_is_the_zero_vector():
  # The text stream alone never sees z, so it must not leak through it.
  query, keys, values = make_inputs()
  module = RetFormer(2, streams="text_only")
  params = init(module)
  np.testing.assert_array_equal(
    module.apply({"params": params}, query, keys, values),
    module.apply({"params": params}, -query, 2 * keys, values),
  )


@pytest.mark.parametrize("position", ["learned", "none"])
def test_order_of_neighbors_matters_to_positions_alone(position):
  query, keys, values = make_inputs()
  module = RetFormer(2, max_neighbors=K, position=position)
  params = init(module)
  if position == "learned":
    for name in ("image_position", "text_position"):
      params[name] = 10 * params[name]
  run = lambda *x: np.asarray(module.apply({"params": params}, *x))
  moved = run(query, keys[:, ::-1], values[:, ::-1])
  change = np.max(np.abs(moved - run(query, keys, values)))
  assert change > 1e-2 if position == "learned" else change < 1e-5


def test_fewer_neighbors_than_the_table_has_rows():
  query, keys, values = make_inputs()
  module = RetFormer(2, max_neighbors=K)
  params = init(module)
  mask = np.broadcast_to(np.arange(K) < 3, (B, K))
  np.testing.assert_allclose(
    module.apply({"params": params}, query, keys[:, :3], values[:, :3]),
    module.apply({"params": params}, query, keys, values, mask),
    rtol=1e-5,
    atol=1e-5,
  )


def test_more_neighbors_than_the_table_has_rows_is_an_error():
  with pytest.raises(ValueError, match=r"at most `max_neighbors` = 6 neighb"):
    init(RetFormer(max_neighbors=6))
  init(RetFormer(1, max_neighbors=6, position="none"))


def test_every_parameter_is_used():
  inputs = make_inputs()
  module = RetFormer(2, max_neighbors=K)
  params = init(module)
  gradient = jax.jit(
    jax.grad(lambda p: jnp.sum(module.apply({"params": p}, *inputs) ** 3))
  )(params)
  assert all(np.any(np.abs(x) > 0) for x in jax.tree.leaves(gradient))


def test_last_layer_is_cheaper_by_xla_count():
  inputs = make_inputs(b=2, k=32, d=256, dv=256)

  def flops(layers):
    module = RetFormer(layers)
    params = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    run = lambda p, *x: module.apply({"params": p}, *x)
    compiled = jax.jit(run).lower(params, *inputs).compile()
    return compiled.cost_analysis()["flops"]

  last = flops(1)
  full = flops(2) - last
  # P = 34 rows against one.
  assert full > 15 * last


def test_weights_of_single_streams_are_sown():
  inputs = make_inputs()
  module = RetFormer(3, max_neighbors=K)
  params = init(module)
  (_, mean), state = module.apply(
    {"params": params},
    *inputs,
    return_attention=True,
    mutable=["intermediates"],
  )
  (both,) = state["intermediates"]["stream_weights"]
  assert both.shape == (B, 2, 3, K)
  np.testing.assert_allclose(both.mean(1), mean, rtol=1e-6)


@pytest.mark.parametrize("tau", [1.0, 0.6])
def test_logits_are_half_tau_times_both_branches(tau):
  inputs = make_inputs(dv=11)
  model = build("retformer", C, num_layers=2, max_neighbors=K, tau=tau)
  params = init(model, *inputs)
  assert set(params) == {"branch", "fusion", "head"}
  assert params["head"]["kernel"].shape == (2 * D, C)
  logits = model.apply({"params": params}, *inputs)
  exact = reference.to_numpy(params)
  query, keys, values = (x.astype(np.float64) for x in inputs)
  z = np.stack([reference.scale(x, "sqrt_d") for x in query])
  mask = np.ones((B, K), bool)
  read_out, _ = reference.retformer(
    exact["fusion"], z, keys, values, mask, num_layers=2
  )
  expected = reference.mlp(exact["branch"], z)
  expected = expected + reference.linear(exact["head"], read_out)
  np.testing.assert_allclose(logits, tau / 2 * expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"block": "vanila"}, "unknown block 'vanila'; did you mean 'vanilla'"),
    ({"streams": "text"}, "unknown streams 'text'; did you mean 'text_only'"),
    ({"text_stream": "crosss"}, "unknown text_stream 'crosss'; did you mean"),
    ({"position": "sine"}, "unknown position 'sine'; known: learned, none"),
    ({"num_heads": 2}, "`num_heads` is 2, which does not divide .* 5"),
    ({"num_layers": 0}, "`num_layers` is 0; expected at least 1"),
  ],
)
def test_wrong_option_is_named(options, message):
  with pytest.raises(ValueError, match=message):
    init(RetFormer(**options))


def test_several_value_encoders_are_refused():
  query, keys, values = make_inputs()
  with pytest.raises(ValueError, match="`values` are of 2 encoders"):
    init(RetFormer(), query, keys, (values, values))
