"""Several seeds in one compiled step, against one seed after the other.

  python -m benchmarks.seeds_at_once [--seeds=5] [--steps=128] [--rounds=7]
    [--models=linear,mlp,mean_knn,mam] [--sizes=emoji,small] [--out=FILE]

Models and settings are those of configs/emoji.py; data are random, of the size
of that experiment, or so small that what a step computes is little beside what
it takes to start it. All train in one process, in turn, --steps steps a round:
read the ratios.

  begin     seconds until the first step is done, most of them to compile: of
            the first seed, of each further one, and of S together
  step      milliseconds, input and all: of one seed, of S seeds one after the
            other, and of S together
  x         the last but one by the last, of each round: median (least-most);
            core x, of core-seconds, leaves out what other processes take
  training  seconds of S seeds and as many steps as the config asks for, one
            after the other and together, reckoned from the above
"""

import argparse
import contextlib
import os
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from configs import emoji
from retrieval_aug import models
from retrieval_aug.common import files
from retrieval_aug.settings import Settings, train_settings
from retrieval_aug.training import loop
from retrieval_aug.training.placement import Memory
from retrieval_aug.training.settings import TrainSettings

_UNDER_WAY = 2  # steps that nobody has waited for
_ENDLESS = 10**6  # steps


class Size(NamedTuple):
  """Of a problem.

  Attributes:
    examples: N.
    rows: U, of the working set.
    neighbors: k of each example.
    dim: d of queries and keys.
    value_dim: d_v.
    classes: C.
    batch: B.
  """

  examples: int
  rows: int
  neighbors: int
  dim: int
  value_dim: int
  classes: int
  batch: int


# Of the emoji experiment as README.md describes it.
_SIZES = {
  "emoji": Size(951, 10_139, 32, 256, 384, 87, 64),
  "small": Size(200, 500, 8, 64, 64, 10, 32),
}


def trainer(name: str, size: Size) -> loop.Trainer:
  """Of a model of the emoji experiment, on random data."""
  settings = Settings(emoji.get_config())
  train = train_settings(settings, name) | {"batch_size": size.batch}
  for aside in ("k", "seeds", "start_from", "seeds_at_once"):
    del train[aside]
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.standard_normal(shape, np.float32).astype("half")
  label = np.arange(size.examples, dtype=np.int32) % size.classes
  rows = rng.integers(0, size.rows, (size.examples, size.neighbors))
  options = getattr(settings.model, name).options("train")
  return loop.Trainer(
    models.build(name, size.classes, **options),
    TrainSettings(**train),
    Memory(normal(size.rows, size.dim), normal(size.rows, size.value_dim)),
    {
      "query": normal(size.examples, size.dim),
      "rows": rows.astype(np.int32),
      "label": label,
    },
    np.bincount(label),
  )


class Cost(NamedTuple):
  """Seconds of the clock, and of all cores in this process."""

  wall: float
  core: float


class Training:
  """Trains some steps when asked to, and goes on there the next time."""

  def __init__(self, of: loop.Trainer, seeds: Sequence[int]):
    """Makes the parameters; the first that asks a trainer for them compiles.

    Args:
      of: the trainer.
      seeds: one, or several that train together.
    """
    self._trainer, self._seeds, self._done = of, seeds, 0
    if len(seeds) > 1:
      self._step = of.compiled.steps_together
      self._state = of.compiled.init_together(seeds)
    else:
      self._step = of.compiled.step
      self._state = of.compiled.init(*seeds)

  def run(self, count: int) -> Cost:
    """Takes some steps; the first, by which input has begun, apart."""
    begin, end = self._done, self._done + _ENDLESS
    batches = self._trainer._feed.ahead(self._seeds, begin, end)
    with contextlib.closing(batches):
      told = [self._start(next(batches))]
      jax.block_until_ready(told)
      clocks = _clocks()
      for _ in range(count):
        told.append(self._start(next(batches)))
        if len(told) > _UNDER_WAY:
          jax.block_until_ready(told.pop(0))
      jax.block_until_ready(told)
      return Cost(*(b - a for a, b in zip(clocks, _clocks())))

  def _start(self, batch: tuple[Any, int]) -> Any:
    chunk, place = batch
    self._state, told = self._step(
      self._state,
      self._trainer.placed.memory,
      chunk,
      np.int32(place),
      np.int32(self._done),
    )
    self._done += 1
    return told


def _clocks() -> Cost:
  return Cost(time.perf_counter(), time.process_time())


def begin(of: loop.Trainer, seeds: Sequence[int]) -> float:
  """Seconds of a training until its first step is done."""
  clock = time.perf_counter()
  Training(of, seeds).run(0)
  return time.perf_counter() - clock


class Row(NamedTuple):
  """What was measured, a list of each, one a round.

  Attributes:
    first: seconds until the first step of the first seed is done.
    further: of a further seed.
    all: of S together.
    one: a step of one seed.
    after: of S, one after the other.
    together: of S together.
  """

  first: list[float]
  further: list[float]
  all: list[float]
  one: list[Cost]
  after: list[Cost]
  together: list[Cost]


def measure(name: str, size: Size, seeds: int, steps: int, rounds: int) -> Row:
  """Trains one seed, several one after the other, and all together.

  Args:
    name: of the model.
    size: of the problem.
    seeds: S.
    steps: a round.
    rounds: how many.
  """
  every, row = range(seeds), Row([], [], [], [], [], [])
  made = trainer(name, size)
  alone = [Training(made, [seed]) for seed in every]
  together = Training(made, every)
  for training in (*alone, together):
    training.run(1)
  for _ in range(rounds):
    new = trainer(name, size)
    row.first.append(begin(new, [0]))
    row.further.append(begin(new, [1]))
    row.all.append(begin(new, every))
    found = [training.run(steps) for training in alone]
    row.one.append(_a_step(found[0], steps))
    row.after.append(_a_step(Cost(*map(sum, zip(*found))), steps))
    row.together.append(_a_step(together.run(steps), steps))
  return row


def _a_step(cost: Cost, steps: int) -> Cost:
  return Cost(cost.wall / steps, cost.core / steps)


def line(name: str, row: Row, seeds: int, total: int) -> str:
  """A row of the table.

  Args:
    name: of the model.
    row: from `measure`.
    seeds: S.
    total: steps of a training.
  """
  first, further, together = map(statistics.median, row[:3])
  ms = [1e3 * statistics.median(c.wall for c in costs) for costs in row[3:]]
  pairs = list(zip(row.after, row.together))
  wall = [a.wall / b.wall for a, b in pairs]
  core = statistics.median(a.core / b.core for a, b in pairs)
  span = f"({min(wall):.2f}-{max(wall):.2f})"
  after = first + (seeds - 1) * further + total * ms[1] / 1e3
  together += total * ms[2] / 1e3
  return (
    f"{name:9}{first:7.1f}{further:6.2f}{statistics.median(row.all):6.1f}"
    f"{ms[0]:8.2f}{ms[1]:7.2f}{ms[2]:7.2f}"
    f"{statistics.median(wall):6.2f} {span:11}{core:6.2f}"
    f"{after:8.1f}{together:7.1f}{after / together:6.2f}"
  )


def main() -> None:
  """Prints a table for each size."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--seeds", type=int, default=5)
  parser.add_argument("--steps", type=int, default=128)
  parser.add_argument("--rounds", type=int, default=7)
  parser.add_argument("--models", default="linear,mlp,mean_knn,mam")
  parser.add_argument("--sizes", default=",".join(_SIZES))
  parser.add_argument("--out", help="file that gets the lines too")
  flags = parser.parse_args()
  lines, s = [], flags.seeds

  def say(text: str) -> None:
    print(text, flush=True)
    lines.extend(text.splitlines())

  say(
    f"jax {jax.__version__} on {jax.devices()[0].device_kind}, "
    f"{len(os.sched_getaffinity(0))} cores; S={s}, {flags.rounds} rounds of "
    f"{flags.steps} steps"
  )
  for at in flags.sizes.split(","):
    size = _SIZES[at]
    say(
      f"\n{at}: N={size.examples:,} U={size.rows:,} k={size.neighbors} "
      f"d={size.dim} d_v={size.value_dim} C={size.classes} B={size.batch}\n"
      f"{'':9}{'begin, s':>19}{'step, ms':>22}{'':24}{'training, s':>21}\n"
      f"{'':9}{'first':>7}{'next':>6}{'S':>6}{'one':>8}{'after':>7}{'S':>7}"
      f"{'x':>6} {'(range)':11}{'core x':>6}{'after':>8}{'S':>7}{'x':>6}"
    )
    for name in flags.models.split(","):
      row = measure(name, size, s, flags.steps, flags.rounds)
      say(line(name, row, s, trainer(name, size).total_steps))
  if flags.out:
    files.write_bytes(flags.out, "".join(f"{x}\n" for x in lines).encode())


if __name__ == "__main__":
  main()
