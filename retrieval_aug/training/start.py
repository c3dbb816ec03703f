"""Runs that begin with the parameters that another run ended with.

To fine-tune an encoder under a classifier that is new sends noise through it:
a classifier trained on the frozen encoder first, and both together after that,
keeps what the encoder knew (Kumar et al., "Fine-Tuning can Distort Pretrained
Features and Underperform Out-of-Distribution", ICLR 2022).
"""

import pathlib
from typing import Any

import jax

from retrieval_aug.common import files, manifest
from retrieval_aug.common.errors import UserError
from retrieval_aug.training.checkpoint import load_params

KIND = "training run"  # of the artifact of a run

PARAMS = "params.npz"


def folder_of(workdir: pathlib.Path, model: str, seed: int) -> pathlib.Path:
  """The folder of one run of an experiment."""
  return workdir / "runs" / model / f"seed_{seed}"


def find(workdir: str, model: str, seed: int) -> manifest.Artifact | None:
  """The run of the same model and seed in another experiment.

  Args:
    workdir: `train.start_from`, the folder of that experiment; empty: none.
    model: its name.
    seed: of the run.

  Raises:
    UserError: there is no such run, or it is not finished.
  """
  if not workdir:
    return None
  folder = folder_of(pathlib.Path(workdir).expanduser(), model, seed)
  what = f"config.train.start_from={workdir}"
  path = folder / "manifest.json"
  if not path.is_file():
    raise UserError(
      f"{what}: has no run of {model} with seed {seed} ({path} is missing); "
      "train it there first, or name another --workdir that has it."
    )
  found = files.read_json(path)
  inputs = found.get("inputs") if isinstance(found, dict) else None
  # Whatever that run says of itself is right: it was not asked for here.
  artifact = manifest.Artifact(folder, KIND, inputs or {})
  if not artifact.is_complete():
    raise UserError(
      f"{what}: the run of {model} with seed {seed} is not finished; run its "
      "--stages=train first."
    )
  return artifact


def params(run: manifest.Artifact, fresh: Any) -> Any:
  """The parameters of the other run, in the place of fresh ones.

  The encoder of a run that fine-tunes begins as it was published where the
  other run did not train it.

  Args:
    run: from `find`.
    fresh: the parameters that the run would begin with.

  Raises:
    UserError: names or shapes differ, or the file is damaged.
  """
  run.verify()
  loaded = load_params(run.folder / PARAMS)
  if "encoder" in fresh and "encoder" not in loaded:
    loaded["encoder"] = fresh["encoder"]
  differing = manifest.differences(shapes(loaded), shapes(fresh))
  if differing:
    more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
    raise UserError(
      f"config.train.start_from: the parameters in {run.folder} are not "
      f"those of this model ({'; '.join(differing[:3])}{more}); give both the "
      "same options of the model, encoders and search."
    )
  return loaded


def check(train: dict[str, Any]) -> None:
  """Refuses to keep a part of where nothing but chance began.

  Args:
    train: `settings.train_settings` of a model.

  Raises:
    UserError: `keep_start` makes no sense.
  """
  kept = train.get("keep_start", 0.0)
  if not 0 <= kept < 1:
    raise UserError(f"config.train.keep_start={kept}: not from 0 to below 1.")
  if kept and not train.get("start_from"):
    raise UserError(
      f"config.train.keep_start={kept}: of random parameters nothing is worth "
      "keeping; name the workdir to start from, train.start_from, or set it "
      "to 0."
    )


def between(last: Any, first: Any, kept: float) -> Any:
  """Parameters on the way from the last to the first, `kept` of it.

  What fine-tuning learns and what was known before are both nearly there
  (Wortsman et al., "Robust Fine-Tuning of Zero-Shot Models", CVPR 2022).
  """
  return jax.tree.map(
    lambda x, y: ((1 - kept) * x + kept * y).astype(x.dtype), last, first
  )


def shapes(tree: Any) -> dict[str, list[int]]:
  """Shape of every array by its name."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): list(x.shape)
    for path, x in jax.tree.leaves_with_path(tree)
  }
