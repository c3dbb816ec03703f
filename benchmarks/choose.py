"""Chooses settings without the test split: grouped cross-validation.

python -m benchmarks.choose --config=configs/emoji.py --workdir=DIR \
  --model=mam --vary=query_dropout=0,0.5,0.8 --vary=train.tau=0,0.25,0.5,1

DIR must hold the finished embed and search stages. The training and validation
examples are dealt to folds by class, near copies together; each setting is
changed alone, from what the config file says, and a model is trained on all
folds but one and asked about that one, in turn. The last line of a table is
the config as it is. The test split is never read.
"""

import ast
import pathlib

import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from benchmarks import folds
from retrieval_aug.evaluation import accuracy
from retrieval_aug.experiment import Experiment
from retrieval_aug.settings import train_settings
from retrieval_aug.training import loop, predict, runs
from retrieval_aug.training.data import Data

_CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Of the finished search stage.")
_MODEL = flags.DEFINE_string("model", "mam", "Which model to vary.")
_VARY = flags.DEFINE_multi_string(
  "vary", [], "NAME=V1,V2,...: an option of the model, or train.NAME."
)
_FOLDS = flags.DEFINE_integer("folds", 5, "Number of folds.")


def score(
  data: dict[str, np.ndarray],
  fold: np.ndarray,
  shared: Data,
  name: str,
  options: dict,
  settings: dict,
) -> float:
  """Top-1 accuracy in percent over all held-out folds."""
  run = runs.Run(name, options, settings, 0, pathlib.Path(), "")
  model = runs.build(run, shared)
  data = data | {"rows": data["rows"][:, : settings["k"]]}
  num_classes = len(shared.class_counts)
  correct = []
  for held in range(fold.max() + 1):
    train = {n: x[fold != held] for n, x in data.items()}
    test = {n: x[fold == held] for n, x in data.items()}
    # A class may have all its examples in the held-out fold: its prior is
    # then that of one example.
    counts = np.bincount(train["label"], minlength=num_classes)
    trainer = loop.Trainer(
      model,
      runs.settings_of(run, shared),
      shared.memory,
      train,
      np.maximum(counts, 1),
    )
    params = trainer.run(held, what=f"{name} fold {held}")
    logits, _ = predict.predict(model, params, shared.memory, test, 256)
    correct.append(accuracy.top_k_correct(logits, test["label"], 1))
  return 100 * float(np.concatenate(correct).mean())


def main(_):
  logging.set_verbosity(logging.ERROR)
  experiment = Experiment(_CONFIG.value, pathlib.Path(_WORKDIR.value))
  data, fold = folds.dealt(experiment, _MODEL.value, _FOLDS.value)

  name = _MODEL.value
  section = getattr(experiment.settings.model, name)
  options = section.options("train")
  train = train_settings(experiment.settings, name)
  trials = []
  for text in _VARY.value:
    key, _, values = text.partition("=")
    for value in ast.literal_eval(f"({values},)"):
      trials.append((f"{key}={value}", key, value))
  trials.append(("as configured", "", None))
  print(f"| {name} | {_FOLDS.value}-fold top-1 |\n|---|---|", flush=True)
  for label, key, value in trials:
    own_options, own_train = dict(options), dict(train)
    if key.startswith("train."):
      own_train[key.removeprefix("train.")] = value
    elif key:
      own_options[key] = value
    found = score(
      data,
      fold,
      experiment.data_of(name),
      name,
      own_options,
      own_train,
    )
    print(f"| {label} | {found:.1f} |", flush=True)


if __name__ == "__main__":
  app.run(main)
