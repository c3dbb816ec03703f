"""Sweeps: each model with every combination of lists of settings.

  --config.sweep.train.learning_rate=1e-3,3e-4
  --config.sweep.model.num_layers=1,2

are four points of a model that has layers, and two of one that has none. A
point is what a config with its values is, and its runs are like any others, in
folders of their own.
"""

import dataclasses
import functools
import itertools
import math
import pathlib
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections

from retrieval_aug import config as configs
from retrieval_aug.common import distributed, files, manifest, progress
from retrieval_aug.common.errors import UserError
from retrieval_aug.evaluation import sweep_table
from retrieval_aug.settings import Settings
from retrieval_aug.training import start
from retrieval_aug.training.data import Data
from retrieval_aug.training.guard import Diverged
from retrieval_aug.training.runs import Run, build, settings_of

# Settings of training that a model which trains nothing has a use for.
_OF_VOTE = ("k", "post_hoc_tau")

# In the folder of a run whose point was left out.
_DIVERGED = "diverged.json"

_LONGEST = 200  # characters of a folder's name; file systems take 255 bytes


@dataclasses.dataclass(frozen=True)
class Trial:
  """A model as it is trained with each seed.

  Attributes:
    model: its name.
    settings: all, with the values of the point.
    values: of the point, by name within `config.model.<model>`.
    point: the name of its folder; empty without a sweep.
  """

  model: str
  settings: Settings = dataclasses.field(compare=False)
  values: dict[str, Any] = dataclasses.field(
    default_factory=dict, compare=False
  )
  point: str = ""

  def folder(self, workdir: pathlib.Path, seed: int) -> pathlib.Path:
    """The folder of the run with a seed."""
    if not self.point:
      return start.folder_of(workdir, self.model, seed)
    return workdir / "sweep" / self.model / self.point / f"seed_{seed}"


def trials(settings: Settings, models: Sequence[str]) -> dict[str, list[Trial]]:
  """The points of the sweep that is asked for, by model; empty if none is.

  Args:
    settings: of the experiment.
    models: those asked for.

  Raises:
    UserError: a list is empty, has a value twice or one of another type, or is
      of a setting that none of the models has.
  """
  lists = {
    f"{section}.{name}": text
    for section in ("train", "model")
    for name, text in getattr(settings.sweep, section).options().items()
    if text is not None
  }
  if not lists:
    return {}
  axes = {model: {} for model in models}
  for key, text in lists.items():
    taking = [model for model in models if _takes(model, key)]
    if not taking:
      having = [model for model in configs.MODELS if _takes(model, key)]
      raise UserError(
        f"config.sweep.{key}: config.model.name={','.join(models)} has no use "
        f"for it; these have: {', '.join(having)}."
      )
    for model in taking:
      own = key.removeprefix("model.")  # its name in config.model.<model>
      axes[model][own] = values(key, text, *_kind(model, key))
  return {model: _points(settings, model, axes[model]) for model in models}


def _points(
  settings: Settings, model: str, axes: dict[str, list[Any]]
) -> list[Trial]:
  names = sorted(axes, key=_label)
  found = []
  for chosen in itertools.product(*(axes[name] for name in names)):
    own = dict(zip(names, chosen))
    changed = {f"model.{model}.{name}": value for name, value in own.items()}
    found.append(
      Trial(model, settings.replaced(changed), own, folder_name(own))
    )
  return found


@functools.cache
def _defaults() -> ml_collections.ConfigDict:
  return configs.defaults()


def _takes(model: str, key: str) -> bool:
  """Whether `train.<name>` or `model.<name>` changes what a model computes."""
  section, name = key.split(".")
  if section == "model":
    return name in _defaults().model[model]
  return model != "vote" or name in _OF_VOTE


def _kind(model: str, key: str) -> tuple[type, Any]:
  """Type and default of `train.<name>` or `model.<name>`."""
  section, name = key.split(".")
  found = _defaults()[section]
  if section == "model":
    found = found[model]
  return found.get_type(name), found[name]


def values(key: str, text: str, kind: type, default: Any) -> list[Any]:
  """The values of a list.

  Args:
    key: its name, for messages.
    text: values with commas between them, or with semicolons.
    kind: their type; `object` is a number or a word.
    default: of the setting; if that is None, "None" is a value too.

  Raises:
    UserError: it is empty, has a value twice, or one of another type.
  """
  what = f"config.sweep.{key}={text}"
  found = []
  for part in map(str.strip, text.split(";" if ";" in text else ",")):
    if not part:
      raise UserError(
        f"{what}: a value is missing; expected a list with commas, such as A,B."
      )
    try:
      value = _value(part, kind, default)
    except ValueError:
      raise UserError(
        f"{what}: {part!r} is no {kind.__name__}; the default is {default}."
      ) from None
    if value in found:
      raise UserError(f"{what}: {part} is there twice; leave one out.")
    found.append(value)
  return found


def _value(text: str, kind: type, default: Any) -> Any:
  if default is None and text == "None":
    return None
  if kind is object:
    try:
      return _value(text, float, 0.0)
    except ValueError:
      return text
  value = configs.as_type(kind, text)
  if kind is float and not math.isfinite(value):
    raise ValueError(text)
  return value


def _label(name: str) -> str:
  """What a setting is called in a point: `learning_rate`, `num_layers`.

  An option of a model that has the name of a setting of training is
  `model.tau`.
  """
  section, _, inner = name.rpartition(".")
  clash = not section and inner in _defaults().train
  return f"model.{inner}" if clash else inner


def folder_name(own: dict[str, Any]) -> str:
  """The name of a point, such as `learning_rate=0.001,num_layers=2`.

  Args:
    own: its values, by name within `config.model.<model>`; without any, it is
      the model as it is set.
  """
  text = ",".join(f"{_label(name)}={value}" for name, value in own.items())
  text = text or "as_set"
  name = re.sub(r"[^A-Za-z0-9=,._+-]", "_", text)[:_LONGEST]
  # Names that differ in what had to go must differ still.
  return name if name == text else f"{name}-{manifest.fingerprint(text)[:8]}"


def check(
  first: dict[Trial, Run], todo: Sequence[Trial], data_of: Callable[[str], Data]
) -> None:
  """Refuses what would fail only after other points had been trained for long.

  Says how much there is to train, and which points are the same.

  Args:
    first: a run of each point, of the same seed.
    todo: the points to train.
    data_of: gives what the runs of a model see.

  Raises:
    UserError: no val example is there to choose a point by, or the settings of
      a point make no sense.
  """
  for trial in todo:
    data, run = data_of(trial.model), first[trial]
    if not len(data.examples["val"].labels):
      raise UserError(
        "config.sweep: the val split is empty, and nothing else may choose a "
        "point; give the dataset one."
      )
    build(run, data)
    settings_of(run, data)
  if todo:
    models = [trial.model for trial in todo]
    counts = [f"{models.count(m)} of {m}" for m in dict.fromkeys(models)]
    progress.note(f"sweep: points to train: {', '.join(counts)}")
    for line in same(first):
      progress.note(f"note: sweep: {line}")


def announce(trial: Trial) -> None:
  """Says which point comes next, if it is one of a sweep."""
  if trial.point:
    progress.note(f"sweep: {trial.model} with {trial.point}")


def leave_out(trial: Trial, runs: Sequence[Run], error: Diverged) -> None:
  """Notes, for good, that a point has diverged; the others go on.

  Args:
    trial: the point.
    runs: its runs, of which one has.
    error: that stopped it.
  """
  if distributed.is_first():
    told = {"runs": _fingerprint(runs), "message": str(error)}
    files.write_json(runs[0].folder / _DIVERGED, told)
  distributed.barrier(f"{trial.model} with {trial.point} has diverged")
  # Of several processes each has looked at its own part of the batch.
  print(error, file=sys.stderr, flush=True)
  progress.note(
    f"sweep: {trial.model} with {trial.point} is left out; delete "
    f"{runs[0].folder.parent} to have it tried again"
  )


def left_out(runs_of: Mapping[Trial, Sequence[Run]]) -> dict[Trial, str]:
  """The points that `leave_out` was told of, and what was wrong with them.

  Args:
    runs_of: the runs of every point.

  Raises:
    UserError: those are all points of a model.
  """
  found = {}
  for trial, runs in runs_of.items():
    path = runs[0].folder / _DIVERGED
    told = files.read_json(path) if path.exists() else {}
    if told.get("runs") == _fingerprint(runs):
      found[trial] = told["message"]
  remaining = {trial.model for trial in runs_of if trial not in found}
  for trial, why in found.items():
    if trial.model not in remaining:
      raise UserError(
        f"config.sweep: all points of {trial.model} diverged: {why}"
      )
  return found


def _fingerprint(runs: Sequence[Run]) -> str:
  return manifest.fingerprint([run.artifact.fingerprint for run in runs])


def same(runs: dict[Trial, Run]) -> list[str]:
  """A line for each point that computes what one before it does.

  Args:
    runs: one of each point, of the same seed.
  """
  seen: dict[str, Trial] = {}
  lines = []
  for trial, run in runs.items():
    before = seen.setdefault(run.artifact.fingerprint, trial)
    if before != trial:
      lines.append(
        f"{trial.model} with {trial.point} is the same as with {before.point}: "
        "it has no use for what differs"
      )
  return lines


def rows(found: dict[Trial, list[dict]]) -> list[dict[str, Any]]:
  """Result rows of all points, the best of each model first.

  Args:
    found: metrics of each point, one a seed; see `evaluation.table.rows`.

  Returns:
    As `sweep_table.rows`, each with the `settings` of its point.
  """
  points: dict[str, dict[str, list[dict]]] = {}
  values_of = {}
  for trial, metrics in found.items():
    points.setdefault(trial.model, {})[trial.point] = metrics
    values_of[trial.model, trial.point] = trial.values
  return [
    row | {"settings": values_of[model, row["point"]]}
    for model, own in points.items()
    for row in sweep_table.rows(model, own)
  ]


def write(workdir: pathlib.Path, all_rows: list[dict[str, Any]]) -> None:
  """Writes `sweep.csv` and `sweep.json`.

  Args:
    workdir: of the experiment.
    all_rows: from `rows`.
  """
  text = sweep_table.to_csv(all_rows)
  files.write_bytes(workdir / "sweep.csv", text.encode())
  files.write_json(workdir / "sweep.json", all_rows)


def to_text(
  all_rows: list[dict[str, Any]],
  settings: Settings,
  left_out: Mapping[Trial, str],
) -> str:
  """The table of all points, and how to have the best of each model.

  Args:
    all_rows: from `rows`.
    settings: of the experiment.
    left_out: points that are in no row, and why.
  """
  shown, best = {}, {}
  for row in all_rows:
    own = row["settings"]
    shown[row["model"], row["point"]] = {_label(n): own[n] for n in own}
    best.setdefault(row["model"], own)
  lines = [
    f"Best of {m}: {flags(m, x, settings)}" for m, x in best.items() if x
  ]
  lines += [
    f"Left out, as it diverged: {trial.model} with {trial.point}: {why}"
    for trial, why in left_out.items()
  ]
  return "\n".join([sweep_table.to_text(all_rows, shown), *lines])


def flags(model: str, own: dict[str, Any], settings: Settings) -> str:
  """What makes a point the config.

  Args:
    model: its name.
    own: the values, by name within `config.model.<model>`.
    settings: of the experiment.
  """
  parts, absent = [], []
  for name, value in own.items():
    full = f"config.model.{model}.{name}"
    if value is not None:
      parts.append(f"--{full}={value}")
    elif getattr(getattr(settings.model, model), name) is not None:
      absent.append(f"c{full.removeprefix('config')} = None in the config file")
  return " and ".join(filter(None, [shlex.join(parts), *absent]))
