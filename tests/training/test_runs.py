"""Runs and evaluations as artifacts: the parameters behind a metric."""

import dataclasses
import shutil

import numpy as np
import pytest

from retrieval_aug.common.errors import UserError
from retrieval_aug.evaluation import accuracy
from retrieval_aug.memory.working_set import WorkingSet
from retrieval_aug.training import evaluations, input_pipeline, runs
from retrieval_aug.training.data import load_data
from tests.training import tiny

TRAIN = tiny.SETTINGS | {
  "epochs": 1.0,
  "k": 3,
  "seeds": 2,
  "post_hoc_tau": 0.0,
}
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
    tiny.memory().keys.astype(np.float16),
    {"text": tiny.memory().values.astype(np.float16)},
    sources=np.arange(tiny.U, dtype=np.int32) % 3,
    labels=np.arange(tiny.U, dtype=np.int32) % (tiny.CLASSES + 1) - 1,
    source_names=["a", "b", "c"],
  )
  return load_data(examples, working_set, "data-1")


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
  evaluations.evaluate(_runs(folder), data, **EVALUATE)
  return folder


@pytest.fixture
def copied(finished, tmp_path):
  """A copy to damage: (its runs, its first evaluation)."""
  shutil.copytree(finished, tmp_path / "runs")
  made = _runs(tmp_path / "runs")
  return made, evaluations.evaluation_artifact(
    made[0], "paper", made[0].data_fingerprint
  )


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
  assert data.memory.keys.dtype == np.float16
  assert data.class_counts.tolist() == [10, 9, 9, 9]


def test_seeds_have_parameters_of_their_own(finished):
  one, two = (run.params()["head"]["kernel"] for run in _runs(finished))
  assert one.shape == (tiny.D, tiny.CLASSES)
  assert (one != two).any()


def test_metrics_are_those_of_the_kept_predictions(finished, data):
  run = _runs(finished)[1]
  evaluation = evaluations.evaluation_artifact(
    run, "paper", run.data_fingerprint
  )
  labels = data.examples["test"].labels
  ids, logits, _ = evaluations.read_predictions(evaluation, "test")
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


MODELS = [
  ("retformer", {"num_layers": 1, "num_heads": 1}),
  ("mam_paper", {"num_layers": 2}),
  ("mam", {"num_layers": 1, "source_gate": True}),
]


@pytest.mark.parametrize(("name", "options"), MODELS)
def test_every_model_trains_and_what_the_data_decides_is_filled_in(
  data, tmp_path, name, options
):
  run = dataclasses.replace(_runs(tmp_path, name)[0], options=options)
  runs.train([run], data)
  evaluations.evaluate([run], data, **EVALUATE)
  fusion = run.params()["fusion"]
  if name == "retformer":  # CLS, z and train.k neighbors
    assert fusion["image_position"].shape == (2 + TRAIN["k"], tiny.D)
  if options.get("source_gate"):
    gate = fusion["layer_0"]["source_gate"]
    assert gate.shape == (3,) and (gate != 0).any()
  evaluation = evaluations.evaluation_artifact(
    run, "paper", run.data_fingerprint
  )
  _, logits, attention = evaluations.read_predictions(evaluation, "val")
  assert logits.shape == (11, tiny.CLASSES)
  assert attention.shape == (11, options["num_layers"], TRAIN["k"])


@pytest.fixture(scope="module")
def two_values(data):
  """As `data`, with values of two encoders."""
  values = (data.memory.values, data.memory.values[:, :3])
  return data._replace(memory=data.memory._replace(values=values))


@pytest.mark.parametrize("name", ["mean_knn", "mam"])
def test_values_of_two_encoders_stand_side_by_side(two_values, tmp_path, name):
  run = _runs(tmp_path, name)[0]
  runs.train([run], two_values)
  evaluations.evaluate([run], two_values, **EVALUATE)
  fusion = run.params()["fusion"]
  output = fusion["layer_0"]["output"] if name == "mam" else fusion["output"]
  assert output["kernel"].shape == (tiny.DV + 3, tiny.D)


def test_retformer_refuses_values_of_two_encoders(two_values, tmp_path):
  message = _refusal(
    lambda: runs.train(_runs(tmp_path, "retformer"), two_values)
  )
  assert "one stream of values" in message and "value_encoders" in message


def test_a_vote_has_nothing_to_train_and_counts_the_memorys_labels(
  data, tmp_path
):
  run = dataclasses.replace(
    _runs(tmp_path, "vote")[0], options={"kind": "plurality"}
  )
  runs.train([run], data)
  evaluations.evaluate([run], data, **EVALUATE)
  assert run.params() == {}
  assert not (run.folder / "metrics.jsonl").read_text()
  _, logits, _ = evaluations.read_predictions(
    evaluations.evaluation_artifact(run, "paper", run.data_fingerprint), "test"
  )
  rows = data.rows["test"][:, :3]
  labels = np.where(rows < 0, -1, np.asarray(data.memory.labels)[rows])
  for scores, own in zip(logits, labels):
    votes = [np.sum(own == c) for c in range(tiny.CLASSES)]
    assert np.floor(scores).tolist() == votes


def test_a_vote_of_a_memory_without_labels_is_refused(data, tmp_path):
  none = data.memory._replace(labels=np.full(tiny.U, -1, np.int32))
  message = _refusal(
    lambda: runs.train(_runs(tmp_path, "vote"), data._replace(memory=none))
  )
  assert "no memory item has a class" in message and "give" in message


@pytest.mark.parametrize(
  "change",
  [
    {"loss": "cross_entropy"},
    {"tau": 0.5},
    {"loss": "ldam", "reweighting": "deferred", "reweight_epoch": 0.5},
    {"loss": "focal", "focal_gamma": 1.0},
    {"loss": "cross_entropy", "reweighting": "class_balanced"},
    {"mixup": 0.5},
  ],
  ids=lambda change: "_".join(str(v) for v in change.values()),
)
def test_every_loss_trains_to_parameters_of_its_own(
  finished, data, tmp_path, change
):
  run = _runs(tmp_path, **change)[0]
  runs.train([run], data)
  kernel = run.params()["head"]["kernel"]
  usual = _runs(finished)[0].params()["head"]["kernel"]
  assert np.isfinite(kernel).all() and (kernel != usual).any()


def test_post_hoc_correction_shifts_the_logits_by_the_prior(data, tmp_path):
  plain = _runs(tmp_path / "plain", loss="cross_entropy")[0]
  shifted = _runs(tmp_path / "p", loss="cross_entropy", post_hoc_tau=0.7)[0]
  logits = []
  for run in (plain, shifted):
    runs.train([run], data)
    evaluations.evaluate([run], data, **EVALUATE)
    evaluation = evaluations.evaluation_artifact(
      run, "paper", run.data_fingerprint
    )
    logits.append(evaluations.read_predictions(evaluation, "val")[1])
  prior = np.log(data.class_counts / data.class_counts.sum())
  np.testing.assert_allclose(logits[1], logits[0] - 0.7 * prior, atol=1e-5)


def test_the_prior_is_never_counted_twice(data, tmp_path):
  run = _runs(tmp_path, loss="lace", post_hoc_tau=0.7)[0]
  message = _refusal(lambda: runs.train([run], data))
  assert "adjusts the logits by the class prior already" in message


def test_a_finished_run_and_evaluation_are_not_done_again(
  finished, data, monkeypatch
):
  monkeypatch.setattr(runs.loop, "Trainer", None)
  monkeypatch.setattr(evaluations.predict, "predictor", None)
  runs.train(_runs(finished), data)
  evaluations.evaluate(_runs(finished), data, **EVALUATE)


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
  other = evaluations.evaluation_artifact(
    _runs(finished)[0], "oltr_code", _runs(finished)[0].data_fingerprint
  )
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
  message = _refusal(
    lambda: evaluations.evaluate(_runs(tmp_path), data, **EVALUATE)
  )
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
  message = _refusal(lambda: evaluations.evaluate([run], data, **EVALUATE))
  assert str(run.folder / "params.npz") in message
  assert f"delete {run.folder} to have it made again" in message


def test_damaged_predictions_are_refused(copied, flip_bit):
  _, evaluation = copied
  flip_bit(evaluation.folder / "predictions-test.npz")
  message = _refusal(lambda: evaluations.read_predictions(evaluation, "test"))
  assert "predictions-test.npz: its bytes are not those" in message
