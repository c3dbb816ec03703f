"""Runs and evaluations as artifacts: the parameters behind a metric."""

import dataclasses
import shutil

import numpy as np
import pytest

from retrieval_aug.common.errors import UserError
from retrieval_aug.evaluation import accuracy
from retrieval_aug.memory.neighbors import WorkingSet
from retrieval_aug.training import input_pipeline, runs
from tests.training import tiny

TRAIN = tiny.SETTINGS | {"epochs": 1.0, "k": 3, "seeds": 2}
EVALUATE = {"batch_size": 8, "shot_groups": "paper"}


@pytest.fixture(scope="module")
def data():
  """Table rows are 100 more than working-set rows."""
  examples = {}
  for seed, (split, n) in enumerate(
    {"train": 37, "val": 11, "test": 13}.items()
  ):
    arrays = tiny.examples(n, seed)
    rows = arrays["rows"].astype(np.int64)
    examples[split] = input_pipeline.Examples(
      ids=[f"{split}/{i}" for i in range(n)],
      labels=arrays["label"],
      queries=arrays["query"],
      neighbors=np.where(rows < 0, -1, rows + 100),
      scores=np.zeros(rows.shape, np.float32),
    )
  working_set = WorkingSet(
    np.arange(100, 100 + tiny.U),
    *(x.astype(np.float16) for x in tiny.memory()),
  )
  return runs.load_data(examples, working_set, "data-1")


def _runs(folder, name="linear", **changes):
  return [
    runs.Run(name, {}, TRAIN | changes, seed, folder / f"seed_{seed}", "data-1")
    for seed in range(2)
  ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data):
  """Two seeds of the linear model, trained and evaluated."""
  folder = tmp_path_factory.mktemp("runs")
  runs.train(_runs(folder), data)
  runs.evaluate(_runs(folder), data, **EVALUATE)
  return folder


@pytest.fixture
def copied(finished, tmp_path):
  """A copy to damage: (its runs, its first evaluation)."""
  shutil.copytree(finished, tmp_path / "runs")
  made = _runs(tmp_path / "runs")
  return made, runs.evaluation_artifact(made[0], "paper")


def _refusal(call):
  with pytest.raises(UserError) as caught:
    call()
  message = str(caught.value)
  assert "\n" not in message
  return message


def test_data_is_renumbered_to_the_working_set_and_cut_to_k(data):
  arrays = data.arrays("test", 3)
  np.testing.assert_array_equal(
    arrays["rows"], tiny.examples(13, 2)["rows"][:, :3]
  )
  assert arrays["query"].shape == (13, tiny.D)
  assert data.memory.keys.dtype == np.float32
  assert data.class_counts.tolist() == [10, 9, 9, 9]


def test_seeds_have_parameters_of_their_own(finished):
  one, two = (run.params()["head"]["kernel"] for run in _runs(finished))
  assert one.shape == (tiny.D, tiny.CLASSES)
  assert (one != two).any()


def test_metrics_are_those_of_the_kept_predictions(finished, data):
  run = _runs(finished)[1]
  evaluation = runs.evaluation_artifact(run, "paper")
  labels = data.examples["test"].labels
  ids, logits, _ = runs.read_predictions(evaluation, "test")
  assert ids == data.examples["test"].ids
  # What the linear model says, by NumPy: inputs are scaled to norm sqrt(d).
  head = run.params()["head"]
  z = data.examples["test"].queries
  z = z / np.linalg.norm(z, axis=1, keepdims=True) * np.sqrt(tiny.D)
  np.testing.assert_allclose(
    logits, z @ head["kernel"] + head["bias"], atol=1e-4
  )
  metrics = evaluation.info()["metrics"]["test"]
  correct = logits.argmax(axis=1) == labels
  assert metrics["top1"]["all"] == pytest.approx(100 * correct.mean())
  assert metrics["top5"]["all"] == 100  # of four classes
  groups = accuracy.shot_groups(data.class_counts, "paper")
  assert metrics["top1"] == accuracy.by_group(correct, labels, groups)


def test_a_finished_run_and_evaluation_are_not_done_again(
  finished, data, monkeypatch
):
  monkeypatch.setattr(runs.loop, "Trainer", None)
  monkeypatch.setattr(runs.loop, "predict", None)
  runs.train(_runs(finished), data)
  runs.evaluate(_runs(finished), data, **EVALUATE)


def test_one_seed_alone_gives_the_parameters_it_gives_among_others(
  finished, data, tmp_path
):
  (_, alone) = _runs(tmp_path)
  runs.train([alone], data)
  np.testing.assert_array_equal(
    alone.params()["head"]["kernel"],
    _runs(finished)[1].params()["head"]["kernel"],
  )


@pytest.mark.parametrize(
  ("change", "named"),
  [
    ({"train": TRAIN | {"learning_rate": 0.5}}, "train.learning_rate"),
    ({"options": {"hidden_dim": 3}}, "model.hidden_dim"),
    ({"data_fingerprint": "data-2"}, "data: data-1 -> data-2"),
    ({"seed": 7}, "seed: 0 -> 7"),
  ],
)
def test_a_run_of_other_settings_is_refused_and_what_differs_named(
  finished, data, change, named
):
  run = dataclasses.replace(_runs(finished)[0], **change)
  message = _refusal(lambda: runs.train([run], data))
  assert named in message and f"delete {run.folder}" in message


@pytest.mark.parametrize("change", [{"checkpoint_epochs": 9.0}, {"seeds": 9}])
def test_what_does_not_change_a_run_does_not_forbid_its_use(finished, change):
  assert _runs(finished, **change)[0].artifact.is_complete()


def test_other_shot_groups_are_another_evaluation(finished):
  other = runs.evaluation_artifact(_runs(finished)[0], "oltr_code")
  assert "shot_groups: paper -> oltr_code" in _refusal(other.is_complete)


@pytest.mark.parametrize("k", [0, 6])
def test_more_neighbors_than_were_found_are_refused_with_both(
  data, tmp_path, k
):
  message = _refusal(lambda: runs.train(_runs(tmp_path, k=k), data))
  assert f"config.train.k={k}: the neighbour shards hold 5" in message
  assert "config.search.k" in message
  assert list(tmp_path.iterdir()) == []


def test_an_option_that_the_model_lacks_is_refused_by_name(data, tmp_path):
  run = dataclasses.replace(_runs(tmp_path)[0], options={"depth": 3})
  message = _refusal(lambda: runs.train([run], data))
  assert message.startswith("config.model.linear: ") and "depth" in message


def test_an_untrained_run_is_not_evaluated(data, tmp_path):
  message = _refusal(lambda: runs.evaluate(_runs(tmp_path), data, **EVALUATE))
  assert (
    message == f"{tmp_path / 'seed_0'}: not trained yet; run --stages=train."
  )


@pytest.mark.parametrize("damage", ["truncate", "flip_bit"])
def test_damaged_parameters_are_refused(
  copied, data, damage, truncate, flip_bit
):
  (run, _), evaluation = copied
  {"truncate": truncate, "flip_bit": flip_bit}[damage](
    run.folder / "params.npz"
  )
  shutil.rmtree(evaluation.folder)
  message = _refusal(lambda: runs.evaluate([run], data, **EVALUATE))
  assert str(run.folder / "params.npz") in message
  assert f"delete {run.folder} to have it made again" in message


def test_damaged_predictions_are_refused(copied, flip_bit):
  _, evaluation = copied
  flip_bit(evaluation.folder / "predictions-test.npz")
  message = _refusal(lambda: runs.read_predictions(evaluation, "test"))
  assert "predictions-test.npz: its bytes are not those" in message
