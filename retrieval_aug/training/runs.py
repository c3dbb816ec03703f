"""The train stage: one folder a run of a model with a seed."""

import contextlib
import dataclasses
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import jax
from flax import linen as nn

from retrieval_aug import models
from retrieval_aug.common import distributed, files, manifest, progress
from retrieval_aug.common.errors import UserError
from retrieval_aug.training import (
  augment,
  finetune,
  loop,
  placement,
  start,
)
from retrieval_aug.training.checkpoint import load_params, save_params
from retrieval_aug.training.data import Data
from retrieval_aug.training.settings import Layout, Telling, TrainSettings

# Settings that were not there from the beginning, with what was done then:
# runs that were made before stay valid.
_ADDED = {
  "accumulate": 1,
  "ema": 0.0,
  "remat": False,
  "eval_epochs": 0.0,
  "keep": "last",
}


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
    memory_dtype: of the working set.
    point: of a sweep, for messages.
  """

  model_name: str
  options: dict[str, Any]
  train: dict[str, Any]
  seed: int
  folder: pathlib.Path
  data_fingerprint: str
  finetuned: dict[str, Any] | None = None
  start: manifest.Artifact | None = None
  memory_dtype: str = "float16"
  point: str = ""

  @property
  def finetunes(self) -> bool:
    return bool(self.train.get("finetune"))

  @property
  def artifact(self) -> manifest.Artifact:
    # How often checkpoints are written and how many seeds there are do not
    # change what a run computes.
    indifferent = ["checkpoint_epochs", "seeds", "start_from", "seeds_at_once"]
    indifferent += [n for n, x in _ADDED.items() if self.train.get(n) == x]
    if self.train.get("keep", "last") == "last":
      indifferent.append("eval_epochs")  # which only looks on
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
    if self.memory_dtype == "bfloat16":  # the others lose nothing
      inputs["memory_dtype"] = self.memory_dtype
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
    return " ".join(
      filter(None, (self.model_name, self.point, f"seed {self.seed}"))
    )

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
  runs: list[Run],
  data: Data,
  finetuning: finetune.FineTuning | None = None,
  *,
  seeds_at_once: int = 1,
  layout: Layout = Layout(),
  telling: Telling = Telling(),
) -> None:
  """Trains the unfinished among the seeds of one model.

  Args:
    runs: equal but for seed and folder.
    data: shared by all.
    finetuning: for runs that fine-tune.
    seeds_at_once: how many train in one compiled step, where that can be.
    layout: where arrays lie.
    telling: what is told beside the metrics files.
  """
  label = f"train {runs[0].model_name}"
  for run in runs:
    distributed.agree(run.artifact.fingerprint, f"the settings of {run.label}")
  # What one process finishes in between is finished for all or for none.
  todo = [run for run in runs if not run.artifact.is_complete()]
  distributed.barrier(label)
  if not todo:
    return
  trainer = _trainer(todo[0], data, finetuning, layout, telling)
  if not trainer.compiled.shapes.params:
    trainer.total_steps = 0
  together = _at_once(trainer, todo, seeds_at_once, label)
  _note(todo, trainer, data, together)
  for i in range(0, len(todo), together):
    _train(trainer, todo[i : i + together])


def _at_once(
  trainer: loop.Trainer, todo: list[Run], wanted: int, label: str
) -> int:
  """How many seeds train together: as many as wanted, where that can be."""
  wanted = min(wanted, len(todo))
  if wanted < 2 or not trainer.total_steps:
    return 1
  if todo[0].start is not None or not trainer.can_train_together():
    progress.note(
      f"{label}: one seed after the other, whatever train.seeds_at_once says: "
      "together they train on one device, from random parameters, on stored "
      "queries, with the working set on the device and train.keep=last"
    )
    return 1
  needs, free = _needs(trainer, wanted), placement.free_bytes()
  if needs <= free:
    return wanted
  fit = max(1, int(wanted * free / needs))
  progress.note(
    f"{label}: train.seeds_at_once={fit}, not {wanted}: so many need "
    f"{needs / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free"
  )
  return fit


def _needs(trainer: loop.Trainer, together: int) -> int:
  """Bytes that a step of several seeds takes beside the working set."""
  # What is compiled is not compiled again to train.
  found = trainer.traced(together).lower().compile().memory_analysis()
  asked = found.argument_size_in_bytes + found.temp_size_in_bytes
  return asked - _bytes(trainer.placed.memory)


def settings_of(run: Run, data: Data) -> TrainSettings:
  """How a run trains; what makes no sense on its data is a `UserError`."""
  k, available = run.train["k"], data.examples["train"].neighbors.shape[1]
  if not 1 <= k <= available:
    raise UserError(
      f"config.train.k={k}: the neighbour shards hold {available}; choose 1 to "
      f"{available}, or search again with a larger config.search.k."
    )
  names = {field.name for field in dataclasses.fields(TrainSettings)}
  found = TrainSettings(**{n: x for n, x in run.train.items() if n in names})
  found.make_loss(data.class_counts)
  return found


def _trainer(run: Run, data: Data, finetuning, layout, telling) -> loop.Trainer:
  """What trains a run and those that are equal but for the seed."""
  settings, k = settings_of(run, data), run.train["k"]
  val = None
  if settings.eval_epochs > 0:
    val = data.arrays("val", k)
    if settings.finetune:
      val = {**val, "images": finetuning.images["val"]}
      del val["query"]
  return loop.Trainer(
    build(run, data),
    settings,
    data.memory,
    data.arrays("train", k),
    data.class_counts,
    finetuning,
    val=val,
    ids=data.examples["train"].ids,
    layout=layout,
    telling=telling,
  )


def _train(trainer: loop.Trainer, runs: list[Run]) -> None:
  """Trains one run, or several together."""
  first = distributed.is_first()
  with contextlib.ExitStack() as stack:
    if first:
      for run in runs:
        stack.enter_context(files.lock(run.folder))
        run.artifact.start()
    if len(runs) == 1:
      (run,) = runs
      what = f"train {run.label}"
      params = [trainer.run(run.seed, run.folder, what, run.start)]
    else:
      params = _train_together(trainer, runs, stack)
    if first:
      for run, own in zip(runs, params):
        save_params(run.folder / start.PARAMS, own)
        run.artifact.record("params", [start.PARAMS])
        run.artifact.finish(["params"])
  distributed.barrier(f"train {runs[0].label}")


def _train_together(trainer, runs: list[Run], stack) -> list[Any]:
  seeds = [run.seed for run in runs]
  name = f"seeds_{seeds[0]}_to_{seeds[-1]}"
  shared = runs[0].folder.parent / name
  stack.enter_context(files.lock(shared))
  # Checkpoints of all of them, named by what they are of.
  artifact = manifest.Artifact(
    shared, "runs together", {r.label: r.artifact.fingerprint for r in runs}
  )
  artifact.is_complete()  # refuses what is of other runs
  artifact.start()
  params = trainer.run_together(
    seeds,
    [run.folder for run in runs],
    shared,
    f"train {runs[0].model_name}",
  )
  stack.callback(shutil.rmtree, shared)
  return params


def _note(
  todo: list[Run], trainer: loop.Trainer, data: Data, together: int
) -> None:
  """Says how much there is to do, and what it will take."""
  name, shapes = todo[0].model_name, trainer.compiled.shapes
  # Three copies of the parameters (Adam's two moments), working set once.
  state = _bytes(shapes)
  at_once = f", {together} at once" if together > 1 else ""
  progress.note(
    f"train {name}: {len(todo)} runs of {trainer.total_steps:,} steps{at_once}"
    f", about {together * state / 1e6:,.1f} MB of state in memory, "
    f"{len(todo) * state / 1e6:,.1f} MB on disk; "
    f"{trainer.placed.why}"
  )
  if todo[0].finetunes:
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    progress.note(
      f"train {name}: {count(shapes.params):,} parameters, of them "
      f"{count(shapes.params['encoder']):,} of the encoder; compiling the step"
    )
    step = trainer.traced().lower().compile()
    needs = step.memory_analysis().temp_size_in_bytes
    progress.note(
      f"train {name}: a step of {trainer.settings.batch_size} images needs "
      f"{needs / 1e6:,.0f} MB beside that (a smaller train.encoder_batch needs "
      "less)"
    )


def _bytes(tree: Any) -> int:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


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
