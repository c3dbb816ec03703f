"""Several seeds in one compiled step: each is what it is alone."""

import dataclasses
import json
import logging
import types

import jax
import numpy as np
import pytest

from retrieval_aug import models
from retrieval_aug.common import distributed
from retrieval_aug.common.errors import UserError
from retrieval_aug.memory.working_set import WorkingSet
from retrieval_aug.training import input_pipeline, loop, placement, runs
from retrieval_aug.training.data import load_data
from retrieval_aug.training.finetune import FineTuning
from retrieval_aug.training.settings import Layout, Telling
from tests.training import tiny

STEPS = 14  # 3 epochs of 37 examples in batches of 8; a checkpoint every 5
SEEDS = (3, 1)
# All that a step may draw or keep.
EVERYTHING = {"mixup": 0.4, "ema": 0.8, "eval_epochs": 2.0}


@pytest.fixture(scope="module")
def trainer():
  """One for all tests: it holds no state of a run, and compiles once."""
  model = models.build("mean_knn", tiny.CLASSES, neighbor_dropout=0.3)
  return tiny.trainer(model, **EVERYTHING)


def _linear():
  """For what is the same of all models: it compiles fast."""
  return models.build("linear", tiny.CLASSES)


def _together(trainer, folder, seeds=SEEDS):
  folders = [folder / str(seed) for seed in seeds]
  return trainer.run_together(seeds, folders, folder / "shared")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, trainer):
  """An uninterrupted training: (its folder, parameters of each seed)."""
  folder = tmp_path_factory.mktemp("together")
  with jax.numpy_rank_promotion("raise"):
    return folder, _together(trainer, folder)


def _assert_equal(one, two):
  assert jax.tree.structure(one) == jax.tree.structure(two)
  jax.tree.map(np.testing.assert_array_equal, one, two)


def _assert_near(one, two):
  """Products of stacked matrices add up in another order."""
  assert jax.tree.structure(one) == jax.tree.structure(two)
  near = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5)
  jax.tree.map(near, one, two)


def _rows(folder):
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def _refusal(call, kind=UserError):
  with pytest.raises(kind) as caught:
    call()
  message = str(caught.value)
  assert "\n" not in message
  return message


@pytest.mark.parametrize("index", range(len(SEEDS)))
def test_each_seed_is_what_it_is_alone(whole, trainer, tmp_path, index):
  folder, params = whole
  alone = trainer.run(SEEDS[index], tmp_path)
  _assert_near(params[index], alone)
  own, rows = folder / str(SEEDS[index]), _rows(tmp_path)
  assert [x["step"] for x in rows] == list(range(1, STEPS + 1))
  assert [x["step"] for x in rows if "val_top1" in x] == [9, STEPS]
  _assert_near(_rows(own), rows)
  header, *table = (own / "metrics.csv").read_text().splitlines()
  names = header.split(",")
  for line, row in zip(table, _rows(own), strict=True):
    cells = {n: float(x) for n, x in zip(names, line.split(",")) if x}
    assert cells == row


def test_seeds_differ_from_each_other(whole):
  one, two = (_rows(whole[0] / str(seed)) for seed in SEEDS)
  assert all(a["loss"] != b["loss"] for a, b in zip(one, two))


def _compiled(caplog):
  """Names of what was compiled."""
  begin = "Finished XLA compilation of "
  texts = [x.getMessage() for x in caplog.records]
  found = [t.removeprefix(begin) for t in texts if t.startswith(begin)]
  return [t.split(" in ")[0] for t in found]


@pytest.mark.parametrize("together", [False, True])
def test_a_step_is_compiled_once_and_for_further_seeds_nothing(
  caplog, tmp_path, together
):
  """The same program tells its memory before, and its costs in the end."""
  trainer = tiny.trainer(_linear(), epochs=1.0)
  with jax.log_compiles(), caplog.at_level(logging.WARNING):
    for seeds, count in (((0, 1), 1), ((2, 3), 0)):
      caplog.clear()
      if together:
        trainer.traced(2).lower().compile()
        _together(trainer, tmp_path / str(seeds), seeds)
      else:
        for seed in seeds:
          trainer.run(seed, tmp_path / str(seed))
      found = _compiled(caplog)
      assert found.count("jit(train_step)") == count
      assert len(found) == 0 or count


class Stop(Exception):
  """Ends a training at a place of the test's choice."""


def test_stopped_seeds_go_on_to_the_same_bits(
  whole, trainer, tmp_path, monkeypatch
):
  """Between two checkpoints, of which the last is of all seeds."""
  step, done = trainer.compiled.steps_together, []

  def counted(*arguments):
    if len(done) == 7:
      raise Stop
    done.append(1)
    return step(*arguments)

  with monkeypatch.context() as patch:
    patch.setattr(trainer.compiled, "steps_together", counted)
    with pytest.raises(Stop):
      _together(trainer, tmp_path)
  kept = [p.name for p in (tmp_path / "shared/checkpoints").glob("[0-9]*")]
  assert kept == ["5"]
  folder, params = whole
  _assert_equal(_together(trainer, tmp_path), params)
  for seed in SEEDS:
    for name in ("metrics.jsonl", "metrics.csv"):
      own = tmp_path / str(seed) / name
      assert own.read_bytes() == (folder / str(seed) / name).read_bytes()


def test_a_step_that_is_not_finite_names_the_seed_its_step_and_examples(
  tmp_path,
):
  """Of an example that only the second seed has met, of the first three steps
  that are looked at together."""
  first, second = (
    input_pipeline.numbers(np.arange(3 * 8), tiny.N, seed) for seed in SEEDS
  )
  bad = next(n for n in second[8:] if n not in (*first, *second[:8]))
  step = 1 + second.tolist().index(bad) // 8
  train = tiny.examples()
  train["query"][bad, 3] = np.nan
  ids = [f"id/{i}" for i in range(tiny.N)]
  trainer = tiny.trainer(_linear(), train, ids=ids, checkpoint_epochs=0.6)
  folders = [tmp_path / str(seed) for seed in SEEDS]
  message = _refusal(
    lambda: trainer.run_together(
      SEEDS, folders, tmp_path / "shared", "train mam"
    )
  )
  assert message.startswith(
    f"train mam seed 1: step {step} is not finite, first in the input "
    f"batch/query, float32 [8, 11]: 1 number (nan) of 'id/{bad}'"
  )
  report = folders[1] / f"nan_step_{step}_process_0.json"
  found = json.loads(report.read_text())
  assert found["examples"] == [f"id/{bad}"]
  own = second[8 * (step - 1) : 8 * step]
  assert found["batch"] == [f"id/{i}" for i in own]


def test_a_profile_is_kept_with_the_first_seed(whole, trainer, monkeypatch):
  """The folder that seeds share is deleted in the end."""
  asked = []

  class Profiler:
    def __init__(self, window, folder):
      asked.append((window, folder))
      raise Stop

  monkeypatch.setattr(loop.profiler, "Profiler", Profiler)
  monkeypatch.setattr(trainer, "_telling", Telling(profile="2:3"))
  with pytest.raises(Stop):
    _together(trainer, whole[0])
  assert asked == [("2:3", whole[0] / str(SEEDS[0]) / "profile")]


# The train stage: which seeds train together, and what is left of it.

TRAIN = tiny.SETTINGS | {"epochs": 1.0, "k": 3}


@pytest.fixture(scope="module")
def data():
  examples = {}
  for seed, (split, n) in enumerate({"train": 37, "val": 11}.items()):
    arrays = tiny.examples(n, seed)
    examples[split] = input_pipeline.Examples(
      ids=[f"{split}/{i}" for i in range(n)],
      labels=arrays["label"],
      queries=arrays["query"],
      neighbors=arrays["rows"].astype(np.int64),
      scores=np.zeros(arrays["rows"].shape, np.float32),
    )
  memory = tiny.memory()
  working_set = WorkingSet(
    np.arange(tiny.U),
    memory.keys.astype(np.float16),
    {"text": memory.values.astype(np.float16)},
    sources=np.zeros(tiny.U, np.int32),
    labels=np.arange(tiny.U, dtype=np.int32) % tiny.CLASSES,
    source_names=["a"],
  )
  return load_data(examples, working_set, "data-1")


def _runs(folder, seeds=5, name="linear", **changes):
  return [
    runs.Run(name, {}, TRAIN | changes, seed, folder / f"seed_{seed}", "data-1")
    for seed in range(seeds)
  ]


@pytest.fixture(scope="module", autouse=True)
def made():
  """Trainers hold no state of a run: one of a kind compiles once."""
  found, make = {}, runs._trainer

  def once(run, data, finetuning, layout, telling):
    key = repr((run.model_name, run.options, run.train, layout))
    if key not in found:
      found[key] = make(run, data, finetuning, layout, telling)
    return found[key]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(runs, "_trainer", once)
    yield found


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory, data):
  """Parameters of five seeds, one trained after the other."""
  trained = _runs(tmp_path_factory.mktemp("one_by_one"))
  with jax.numpy_rank_promotion("raise"):
    runs.train(trained, data)
  return [run.params() for run in trained]


@pytest.fixture
def groups(monkeypatch):
  """Which seeds were trained: lists of those that were trained together."""
  found = []
  run, run_together = loop.Trainer.run, loop.Trainer.run_together

  def one(self, seed, *arguments):
    found.append([seed])
    return run(self, seed, *arguments)

  def several(self, seeds, *arguments):
    found.append(list(seeds))
    return run_together(self, seeds, *arguments)

  monkeypatch.setattr(loop.Trainer, "run", one)
  monkeypatch.setattr(loop.Trainer, "run_together", several)
  return found


def _folders(folder):
  return sorted(p.name for p in folder.iterdir())


def test_five_seeds_train_two_at_once(data, tmp_path, groups, one_by_one):
  trained = _runs(tmp_path)
  runs.train(trained, data, seeds_at_once=2)
  assert groups == [[0, 1], [2, 3], [4]]
  for run, params in zip(trained, one_by_one):
    assert run.artifact.is_complete()
    _assert_near(run.params(), params)
    assert len(_rows(run.folder)) == 5
    told = json.loads((run.folder / "summary.json").read_text())
    assert told["seeds_at_once"] == (1 if run.seed == 4 else 2)
  # Nothing is left of the folders that they shared.
  assert _folders(tmp_path) == [f"seed_{seed}" for seed in range(5)]


def test_a_finished_seed_is_left_alone(data, tmp_path, groups):
  trained = _runs(tmp_path, 3)
  runs.train(trained[1:2], data)
  before = {p: p.stat().st_mtime_ns for p in trained[1].folder.rglob("*")}
  del groups[:]
  runs.train(trained, data, seeds_at_once=2)
  assert groups == [[0, 2]]
  after = {p: p.stat().st_mtime_ns for p in trained[1].folder.rglob("*")}
  assert after == before


def test_seeds_that_were_told_to_stop_go_on_together(
  data, tmp_path, monkeypatch, one_by_one
):
  trained = _runs(tmp_path, 2)
  train = lambda: runs.train(trained, data, seeds_at_once=5)
  with monkeypatch.context() as patch:
    reached = lambda self, step: step == 3
    patch.setattr(distributed.Preemption, "reached", reached)
    message = _refusal(train, distributed.Preempted)
  assert message == (
    "train linear seed 0 to 1: stopped and saved after step 3 of 5"
  )
  shared = tmp_path / "seeds_0_to_1"
  assert [p.name for p in (shared / "checkpoints").iterdir()] == ["3"]
  assert not any(run.artifact.is_complete() for run in trained)
  train()
  assert not shared.exists()
  for run, params in zip(trained, one_by_one):
    _assert_near(run.params(), params)
    assert [x["step"] for x in _rows(run.folder)] == [1, 2, 3, 4, 5]


def _tuned():
  """A trainer of stored queries' place taken by images that nobody reads."""
  train = tiny.examples()
  encoder = types.SimpleNamespace(params={}, apply=None)
  transform = types.SimpleNamespace(mean=None, matrix=None)
  return loop.Trainer(
    tiny.model(),
    tiny.settings(finetune=True),
    tiny.memory(),
    train,
    np.bincount(train["label"]),
    FineTuning(encoder, transform, {"train": None}),
  )


@pytest.mark.parametrize(
  "make",
  [
    _tuned,
    lambda: tiny.trainer(layout=Layout(placement="host")),
    lambda: tiny.trainer(layout=Layout(placement="sharded")),
    lambda: tiny.trainer(keep="best", eval_epochs=1.0),
    lambda: tiny.trainer(keep_start=0.5),
  ],
  ids=["finetune", "host", "sharded", "keep=best", "keep_start"],
)
def test_what_cannot_be_done_together_is_known(make):
  assert not make().can_train_together()


def test_several_devices_train_one_seed_at_a_time(trainer, monkeypatch):
  assert trainer.can_train_together()
  monkeypatch.setattr(trainer, "mesh", types.SimpleNamespace(size=2))
  assert not trainer.can_train_together()


def test_where_it_cannot_be_a_note_says_so_and_all_is_the_same(
  data, tmp_path, groups, one_by_one, capsys
):
  trained = _runs(tmp_path, 2)
  layout = Layout(placement="host")
  runs.train(trained, data, seeds_at_once=2, layout=layout)
  assert groups == [[0], [1]]
  assert "one seed after the other, whatever train.seeds_at_once" in (
    capsys.readouterr().err
  )
  for run, params in zip(trained, one_by_one):
    _assert_equal(run.params(), params)


def test_seeds_that_start_from_other_runs_do_so(data, tmp_path, groups, capsys):
  """Each from its own, which `run_together` knows nothing of."""
  first = _runs(tmp_path / "first", 2)
  runs.train(first, data, seeds_at_once=2)
  trained = [
    dataclasses.replace(run, start=begin.artifact)
    for run, begin in zip(_runs(tmp_path, 2, learning_rate=0.0), first)
  ]
  runs.train(trained, data, seeds_at_once=2)
  assert groups == [[0, 1], [0], [1]]
  assert "one seed after the other" in capsys.readouterr().err
  for run, begin in zip(trained, first):
    _assert_equal(run.params(), begin.params())


@pytest.mark.parametrize(("room", "sizes"), [(0.7, [3, 2]), (0.3, 5 * [1])])
def test_as_many_seeds_train_together_as_fit(
  data, tmp_path, made, monkeypatch, capsys, room, sizes
):
  trained, asked = _runs(tmp_path), []
  monkeypatch.setattr(runs, "_train", lambda _, some: asked.append(len(some)))
  monkeypatch.setattr(placement, "free_bytes", lambda: 10**9)
  made.clear()
  runs.train(trained, data, seeds_at_once=9)
  assert asked == [5]
  (trainer,) = made.values()
  needs = runs._needs(trainer, 5)
  state = sum(x.nbytes for x in jax.tree.leaves(trainer.compiled.init(0)))
  assert needs > 5 * state
  del asked[:]
  monkeypatch.setattr(placement, "free_bytes", lambda: int(room * needs))
  runs.train(trained, data, seeds_at_once=5)
  assert asked == sizes
  assert f"train.seeds_at_once={sizes[0]}, not 5" in capsys.readouterr().err


def test_a_vote_has_nothing_to_train_together(data, tmp_path, groups):
  trained = _runs(tmp_path, 2, "vote")
  runs.train(trained, data, seeds_at_once=2)
  assert groups == [[0], [1]]
  assert [run.params() for run in trained] == [{}, {}]
