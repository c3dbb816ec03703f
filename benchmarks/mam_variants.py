"""Which MAM is the default: every variant, cross-validated on two memories.

python -m benchmarks.mam_variants --config=configs/emoji.py \\
  --workdir=workdir/emoji --own_workdir=workdir/own

Trains residual x share_layers x qk_init x neighbor_dropout x num_layers, each
with three strengths of the LACE loss (one compiled step trains all three, as
they gather the same neighbours), and writes docs/mam_variants.md. `--workdir`
has the config's memory; in `--own_workdir` the memory is the training split
itself. What is missing there is embedded and searched first. Every score is
kept in `--scores`: a killed run goes on where it stopped. Examples are dealt
to folds as in `benchmarks.choose`; the test split is never read.
"""

import concurrent.futures
import copy
import itertools
import json
import multiprocessing
import os
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging
from ml_collections import config_flags

from benchmarks import folds
from retrieval_aug import models
from retrieval_aug.common import files, progress
from retrieval_aug.evaluation import accuracy
from retrieval_aug.experiment import Experiment
from retrieval_aug.settings import train_settings
from retrieval_aug.training import input_pipeline, optimizer, step
from retrieval_aug.training import loss as losses

_CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment.")
_WORKDIR = flags.DEFINE_string("workdir", None, "With the config's memory.")
_OWN = flags.DEFINE_string("own_workdir", None, "With its own as memory.")
_EPOCHS = flags.DEFINE_float("epochs", 30, "Epochs of each training.")
_FOLDS = flags.DEFINE_integer("folds", 3, "Number of folds.")
_SCORES = flags.DEFINE_string(
  "scores", "benchmarks/results/mam_variants.jsonl", "Every score, a line each."
)
_PAGE = flags.DEFINE_string("page", "docs/mam_variants.md", "The table.")
_PROCESSES = flags.DEFINE_integer("processes", 2, "That train side by side.")

TAUS = (0.5, 0.7, 1.0)
DROPOUTS = (0.0, 0.3, 0.5)
LAYERS = (1, 2, 4, 8)
INITS = ("identity", "lecun_normal")
RESIDUALS = ("query", "previous")


class Variant(NamedTuple):
  """The options that differ. One layer has no residual or sharing to choose."""

  qk_init: str
  residual: str
  share_layers: bool
  num_layers: int
  neighbor_dropout: float


def variants() -> list[Variant]:
  """All that differ in what they compute, cheapest first."""
  every = itertools.product(INITS, RESIDUALS, (True, False), LAYERS, DROPOUTS)
  kept = [
    Variant(*v)
    for v in every
    if v[3] > 1 or (v[1], v[2]) == (RESIDUALS[0], False)
  ]
  return sorted(kept, key=lambda v: v.num_layers)


class Problem(NamedTuple):
  """One memory's examples and settings, as a worker needs them."""

  data: dict[str, np.ndarray]
  fold: np.ndarray
  memory: step.Memory
  num_classes: int
  options: dict[str, Any]
  train: dict[str, Any]


def problem(experiment: Experiment, count: int, epochs: float) -> Problem:
  """Training and validation examples, dealt to folds."""
  data, fold = folds.dealt(experiment, "mam", count)
  train = train_settings(experiment.settings, "mam")
  # At one rate for all: a tenth for psi, as configs/emoji.py has it, would
  # favor the identity, which needs to move less.
  train |= {"epochs": epochs, "lr_factors": ()}
  data["rows"] = data["rows"][:, : train["k"]]
  return Problem(
    data,
    fold,
    experiment.data.memory,
    len(experiment.data.class_counts),
    experiment.settings.model.mam.options("train"),
    train,
  )


def scores(p: Problem, variant: Variant) -> list[float]:
  """Top-1 accuracy in percent over the held-out folds, one a tau."""
  model = models.build("mam", p.num_classes, **p.options | variant._asdict())
  memory = jax.tree.map(jnp.asarray, p.memory)
  # One number of steps for all folds, so that they share a compilation.
  folds = p.fold.max() + 1
  per_epoch = len(p.fold) * (1 - 1 / folds) / p.train["batch_size"]
  total = round(p.train["epochs"] * per_epoch)
  train = _trainer(p, model, total, round(p.train["warmup_epochs"] * per_epoch))
  predict = jax.jit(
    jax.vmap(step.make_predict_step(model), in_axes=(0, None, None))
  )
  correct = []
  for held in range(folds):
    own = {n: x[p.fold != held] for n, x in p.data.items()}
    test = {n: x[p.fold == held] for n, x in p.data.items()}
    # A class may have all its examples in the held-out fold.
    counts = np.maximum(np.bincount(own["label"], minlength=p.num_classes), 1)
    batches = input_pipeline.train_batches(
      own,
      batch_size=p.train["batch_size"],
      seed=held,
      first_step=0,
      last_step=total,
    )
    # All batches at once: a scan over them costs a step nothing but itself.
    batches = list(batches)
    batches = {n: np.stack([b[n] for b in batches]) for n in batches[0]}
    params = train(memory, batches, losses.log_prior(counts), held)
    found = [
      np.asarray(predict(params, memory, batch)[0])[:, :count]
      for count, batch in input_pipeline.eval_batches(test, 128)
    ]
    logits = np.concatenate(found, axis=1)
    correct.append(
      [accuracy.top_k_correct(x, test["label"], 1) for x in logits]
    )
  return [100 * float(x.mean()) for x in np.concatenate(correct, axis=1)]


def _trainer(p: Problem, model, total_steps: int, warmup_steps: int):
  """A jitted whole training, whose parameters have a leading axis of taus."""
  tx = optimizer.make(
    learning_rate=p.train["learning_rate"],
    weight_decay=p.train["weight_decay"],
    total_steps=total_steps,
    warmup_steps=warmup_steps,
    gradient_clip=p.train["gradient_clip"],
  )

  @jax.jit
  def train(memory, batches, prior, seed):
    key = jax.random.key(seed)

    def one(state, batch, tau):
      def loss_of(params):
        logits = model.apply(
          {"params": params},
          batch["query"],
          **step.inputs(memory, batch),
          train=True,
          rngs={"dropout": jax.random.fold_in(key, state.step)},
        )
        smoothing = p.train["label_smoothing"]
        return losses.lace(
          logits, batch["label"], prior, tau=tau, label_smoothing=smoothing
        ).mean()

      gradients = jax.grad(loss_of)(state.params)
      updates, opt_state = tx.update(gradients, state.opt_state, state.params)
      params = optax.apply_updates(state.params, updates)
      return state._replace(
        params=params, opt_state=opt_state, step=state.step + 1
      )

    def all_taus(states, batch):
      each = jax.vmap(one, in_axes=(0, None, 0))
      return each(states, batch, jnp.asarray(TAUS)), None

    dims, k = batches["query"].shape[-1], batches["rows"].shape[-1]
    state = step.init(model, tx, memory, dims, k, seed)
    states = jax.tree.map(lambda x: jnp.stack([x] * len(TAUS)), state)
    return jax.lax.scan(all_taus, states, batches)[0].params

  return train


_problems: dict[str, Problem] = {}


def _start(problems: dict[str, Problem]) -> None:
  _problems.update(problems)


def _work(memory: str, variant: Variant) -> dict[str, Any]:
  found = scores(_problems[memory], variant)
  return {"memory": memory, **variant._asdict(), "scores": found}


def page(rows: list[dict[str, Any]], head: str) -> str:
  """The Markdown page: for each memory a table, and what each knob is worth."""
  best = {}
  for row in rows:
    variant = Variant(*(row[f] for f in Variant._fields))
    top = max(row["scores"])
    best[row["memory"], variant] = top, TAUS[row["scores"].index(top)]
  lines = [head, *_both(best), ""]
  for memory in dict.fromkeys(m for m, _ in best):
    own = {v: x for (m, v), x in best.items() if m == memory}
    lines += [f"## Memory: {memory}", "", *_table(own), "", *_worth(own), ""]
  return "\n".join(lines).rstrip() + "\n"


def _both(best: dict[tuple[str, Variant], tuple[float, float]]) -> list[str]:
  """The best variants by their mean over the memories."""
  found: dict[Variant, list[float]] = {}
  for (_, variant), (value, _) in best.items():
    found.setdefault(variant, []).append(value)
  order = sorted(found, key=lambda v: (-np.mean(found[v]), v.num_layers))
  lines = [
    'The best five by the mean of both memories. `build("mam")` and',
    "`config.model.mam` have the first as their defaults.",
    "",
    "| " + " | ".join(Variant._fields) + " | mean |",
    "|---" * (len(Variant._fields) + 1) + "|",
  ]
  for v in order[:5]:
    cells = [str(x) for x in v] + [f"{np.mean(found[v]):.1f}"]
    lines.append("| " + " | ".join(cells) + " |")
  return lines


def _table(own: dict[Variant, tuple[float, float]]) -> list[str]:
  head = ["qk_init", "L", "residual", "share_layers"]
  head += [f"neighbor_dropout {d}" for d in DROPOUTS]
  lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
  top = max(x for x, _ in own.values())
  for v in dict.fromkeys(v._replace(neighbor_dropout=0.0) for v in own):
    any_ = v.num_layers == 1
    cells = [v.qk_init, str(v.num_layers)]
    cells += ["any"] * 2 if any_ else [v.residual, str(v.share_layers)]
    for d in DROPOUTS:
      value, tau = own[v._replace(neighbor_dropout=d)]
      text = f"{value:.1f} ({tau})"
      cells.append(f"**{text}**" if value == top else text)
    lines.append("| " + " | ".join(cells) + " |")
  return lines


def _worth(own: dict[Variant, tuple[float, float]]) -> list[str]:
  """Mean over all variants that have a value of a knob."""
  lines = ["Mean of all variants with L > 1 that have", ""]
  for field in Variant._fields:
    values = sorted({getattr(v, field) for v in own if v.num_layers > 1})
    parts = []
    for value in values:
      found = [
        x
        for v, (x, _) in own.items()
        if v.num_layers > 1 and getattr(v, field) == value
      ]
      parts.append(f"{value}: {np.mean(found):.1f}")
    lines.append(f"- `{field}` {', '.join(parts)}")
  return lines


def main(_):
  logging.set_verbosity(logging.ERROR)
  config = _CONFIG.value
  own = copy.deepcopy(config)
  own.memory.sources = "train"
  config.model.name = own.model.name = "mam"
  problems = {}
  for name, c, folder in (
    ("other vendors' drawings", config, _WORKDIR.value),
    ("the training drawings", own, _OWN.value),
  ):
    experiment = Experiment(c, pathlib.Path(folder))
    with files.lock(experiment.workdir):
      experiment.embed()
      experiment.search()
    problems[name] = problem(experiment, _FOLDS.value, _EPOCHS.value)

  path = pathlib.Path(_SCORES.value)
  setting = {"epochs": _EPOCHS.value, "folds": _FOLDS.value}
  rows = []
  if path.exists():
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [r for r in rows if all(r[n] == v for n, v in setting.items())]
  done = {(r["memory"], *(r[f] for f in Variant._fields)) for r in rows}
  todo = [
    (name, v) for v in variants() for name in problems if (name, *v) not in done
  ]
  # Cores do more side by side than together on matrices this small.
  os.environ["XLA_FLAGS"] = (
    "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
  )
  with (
    concurrent.futures.ProcessPoolExecutor(
      _PROCESSES.value,
      multiprocessing.get_context("spawn"),
      initializer=_start,
      initargs=(problems,),
    ) as pool,
    progress.bar(total=len(todo), what="variants", unit="variant") as bar,
  ):
    futures = [pool.submit(_work, *t) for t in todo]
    for future in concurrent.futures.as_completed(futures):
      rows.append(setting | future.result())
      text = "".join(json.dumps(r) + "\n" for r in rows)
      files.write_bytes(path, text.encode())
      bar.update(1)
  order = {v: i for i, v in enumerate(variants())}
  rows.sort(
    key=lambda r: (
      list(problems).index(r["memory"]),
      order[Variant(*(r[f] for f in Variant._fields))],
    )
  )
  count = sum(len(p.fold) for p in problems.values()) // len(problems)
  head = _HEAD.format(
    doc=__doc__.split("\n\n")[1],
    folds=_FOLDS.value,
    epochs=_EPOCHS.value,
    count=count,
    error=100 * float(np.sqrt(0.25 / count)),
  )
  files.write_bytes(pathlib.Path(_PAGE.value), page(rows, head).encode())


_HEAD = """# Which MAM is the default

Made by

```bash
{doc}
```

Top-1 accuracy in percent over {folds} folds of the {count:,} training and
validation drawings, {epochs:g} epochs each, every variant with the best of
three strengths tau of the LACE loss (in brackets). The other settings are those
of `configs/emoji.py`, but for one learning rate for all parameters. The
standard error of one figure is about {error:.1f}; figures of one table share
their examples, so that differences are surer than that.
"""


if __name__ == "__main__":
  app.run(main)
