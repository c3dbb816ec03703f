"""Gathering neighbours and one step of training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retrieval_aug import models
from retrieval_aug.training import optimizer
from retrieval_aug.training import step as steps
from retrieval_aug.training.loss import make_loss, sample_mix
from tests.training import tiny


def _optimizer():
  return optimizer.make(
    learning_rate=0.1,
    weight_decay=0.1,
    total_steps=7,
    warmup_steps=1,
    gradient_clip=1.0,
  )


@functools.cache
def _compiled(model, mixup, **options):
  """Compiled once a model: Flax modules compare by their attributes."""
  loss = make_loss(
    "lace", np.ones(tiny.CLASSES, int), tau=1.0, label_smoothing=0.1
  )
  loss = steps.make_loss(model, loss, mixup=mixup)
  return jax.jit(steps.make_train_step(loss, _optimizer(), **options))


def _init(model, seed=0, **options):
  init = functools.partial(
    steps.init, model, _optimizer(), _memory(), tiny.D, tiny.K, **options
  )
  return jax.jit(init)(seed)


def _run(model, memory, batch, seed=0, count=2, mixup=0.0, **options):
  """(state, metrics) after a few steps on one batch; `seed` is dropout's."""
  train_step = _compiled(model, mixup, **options)
  state = _init(model, ema="ema" in options)
  state = state._replace(rng=jax.random.key_data(jax.random.key(seed)))
  told = []
  for number in range(count):
    state, metrics = train_step(state, memory, batch, np.int32(number))
    told.append(jax.device_get(metrics))
  return jax.device_get(state), told


def _train_step(*arguments, **options):
  """(params, losses) after a few steps on one batch; see `_run`."""
  state, told = _run(*arguments, **options)
  assert int(state.step) == len(told) and all(x.ok for x in told)
  return state.params, [float(x.loss) for x in told]


def _memory(change=None):
  keys, values, *_ = tiny.memory()
  if change is not None:
    keys[0], values[0] = change, change
  return steps.Memory(jnp.asarray(keys), jnp.asarray(values))


def _batch():
  return {n: jnp.asarray(x) for n, x in tiny.examples(13).items()}


def _assert_equal(one, two):
  jax.tree.map(np.testing.assert_array_equal, one, two)


def _gathered(memory, rows):
  found = steps.inputs(memory, {"rows": rows})
  assert found["sources"] is None and found["labels"] is None
  return found["keys"], found["values"], found["mask"]


def test_gather_takes_the_named_rows():
  memory = _memory()
  rows = jnp.array([[3, 0, 22], [7, 7, 1]], jnp.int32)
  keys, values, mask = _gathered(memory, rows)
  np.testing.assert_array_equal(keys, np.asarray(memory.keys)[np.asarray(rows)])
  np.testing.assert_array_equal(values[1, 2], memory.values[1])
  assert keys.shape == (2, 3, tiny.D) and values.shape == (2, 3, tiny.DV)
  assert mask.dtype == bool and mask.all()


def test_gather_masks_pads_with_something_finite_in_their_place():
  rows = jnp.array([[3, -1, -1]], jnp.int32)
  keys, values, mask = _gathered(_memory(), rows)
  assert mask.tolist() == [[True, False, False]]
  assert jnp.isfinite(keys).all() and jnp.isfinite(values).all()


def _pads_only_at_row_0():
  """A batch whose lists never name row 0, which stands in for pads."""
  batch = _batch()
  batch["rows"] = jnp.where(batch["rows"] == 0, 1, batch["rows"])
  assert (batch["rows"] == -1).any()
  return batch


@pytest.mark.parametrize("name", ["mam", "mean_knn"])
def test_what_stands_in_a_masked_place_never_matters(name):
  model = tiny.model() if name == "mam" else models.build(name, tiny.CLASSES)
  batch = _pads_only_at_row_0()
  params, losses = _train_step(model, _memory(), batch)
  for change in (0.0, 1e4, -1e4):
    other_params, other_losses = _train_step(model, _memory(change), batch)
    assert losses == other_losses
    _assert_equal(params, other_params)


def test_an_example_without_any_neighbor_trains():
  batch = _batch()
  batch["rows"] = batch["rows"].at[4].set(-1)
  params, losses = _train_step(tiny.model(), _memory(), batch)
  assert np.isfinite(losses).all()
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


def test_parameters_are_a_function_of_the_seed_alone():
  model = tiny.model(qk_init="lecun_normal")
  first, again, other = (_init(model, seed).params for seed in (0, 0, 1))
  _assert_equal(first, again)
  assert (first["head"]["kernel"] != other["head"]["kernel"]).any()


def test_dropout_is_a_function_of_the_seed_and_the_step():
  """The batch is the same at both steps, and the rate of the first is 0."""
  batch, memory = _batch(), _memory()
  one = _train_step(tiny.model(), memory, batch, seed=3)
  _assert_equal(one, _train_step(tiny.model(), memory, batch, seed=3))
  other = _train_step(tiny.model(), memory, batch, seed=4)
  assert one[1][0] != other[1][0]
  assert one[1][0] != one[1][1]


def test_mixup_is_a_function_of_the_seed_and_the_step():
  batch, memory, model = _batch(), _memory(), tiny.model(neighbor_dropout=0.0)
  one = _train_step(model, memory, batch, seed=3, mixup=1.0)
  _assert_equal(one, _train_step(model, memory, batch, seed=3, mixup=1.0))
  assert one[1] != _train_step(model, memory, batch, seed=4, mixup=1.0)[1]
  assert one[1] != _train_step(model, memory, batch, seed=3)[1]


def test_mixup_mixes_what_the_head_sees_and_the_labels():
  """The first loss, from the model's own logits of the mixed read-outs."""
  batch, memory = _batch(), _memory()
  model = models.build("linear", tiny.CLASSES)
  _, (loss, _) = _train_step(model, memory, batch, seed=5, mixup=0.4)
  params = _init(model).params
  key = jax.random.fold_in(jax.random.fold_in(jax.random.key(5), 0), 1)
  partner, share = sample_mix(key, 13, 0.4)
  z = batch["query"] / jnp.linalg.norm(batch["query"], axis=1, keepdims=True)
  z = np.asarray(z * np.sqrt(tiny.D), np.float64)
  wanted = 0.9 * np.eye(tiny.CLASSES)[batch["label"]] + 0.1 / tiny.CLASSES
  share = np.asarray(share, np.float64)[:, None]
  mixed = lambda x: share * x + (1 - share) * x[np.asarray(partner)]
  logits = mixed(z) @ np.asarray(params["head"]["kernel"], np.float64)
  log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
  expected = -(mixed(wanted) * log_p).sum(axis=1).mean()
  assert loss == pytest.approx(expected, rel=1e-5)


def test_gather_takes_sources_and_labels_along():
  memory = _memory()._replace(
    sources=jnp.arange(tiny.U) % 3, labels=jnp.arange(tiny.U) - 1
  )
  found = steps.inputs(memory, {"rows": jnp.array([[3, 0, -1]], jnp.int32)})
  assert found["sources"].tolist() == [[0, 0, 0]]
  assert found["labels"].tolist() == [[2, -1, -1]]
  assert found["mask"].tolist() == [[True, True, False]]


def test_steps_lower_the_loss_of_their_batch():
  _, losses = _train_step(tiny.model(), _memory(), _batch(), count=7)
  assert losses[-1] < 0.8 * losses[0]


def test_prediction_does_not_drop_neighbors_and_weights_sum_to_one():
  model, memory, batch = tiny.model(), _memory(), _batch()
  params = _init(model).params
  predict = jax.jit(steps.make_predict_step(model))
  logits, weights = predict(params, memory, batch)
  again, _ = predict(params, memory, batch)
  np.testing.assert_array_equal(logits, again)
  assert logits.shape == (13, tiny.CLASSES)
  assert weights.shape == (13, 1, tiny.K)
  np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-5)
  masked = np.broadcast_to((batch["rows"] < 0)[:, None], weights.shape)
  np.testing.assert_array_equal(np.asarray(weights)[masked], 0)


def test_a_working_set_in_half_precision_is_what_it_says_exactly():
  memory, batch = _memory(), _batch()
  half = jax.tree.map(lambda x: x.astype(jnp.float16), memory)
  whole = jax.tree.map(lambda x: x.astype(jnp.float32), half)
  one = _train_step(tiny.model(), half, batch)
  _assert_equal(one, _train_step(tiny.model(), whole, batch))


def test_neighbors_that_come_with_the_batch_are_those_gathered():
  memory, batch = _memory(), _batch()
  found = steps.gather(memory, batch["rows"])
  joined = batch | {"neighbors": found}
  one = _train_step(tiny.model(), memory, batch)
  other = _train_step(tiny.model(), steps.Memory(None, None), joined)
  _assert_equal(one, other)


@pytest.mark.parametrize(
  ("name", "options", "expected"),
  [
    ("linear", {}, ()),
    ("mlp", {}, ()),
    ("mean_knn", {}, ("values",)),
    ("retformer", {"num_layers": 1, "max_neighbors": 5}, ("keys", "values")),
    ("mam", {"num_layers": 1}, ("keys", "values")),
    (
      "mam",
      {"num_layers": 1, "source_gate": 3},
      ("keys", "values", "sources"),
    ),
    ("vote", {}, ("keys", "labels")),
  ],
)
def test_a_model_needs_what_it_looks_at(name, options, expected):
  ones = np.zeros(tiny.U, np.int32)
  memory = tiny.memory()._replace(sources=ones, labels=ones)
  model = models.build(name, tiny.CLASSES, **options)
  assert steps.needed(model, memory, tiny.D, tiny.K) == expected


def test_of_several_values_all_are_needed():
  keys, values, *_ = tiny.memory()
  memory = steps.Memory(keys.astype("f2"), (values.astype("f2"), values))
  found = steps.needed(tiny.model(), memory, tiny.D, tiny.K)
  assert found == ("keys", "values")


def _plain():
  """A model in whose training nothing is drawn."""
  return tiny.model(neighbor_dropout=0.0)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_gradients_are_those_of_the_batch(parts):
  batch = {n: x[:12] for n, x in _batch().items()}
  whole, told = _run(_plain(), _memory(), batch)
  state, in_parts = _run(_plain(), _memory(), batch, accumulate=parts)
  for one, two in zip(told, in_parts):
    np.testing.assert_allclose(two, one, rtol=2e-5)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
    state.params,
    whole.params,
  )


def test_parts_of_a_batch_draw_apart():
  """The same example four times: with one draw all parts would agree."""
  batch = {n: jnp.repeat(x[:1], 4, axis=0) for n, x in _batch().items()}
  one = _train_step(tiny.model(neighbor_dropout=0.5), _memory(), batch)
  parts = _train_step(
    tiny.model(neighbor_dropout=0.5), _memory(), batch, accumulate=4
  )
  assert one[1] != parts[1]


def test_the_average_follows_the_parameters():
  first = _init(tiny.model(), ema=True)
  _assert_equal(first.ema, first.params)
  expected = jax.device_get(first.params)
  for count in (1, 2, 3):
    state, _ = _run(tiny.model(), _memory(), _batch(), count=count, ema=0.75)
    expected = jax.tree.map(
      lambda old, new: 0.75 * old + 0.25 * new, expected, state.params
    )
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
      state.ema,
      expected,
    )


def test_without_an_average_none_is_kept():
  assert _run(tiny.model(), _memory(), _batch())[0].ema is None


@pytest.mark.parametrize("where", ["query", "memory"])
def test_a_step_that_is_not_finite_changes_nothing_and_freezes_the_state(where):
  """Nor does a good one after it, until the host has looked."""
  batch, memory = _batch(), _memory()
  good, bad = (memory, batch), (memory, batch)
  if where == "query":
    bad = memory, batch | {"query": batch["query"].at[3, 2].set(jnp.nan)}
  else:
    bad = memory._replace(keys=memory.keys.at[7, 1].set(jnp.inf)), batch
  step = _compiled(tiny.model(), 0.0, ema=0.5)
  state = _init(tiny.model(), ema=True)
  state, told = step(state, *good, np.int32(0))
  assert told.ok and int(state.step) == 1
  before = jax.device_get(state)
  for number, arguments in ((1, bad), (2, good)):
    state, told = step(state, *arguments, np.int32(number))
    assert not told.ok
    _assert_equal(jax.device_get(state), before)
  state, told = step(state, *good, np.int32(1))
  assert told.ok and int(state.step) == 2


def test_computing_activations_again_changes_no_result_and_needs_less():
  batch, memory = _batch(), _memory()
  model = tiny.model(num_layers=3)
  loss = make_loss("cross_entropy", np.ones(tiny.CLASSES, int))
  sizes, states = [], []
  for remat in (False, True):
    loss_of = steps.make_loss(model, loss, remat=remat)
    step = jax.jit(steps.make_train_step(loss_of, _optimizer()))
    wide = {n: jnp.repeat(x, 50, axis=0) for n, x in batch.items()}
    arguments = _init(model), memory, wide, np.int32(0)
    compiled = step.lower(*arguments).compile()
    sizes.append(compiled.memory_analysis().temp_size_in_bytes)
    states.append(jax.device_get(step(*arguments)[0].params))
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), *states
  )
  assert sizes[1] < sizes[0]
