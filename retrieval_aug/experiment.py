"""An experiment in a folder: each method is a stage of the main job."""

import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from retrieval_aug import config as configs
from retrieval_aug import encoders, sweep
from retrieval_aug.common import distributed, files, progress
from retrieval_aug.common.errors import UserError
from retrieval_aug.common.manifest import Artifact
from retrieval_aug.datasets.vectors import NoImageError
from retrieval_aug.evaluation import table as result_table
from retrieval_aug.memory import leakage, neighbors, rac, working_set
from retrieval_aug.memory.table import Table
from retrieval_aug.report import leaks_picture, neighbors_picture, pictures
from retrieval_aug.retrieval.stages import Retrieval, Runner, run_here
from retrieval_aug.settings import Settings, chosen_models, train_settings
from retrieval_aug.sweep import Trial
from retrieval_aug.training import evaluations, finetune, guard, runs, start
from retrieval_aug.training.data import (
  Data,
  joined_data,
  load_data,
  read_examples,
)
from retrieval_aug.training.settings import Layout, Telling


class Experiment:
  """The stages, by name; each returns whether there was anything to do."""

  def __init__(
    self, config: Any, workdir: pathlib.Path, runner: Runner = run_here
  ):
    """Nothing is read or computed yet.

    Args:
      config: a ConfigDict from a file of `configs/`.
      workdir: for everything that is written.
      runner: does the jobs of embedding and searching.
    """
    self.settings = Settings(config)
    self.workdir = workdir
    self.models = chosen_models(self.settings)
    self._swept = sweep.trials(self.settings, self.models)
    self.retrieval = Retrieval(
      config, workdir, self.models, self.settings, runner
    )

  def embed(self) -> bool:
    """Images and texts to embedding tables."""
    return self.retrieval.embed()

  def search(self) -> bool:
    """Tables to neighbour shards and their working set."""
    return self.retrieval.search()

  def train(self) -> bool:
    """Neighbours to trained parameters: every model with every seed."""
    trials = self._trained()
    trains = [train_settings(t.settings, t.model) for t in trials]
    augmented = any(t["augment"] != "none" for t in trains)
    if augmented and not any(t["finetune"] for t in trains):
      progress.note(
        "note: config.train.augment is set, but no model that is asked for "
        "has train.finetune=True"
      )
    runs_of = lambda trial: [run.artifact for run in self._runs(trial)]
    todo = [t for t in trials if not _complete_for_all(runs_of(t))]
    if self._swept:
      first = {trial: self._runs(trial)[0] for trial in trials}
      sweep.check(first, todo, self.data_of)
    for trial in trials:
      if trial in todo and not self._train(trial):
        continue
      for run in self._runs(trial):
        run.artifact.verify()
    self._left_out()  # not all of them
    return bool(todo)

  def _train(self, trial: Trial) -> bool:
    """Trains a model; of a sweep, one that diverges does not end it."""
    train = train_settings(trial.settings, trial.model)
    looks = train["eval_epochs"] > 0
    sweep.announce(trial)
    try:
      runs.train(
        self._runs(trial),
        self.data_of(trial.model),
        self._finetuning(trial, ("train", "val")[: 1 + looks]),
        seeds_at_once=train["seeds_at_once"],
        layout=self._layout,
        telling=Telling(**self.settings.log.options()),
      )
    except guard.Diverged as error:
      if not self._swept:
        raise
      sweep.leave_out(trial, self._runs(trial), error)
      return False
    return True

  def evaluate(self) -> bool:
    """Parameters to metrics, `results.csv` and `.json`; or those of a sweep."""
    options = self.settings.evaluate.options()
    worked = False
    for trial in self._trained():
      if not _complete_for_all(self._evaluations(trial)):
        worked = True
        runs.check_trained(self._runs(trial))
        sweep.announce(trial)
        tuned = self._finetuning(trial, evaluations.EVAL_SPLITS)
        evaluations.evaluate(
          self._runs(trial),
          self.data_of(trial.model),
          tuned,
          layout=self._layout,
          **options,
        )
      for artifact in self._evaluations(trial):
        artifact.verify()
    if distributed.is_first():
      if self._swept:
        sweep.write(self.workdir, self._sweep_rows())
      else:
        rows = self._rows()
        text = result_table.to_csv(rows)
        files.write_bytes(self.workdir / "results.csv", text.encode())
        files.write_json(self.workdir / "results.json", rows)
    return worked

  def report(self) -> bool:
    """Evaluated runs to `neighbors.png`, and leaks to `leaks.png`."""
    drawn = self._report_leaks()
    return self._report_neighbors() or drawn

  def _report_leaks(self) -> bool:
    path = self.workdir / "leaks.png"
    version = self.retrieval.now.leaks.fingerprint
    found = self.retrieval.leaks()
    if not found or not found["pairs"]:
      path.unlink(missing_ok=True)  # of other settings
      return False
    if pictures.version_of(path) == version:
      return False
    images = self.retrieval.images_of_rows()
    return leaks_picture.draw(path, found["pairs"], *images, version)

  def _report_neighbors(self) -> bool:
    options = self.settings.report.options()
    if self._swept:
      progress.note("neighbors.png shows a run of runs/, and a sweep has none")
      return False
    if "mam" not in self.models:
      progress.note("neighbors.png shows what mam attends to: not asked for")
      return False
    trial = Trial("mam", self.settings)
    run, evaluation = self._runs(trial)[0], self._evaluations(trial)[0]
    if not evaluation.is_complete():
      raise UserError(f"{run.folder}: not evaluated; run --stages=evaluate.")
    path = self.workdir / "neighbors.png"
    version = f"{evaluation.fingerprint} {sorted(options.items())}"
    if pictures.version_of(path) == version:
      return False
    queries, memory = self.tables
    examples = read_examples(self._neighbors, queries)
    rows = neighbors_picture.choose(
      examples["train"].labels,
      examples["test"],
      *evaluations.read_predictions(evaluation, "test"),
      **options,
    )
    try:
      shown = np.unique(np.concatenate([r.neighbors for r in rows]))
      shown = shown[shown >= 0]
      ids = memory.column_rows("id", shown)
      neighbors_picture.draw(
        path,
        rows,
        self.retrieval.sources.downstream,
        self.retrieval.sources.memory_items(ids),
        dict(zip(shown.tolist(), ids)),
        version,
      )
    except NoImageError as error:
      progress.note(f"neighbors.png cannot be drawn: {error}")
      return False
    return True

  def text(self) -> str:
    """The final table as Markdown, and what a reader of it must know."""
    table = self._results()
    lines = [table, f"Neighbors: {neighbors.describe(self._neighbors)}."]
    if self.retrieval.leaks() is not None:
      lines.append(f"Leaks: {leakage.describe(self.retrieval.now.leaks)}.")
    if "rac" in self.models:
      lines.append(
        f"Joined texts of rac: {rac.describe(self.retrieval.now.joined)}."
      )
    return "\n".join(lines)

  def _results(self) -> str:
    if self._swept:
      rows = self._sweep_rows()
      return sweep.to_text(rows, self.settings, self._left_out())
    labels = {s: np.asarray(x) for s, x in self._labels().items()}
    classes = 1 + max(int(x.max()) for x in labels.values())
    return result_table.to_text(
      self._rows(),
      "test",
      np.bincount(labels["train"], minlength=classes),
      labels["test"],
      self.settings.evaluate.shot_groups,
    )

  @functools.cached_property
  def runnable(self) -> list[str]:
    """The models asked for; of "all", those that this memory serves.

    Who asks for `vote` by name is told why it cannot be.
    """
    if self.settings.model.name != "all":
      return self.models
    if (self.data.memory.labels >= 0).any():
      return self.models
    progress.note("vote is left out: no memory item has a class as its label")
    return [name for name in self.models if name != "vote"]

  @functools.cached_property
  def _trials(self) -> list[Trial]:
    """The models that run, each at every point of a sweep."""
    if not self._swept:
      return [Trial(name, self.settings) for name in self.runnable]
    return [trial for name in self.runnable for trial in self._swept[name]]

  def _left_out(self) -> dict[Trial, str]:
    """Points of a sweep that have diverged, and what was wrong with them."""
    swept = self._trials if self._swept else []
    return sweep.left_out({trial: self._runs(trial) for trial in swept})

  def _trained(self) -> list[Trial]:
    """What there is to evaluate."""
    left_out = self._left_out()
    return [trial for trial in self._trials if trial not in left_out]

  @property
  def tables(self) -> tuple[Table, Table]:
    """The query table and the memory table, as the embed stage left them."""
    return self.retrieval.tables

  @functools.cached_property
  def _layout(self) -> Layout:
    mesh, memory = self.settings.mesh, self.settings.memory
    return Layout(mesh.model, mesh.sharding, memory.placement, memory.dtype)

  @property
  def _neighbors(self) -> Artifact:
    return self.retrieval.now.neighbors

  def data_of(self, model: str) -> Data:
    """What the runs of a model see; needs the search stage to be finished."""
    return self._joined_data if model == "rac" else self.data

  @functools.cached_property
  def _joined_data(self) -> Data:
    joined = self.retrieval.now.joined
    if not joined.is_complete():
      raise UserError(
        f"{joined.folder}: not finished; run --stages=search first."
      )
    return joined_data(self.data, joined)

  @functools.cached_property
  def data(self) -> Data:
    """What all models but RAC see; needs the search stage to be finished."""
    rows = self.retrieval.now.working_set
    for artifact in (self._neighbors, rows):
      if not artifact.is_complete():
        raise UserError(
          f"{artifact.folder}: not finished; run --stages=search first."
        )
    return load_data(
      read_examples(self._neighbors, self.tables[0]),
      working_set.load_working_set(rows, check=distributed.is_first()),
      rows.fingerprint,
    )

  @functools.cache  # noqa: B019 - an experiment lives as long as its process
  def _runs(self, trial: Trial) -> list[runs.Run]:
    """The runs of one model, one a seed."""
    name = trial.model
    train = train_settings(trial.settings, name)
    seen = self.retrieval.now.seen_by(name)
    before = [v.seen_by(name).fingerprint for v in self.retrieval.earlier]
    finetuned = None
    if train["finetune"]:
      finetune.check(name, train)
      finetuned = {
        "encoder": self.tables[0].inputs["encoder"],
        "images": self._image_cache(trial, "train").fingerprint,
      }
    found = [
      runs.Run(
        model_name=name,
        options=getattr(trial.settings.model, name).options("train"),
        train=train,
        seed=seed,
        folder=trial.folder(self.workdir, seed),
        data_fingerprint=seen.fingerprint,
        finetuned=finetuned,
        start=start.find(train["start_from"], name, seed),
        memory_dtype=self._layout.dtype,
        point=trial.point,
      )
      for seed in range(train["seeds"])
    ]
    return [runs.trained_on(run, before) for run in found]

  def _image_cache(self, trial: Trial, split: str) -> Artifact:
    """Where the images are that a model is fine-tuned on, or evaluated."""
    return finetune.cache_artifact(
      self.workdir / "images",
      self.tables[0],
      split,
      train_settings(trial.settings, trial.model),
      self.settings.embed.shard_rows,
    )

  def _finetuning(
    self, trial: Trial, splits: Sequence[str]
  ) -> finetune.FineTuning | None:
    """What a model is fine-tuned with; None for one of frozen queries."""
    if not train_settings(trial.settings, trial.model)["finetune"]:
      return None
    s = self.settings
    workers = {
      n: v
      for n, v in s.embed.options().items()
      if n in ("threads", "processes")
    }
    return finetune.load(
      self._neighbors,
      [self._image_cache(trial, split) for split in splits],
      encoders.load(**s.encoder.options()),
      lambda: self.retrieval.sources.downstream,
      **workers,
    )

  def evaluations(self, name: str) -> list[Artifact]:
    """Predictions and metrics of a model, one a seed, on the present memory."""
    return self._evaluations(Trial(name, self.settings))

  def _evaluations(self, trial: Trial) -> list[Artifact]:
    shot_groups = self.settings.evaluate.shot_groups
    seen = self.retrieval.now.seen_by(trial.model).fingerprint
    return [
      evaluations.evaluation_artifact(r, shot_groups, seen)
      for r in self._runs(trial)
    ]

  def _sweep_rows(self) -> list[dict[str, Any]]:
    metrics = lambda trial: [
      a.info()["metrics"] for a in self._evaluations(trial)
    ]
    return sweep.rows({trial: metrics(trial) for trial in self._trained()})

  def _rows(self) -> list[dict[str, Any]]:
    """Result rows of the models asked for, and of those evaluated before."""
    out = []
    for name in configs.MODELS:
      if name in self.runnable or self._evaluated_before(name):
        metrics = [a.info()["metrics"] for a in self.evaluations(name)]
        out += result_table.rows(name, metrics)
    return out

  def _evaluated_before(self, name: str) -> bool:
    """Whether this folder has the model's results, with these settings."""
    if not (self.workdir / "runs" / name).exists():
      return False
    try:
      return _complete(self.evaluations(name))
    except UserError:  # of other settings: not of this table
      return False

  def _labels(self) -> dict[str, list[int]]:
    """Labels of each split, in table order."""
    queries = self.tables[0]
    out: dict[str, list[int]] = {}
    for split, label in zip(queries.column("split"), queries.column("label")):
      out.setdefault(split, []).append(label)
    return out


def _complete(artifacts: list[Artifact]) -> bool:
  return all(a.is_complete() for a in artifacts)


def _complete_for_all(artifacts: list[Artifact]) -> bool:
  """As `_complete`, with one answer for all processes."""
  complete = _complete(artifacts)
  # None finishes one of them before all have looked.
  distributed.barrier("what is done already")
  return complete
