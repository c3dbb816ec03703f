"""What a model learns by an edit of its memory, with the same weights.

  python -m benchmarks.edit_memory --config=configs/emoji.py
    --workdir=workdir/emoji --to=workdir/emoji_edited [--classes=10]

Takes the embedding tables of a finished workdir to another one, removes all
memory items of some classes, trains and evaluates; then restores the items, and
evaluates the same weights again. Prints the accuracy on the test examples of
these classes, and of all others. Both edits are commands that a user has:

  python -m retrieval_aug.memory remove DIR --where label=CLASS
  python -m retrieval_aug.memory restore DIR --where label=CLASS
"""

import pathlib
import shutil
import time

import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from retrieval_aug.experiment import Experiment
from retrieval_aug.memory import edits
from retrieval_aug.training import evaluations

_CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Finished: has the tables.")
_TO = flags.DEFINE_string("to", None, "A new workdir.")
_CLASSES = flags.DEFINE_integer("classes", 10, "To withhold, spread evenly.")


def accuracy(experiment: Experiment, name: str, withheld: np.ndarray) -> str:
  """Of test examples of the withheld classes, and of the others."""
  found = []
  for evaluation in experiment.evaluations(name):
    ids, logits, _ = evaluations.read_predictions(evaluation, "test")
    queries = experiment.tables[0]
    label = dict(zip(queries.column("id"), queries.column("label")))
    labels = np.array([label[x] for x in ids])
    right = logits.argmax(axis=1) == labels
    own = np.isin(labels, withheld)
    found.append((100 * right[own].mean(), 100 * right[~own].mean()))
  mean, spread = np.mean(found, axis=0), np.std(found, axis=0)
  return " ".join(f"{m:6.1f} ± {s:3.1f}" for m, s in zip(mean, spread))


def main(_: list[str]) -> None:
  """Withholds, trains, measures; restores, measures."""
  logging.set_verbosity(logging.ERROR)
  config, to = _CONFIG.value, pathlib.Path(_TO.value)
  for name in ("queries", "memory"):
    if not (to / name).exists():
      shutil.copytree(pathlib.Path(_WORKDIR.value) / name, to / name)
  queries = Experiment(config, to).tables[0]
  names = dict(zip(queries.column("label"), queries.column("class_name")))
  even = np.linspace(0, len(names) - 1, _CLASSES.value).astype(int)
  withheld = np.array(sorted(names))[even]
  classes = [names[x] for x in withheld]
  rows = 0
  for name in classes:
    rows += len(edits.remove(to / "memory", where={"label": name}).rows)
  live = len(queries.column("id"))
  print(f"withheld: {', '.join(classes)}")
  lines = [f"{'model':10} {'memory':22} {'their classes':>13} {'others':>12}"]

  def measure(what: str) -> None:
    start = time.monotonic()
    experiment = Experiment(config, to)
    trained = (experiment.search(), experiment.train(), experiment.evaluate())[
      1
    ]
    spent = time.monotonic() - start
    for name in experiment.runnable:
      lines.append(
        f"{name:10} {what:22} {accuracy(experiment, name, withheld)}"
      )
    info = experiment.retrieval.now.neighbors.info()
    print(
      f"{what}: {spent:.1f} s, {'trained' if trained else 'not trained'}; "
      f"{info['searched_anew']:,} of {live:,} queries searched all keys"
    )

  measure(f"without {rows:,} items")
  for name in classes:
    edits.restore(to / "memory", where={"label": name})
  measure("with them")
  print("\n".join(lines))


if __name__ == "__main__":
  app.run(main)
