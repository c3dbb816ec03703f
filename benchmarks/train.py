"""Training with neighbours by id, against copies of them in every record.

  python -m benchmarks.train [--folder=DIR] [--examples=115846]
    [--classes=1000] [--memories=1e4,1e5,1e6] [--batch=512] [--rounds=5]
    [--sections=throughput,bytes,examples,memory,input] [--out=FILE]

The set is generated (`train_data.py`), of the size of ImageNet-LT: d = d_v =
768, k = 100, queries of a frozen encoder. The model is MAM with L = 8 layers,
whose weights are shared as the paper writes it (`mam_paper`), or each layer's
own.

  ours    this library: ids in the records, one copy of the working set, keys
          that are never projected
  usual   keys and values of all neighbours in every record, read by tf.data;
          each of the L layers projects all k keys (`copied_neighbors.py`)
  once    as usual, but what shared layers project is kept for all of them

All have the same parameters, loss, optimizer and batches of the same size, and
train in one process, in turn, a few steps each: read the ratios. Those of
core-seconds leave out what other processes take. Sections:

  throughput  input and step together, each alone, and XLA's counts of the step
  bytes       an example takes on disk
  examples    an epoch of N/16, N/8 and N/4 examples in the training loop
  memory      the same training from memories of several sizes, in turn
  input       share of the time that the training loop waits for input

Of the usual way only 4,096 records are written, and read from RAM again and
again; of all examples they would be 36 GB. That favours it.
"""

import argparse
import os
import pathlib
import statistics
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax

from benchmarks import copied_neighbors, train_data
from benchmarks import train_contenders as contenders
from benchmarks.train_contenders import Contender, Set
from retrieval_aug.common import files, manifest
from retrieval_aug.training import loop

SECTIONS = ("throughput", "bytes", "examples", "memory", "input")

# A round's steps, steps on one batch, and batches: more of what is fast.
_COUNTS = {"ours": (8, 8, 64), "usual": (3, 2, 8), "once": (4, 3, 8)}

Say = Callable[[str], None]


def throughput(
  of: Set, copies: manifest.Artifact, batch_size: int, rounds: int, say: Say
) -> None:
  """Says how fast all train, and why."""
  for shared in (True, False):
    options = {"share_layers": shared}
    found = {
      "ours": contenders.ours(of, batch_size, **options),
      "usual": contenders.usual(of, copies, batch_size, **options),
    }
    if shared:
      found["once"] = contenders.usual(
        of, copies, batch_size, project_once=True
      )
    contenders.check_same(of, found)
    say(
      "\nL = 8 layers with "
      + ("one set of weights" if shared else "weights of their own")
    )
    _throughput(found, rounds, say)


def _throughput(found: dict[str, Contender], rounds: int, say: Say) -> None:
  names = ("train", "step", "input")
  rates = {(name, what): [] for name in found for what in names}
  for _ in range(rounds):
    for name, one in found.items():
      ask = one.train, one.step_alone, one.input_alone
      for what, call, count in zip(names, ask, _COUNTS[name]):
        rates[name, what].append(call(count))
  say(
    f"{'':6}{'examples/s':>11}{'ours is x (range)':>19}{'a core-s':>10}"
    f"{'ours x':>8}{'step alone':>12}{'ours x':>8}{'input alone':>13}"
    f"{'GFLOP/ex':>10}{'MB/ex':>7}"
  )

  def middle(name: str, what: str, clock: str) -> float:
    return statistics.median(getattr(r, clock) for r in rates[name, what])

  def ratios(name: str, what: str, clock: str) -> list[float]:
    pairs = zip(rates["ours", what], rates[name, what])
    return [getattr(a, clock) / getattr(b, clock) for a, b in pairs]

  for name, one in found.items():
    wall = ratios(name, "train", "wall")
    core = statistics.median(ratios(name, "train", "core"))
    step = statistics.median(ratios(name, "step", "wall"))
    span = f"({min(wall):.1f}-{max(wall):.1f})"
    say(
      f"{name:6}{middle(name, 'train', 'wall'):11,.0f}"
      f"{statistics.median(wall):8.1f} {span:>10}"
      f"{middle(name, 'train', 'core'):10,.0f}{core:8.1f}"
      f"{middle(name, 'step', 'wall'):12,.0f}{step:8.1f}"
      f"{middle(name, 'input', 'wall'):13,.0f}"
      f"{one.costs.flops / 1e9:10.3f}{one.costs.bytes / 1e6:7.1f}"
    )


def disk(of: Set, copies: manifest.Artifact, say: Say) -> None:
  """Says how many bytes an example takes."""
  n, size = of.sizes.examples, lambda path: path.stat().st_size
  shards = of.artifacts.neighbors.folder.glob("neighbors-train-*")
  own = sum(map(size, shards)) / n
  rows = sum(map(size, of.artifacts.working_set.folder.glob("*.npy")))
  records = sum(map(size, copied_neighbors.paths(copies)))
  theirs, shared = records / contenders.copied_examples(of), own + rows / n
  say("\nbytes an example on disk")
  say(f"usual {theirs:9,.0f}  its record; {theirs * n / 1e9:.1f} GB in all")
  say(f"ours  {own:9,.0f}  its record: 1/{theirs / own:.0f}")
  say(
    f"      {shared:9,.0f}  and its share of the working set, "
    f"{rows / 1e9:.2f} GB for all: 1/{theirs / shared:.0f}"
  )


def trained(made: loop.Trainer, steps: int | None = None) -> dict[str, Any]:
  """The training loop's own summary of a run.

  Args:
    made: the trainer.
    steps: how many at the most; None for an epoch.
  """
  if steps is not None:
    made.total_steps = min(made.total_steps, steps)
  with tempfile.TemporaryDirectory() as folder:
    made.run(0, pathlib.Path(folder))
    return files.read_json(pathlib.Path(folder) / "summary.json")


def epochs(of: Set, batch_size: int, say: Say) -> None:
  """Says how long an epoch of more and more examples takes."""
  # What is loaded and compiled for the first run is not the epoch's.
  trained(contenders.trainer(of, batch_size), 2)
  say("\nan epoch of N examples in the training loop")
  for every in (16, 8, 4):
    told = trained(contenders.trainer(of, batch_size, every=every))
    n = len(of.train["label"][::every])
    seconds = n / told["examples_per_second"]
    say(
      f"N={n:8,}{seconds:8.1f} s, {1e3 * seconds / n:.3f} ms an example, from "
      f"{told['steps']} steps"
    )


def memories(
  sets: Sequence[Set], batch_size: int, rounds: int, say: Say
) -> None:
  """Says how fast the same training is with larger and larger memories."""
  say("\nthe same from M memory rows, of which the lists name U")
  found = [contenders.ours(of, batch_size) for of in sets]
  rates = [[] for _ in found]
  for _ in range(rounds):
    for one, rate in zip(found, rates):
      rate.append(one.train(_COUNTS["ours"][0]).wall)
  for of, rate in zip(sets, rates):
    ratio = statistics.median(a / b for a, b in zip(rates[0], rate))
    epoch = of.sizes.examples / statistics.median(rate)
    say(
      f"M={of.sizes.memory:10,} U={len(of.data.memory.keys):8,}{epoch:8.1f} s "
      f"an epoch, {ratio:.2f} times the first; read in {of.seconds:.1f} s"
    )


def waits(of: Set, batch_size: int, rounds: int, say: Say) -> None:
  """Says what share of its time the loop waits for input."""
  say("\nshare of the time that the training loop waits for input")
  for placed in ("replicated", "host"):
    made = contenders.trainer(of, batch_size, placed)
    told = trained(made, 20 * rounds)
    say(
      f"{placed:11}{100 * told['input_wait']:6.2f} %, "
      f"{told['examples_per_second']:,.0f} examples/s, {told['steps']} steps"
    )


def main() -> None:
  """Prints the sections that are asked for."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--folder", default="workdir/benchmark_train")
  parser.add_argument("--examples", type=int, default=train_data.EXAMPLES)
  parser.add_argument("--classes", type=int, default=train_data.CLASSES)
  parser.add_argument("--memories", default="1e4,1e5,1e6")
  parser.add_argument("--batch", type=int, default=512)
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--sections", default=",".join(SECTIONS))
  parser.add_argument("--out", help="file that gets the lines too")
  flags = parser.parse_args()
  folder, lines = pathlib.Path(flags.folder), []
  sections = flags.sections.split(",")
  if unknown := set(sections) - set(SECTIONS):
    parser.error(f"--sections={min(unknown)}: not among {', '.join(SECTIONS)}")
  sizes = sorted(int(float(m)) for m in flags.memories.split(","))
  sizes = [train_data.Sizes(flags.examples, flags.classes, m) for m in sizes]

  def say(line: str) -> None:
    print(line, flush=True)
    lines.append(line)

  of = contenders.read(folder, sizes[-1])
  copies = contenders.copied(of)
  say(
    f"jax {jax.__version__} on {jax.devices()[0].device_kind}, "
    f"{len(os.sched_getaffinity(0))} cores\n"
    f"N={of.sizes.examples:,} C={of.sizes.classes} k={of.sizes.neighbors} "
    f"d=d_v={of.sizes.dim} M={of.sizes.memory:,} "
    f"U={len(of.data.memory.keys):,} B={flags.batch}"
  )
  for section in sections:
    if section == "throughput":
      throughput(of, copies, flags.batch, flags.rounds, say)
    elif section == "bytes":
      disk(of, copies, say)
    elif section == "examples":
      epochs(of, flags.batch, say)
    elif section == "memory":
      others = [contenders.read(folder, s) for s in sizes[:-1]]
      memories([*others, of], flags.batch, flags.rounds, say)
    elif section == "input":
      waits(of, flags.batch, flags.rounds, say)
  if flags.out:
    files.write_bytes(flags.out, "".join(f"{x}\n" for x in lines).encode())


if __name__ == "__main__":
  main()
