"""The train and evaluate stages: one folder a run of a model with a seed."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn

from retrieval_aug import models
from retrieval_aug.common import files, manifest, progress
from retrieval_aug.common.errors import UserError
from retrieval_aug.evaluation import accuracy
from retrieval_aug.memory import neighbors, rac
from retrieval_aug.memory.table import Table
from retrieval_aug.memory.working_set import WorkingSet
from retrieval_aug.training import (
  augment,
  finetune,
  input_pipeline,
  loop,
  start,
  step,
)
from retrieval_aug.training import loss as losses
from retrieval_aug.training.checkpoint import load_params, save_params

EVAL_SPLITS = ("val", "test")
TOP_KS = (1, 5)


class Data(NamedTuple):
  """What every run of an experiment shares.

  Attributes:
    examples: split -> examples with their neighbours.
    memory: the working set.
    rows: split -> int32 [N, k], working-set rows of the neighbours.
    class_counts: int64 [C], training examples a class.
    source_names: name of each source of the memory.
    fingerprint: of the neighbours and values behind all this.
  """

  examples: dict[str, input_pipeline.Examples]
  memory: step.Memory
  rows: dict[str, np.ndarray]
  class_counts: np.ndarray
  source_names: list[str]
  fingerprint: str

  def arrays(self, split: str, k: int) -> dict[str, np.ndarray]:
    """query [N, d], rows [N, k] and label [N] of one split."""
    examples = self.examples[split]
    return {
      "query": examples.queries,
      "rows": self.rows[split][:, :k],
      "label": examples.labels,
    }


def read_examples(
  artifact: manifest.Artifact, queries: Table
) -> dict[str, input_pipeline.Examples]:
  """Joins every split of the query table with its neighbours."""
  info = artifact.info()
  columns = [queries.column(n) for n in ("id", "label", "split")]
  out = {}
  for split in neighbors.SPLITS:
    chosen = [(i, label) for i, label, s in zip(*columns) if s == split]
    out[split] = input_pipeline.read(
      neighbors.shard_paths(artifact, split),
      [i for i, _ in chosen],
      [label for _, label in chosen],
      info["dims"],
      info["k"],
    )
  return out


def load_data(
  examples: dict[str, input_pipeline.Examples],
  working_set: WorkingSet,
  fingerprint: str,
) -> Data:
  """Brings examples and working set into the form that runs use."""
  labels = np.concatenate([e.labels for e in examples.values()])
  values = tuple(x.astype(np.float32) for x in working_set.values.values())
  return Data(
    examples=examples,
    memory=step.Memory(
      working_set.keys.astype(np.float32),
      values[0] if len(values) == 1 else values,
      working_set.sources,
      working_set.labels,
    ),
    rows={s: working_set.renumber(e.neighbors) for s, e in examples.items()},
    class_counts=losses.class_counts(
      examples["train"].labels, int(labels.max()) + 1
    ),
    source_names=working_set.source_names,
    fingerprint=fingerprint,
  )


def joined_data(data: Data, joined: manifest.Artifact) -> Data:
  """What RAC sees: each example has one neighbour, its joined text.

  Args:
    data: what the others see.
    joined: from `rac.joined_artifact`.
  """
  values, rows, first = [], {}, 0
  for split in data.examples:
    embedded, has_text = rac.load_joined(joined, split)
    values.append(embedded.astype(np.float32))
    own = np.arange(first, first + len(embedded), dtype=np.int32)
    rows[split] = np.where(has_text, own, -1)[:, None]
    first += len(embedded)
  return data._replace(
    memory=step.Memory(None, np.concatenate(values)),
    rows=rows,
    fingerprint=joined.fingerprint,
  )


@dataclasses.dataclass(frozen=True)
class Run:
  """One model trained with one seed.

  Attributes:
    model_name: a name in `models`.
    options: of the module.
    train: as `settings.train_settings` gives them.
    seed: of parameters, order and dropout.
    folder: of this run.
    data_fingerprint: of the data it sees.
    finetuned: a JSON value that names the encoder and the images, of a run
      that fine-tunes; else None.
    start: the run whose parameters it begins with, if any.
  """

  model_name: str
  options: dict[str, Any]
  train: dict[str, Any]
  seed: int
  folder: pathlib.Path
  data_fingerprint: str
  finetuned: dict[str, Any] | None = None
  start: manifest.Artifact | None = None

  @property
  def finetunes(self) -> bool:
    return bool(self.train.get("finetune"))

  @property
  def artifact(self) -> manifest.Artifact:
    # How often checkpoints are written and how many seeds there are do not
    # change what a run computes.
    indifferent = ["checkpoint_epochs", "seeds", "start_from"]
    inputs = {
      "data": self.data_fingerprint,
      "model": {"name": self.model_name, **self.options},
      "seed": self.seed,
    }
    if self.finetunes:
      text = str(augment.make(self.train["augment"]))
      inputs |= {"finetuned": self.finetuned, "augment": text}
      indifferent.append("augment")  # however it is written
    else:
      # What a frozen encoder has no use for. Runs that were made before there
      # were these settings stay valid.
      indifferent += ["finetune", "augment", "encoder_batch"]
    if self.start is not None:
      # The run, wherever its folder lies.
      inputs["start"] = self.start.fingerprint
    if not self.train.get("keep_start"):
      indifferent.append("keep_start")
    train = {n: v for n, v in self.train.items() if n not in indifferent}
    inputs["train"] = train
    return manifest.Artifact(self.folder, start.KIND, inputs)

  @property
  def label(self) -> str:
    return f"{self.model_name} seed {self.seed}"

  def params(self) -> Any:
    """The trained parameters, verified."""
    self.artifact.verify()
    return load_params(self.folder / start.PARAMS)


def build(run: Run, data: Data) -> nn.Module:
  """The run's model; an option that it does not take is a `UserError`."""
  name, options = run.model_name, dict(run.options)
  start.check(run.train)
  if run.finetunes:
    finetune.check(name, run.train)
  if options.get("source_gate"):
    options["source_gate"] = len(data.source_names)
  if "max_neighbors" in models.options(name):
    options["max_neighbors"] = run.train["k"]
  if name == "retformer" and isinstance(data.memory.values, tuple):
    raise UserError(
      "config.model.name=retformer: it has one stream of values; leave one of "
      f"config.value_encoders, not {len(data.memory.values)}, or leave it out."
    )
  if name == "vote" and not (data.memory.labels >= 0).any():
    raise UserError(
      "config.model.name=vote: no memory item has a class of this task as its "
      "label; leave `vote` out, or give the memory labels."
    )
  try:
    return models.build(name, len(data.class_counts), **options)
  except (ValueError, TypeError) as error:
    raise UserError(f"config.model.{name}: {error}") from error


def train(
  runs: list[Run], data: Data, finetuning: finetune.FineTuning | None = None
) -> None:
  """Trains the unfinished among the seeds of one model, in turn.

  Args:
    runs: equal but for seed and folder.
    data: shared by all.
    finetuning: for runs that fine-tune.
  """
  todo = [run for run in runs if not run.artifact.is_complete()]
  if not todo:
    return
  settings = dict(todo[0].train)
  k = settings.pop("k")
  settings.pop("seeds")
  settings.pop("start_from", None)
  available = data.examples["train"].neighbors.shape[1]
  if not 1 <= k <= available:
    raise UserError(
      f"config.train.k={k}: the neighbour shards hold {available}; choose 1 to "
      f"{available}, or search again with a larger config.search.k."
    )
  trainer = loop.Trainer(
    build(todo[0], data),
    loop.TrainSettings(**settings),
    data.memory,
    data.arrays("train", k),
    data.class_counts,
    finetuning,
  )
  shapes = jax.eval_shape(trainer.init, 0)
  if not shapes.params:
    trainer.total_steps = 0
  _note(todo, trainer, shapes, data)
  for run in todo:
    artifact = run.artifact
    with files.lock(run.folder):
      artifact.start()
      params = trainer.run(
        run.seed, run.folder, f"train {run.label}", run.start
      )
      save_params(run.folder / start.PARAMS, params)
      artifact.record("params", [start.PARAMS])
      artifact.finish(["params"])


def _note(
  todo: list[Run], trainer: loop.Trainer, shapes: step.State, data: Data
) -> None:
  """Says how much there is to do, and what it will take."""
  name = todo[0].model_name
  # Three copies of the parameters (Adam's two moments), working set once.
  state = _bytes(shapes)
  progress.note(
    f"train {name}: {len(todo)} runs of {trainer.total_steps:,} steps, about "
    f"{state / 1e6:,.1f} MB of state and {_bytes(data.memory) / 1e6:,.0f} MB "
    f"of working set in memory, {len(todo) * state / 1e6:,.1f} MB on disk"
  )
  if todo[0].finetunes:
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    progress.note(
      f"train {name}: {count(shapes.params):,} parameters, of them "
      f"{count(shapes.params['encoder']):,} of the encoder; compiling the step"
    )
    progress.note(
      f"train {name}: a step of {trainer.settings.batch_size} images needs "
      f"{trainer.activations() / 1e6:,.0f} MB beside that (a smaller "
      "train.encoder_batch needs less)"
    )


def _bytes(tree: Any) -> int:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def evaluation_artifact(
  run: Run, shot_groups: str, data_fingerprint: str
) -> manifest.Artifact:
  """Predictions and metrics of a run.

  Args:
    run: trained.
    shot_groups: see `accuracy.shot_groups`.
    data_fingerprint: of the data that it predicts from; another than it was
      trained on where the memory was edited since.
  """
  inputs = {"run": run.artifact.fingerprint, "shot_groups": shot_groups}
  name = "evaluation"
  if data_fingerprint != run.data_fingerprint:
    inputs["data"] = data_fingerprint
    name = f"evaluation_{data_fingerprint[:8]}"
  return manifest.Artifact(run.folder / name, "evaluation", inputs)


def trained_on(run: Run, data_fingerprints: Sequence[str]) -> Run:
  """The run as it was trained, if that was before the memory was edited.

  Args:
    run: on the data as they are.
    data_fingerprints: of the data as they were before.
  """
  path = run.folder / manifest.NAME
  if not path.exists():
    return run
  found = files.read_json(path).get("fingerprint")
  for fingerprint in data_fingerprints:
    before = dataclasses.replace(run, data_fingerprint=fingerprint)
    if before.artifact.fingerprint == found:
      if before.artifact.is_complete():
        return before
      raise UserError(
        f"{run.folder}: this run began before the memory was edited; restore "
        "the memory and finish it, or delete the folder to train on the edited "
        "one."
      )
  return run


def check_trained(runs: list[Run]) -> None:
  """Raises a `UserError` that names a run which is not trained yet."""
  for run in runs:
    if not run.artifact.is_complete():
      raise UserError(f"{run.folder}: not trained yet; run --stages=train.")


def evaluate(
  runs: list[Run],
  data: Data,
  finetuning: finetune.FineTuning | None = None,
  *,
  batch_size: int,
  shot_groups: str,
) -> None:
  """Predicts val and test with the unevaluated among the runs of one model.

  Writes `predictions-<split>.npz` (example ids, logits, attention weights)
  and puts the metrics into the manifest.

  Args:
    runs: equal but for seed and folder, trained.
    data: shared by all.
    finetuning: for runs that fine-tune; its images are seen as `prepare` of
      the encoder makes them.
    batch_size: examples a step.
    shot_groups: see `accuracy.shot_groups`.
  """
  groups = accuracy.shot_groups(data.class_counts, shot_groups)
  artifacts = {
    r.seed: evaluation_artifact(r, shot_groups, data.fingerprint) for r in runs
  }
  todo = [run for run in runs if not artifacts[run.seed].is_complete()]
  if not todo:
    return
  check_trained(todo)
  query = None
  if todo[0].finetunes:
    query = finetuning.query(todo[0].train["encoder_batch"])
  # One for all seeds and splits, so that it is compiled once.
  predict = step.make_predict_step(build(todo[0], data), query)
  for run in todo:
    artifact = artifacts[run.seed]
    progress.note(f"evaluate {run.label}")
    with files.lock(artifact.folder):
      artifact.start()
      params = run.params()
      if query is not None:
        finetune.check_params(
          params["encoder"], finetuning.encoder, run.artifact.remedy
        )
      metrics = {}
      for split in EVAL_SPLITS:
        arrays = data.arrays(split, run.train["k"])
        what = None
        if query is not None:
          del arrays["query"]
          arrays["images"] = finetuning.images[split]
          what = f"evaluate {split}"
        logits, attention = loop.predict_with(
          predict, params, data.memory, arrays, batch_size, what
        )
        logits = _adjusted(logits, data.class_counts, run.train)
        path = artifact.folder / f"predictions-{split}.npz"
        with files.atomic_path(path) as temporary, open(temporary, "wb") as f:
          np.savez(
            f,
            ids=np.asarray(data.examples[split].ids),
            logits=logits,
            attention=attention.astype(np.float16),
          )
        artifact.record(split, [path.name])
        labels = data.examples[split].labels
        metrics[split] = {
          f"top{k}": accuracy.by_group(
            accuracy.top_k_correct(logits, labels, k), labels, groups
          )
          for k in TOP_KS
        }
      artifact.finish(list(EVAL_SPLITS), {"metrics": metrics})


def _adjusted(
  logits: np.ndarray, class_counts: np.ndarray, train: dict[str, Any]
) -> np.ndarray:
  """Logits [N, C] after the post-hoc correction that the settings ask for."""
  tau = train["post_hoc_tau"]
  if not tau:
    return logits
  prior = losses.log_prior(class_counts)
  return np.asarray(losses.post_hoc(logits, prior, tau))


def read_predictions(
  evaluation: manifest.Artifact, split: str
) -> tuple[list[str], np.ndarray, np.ndarray]:
  """(example ids, logits [N, C], attention [N, L, k]), verified."""
  evaluation.verify()
  path = evaluation.folder / f"predictions-{split}.npz"
  with np.load(path, allow_pickle=False) as data:
    ids = [str(i) for i in data["ids"]]
    return ids, data["logits"], data["attention"].astype(np.float32)
