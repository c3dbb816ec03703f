"""Fine-tuning: where it starts, what it changes, and what it leaves alone."""

import dataclasses
import functools
import json
import logging
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from retrieval_aug import config, models
from retrieval_aug.common.errors import UserError
from retrieval_aug.memory import key_transform
from retrieval_aug.memory.table import Table
from retrieval_aug.training import evaluations, finetune, loop, optimizer, runs
from retrieval_aug.training import step as steps
from retrieval_aug.training.data import Data, read_examples
from retrieval_aug.training.loss import make_loss
from tests.training import tiny, tiny_images

AUGMENT = "inception_crop(0.3), flip"
SETTINGS = {
  "finetune": True,
  "augment": AUGMENT,
  "encoder_batch": 0,
  "epochs": 2.0,  # 9 steps of 8 of 37 examples
  "gradient_clip": 0.0,
}
STEPS = 9
DIMS = tiny_images.SEARCH["key_dims"]


def _load(workdir, splits=("train", "val", "test"), text=AUGMENT, **changes):
  artifact = tiny_images.neighbors_artifact(workdir, workdir / "neighbors")
  artifact = changes.pop("neighbors", artifact)
  given = {"encoder": tiny_images.encoder()} | changes
  caches = [
    finetune.cache_artifact(
      workdir / "images", Table(workdir / "queries"), s, {"augment": text}, 20
    )
    for s in splits
  ]
  return finetune.load(
    artifact, caches, items=lambda: tiny_images.dataset()[0], threads=2, **given
  )


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """An experiment after its search stage, with whitened keys."""
  folder = tmp_path_factory.mktemp("finetune")
  with jax.numpy_rank_promotion("raise"):
    tiny_images.embedded(folder)
    tiny_images.searched(folder, folder / "neighbors")
  return folder


@pytest.fixture(scope="module")
def tuning(workdir):
  with jax.numpy_rank_promotion("raise"):
    return _load(workdir)


def _data(workdir):
  """What runs see: the memory's own values are random."""
  artifact = tiny_images.neighbors_artifact(workdir, workdir / "neighbors")
  examples = read_examples(artifact, Table(workdir / "queries"))
  with np.load(workdir / "neighbors" / "key_transform.npz") as f:
    transform = key_transform.KeyTransform(f["mean"], f["matrix"])
  keys = transform(Table(workdir / "memory").keys())
  rng = np.random.default_rng(0)
  count = len(keys)
  memory = steps.Memory(
    keys.astype(np.float32),
    rng.normal(size=(count, 5)).astype(np.float32),
    np.zeros(count, np.int32),
    np.arange(count, dtype=np.int32) % tiny_images.CLASSES,
  )
  return Data(
    examples,
    memory,
    {s: e.neighbors.astype(np.int32) for s, e in examples.items()},
    np.bincount(examples["train"].labels),
    ["memory"],
    "data-1",
  )


@pytest.fixture(scope="module")
def data(workdir):
  return _data(workdir)


def _model(name="mam"):
  options = {"num_layers": 1, "neighbor_dropout": 0.3} if name == "mam" else {}
  return models.build(name, tiny_images.CLASSES, **options)


def _trainer(data, tuning, model=None, **changes):
  return loop.Trainer(
    model or _model(),
    tiny.settings(**SETTINGS | changes),
    data.memory,
    data.arrays("train", 5),
    data.class_counts,
    tuning,
  )


@pytest.fixture(scope="module")
def trainer(data, tuning):
  with jax.numpy_rank_promotion("raise"):
    return _trainer(data, tuning)


def _run(trainer, folder=None, seed=0):
  return jax.device_get(trainer.run(seed, folder))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, trainer):
  """An uninterrupted run: (its folder, its parameters)."""
  folder = tmp_path_factory.mktemp("whole")
  with jax.numpy_rank_promotion("raise"):
    return folder, _run(trainer, folder)


def _assert_equal(one, two):
  assert jax.tree.structure(one) == jax.tree.structure(two)
  jax.tree.map(np.testing.assert_array_equal, one, two)


def _refusal(call):
  with pytest.raises(UserError) as caught:
    call()
  message = str(caught.value)
  assert "\n" not in message
  return message


def _losses(folder):
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  found = [json.loads(line) for line in lines]
  assert [x["step"] for x in found] == list(range(1, len(found) + 1))
  return [x["loss"] for x in found]


def _init(model, data, tuning):
  """A state whose next step is the gradient."""
  return steps.init(
    model,
    optax.sgd(1.0),
    data.memory,
    DIMS,
    5,
    0,
    encoder_params=tuning.encoder.params,
  )


_TWO_DEVICES = """
import pathlib, sys, jax
from tests.training import test_finetune as t
assert len(jax.devices()) == 2
workdir, folder = map(pathlib.Path, sys.argv[1:])
trainer = t._trainer(t._data(workdir), t._load(workdir), encoder_batch=4)
trainer.run(0, folder)
"""


class TestTheQuery:
  @pytest.mark.parametrize("kind", ["none", "center", "pca", "whiten"])
  def test_is_the_stored_one_before_the_first_step(
    self, workdir, tmp_path, kind
  ):
    """Stored were float16 embeddings, transformed, in float16."""
    artifact = tiny_images.searched(workdir, tmp_path / "neighbors", kind)
    found = _load(workdir, ["test"], neighbors=artifact)
    queries = Table(workdir / "queries")
    stored = read_examples(artifact, queries)["test"].queries
    z = found.query(0)(found.encoder.params, found.images["test"][np.arange(7)])
    assert z.dtype == jnp.float32 and z.shape == stored.shape
    scale = np.abs(stored).max()
    np.testing.assert_allclose(z, stored, rtol=0, atol=3e-3 * scale)
    # And it is nobody else's.
    distance = np.linalg.norm(z[:, None] - stored[None], axis=-1)
    assert (distance.argmin(axis=1) == np.arange(7)).all()

  @pytest.mark.parametrize("at_once", [1, 3, 4, 7, 8, 99])
  def test_does_not_depend_on_how_many_are_encoded_at_once(
    self, tuning, at_once
  ):
    pixels = tuning.images["val"][np.array([0, 1, 2, 3, 4, 0, 2])]

    def value_and_gradient(count):
      query = tuning.query(count)
      loss = lambda params: (query(params, pixels) ** 2).sum()
      z = jax.jit(query)(tuning.encoder.params, pixels)
      return z, jax.jit(jax.grad(loss))(tuning.encoder.params)

    one, two = value_and_gradient(0), value_and_gradient(at_once)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)
    jax.tree.map(close, one, two)

  def test_is_encoded_by_so_many_and_no_more(self, tuning):
    seen = []

    def apply(params, pixels):
      seen.append(pixels.shape[0])
      return tiny_images.apply(params, pixels)

    query = finetune.query(apply, tuning.transform, 3)
    query(tuning.encoder.params, tuning.images["test"][np.arange(7)])
    assert set(seen) == {3}


class TestFrozenLayers:
  def _step(self, data, tuning, frozen):
    """The compiled step, its arguments, and the gradient that it takes."""
    model = _model("linear")
    loss = make_loss("lace", data.class_counts, tau=1.0, label_smoothing=0.1)
    arrays = data.arrays("val", 5)
    state = _init(model, data, tuning)
    batch = {n: arrays[n] for n in ("rows", "label")}
    batch["images"] = tuning.images["val"][np.arange(5)]
    loss_of = steps.make_loss(model, loss, query=tuning.query(0))
    step = steps.make_train_step(loss_of, optax.sgd(1.0), frozen=frozen)
    step = jax.jit(step, donate_argnums=0)
    arguments = (state, data.memory, batch, np.int32(0))
    compiled = step.lower(*arguments).compile()
    before = jax.device_get(state.params)
    after = jax.device_get(compiled(*arguments)[0].params)
    return compiled, jax.tree.map(lambda a, b: a - b, before, after)

  def test_have_no_gradient_and_the_others_have_the_same(self, data, tuning):
    factors = (("encoder/stem/.*", 0.0),)
    frozen = functools.partial(optimizer.frozen, lr_factors=factors)
    whole, everything = self._step(data, tuning, None)
    part, rest = self._step(data, tuning, frozen)
    assert np.abs(everything["encoder"]["stem"]["kernel"]).max() > 1e-4
    for x in jax.tree.leaves(rest["encoder"].pop("stem")):
      np.testing.assert_array_equal(x, 0)
    del everything["encoder"]["stem"]
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7),
      rest,
      everything,
    )
    # It is not computed and thrown away.
    flops = lambda compiled: compiled.cost_analysis()["flops"]
    assert flops(part) < 0.8 * flops(whole)


class TestTheGradient:
  def test_of_encoder_weights_is_that_of_finite_differences(self, data, tuning):
    """Of the whole loss of a linear model, in float64 by NumPy."""
    model = _model("linear")
    loss = make_loss("lace", data.class_counts, tau=1.0, label_smoothing=0.1)
    sgd = optax.sgd(1.0)  # a step is the gradient
    arrays = data.arrays("val", 5)
    state = _init(model, data, tuning)
    batch = {n: arrays[n] for n in ("rows", "label")}
    batch["images"] = tuning.images["val"][np.arange(5)]
    before = jax.device_get(state.params)
    loss_of = steps.make_loss(model, loss, query=tuning.query(2))
    train_step = jax.jit(steps.make_train_step(loss_of, sgd))
    state, told = train_step(state, data.memory, batch, np.int32(0))
    after = jax.device_get(state.params)
    gradient = jax.tree.map(lambda a, b: a - b, before, after)

    prior = np.log(data.class_counts / data.class_counts.sum())
    wanted = 0.9 * np.eye(4)[batch["label"]] + 0.1 / 4

    def by_numpy(params):
      p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
      x = (batch["images"].reshape(5, -1) - 127.5) / 127.5
      stem, top = p["encoder"]["stem"], p["encoder"]["top"]
      raw = np.tanh(x @ stem["kernel"] + stem["bias"]) @ top["kernel"]
      z = (raw + top["bias"] - tuning.transform.mean) @ tuning.transform.matrix
      z = z / np.linalg.norm(z, axis=1, keepdims=True) * np.sqrt(DIMS)
      logits = z @ p["head"]["kernel"] + p["head"]["bias"] + prior
      log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
      return -(wanted * log_p).sum(axis=1).mean()

    assert float(told.loss) == pytest.approx(by_numpy(before), rel=1e-4)
    rng = np.random.default_rng(1)
    for layer, name in (
      ("stem", "kernel"),
      ("stem", "bias"),
      ("top", "kernel"),
    ):
      found = gradient["encoder"][layer][name]
      assert np.abs(found).max() > 1e-4
      for _ in range(4):
        at = tuple(int(rng.integers(n)) for n in found.shape)

        def moved(by, layer=layer, name=name, at=at):
          params = jax.tree.map(np.float64, before)
          params["encoder"][layer][name][at] += by
          return by_numpy(params)

        slope = (moved(1e-5) - moved(-1e-5)) / 2e-5
        assert found[at] == pytest.approx(slope, rel=2e-3, abs=2e-6)


class TestARun:
  def test_trains_the_encoder_under_a_name_of_its_own(self, whole, tuning):
    params = whole[1]
    assert set(params) == {"encoder", "fusion", "head"}
    start = jax.device_get(tuning.encoder.params)
    assert jax.tree.structure(params["encoder"]) == jax.tree.structure(start)
    changed = jax.tree.map(
      lambda a, b: (a != b).any(), params["encoder"], start
    )
    assert all(jax.tree.leaves(changed))

  def test_logs_every_step(self, whole):
    found = _losses(whole[0])
    assert len(found) == STEPS and np.isfinite(found).all()

  def test_leaves_the_encoder_keys_and_transform_as_they_were(
    self, whole, data, tuning, trainer
  ):
    """Its state is overwritten step by step: it must be a copy."""
    _assert_equal(
      jax.device_get(tuning.encoder.params), tiny_images.encoder().params
    )
    held = trainer.placed.memory
    half = lambda x: x.astype(np.float16)
    np.testing.assert_array_equal(held.keys, half(data.memory.keys))
    np.testing.assert_array_equal(held.values, half(data.memory.values))
    z = tuning.query(0)(tuning.encoder.params, tuning.images["val"][[0, 1]])
    stored = data.examples["val"].queries[:2]
    np.testing.assert_allclose(z, stored, atol=3e-3 * np.abs(stored).max())

  def test_of_the_same_seed_is_bit_equal(self, whole, trainer):
    _assert_equal(_run(trainer), whole[1])

  @pytest.mark.parametrize("calls", [3, 6])
  def test_that_was_stopped_goes_on_to_the_same_bits(
    self, whole, trainer, tmp_path, monkeypatch, calls
  ):
    """Before and after its checkpoint at step 5."""
    step, done = trainer.compiled.step, []

    def stopping(*arguments):
      if len(done) == calls:
        raise KeyboardInterrupt
      done.append(1)
      return step(*arguments)

    with monkeypatch.context() as patch:
      patch.setattr(trainer.compiled, "step", stopping)
      with pytest.raises(KeyboardInterrupt):
        trainer.run(0, tmp_path)
    kept = [p.name for p in (tmp_path / "checkpoints").glob("[0-9]*")]
    assert kept == (["5"] if calls > 5 else [])
    _assert_equal(_run(trainer, tmp_path), whole[1])
    assert (tmp_path / "metrics.jsonl").read_bytes() == (
      whole[0] / "metrics.jsonl"
    ).read_bytes()

  def test_of_two_devices_is_that_of_one(self, whole, workdir, tmp_path):
    """And of a batch that the encoder sees in parts, over both of them."""
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run(
      [sys.executable, "-c", _TWO_DEVICES, str(workdir), str(tmp_path)],
      cwd=root,
      env=os.environ
      | {
        "PYTHONPATH": str(root),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
      },
      capture_output=True,
      text=True,
    )
    assert done.returncode == 0, done.stderr
    one, two = (_losses(folder) for folder in (whole[0], tmp_path))
    # Sums over the batch are added in another order.
    np.testing.assert_allclose(two, one, rtol=1e-3)

  def test_draws_another_augmentation_with_another_seed(self, data, tuning):
    batches = [
      next(_trainer(data, tuning)._feed.batches(seed, 0, 1)) for seed in (0, 1)
    ]
    assert (batches[0]["images"] != batches[1]["images"]).any()

  def test_knows_what_a_step_needs_and_compiles_it_once(
    self, data, tuning, caplog
  ):
    trainer = _trainer(data, tuning, _model("linear"), epochs=0.4)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
      needs = trainer.traced().lower().compile().memory_analysis()
      assert needs.temp_size_in_bytes > 8 * tiny_images.HIDDEN * 4
      trainer.run(0)
    compiled = [r.getMessage() for r in caplog.records]
    assert sum("Compiling jit(train_step)" in x for x in compiled) == 1

  def test_that_is_not_finite_names_the_images_of_the_step(
    self, data, tuning, tmp_path
  ):
    """The encoder's own parameters are not finite from the beginning."""
    params = jax.tree.map(jnp.copy, tuning.encoder.params)
    params["top"]["bias"] = params["top"]["bias"].at[2].set(jnp.nan)
    encoder = dataclasses.replace(tuning.encoder, params=params)
    broken = _trainer(data, tuning._replace(encoder=encoder))
    message = _refusal(lambda: broken.run(0, tmp_path, "train mam seed 0"))
    assert message.startswith(
      "train mam seed 0: step 1 is not finite, first in the parameter "
      "encoder/top/bias, float32 [11]: 1 number (nan)"
    )


def _moves(data, tuning, **changes):
  """Mean change of each of the encoder's kernels in a short linear run."""
  settings = {"augment": "none", "weight_decay": 0.0, "warmup_epochs": 0.0}
  trained = _trainer(data, tuning, _model("linear"), **settings | changes)
  params = _run(trained)["encoder"]
  start = jax.device_get(tuning.encoder.params)
  return {
    layer: np.abs(params[layer]["kernel"] - start[layer]["kernel"]).mean()
    for layer in start
  }


@pytest.fixture(scope="module")
def prepared(workdir):
  """For runs without a crop."""
  with jax.numpy_rank_promotion("raise"):
    return _load(workdir, ["train"], "none")


def test_what_a_frozen_encoder_cannot_tell_apart_is_learned(data, prepared):
  """Loss of the training images, by the head's own and by the encoder's."""
  losses = {}
  for rate in (0.0, 1.0):
    trained = _trainer(
      data,
      prepared,
      _model("linear"),
      augment="none",
      epochs=6.0,
      lr_factors=(("encoder/.*", rate),),
    )
    params = _run(trained)
    pixels = prepared.images["train"][np.arange(37)]
    z = prepared.query(0)(params.pop("encoder"), pixels)
    logits = _model("linear").apply({"params": params}, z)
    label = data.examples["train"].labels
    losses[rate] = float(
      optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()
    )
  assert losses[1.0] < 0.8 * losses[0.0] < 0.8 * np.log(4)


class TestLearningRates:
  def test_of_the_encoder_are_its_own_layer_by_layer(self, data, prepared):
    decayed = config.layer_decay(
      ["encoder/stem/.*", "encoder/top/.*"], factor=0.2, decay=0.1
    )
    usual = _moves(data, prepared)
    slowed = _moves(data, prepared, lr_factors=decayed)
    assert usual["top"] > 1e-3
    # Adam's steps have the size of the learning rate.
    assert slowed["top"] / usual["top"] == pytest.approx(0.2, rel=0.5)
    assert slowed["stem"] / usual["stem"] == pytest.approx(0.02, rel=0.5)

  def test_of_zero_keep_a_layer_as_it_was(self, data, prepared):
    found = _moves(data, prepared, lr_factors=(("encoder/stem/.*", 0.0),))
    assert found["stem"] == 0 and found["top"] > 1e-3


TRAIN = tiny.SETTINGS | SETTINGS | {"epochs": 1.0, "k": 3, "seeds": 2}
TRAIN |= {"post_hoc_tau": 0.0}
FINETUNED = {"encoder": {"name": "tiny"}, "images": "cache-1"}
EVALUATE = {"batch_size": 4, "shot_groups": "paper"}


def _runs(folder, name="linear", **changes):
  return [
    runs.Run(
      name,
      {},
      TRAIN | changes,
      seed,
      folder / f"seed_{seed}",
      "data-1",
      FINETUNED,
    )
    for seed in range(2)
  ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data, tuning):
  """Two seeds of the linear model, trained and evaluated."""
  folder = tmp_path_factory.mktemp("runs")
  with jax.numpy_rank_promotion("raise"):
    runs.train(_runs(folder), data, tuning)
    evaluations.evaluate(_runs(folder), data, tuning, **EVALUATE)
  return folder


class TestRuns:
  def test_keep_the_encoder_with_the_rest(self, finished):
    with np.load(finished / "seed_0" / "params.npz") as f:
      assert set(f.files) == {
        *("head/kernel", "head/bias"),
        *("encoder/stem/kernel", "encoder/stem/bias"),
        *("encoder/top/kernel", "encoder/top/bias"),
      }
      assert f["head/kernel"].shape == (DIMS, tiny_images.CLASSES)

  def test_predict_from_images_as_the_encoder_prepares_them(
    self, finished, data, tuning
  ):
    for run in _runs(finished):
      params = run.params()
      evaluation = evaluations.evaluation_artifact(
        run, "paper", run.data_fingerprint
      )
      ids, logits, _ = evaluations.read_predictions(evaluation, "test")
      assert ids == data.examples["test"].ids
      index = [int(i.removeprefix("item/")) for i in ids]
      pixels = tiny_images.encoder().prepare(
        [tiny_images.image(i) for i in index]
      )
      z = tuning.transform(
        np.asarray(tiny_images.apply(params["encoder"], pixels))
      )
      z = z / np.linalg.norm(z, axis=1, keepdims=True) * np.sqrt(DIMS)
      expected = z @ params["head"]["kernel"] + params["head"]["bias"]
      np.testing.assert_allclose(logits, expected, atol=1e-4)

  def test_say_how_many_parameters_train_and_what_a_step_needs(
    self, data, tuning, tmp_path, capfd
  ):
    runs.train(_runs(tmp_path, epochs=0.2)[:1], data, tuning)
    notes = capfd.readouterr().err
    encoder = 3 * tiny_images.SIZE**2 * 17 + 17 + 17 * 11 + 11
    total = encoder + DIMS * 4 + 4
    assert f"{total:,} parameters, of them {encoder:,} of the encoder" in notes
    assert "a step of 8 images needs" in notes

  def test_are_not_those_of_another_encoder_augmentation_or_of_none(
    self, finished
  ):
    run = _runs(finished)[0]
    for change, named in (
      ({"finetuned": FINETUNED | {"images": "x"}}, "finetuned.images: cache-1"),
      ({"train": TRAIN | {"augment": "flip"}}, "augment: inception_crop(min_"),
      ({"train": TRAIN | {"encoder_batch": 2}}, "train.encoder_batch: 0 -> 2"),
      ({"train": TRAIN | {"finetune": False}}, "train.finetune: "),
    ):
      other = dataclasses.replace(run, **change)
      assert named in _refusal(other.artifact.is_complete)
    text = " inception_crop(min_area=0.3),flip "
    spelt = TRAIN | {"augment": text}
    assert dataclasses.replace(run, train=spelt).artifact.is_complete()

  def test_of_a_frozen_encoder_keep_the_names_that_they_had(self, tmp_path):
    """Runs that were made before there was fine-tuning stay valid."""
    old = {n: v for n, v in TRAIN.items() if n not in SETTINGS} | {
      "epochs": 1.0
    }
    new = old | {"finetune": False, "augment": "flip", "encoder_batch": 3}
    prints = [
      runs.Run("linear", {}, t, 0, tmp_path, "data-1").artifact.fingerprint
      for t in (old, new)
    ]
    assert prints[0] == prints[1]

  def test_of_an_encoder_that_is_built_otherwise_are_refused(
    self, finished, data, tuning, tmp_path
  ):
    params = tuning.encoder.params
    scanned = {"layers": jnp.ones((2, 3)), "top": params["top"]}
    other = tuning._replace(
      encoder=dataclasses.replace(tuning.encoder, params=scanned)
    )
    (run, _) = _runs(finished)
    shutil.copytree(run.folder, tmp_path / "seed_0")
    shutil.rmtree(tmp_path / "seed_0" / "evaluation")
    run = dataclasses.replace(run, folder=tmp_path / "seed_0")
    message = _refusal(
      lambda: evaluations.evaluate([run], data, other, **EVALUATE)
    )
    assert "layers: (absent) -> [2, 3]" in message
    assert "stem/bias: [17] -> (absent)" in message
    assert f"delete {run.folder}" in message


class TestMistakes:
  def test_a_vote_is_not_fine_tuned(self, data, tuning, tmp_path):
    message = _refusal(
      lambda: runs.train(_runs(tmp_path, "vote"), data, tuning)
    )
    assert message.startswith("config.model.vote.train.finetune=True: ")
    assert "set it to False" in message

  def test_an_encoder_of_texts_is_not_fine_tuned(self, workdir):
    message = _refusal(
      lambda: _load(workdir, encoder=tiny_images.text_encoder())
    )
    assert message == (
      "config.encoder.name=letters: an encoder of texts; only one of images "
      "can be fine-tuned. Choose one, or set train.finetune=False."
    )

  def test_another_encoder_than_that_of_the_keys_is_refused(self, workdir):
    message = _refusal(lambda: _load(workdir, encoder=tiny_images.encoder(1)))
    assert "config.encoder: not the one that made the keys (seed: 0 -> 1)" in (
      message
    )

  def test_a_damaged_transform_is_refused(self, workdir, flip_bit):
    path = workdir / "neighbors" / "key_transform.npz"
    flip_bit(path)
    try:
      assert str(path) in _refusal(lambda: _load(workdir))
    finally:
      flip_bit(path)

  def test_stored_queries_are_not_taken_for_images(self, data):
    message = _refusal(lambda: _trainer(data, None))
    assert "train.finetune=True" in message and "set it to False" in message

  @pytest.mark.parametrize(
    ("change", "named"),
    [
      ({"encoder_batch": -1}, "config.train.encoder_batch=-1: must be 0"),
      ({"augment": "flop"}, "config.train.augment=flop: no step 'flop'"),
    ],
  )
  def test_settings_without_sense_are_refused(
    self, data, tuning, tmp_path, change, named
  ):
    runs_ = lambda: runs.train(_runs(tmp_path, **change), data, tuning)
    assert _refusal(runs_).startswith(named)
    assert list(tmp_path.iterdir()) == []

  def test_a_pattern_of_an_encoder_that_is_frozen_says_when_there_is_one(
    self, data
  ):
    frozen = _trainer(
      data, None, finetune=False, lr_factors=(("encoder/.*", 0.1),)
    )
    message = _refusal(lambda: frozen.run(0))
    assert "'encoder/.*' matches no parameter's whole name" in message
    assert "encoder/... with train.finetune=True" in message
