"""Progress bars and one-line notes on standard error."""

import sys
from collections.abc import Iterable
from typing import Any

import tqdm

from retrieval_aug.common import distributed


def bar(
  items: Iterable[Any] | None = None,
  *,
  total: int,
  what: str,
  unit: str,
  shown: bool = True,
) -> tqdm.tqdm:
  """A progress bar with rate and ETA.

  On a terminal it redraws; in a log file it prints a line every ten seconds
  at the most, so that logs stay readable.

  Args:
    items: what to iterate over; None for manual `update(n)`.
    total: number of units in all.
    what: label, for example "embed memory".
    unit: what is counted, for example "image".
    shown: whether anything is printed.
  """
  terminal = sys.stderr.isatty()
  return tqdm.tqdm(
    items,
    total=total,
    desc=what,
    unit=f" {unit}",
    file=sys.stderr,
    mininterval=0.2 if terminal else 10.0,
    dynamic_ncols=terminal,
    ncols=None if terminal else 140,
    ascii=not terminal,
    disable=not shown,
  )


def note(text: str) -> None:
  """Prints one line to standard error at once.

  Of several processes only the first does: all come to the same places.
  """
  if distributed.is_first():
    print(text, file=sys.stderr, flush=True)
