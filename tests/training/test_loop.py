"""Training: the same bits again, whatever interrupts it."""

import contextlib
import json
import re
import shutil

import jax
import numpy as np
import pytest

from retrieval_aug import models
from retrieval_aug.common import distributed
from retrieval_aug.common.errors import UserError
from retrieval_aug.training import input_pipeline, predict
from tests.training import tiny

STEPS = 14  # 3 epochs of 37 examples in batches of 8
CHECKPOINTS = (5, 10, 14)


def _assert_equal(one, two):
  assert jax.tree.structure(one) == jax.tree.structure(two)
  jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.fixture(scope="module")
def trainer():
  """One for all tests: it holds no state of a run, and compiles once."""
  with jax.numpy_rank_promotion("raise"):
    return tiny.trainer()


def _run(trainer, folder, seed=0):
  return jax.device_get(trainer.run(seed, folder))


def _losses(folder):
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, trainer):
  """An uninterrupted run: (its folder, its parameters)."""
  folder = tmp_path_factory.mktemp("whole")
  with jax.numpy_rank_promotion("raise"):
    return folder, _run(trainer, folder)


class Stop(Exception):
  """Ends a run at a place of the test's choice."""


@pytest.fixture
def stop_after(trainer, monkeypatch):
  """`with stop_after(n):` a run raises `Stop` after n steps."""

  @contextlib.contextmanager
  def stop(count):
    step, done = trainer.compiled.step, []

    def counted(*arguments):
      if len(done) == count:
        raise Stop
      done.append(1)
      return step(*arguments)

    with monkeypatch.context() as patch:
      patch.setattr(trainer.compiled, "step", counted)
      yield

  return stop


def test_steps_of_epochs_are_rounded_and_at_least_one():
  settings = tiny.settings()
  assert settings.steps(3.0, 37) == STEPS
  assert settings.steps(1.0, 37) == 5
  assert settings.steps(0.0, 37) == 1


def test_a_run_logs_every_step_and_learns(whole):
  folder, _ = whole
  found = _losses(folder)
  assert [x["step"] for x in found] == list(range(1, STEPS + 1))
  first, last = (
    np.mean([x["loss"] for x in part]) for part in (found[:5], found[-5:])
  )
  assert last < 0.8 * first


def test_the_same_seed_twice_is_bit_equal(whole, trainer, tmp_path):
  folder, params = whole
  _assert_equal(_run(trainer, tmp_path), params)
  assert (tmp_path / "metrics.jsonl").read_bytes() == (
    folder / "metrics.jsonl"
  ).read_bytes()


def test_another_seed_is_another_run(whole, trainer, tmp_path):
  _run(trainer, tmp_path, seed=1)
  assert _losses(tmp_path) != _losses(whole[0])


def test_without_a_folder_nothing_is_kept_and_the_result_is_the_same(
  whole, trainer
):
  _assert_equal(_run(trainer, None), whole[1])


def test_checkpoints_do_not_change_the_result(whole):
  rare = tiny.trainer(checkpoint_epochs=100.0)
  _assert_equal(_run(rare, None), whole[1])


@pytest.mark.parametrize("calls", [3, 5, 7, 13])
def test_a_stopped_run_goes_on_to_the_same_bits(
  whole, trainer, tmp_path, stop_after, calls
):
  """Before the first checkpoint, just after it, between two, at the end."""
  folder, params = whole
  with stop_after(calls), pytest.raises(Stop):
    _run(trainer, tmp_path)
  kept = [s for s in CHECKPOINTS if s <= calls]
  steps = [int(p.name) for p in (tmp_path / "checkpoints").glob("[0-9]*")]
  assert steps == kept[-1:]
  _assert_equal(_run(trainer, tmp_path), params)
  assert (tmp_path / "metrics.jsonl").read_bytes() == (
    folder / "metrics.jsonl"
  ).read_bytes()


def test_a_run_that_is_stopped_at_its_last_step_is_finished_by_the_next(
  whole, trainer, tmp_path, monkeypatch
):
  with monkeypatch.context() as patch:
    reached = lambda preemption, step: step == STEPS
    patch.setattr(distributed.Preemption, "reached", reached)
    with pytest.raises(distributed.Preempted, match="after step 14 of 14"):
      _run(trainer, tmp_path)
  _assert_equal(_run(trainer, tmp_path), whole[1])
  assert _losses(tmp_path) == _losses(whole[0])


def test_a_finished_run_is_not_trained_again(
  whole, trainer, tmp_path, stop_after
):
  folder = tmp_path / "copy"
  shutil.copytree(whole[0], folder)
  with stop_after(0):
    _assert_equal(_run(trainer, folder), whole[1])


def test_half_a_line_and_lines_after_the_checkpoint_are_written_anew(
  whole, trainer, tmp_path, stop_after
):
  """What a kill between two checkpoints leaves in the log."""
  with stop_after(7), pytest.raises(Stop):
    _run(trainer, tmp_path)
  with open(tmp_path / "metrics.jsonl", "a") as f:
    f.write('{"step": 6, "loss": 99.0}\n{"step": 7, "lo')
  _run(trainer, tmp_path)
  assert _losses(tmp_path) == _losses(whole[0])


@pytest.mark.parametrize(
  ("step", "kept", "parts"), [(1, [], 1), (3, [], 2), (5, ["3"], 1)]
)
def test_a_step_that_is_not_finite_is_named_with_its_examples(
  tmp_path, step, kept, parts
):
  """A broken query, seen in one step only; and what was saved stays."""
  order = input_pipeline.numbers(np.arange(14 * 8), tiny.N, 0)
  batch = order[8 * (step - 1) : 8 * step]
  bad = next(n for n in batch if n not in order[: 8 * (step - 1)].tolist())
  train = tiny.examples()
  train["query"][bad, 3] = np.nan
  ids = [f"id/{i}" for i in range(tiny.N)]
  # A checkpoint every third step.
  trainer = tiny.trainer(
    train=train, ids=ids, checkpoint_epochs=0.6, accumulate=parts
  )
  with pytest.raises(UserError) as caught:
    trainer.run(0, tmp_path, "train mam seed 0")
  message = str(caught.value)
  assert message.startswith(
    f"train mam seed 0: step {step} is not finite, first in the input "
    f"batch/query, float32 [{8 // parts}, 11]: 1 number (nan) of 'id/{bad}'"
  )
  assert message.endswith("The last good checkpoint is kept.")
  path = tmp_path / f"nan_step_{step}_process_0.json"
  report = json.loads(path.read_text())
  assert report["examples"] == [f"id/{bad}"]
  assert report["batch"] == [f"id/{i}" for i in batch]
  steps = [p.name for p in (tmp_path / "checkpoints").glob("[0-9]*")]
  assert steps == kept
  # What was done before is there, and nothing of what was not.
  assert len(_losses(tmp_path)) == (int(kept[0]) if kept else 0)


def test_a_step_that_grows_without_bound_names_the_learning_rate(tmp_path):
  """The learning rate of such runs is what people set too high."""
  linear = models.build("linear", tiny.CLASSES)
  trainer = tiny.trainer(linear, learning_rate=1e30, warmup_epochs=0.0)
  message = _refusal(lambda: trainer.run(0, tmp_path, "train mam seed 0"))
  assert re.search(r"step \d+ is not finite, ", message)
  assert "lower train.learning_rate" in message


def _refusal(call):
  with pytest.raises(UserError) as caught:
    call()
  message = str(caught.value)
  assert "\n" not in message
  return message


@pytest.mark.parametrize("size", [0, -8])
def test_a_batch_size_without_sense_is_refused_by_name(size):
  with pytest.raises(UserError, match=f"config.train.batch_size={size}: must"):
    tiny.trainer(batch_size=size)


def test_prediction_does_not_depend_on_the_batch_size(whole):
  arrays = tiny.examples(29, seed=5)
  call = lambda size: predict.predict(
    tiny.model(), whole[1], tiny.memory(), arrays, size
  )
  logits, weights = call(29)
  assert logits.shape == (29, tiny.CLASSES)
  assert weights.shape == (29, 1, tiny.K)
  for size in (5, 64):
    other_logits, other_weights = call(size)
    np.testing.assert_allclose(other_logits, logits, atol=1e-5)
    np.testing.assert_allclose(other_weights, weights, atol=1e-5)
