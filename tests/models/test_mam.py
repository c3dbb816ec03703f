"""What is particular to MAM: parameters, options, and the saved projection."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from retrieval_aug.models import (
  MAM,
  Classifier,
  Linear,
  build,
  fold_for_inference,
  stack_layers,
  unstack_layers,
)
from tests.models import reference
from tests.models.plain import PlainClassifier

B, K, D, DV = 3, 7, 5, 11


def make_inputs(seed=0, b=B, k=K, d=D, dv=DV):
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


LAYER = {
  "query/kernel": (D, D),
  "query/bias": (D,),
  "key/kernel": (D, D),
  "output/kernel": (DV, D),
  "output/bias": (D,),
}


@pytest.mark.parametrize(
  ("options", "layers"),
  [
    ({}, 8),
    ({"num_layers": 2}, 2),
    ({"num_layers": 3, "share_layers": True}, 1),
  ],
)
def test_parameter_tree_is_golden(options, layers):
  params = MAM(**options).init(jax.random.key(0), *make_inputs())["params"]
  assert shapes(params) == {
    f"layer_{i}/{name}": shape
    for i in range(layers)
    for name, shape in LAYER.items()
  }
  count = sum(x.size for x in jax.tree.leaves(params))
  assert count == layers * (2 * D * D + D + DV * D + D)  # the docstring's


def test_identity_init_attends_by_cosine():
  query, keys, values = make_inputs()
  module = MAM(num_layers=1)
  params = module.init(jax.random.key(0), query, keys, values)["params"]
  np.testing.assert_array_equal(params["layer_0"]["query"]["kernel"], np.eye(D))
  np.testing.assert_array_equal(params["layer_0"]["key"]["kernel"], np.eye(D))
  _, attention = module.apply(
    {"params": params}, query, keys, values, return_attention=True
  )
  cosine = np.einsum("bd,bkd->bk", query, keys)
  cosine /= np.linalg.norm(query, axis=-1)[:, None]
  cosine /= np.linalg.norm(keys, axis=-1)
  expected = np.exp(cosine * np.sqrt(D))
  expected /= expected.sum(-1, keepdims=True)
  np.testing.assert_allclose(attention[:, 0], expected, rtol=1e-5)


def test_value_by_hand():
  # One neighbor: the weight is 1 whatever the key, so that every layer adds
  # chi(v) to z. z = (1, 2), v = (3,), chi(v) = (10, 20) v + (1, -1).
  chi = {"kernel": jnp.array([[10.0, 20.0]]), "bias": jnp.array([1.0, -1.0])}
  eye = {"kernel": jnp.eye(2)}
  layer = {"query": {**eye, "bias": jnp.zeros(2)}, "key": eye, "output": chi}
  inputs = (
    jnp.array([[1.0, 2.0]]),
    jnp.array([[[-5.0, 0.0]]]),
    jnp.array([[[3.0]]]),
  )
  variables = {"params": {"layer_0": layer, "layer_1": layer}}
  literal = MAM(num_layers=2).apply(variables, *inputs)
  np.testing.assert_array_equal(literal, [[32.0, 61.0]])
  chained = MAM(num_layers=2, residual="previous").apply(variables, *inputs)
  np.testing.assert_array_equal(chained, [[63.0, 120.0]])


def test_shared_layers_equal_copies_of_one_layer():
  inputs = make_inputs()
  shared = MAM(num_layers=3, share_layers=True, qk_init="lecun_normal")
  params = shared.init(jax.random.key(0), *inputs)["params"]
  copies = {f"layer_{i}": params["layer_0"] for i in range(3)}
  np.testing.assert_array_equal(
    shared.apply({"params": params}, *inputs),
    MAM(num_layers=3).apply({"params": copies}, *inputs),
  )


def test_input_scale_ignores_the_length_of_query_and_keys_in_attention():
  query, keys, values = make_inputs()
  module = MAM(num_layers=1)
  params = module.init(jax.random.key(0), query, keys, values)["params"]
  run = lambda q, k: module.apply(
    {"params": params}, q, k, values, return_attention=True
  )
  refined, attention = run(query, keys)
  longer, same = run(3 * query, 7 * keys)
  np.testing.assert_allclose(attention, same, rtol=1e-5)
  # The residual is the query as given.
  np.testing.assert_allclose(longer - refined, 2 * query, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"residual": "prev"}, "unknown residual 'prev'; did you mean 'previous'"),
    ({"qk_init": "eye"}, "unknown qk_init 'eye'.*identity, lecun_normal"),
    ({"input_scale": "sqrt"}, "unknown input_scale 'sqrt'; did you mean"),
    ({"value_scale": "l2"}, "unknown value_scale 'l2'"),
    (
      {"value_fusion": "separated"},
      "unknown value_fusion 'separated'; did you mean",
    ),
    ({"norm": "layer"}, "unknown norm 'layer'; known: None, qk"),
    ({"num_heads": 2}, "`num_heads` is 2, which does not divide .* 5"),
    ({"attention_temperature": 0.0}, "`attention_temperature` is 0.0"),
    ({"attention_temperature": "learn"}, "did you mean 'learned'"),
    ({"num_layers": 0}, "`num_layers` is 0; expected at least 1"),
    ({"neighbor_dropout": 1.0}, "`neighbor_dropout` is 1.0; expected a rate"),
    ({"dropout": -0.1}, r"`dropout` is -0.1; expected a rate in \[0, 1\)"),
  ],
)
def test_wrong_option_is_named(options, message):
  with pytest.raises(ValueError, match=message):
    MAM(**options).init(jax.random.key(0), *make_inputs())


# Several value encoders, memory sources, folding, stacking.


def noisy(params, seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: x + jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), params
  )


@pytest.mark.parametrize("value_fusion", ["concatenate", "separate"])
@pytest.mark.parametrize("num_heads", [1, 5])
def test_several_value_encoders_equal_equations(value_fusion, num_heads):
  query, keys, values = make_inputs()
  visual = make_inputs(1, dv=2)[2]
  mask = np.random.default_rng(2).random((B, K)) < 0.6
  options = {
    "num_layers": 2,
    "num_heads": num_heads,
    "value_fusion": value_fusion,
    "value_scale": "sqrt_d",
  }
  module = MAM(**options)
  inputs = (query, keys, (values, visual), mask)
  params = noisy(module.init(jax.random.key(0), *inputs)["params"])
  got, attention = module.apply(
    {"params": params}, *inputs, return_attention=True
  )
  exact = [np.asarray(x, np.float64) for x in (query, keys, values, visual)]
  expected, weights = reference.mam(
    reference.to_numpy(params), *exact[:2], exact[2:], mask, **options
  )
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(attention, weights, rtol=1e-4, atol=1e-6)


def test_separate_attentions_have_parameters_of_their_own():
  query, keys, values = make_inputs()
  inputs = (query, keys, (values, values[..., :2]))
  module = MAM(num_layers=1, value_fusion="separate")
  params = module.init(jax.random.key(0), *inputs)["params"]
  assert shapes(params) == {
    f"layer_0/value_{i}/{name}": shape
    for i, width in enumerate((DV, 2))
    for name, shape in {**LAYER, "output/kernel": (width, D)}.items()
  }


def test_wrong_shape_of_one_of_several_values_is_named():
  query, keys, values = make_inputs()
  with pytest.raises(ValueError, match=r"`values\[1\]` has shape \(3, 6, 11\)"):
    MAM().init(jax.random.key(0), query, keys, (values, values[:, :6]))


def test_source_gate_multiplies_the_weights_of_a_source():
  inputs = make_inputs()
  sources = np.array([[0, 1, 2, 2, 0, 1, 0]] * B, np.int32)
  module = MAM(num_layers=1, source_gate=3)
  params = module.init(jax.random.key(0), *inputs, sources=sources)["params"]
  run = lambda params: module.apply(
    {"params": params}, *inputs, sources=sources, return_attention=True
  )[1][:, 0]
  start = run(params)
  plain = MAM(num_layers=1).apply(
    {"params": params}, *inputs, return_attention=True
  )[1][:, 0]
  np.testing.assert_allclose(start, plain, rtol=1e-6)
  gates = np.array([2.0, 0.5, 1.0], np.float32)
  params["layer_0"]["source_gate"] = jnp.log(gates)
  expected = start * gates[sources]
  np.testing.assert_allclose(
    run(params), expected / expected.sum(-1, keepdims=True), rtol=1e-5
  )


def test_source_gate_equals_equations():
  inputs = make_inputs()
  sources = np.array([[0, 1, 2, 2, 0, 1, 0]] * B, np.int32)
  module = MAM(num_layers=3, source_gate=3)
  params = module.init(jax.random.key(0), *inputs, sources=sources)["params"]
  params = noisy(params)
  got = module.apply({"params": params}, *inputs, sources=sources)
  expected, _ = reference.mam(
    reference.to_numpy(params),
    *(np.asarray(x, np.float64) for x in inputs),
    np.ones((B, K), bool),
    sources=sources,
    num_layers=3,
  )
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_source_outside_the_gate_gives_nan_rather_than_anothers_weight():
  inputs = make_inputs()
  module = MAM(num_layers=1, source_gate=2)
  sources = np.zeros((B, K), np.int32)
  params = module.init(jax.random.key(0), *inputs, sources=sources)["params"]
  sources[1, 3] = 2
  got = np.asarray(module.apply({"params": params}, *inputs, sources=sources))
  assert np.isnan(got).any(axis=-1).tolist() == [False, True, False]


@pytest.mark.parametrize(
  ("sources", "message"),
  [
    (None, "`sources` is missing"),
    (np.zeros((B, K - 1), np.int32), r"`sources` has shape \(3, 6\)"),
    (np.zeros((B, K), np.float32), "`sources` has type float32; expected int"),
  ],
)
def test_wrong_sources_are_named(sources, message):
  with pytest.raises(ValueError, match=message):
    MAM(source_gate=2).init(jax.random.key(0), *make_inputs(), sources=sources)


@pytest.mark.parametrize(
  "options",
  [
    {},
    {"num_heads": 5},
    {"share_layers": True},
    {"scan_layers": True},
    {"value_fusion": "separate"},
    {"norm": "qk", "attention_temperature": "learned"},
  ],
)
def test_folding_changes_parameters_but_not_outputs(options):
  inputs = make_inputs()
  module = MAM(num_layers=3, **options)
  params = noisy(module.init(jax.random.key(0), *inputs)["params"])
  folded = fold_for_inference(params, module.num_heads)
  light = module.clone(folded=True)
  wanted = light.init(jax.random.key(0), *inputs)["params"]
  assert shapes(folded) == shapes(wanted)
  for got, want in zip(
    light.apply({"params": folded}, *inputs, return_attention=True),
    module.apply({"params": params}, *inputs, return_attention=True),
    strict=True,
  ):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_folding_halves_the_parameters_of_the_attention():
  params = MAM(num_layers=1).init(jax.random.key(0), *make_inputs())["params"]
  assert shapes(fold_for_inference(params)) == {
    "layer_0/folded/kernel": (D, D),
    "layer_0/folded/bias": (D,),
    "layer_0/output/kernel": (DV, D),
    "layer_0/output/bias": (D,),
  }


def test_folding_reaches_into_a_classifier_and_leaves_the_rest():
  inputs = make_inputs()
  model = build("mam", 13, num_layers=2)
  params = noisy(model.init(jax.random.key(0), *inputs)["params"])
  light = build("mam", 13, num_layers=2, folded=True)
  np.testing.assert_allclose(
    light.apply({"params": fold_for_inference(params)}, *inputs),
    model.apply({"params": params}, *inputs),
    rtol=1e-4,
    atol=1e-5,
  )


def test_stacked_layers_equal_a_loop_and_convert_back():
  inputs = make_inputs()
  # Eleven, because layer_10 sorts before layer_2 as text.
  loop = MAM(num_layers=11, qk_init="lecun_normal")
  params = noisy(loop.init(jax.random.key(0), *inputs)["params"])
  scan = loop.clone(scan_layers=True)
  stacked = stack_layers(params)
  wanted = scan.init(jax.random.key(0), *inputs)["params"]
  assert shapes(stacked) == shapes(wanted)
  np.testing.assert_allclose(
    scan.apply({"params": stacked}, *inputs),
    loop.apply({"params": params}, *inputs),
    rtol=1e-5,
    atol=1e-5,
  )
  jax.tree.map(np.testing.assert_array_equal, unstack_layers(stacked), params)


def test_scanned_layers_start_differently():
  module = MAM(num_layers=2, qk_init="lecun_normal", scan_layers=True)
  params = module.init(jax.random.key(0), *make_inputs())["params"]
  first, second = params["layers"]["query"]["kernel"]
  assert np.any(np.asarray(first) != np.asarray(second))


def test_weights_of_single_heads_are_sown():
  inputs = make_inputs()
  module = MAM(num_layers=2, num_heads=5)
  params = noisy(module.init(jax.random.key(0), *inputs)["params"])
  (_, mean), state = module.apply(
    {"params": params},
    *inputs,
    return_attention=True,
    mutable=["intermediates"],
  )
  (heads,) = state["intermediates"]["layer_1"]["head_weights"]
  assert heads.shape == (B, 5, K)
  np.testing.assert_allclose(heads.mean(1), mean[:, 1], rtol=1e-6)


# The projection that is not computed (DESIGN decision 6).


def _classifiers(num_classes, num_layers):
  ours = Classifier(
    head=Linear(num_classes),
    fusion=MAM(
      num_layers=num_layers, qk_init="lecun_normal", input_scale="none"
    ),
    input_scale="none",
  )
  return ours, PlainClassifier(num_classes, num_layers)


def test_reassociated_projection_equals_plain_and_so_does_its_gradient():
  inputs = make_inputs(1, b=5, k=31, d=64, dv=47)
  labels = np.arange(5)
  ours, plain = _classifiers(num_classes=13, num_layers=3)
  params = plain.init(jax.random.key(0), *inputs)["params"]
  own = ours.init(jax.random.key(0), *inputs)["params"]
  assert shapes(own) == shapes(params)

  def loss(model, params):
    logits = model.apply({"params": params}, *inputs)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), logits

  (_, got), got_grad = jax.jit(
    jax.value_and_grad(lambda p: loss(ours, p), has_aux=True)
  )(params)
  # The oracle is plain Flax code, which strict promotion does not suit.
  with jax.numpy_rank_promotion("allow"):
    (_, want), want_grad = jax.jit(
      jax.value_and_grad(lambda p: loss(plain, p), has_aux=True)
    )(params)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    got_grad,
    want_grad,
  )


def test_reassociated_projection_saves_fifteen_fold_by_xla_count():
  inputs = make_inputs(2, b=2, k=100, d=768, dv=768)
  labels = np.array([0, 999])

  def flops(model):
    def loss(params, query, keys, values):
      logits = model.apply({"params": params}, query, keys, values)
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
      return losses.mean()

    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    step = jax.jit(jax.value_and_grad(loss)).lower(params, *inputs).compile()
    return step.cost_analysis()["flops"] / 2 / 1e9  # GFLOP an example

  ours, plain = _classifiers(num_classes=1000, num_layers=8)
  own = flops(ours)
  with jax.numpy_rank_promotion("allow"):
    straightforward = flops(plain)
  assert own < 0.11  # 0.093 in the prototype
  assert straightforward > 15 * own


def test_bias_of_psi_k_would_have_no_gradient():
  # Why `key` has no bias: a constant on all logits of a softmax.
  query, keys, values = make_inputs()

  def refined(bias):
    logits = jnp.einsum("bd,bkd->bk", query, keys + bias[None, None, :])
    return jnp.einsum("bk,bkv->bv", jax.nn.softmax(logits), values)

  jacobian = jax.jacobian(refined)(jnp.ones(D))
  np.testing.assert_allclose(jacobian, 0.0, atol=1e-5)
