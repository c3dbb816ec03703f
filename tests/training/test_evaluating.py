"""Looks at val while training, the best state, and the moving average."""

import json

import jax
import numpy as np
import pytest

from retrieval_aug.common import distributed
from retrieval_aug.common.errors import UserError
from retrieval_aug.training import books, loop, predict, sharding
from retrieval_aug.training.step import State
from tests.training import tiny

STEPS = 14
LOOKS = [3, 6, 9, 12, 14]  # after every third, and the last
VAL = tiny.examples(29, seed=5)
EMA = 0.75


def _trainer(**changes):
  train = tiny.examples()
  return loop.Trainer(
    tiny.model(),
    tiny.settings(**{"eval_epochs": 0.65, "ema": EMA} | changes),
    tiny.memory(),
    train,
    np.bincount(train["label"]),
    val=VAL,
  )


@pytest.fixture(scope="module")
def trainer():
  """Keeps the best; one for all tests, for it compiles once."""
  with jax.numpy_rank_promotion("raise"):
    return _trainer(keep="best")


def _rows(folder):
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def _tops(folder):
  return {x["step"]: x["val_top1"] for x in _rows(folder) if "val_top1" in x}


def _saved(folder):
  return {int(p.name) for p in (folder / "checkpoints").iterdir()}


def _assert_equal(one, two):
  jax.tree.map(np.testing.assert_array_equal, one, two)


class Whole:
  """An uninterrupted run in a folder, and its state after every step."""

  def __init__(self, trainer, folder, monkeypatch):
    self.folder, self.states = folder, {}
    save = books.Books.save

    def watched(these, number, state, top):
      self.states[number] = sharding.fetch(state)
      if number in LOOKS or number % 5 == 0:
        save(these, number, state, top)

    with monkeypatch.context() as patch:
      patch.setattr(books.Books, "save", watched)
      patch.setattr(trainer, "checkpoint_steps", 1)
      self.params = trainer.run(0, folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, trainer):
  with pytest.MonkeyPatch.context() as patch:
    with jax.numpy_rank_promotion("raise"):
      return Whole(trainer, tmp_path_factory.mktemp("whole"), patch)


@pytest.fixture
def tops(trainer, monkeypatch):
  """`tops(numbers)`: so many of val will be right at one look after another."""

  def set_to(numbers):
    numbers = iter(numbers)

    def predictor(params, arrays, batch_size):
      right = np.arange(len(VAL["label"])) < next(numbers)
      label = np.where(right, VAL["label"], (VAL["label"] + 1) % tiny.CLASSES)
      return np.eye(tiny.CLASSES, dtype=np.float32)[label], None

    monkeypatch.setattr(trainer, "_predictor", predictor)

  return set_to


@pytest.fixture
def stop(monkeypatch):
  """`stop(n)`: runs stop after step n, as by SIGTERM."""

  def at(step):
    reached = lambda _, number: number == step
    monkeypatch.setattr(distributed.Preemption, "reached", reached)

  return at


# --- What is looked at.


def test_the_accuracy_is_that_of_the_predictions_at_the_steps_asked_for(whole):
  tops = _tops(whole.folder)
  assert list(tops) == LOOKS
  assert len(set(tops.values())) > 1
  predictor = predict.predictor(tiny.model(), tiny.memory(), VAL)
  for step, top in tops.items():
    # The average is looked at; here in batches of another size.
    logits, _ = predictor(whole.states[step].ema, VAL, 29)
    right = logits.argmax(axis=1) == VAL["label"]
    assert top == pytest.approx(100 * right.mean())


def test_the_table_has_a_cell_for_each_look(whole):
  lines = (whole.folder / "metrics.csv").read_text().splitlines()
  assert lines[0].split(",")[-1] == "val_top1"
  cells = {i: line.split(",")[-1] for i, line in enumerate(lines) if i}
  found = {step: float(cell) for step, cell in cells.items() if cell}
  assert found == _tops(whole.folder)


def test_looking_changes_nothing(whole, trainer, tmp_path, monkeypatch):
  monkeypatch.setattr(trainer, "_eval_steps", 0)
  trainer.run(0, tmp_path)
  without = [
    {n: x[n] for n in x if n != "val_top1"} for x in _rows(whole.folder)
  ]
  assert _rows(tmp_path) == without


def test_what_predictions_are_corrected_by_is_looked_at_too():
  """Of two classes the rarer is taken, which the logits alone do not say."""
  settings = {"loss": "cross_entropy", "tau": 0.0, "post_hoc_tau": 1.0}
  trainer = loop.Trainer(
    tiny.model(),
    tiny.settings(eval_epochs=1.0, **settings),
    tiny.memory(),
    tiny.examples(),
    np.array([30, 1, 3, 3]),
    val={"label": np.array([1, 1, 0])},
  )
  logits = np.array([[1.0, 0, -9, -9], [2, 0, -9, -9], [9, 0, -9, -9]])
  trainer._predictor = lambda *_: (logits.astype(np.float32), None)
  rows = [[{}]]
  trainer._look(State(None, None, None, None, None), rows)
  assert rows[0][0]["val_top1"] == 100


# --- What is kept.


def test_the_average_is_kept(whole):
  """Of the parameters after each step, the first with the last's weight."""
  expected = whole.states[1].ema
  for step in range(2, STEPS + 1):
    expected = jax.tree.map(
      lambda old, new: EMA * old + (1 - EMA) * new,
      expected,
      whole.states[step].params,
    )
  last = whole.states[STEPS]
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6),
    last.ema,
    expected,
  )
  kernel = lambda tree: tree["head"]["kernel"]
  assert np.abs(kernel(last.ema) - kernel(last.params)).max() > 1e-3


@pytest.mark.parametrize(
  ("numbers", "best"),
  [
    ([7, 23, 19, 2, 11], 6),
    ([7, 2, 19, 19, 18], 12),  # the later of two that are equal
  ],
)
def test_the_best_is_kept_beside_the_latest(
  whole, trainer, tmp_path, tops, numbers, best
):
  tops(numbers)
  params = trainer.run(0, tmp_path)
  expected = [100 * n / 29 for n in numbers]
  assert list(_tops(tmp_path).values()) == pytest.approx(expected)
  _assert_equal(params, whole.states[best].ema)
  assert _saved(tmp_path) == {best, STEPS}


@pytest.mark.parametrize("stopped", [7, 9])
def test_the_best_survives_a_resume(
  whole, trainer, tmp_path, tops, stop, stopped
):
  numbers = [7, 23, 19, 2, 11]
  tops(numbers)
  with pytest.raises(
    distributed.Preempted, match=f"after step {stopped} of 14"
  ):
    stop(stopped)
    trainer.run(0, tmp_path)
  assert _saved(tmp_path) == {6, stopped}
  stop(None)
  tops(numbers[len(_tops(tmp_path)) :])
  _assert_equal(trainer.run(0, tmp_path), whole.states[6].ema)
  assert _saved(tmp_path) == {6, STEPS}
  # Nothing is left to be done, and the same is kept.
  tops([])
  _assert_equal(trainer.run(0, tmp_path), whole.states[6].ema)


@pytest.mark.parametrize("looks", [(3, 0), (0, 3)])
def test_looks_can_be_turned_on_and_off_in_the_middle(
  whole, trainer, tmp_path, monkeypatch, stop, looks
):
  """Which runs that keep the last may do."""
  before, after = looks
  monkeypatch.setattr(
    trainer, "settings", tiny.settings(ema=EMA, eval_epochs=1.0)
  )
  monkeypatch.setattr(trainer, "_eval_steps", before)
  stop(7)
  with pytest.raises(distributed.Preempted):
    trainer.run(0, tmp_path)
  stop(None)
  monkeypatch.setattr(trainer, "_eval_steps", after)
  _assert_equal(trainer.run(0, tmp_path), whole.states[STEPS].ema)
  expected = _tops(whole.folder)
  kept = [s for s in LOOKS if (before if s <= 7 else after)]
  assert _tops(tmp_path) == {s: expected[s] for s in kept}


# --- Settings without sense.


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"keep": "best", "eval_epochs": 0.0},
      "config.train.keep=best: nothing says which is best; set "
      "train.eval_epochs to how often to look, such as 1.",
    ),
    ({"keep": "first"}, "config.train.keep=first: not one of"),
    ({"ema": 1.0}, "config.train.ema=1.0: not from 0 to below 1."),
    ({"ema": -0.1}, "config.train.ema=-0.1: not from 0 to below 1."),
    (
      {"accumulate": 3},
      "config.train.accumulate=3: must be a whole part of train.batch_size=8.",
    ),
    ({"accumulate": 0}, "config.train.accumulate=0: must be a whole part of"),
  ],
)
def test_settings_without_sense_are_refused(changes, message):
  with pytest.raises(UserError) as caught:
    tiny.settings(**changes)
  assert str(caught.value).startswith(message)
  assert "\n" not in str(caught.value)
