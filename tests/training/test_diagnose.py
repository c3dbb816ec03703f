"""What is not finite in a step, and whose: named before all that follows it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from retrieval_aug import models
from retrieval_aug.training import diagnose

B, D, DV, K, CLASSES = 7, 12, 5, 3, 4
IDS = [f"image_{i}" for i in range(B)]


def _normal(*shape):
  rng = np.random.default_rng(sum(shape))
  return rng.normal(size=shape).astype(np.float32)


def _inputs(k=K):
  return {
    "query": _normal(B, D),
    "label": np.arange(B, dtype=np.int32) % CLASSES,
    "neighbors": {
      "keys": _normal(B, k, D),
      "values": _normal(B, k, DV),
      "mask": np.arange(B * k).reshape(B, k) % 5 > 0,
    },
  }


def _logits(model, params, inputs, query=None):
  return model.apply(
    {"params": params},
    inputs["query"] if query is None else query,
    **inputs["neighbors"],
    train=True,
    rngs={"dropout": jax.random.key(1)},
  )


def _losses(logits, inputs):
  labels = inputs["label"]
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def _loss_of(model):
  def call(params, inputs):
    logits = _logits(model, params, inputs)
    return _losses(logits, inputs), logits

  return call


def _problem(name, inputs=None, **options):
  """(loss_of, parameters, inputs) of a model where all is finite."""
  model = models.build(name, CLASSES, **options)
  inputs = inputs or _inputs()
  shapes = jax.eval_shape(
    lambda: model.init(
      jax.random.key(0), inputs["query"], **inputs["neighbors"]
    )
  )
  draw = lambda x: _normal(*x.shape) / np.float32(D)
  return _loss_of(model), jax.tree.map(draw, shapes["params"]), inputs


def _assert_bad(bad, name, kind, count=None, sample=None, examples=None):
  assert (bad.name, bad.kind) == (name, kind)
  if count is not None:
    assert bad.count == count
  if sample is not None:
    assert bad.sample == sample
  if examples is None:
    assert bad.examples is None
  else:
    np.testing.assert_array_equal(bad.examples, examples)


@pytest.mark.parametrize(
  ("name", "options"),
  [
    ("mlp", {}),
    ("mean_knn", {}),
    ("rac", {}),
    ("retformer", {"num_layers": 1, "streams": "image_only"}),
    ("mam", {"scan_layers": True, "remat": True}),
  ],
)
def test_every_model_is_fine_until_a_query_is_not(name, options):
  inputs = _inputs(1 if name == "rac" else K)
  loss_of, params, _ = _problem(name, inputs, **options)
  assert diagnose.first_bad(loss_of, params, inputs) is None
  inputs["query"][2, 3:5] = np.nan
  bad = diagnose.first_bad(loss_of, params, inputs)
  _assert_bad(bad, "batch/query", "input", 2, "nan", [2])
  assert (bad.shape, bad.dtype) == ((B, D), "float32")


def test_a_parameter_comes_before_the_batch():
  loss_of, params, inputs = _problem("mam", num_layers=1)
  params["fusion"]["layer_0"]["query"]["kernel"][3, 4] = -np.inf
  params["head"]["bias"][:] = np.nan
  inputs["query"][:] = np.nan
  bad = diagnose.first_bad(loss_of, params, inputs)
  _assert_bad(bad, "fusion/layer_0/query/kernel", "parameter", 1, "-inf")


@pytest.mark.parametrize("kind", [np.float16, np.float32, jnp.bfloat16])
def test_a_key_is_found_though_a_mask_hides_it(kind):
  loss_of, params, inputs = _problem("mam", num_layers=1)
  neighbors = inputs["neighbors"]
  neighbors["mask"][4, 1] = False
  keys = neighbors["keys"].astype(kind)
  keys[4, 1, 2], keys[6, 0] = np.inf, np.nan
  neighbors["keys"] = jnp.asarray(keys)
  bad = diagnose.first_bad(loss_of, params, inputs)
  count = 1 + D
  _assert_bad(bad, "batch/neighbors/keys", "input", count, "inf", [4, 6])
  assert bad.dtype == jnp.dtype(kind).name


def test_what_overflows_in_half_precision_is_named_with_its_examples():
  loss_of, params, inputs = _problem("mam", num_layers=1, dtype="float16")
  inputs["neighbors"]["keys"][3, 0] = -1e5
  bad = diagnose.first_bad(loss_of, params, inputs)
  name = "fusion._run_layers (input neighbors/keys)"
  _assert_bad(bad, name, "activation", D, "-inf", [3])
  assert bad.dtype == "float16"


def test_the_inner_module_is_named_before_the_one_around_it():
  loss_of, params, inputs = _problem("mlp")
  params["head"]["hidden"]["kernel"] *= 1e25
  params["head"]["output"]["kernel"] *= 1e25
  bad = diagnose.first_bad(loss_of, params, inputs)
  _assert_bad(bad, "head/output (output)", "activation", examples=range(B))


def test_what_no_module_gave_is_named_as_the_input_of_one():
  """As the query from an encoder whose own layers are traced."""
  model = models.build("linear", CLASSES)
  _, params, inputs = _problem("linear")

  def loss_of(params, inputs):
    query = jax.lax.map(
      lambda x: x / jnp.where(x[0] > 1e9, 0.0, 1.0), inputs["query"]
    )
    logits = _logits(model, params, inputs, query)
    return _losses(logits, inputs), logits

  inputs["query"][5, 0] = 2e9
  bad = diagnose.first_bad(loss_of, params, inputs)
  _assert_bad(bad, "Classifier (input query)", "activation", D, None, [5])


def test_of_layers_that_are_traced_the_method_around_them_is_named():
  loss_of, params, inputs = _problem("mam", num_layers=1, remat=True)
  params["fusion"]["layer_0"]["output"]["kernel"][:] = 3e38
  # The others find nothing.
  inputs["neighbors"]["mask"][np.arange(B) != 1] = False
  bad = diagnose.first_bad(loss_of, params, inputs)
  name = "fusion._run_layers (output 0)"
  _assert_bad(bad, name, "activation", examples=[1])


class _Patches(nn.Module):
  """Of each example two rows, so that the first axis is not the batch."""

  @nn.compact
  def __call__(self, x):
    x = self._halves(x)
    return nn.Dense(CLASSES)(x).reshape(B, 2, CLASSES).sum(axis=1)

  def _halves(self, x):
    return jnp.exp(x.reshape(2 * B, -1))


def test_examples_are_those_without_a_loss_where_rows_are_others():
  model, inputs = _Patches(), _inputs()
  params = model.init(jax.random.key(0), inputs["query"])["params"]

  def loss_of(params, inputs):
    logits = model.apply({"params": params}, inputs["query"])
    return _losses(logits, inputs), logits

  inputs["query"][[2, 6], -1] = 1e3
  bad = diagnose.first_bad(loss_of, params, inputs)
  _assert_bad(bad, "_Patches._halves (output)", "activation", 2, "inf", [2, 6])
  assert bad.shape == (2 * B, D // 2)


def _after_linear(logits_to, losses_of):
  """A `loss_of` that goes on from the logits of a linear model."""
  model = models.build("linear", CLASSES)

  def loss_of(params, inputs):
    logits = logits_to(_logits(model, params, inputs))
    return losses_of(logits, inputs), logits

  return loss_of, *_problem("linear")[1:]


def test_logits_and_losses_are_looked_at_after_the_modules():
  spoil = lambda x: x.at[3].set(jnp.nan)
  bad = diagnose.first_bad(*_after_linear(spoil, _losses))
  _assert_bad(bad, "logits", "logits", CLASSES, "nan", [3])

  def taken(logits, inputs):  # a class that does not exist has no logit
    log_p = jax.nn.log_softmax(logits)
    labels = inputs["label"][:, None]
    return -jnp.take_along_axis(log_p, labels, axis=1, mode="fill")[:, 0]

  loss_of, params, inputs = _after_linear(lambda x: x, taken)
  inputs["label"][5] = CLASSES
  bad = diagnose.first_bad(loss_of, params, inputs)
  _assert_bad(bad, "loss", "loss", 1, "nan", [5])


def test_finite_losses_may_have_no_finite_mean():
  huge = lambda logits, _: 3e38 * jax.nn.sigmoid(logits[:, 0] + 10)
  bad = diagnose.first_bad(*_after_linear(lambda x: x, huge))
  _assert_bad(bad, "loss (mean)", "loss", 1, "inf")


@pytest.mark.parametrize(
  ("name", "sample", "of_bias"),
  [
    ("head/bias", "nan", lambda b: jnp.sqrt(jnp.sum(b**2))),
    ("gradient (global norm)", "inf", lambda b: 1e25 * b[0]),
  ],
)
def test_gradients_are_the_last_to_be_looked_at(name, sample, of_bias):
  loss_of, params, inputs = _problem("linear")
  params["head"]["bias"][:] = 0.0  # where a root has no slope

  def with_bias(params, inputs):
    losses, logits = loss_of(params, inputs)
    return losses + of_bias(params["head"]["bias"]), logits

  bad = diagnose.first_bad(with_bias, params, inputs)
  _assert_bad(bad, name, "gradient", sample=sample)


def _bad(name="batch/query", kind="input", dtype="float32", examples=None):
  examples = None if examples is None else np.array(examples)
  return diagnose.Bad(name, kind, (B, D), dtype, 2, "nan", examples)


def _message(bad, saved=None, **processes):
  return diagnose.message(
    bad, what="train mam seed 0", step=12, ids=IDS, saved=saved, **processes
  )


def test_a_message_names_step_tensor_examples_and_remedy():
  assert _message(_bad(examples=[2, 5])) == (
    "train mam seed 0: step 12 is not finite, first in the input batch/query, "
    "float32 [7, 12]: 2 numbers (nan) of 'image_2', 'image_5'; the images or "
    "embeddings are damaged, not the training: look at config.dataset, and "
    "delete what was made of it in the --workdir to have it embedded again. "
    "The last good checkpoint is kept."
  )


@pytest.mark.parametrize(
  ("bad", "wanted"),
  [
    (_bad("batch/neighbors/keys", examples=[1]), "config.memory"),
    (_bad("head/bias", "parameter"), "train.start_from"),
    (_bad("head/bias", "gradient"), "train.gradient_clip"),
    (_bad("head (output)", "activation"), "lower train.learning_rate"),
    (_bad("head (output)", "activation", "bfloat16"), "compute in float32"),
    (_bad("loss", "loss", examples=[1]), "in the loss, float32"),
    (_bad("loss", "loss", examples=range(4)), "'image_2' and 1 more;"),
    (_bad("loss", "loss", examples=range(B)), "of all 7 examples, 'image_0',"),
    (_bad("head/bias", "gradient"), "batch of 'image_0', 'image_1', 'image_2'"),
    (None, "its loss and gradient are when computed alone"),
  ],
)
def test_a_message_is_one_line_with_what_its_kind_needs(bad, wanted):
  text = _message(bad)
  assert wanted in text and "\n" not in text
  assert "step 12" in text and text.endswith("last good checkpoint is kept.")


def test_a_process_whose_part_is_finite_points_to_the_others():
  assert _message(None, processes=2) == (
    "train mam seed 0: step 12 is not finite, but is when computed on this "
    "process's part of the batch alone, 'image_0', 'image_1', 'image_2' and 4 "
    "more; see what the other processes say. The last good checkpoint is kept."
  )


@pytest.mark.parametrize("examples", [None, [1], range(4), range(B)])
def test_a_message_names_the_file_where_ids_are_left_out(examples):
  left_out = examples is None or len(examples) > 3
  assert (
    "nan_step_12.json"
    in _message(_bad(examples=examples), "R/nan_step_12.json")
  ) == left_out


def test_a_report_has_all_ids_as_json():
  found = diagnose.report(_bad(examples=[0, 2, 3, 5]), 12, np.array(IDS))
  assert json.loads(json.dumps(found)) == {
    "step": 12,
    "batch": IDS,
    "tensor": {
      "name": "batch/query",
      "kind": "input",
      "shape": [7, 12],
      "dtype": "float32",
      "count": 2,
      "sample": "nan",
    },
    "examples": ["image_0", "image_2", "image_3", "image_5"],
  }
  assert diagnose.report(None, 3, IDS)["tensor"] is None
