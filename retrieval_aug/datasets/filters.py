"""Filters of a memory: what is too small, unlicensed, unsafe or there twice.

All are off by default. What each one did is in the fingerprint, and so in the
manifest of all that is made from the memory.
"""

import collections
import dataclasses
import itertools
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures

import numpy as np

from retrieval_aug.common import progress
from retrieval_aug.common.errors import UserError
from retrieval_aug.datasets import duplicates, images, memories, vectors
from retrieval_aug.datasets.types import MemorySource

# Raised when the same options come to keep other items.
_FORMAT = 1

# How LAION's words compare with scores.
_NSFW_WORDS = {"unlikely": 0.0, "unsure": 0.5, "nsfw": 1.0}

# More bits apart, and the images have nothing in common.
_MOST_BITS = 16

# Images in flight at once, a thread.
_AHEAD = 8


def apply(
  memory: MemorySource,
  *,
  min_size: int = 0,
  licenses: str = "",
  nsfw_column: str = "",
  max_nsfw: float = 0.5,
  near_duplicates: int = -1,
  text_min: int = 0,
  text_max: int = 0,
  text_exclude: str = "",
  text_require: str = "",
  allow_none: bool = False,
) -> MemorySource:
  """The items that pass all filters, in their order.

  What costs least comes first, and an item counts to the filter that drops it
  first. Images are opened for `min_size`, where the columns `width` and
  `height` do not tell, and for `near_duplicates`.

  Args:
    memory: what to choose from.
    min_size: pixels of the shorter side; 0 is off.
    licenses: those that are kept, with commas, whatever their case; "" is off.
      Needs the column `license`.
    nsfw_column: holds a score of how unsafe an image is, or LAION's words:
      UNLIKELY is 0, UNSURE 0.5, NSFW 1. "" is off.
    max_nsfw: the highest score that is kept. A cell that is neither a score
      nor a word is dropped.
    near_duplicates: bits in which the perceptual hashes of two images may
      differ, 0 to 16, and the second is dropped; 4 finds other sizes and
      qualities of an image. -1 is off. Images of one color or slope are kept.
    text_min: characters; 0 is off.
    text_max: likewise.
    text_exclude: regex; a text in which it is found is dropped. "" is off.
    text_require: regex; a text in which it is not found is dropped.
    allow_none: whether nothing may be left.

  Returns:
    `memory` itself if all filters are off.

  Raises:
    UserError: an option that is wrong, a column that is missing, an image that
      cannot be read, or nothing that is left.
  """
  options = {
    "min_size": min_size,
    "licenses": licenses,
    "near_duplicates": near_duplicates,
    "text_min": text_min,
    "text_max": text_max,
    "text_exclude": text_exclude,
    "text_require": text_require,
    "nsfw_column": nsfw_column,
  }
  _check_numbers(options, max_nsfw)
  # No bits at all are a filter too, unlike 0 and "" of the others.
  hashed = near_duplicates >= 0
  options = {
    name: value
    for name, value in options.items()
    if (hashed if name == "near_duplicates" else value)
  }
  if not options:
    return memory
  if nsfw_column:
    options["max_nsfw"] = max_nsfw
  rows = np.arange(len(memory))
  dropped = {}
  for name, passes in _of_facts(memory, options).items():
    kept = np.array([passes(i) for i in rows], bool)
    dropped[name] = int((~kept).sum())
    rows = rows[kept]
  rows = _of_images(memory, rows, options, dropped)
  told = ", ".join(f"{name} {number:,}" for name, number in dropped.items())
  if not len(rows) and not allow_none:
    raise UserError(
      f"{memory.name}: config.memory.filters drop all {len(memory):,} items "
      f"({told}); loosen them.{_hint(memory, options)}"
    )
  progress.note(
    f"{memory.name}: filters keep {len(rows):,} of {len(memory):,} items "
    f"(dropped: {told})"
  )
  return _chosen(memory, rows, options, dropped)


def _check_numbers(options: dict, max_nsfw: float) -> None:
  for name in ("min_size", "text_min", "text_max"):
    if options[name] < 0:
      raise UserError(
        f"config.memory.filters.{name}={options[name]}: not from 0 (off) on."
      )
  bits = options["near_duplicates"]
  if not -1 <= bits <= _MOST_BITS:
    raise UserError(
      f"config.memory.filters.near_duplicates={bits}: not from 0 to "
      f"{_MOST_BITS} bits, nor -1 (off)."
    )
  if options["text_max"] and options["text_max"] < options["text_min"]:
    raise UserError(
      f"config.memory.filters.text_max={options['text_max']}: below "
      f"text_min={options['text_min']}."
    )
  if math.isnan(max_nsfw):
    raise UserError("config.memory.filters.max_nsfw: not a number.")


def _of_facts(
  memory: MemorySource, options: dict
) -> dict[str, Callable[[int], bool]]:
  """Filters that open no image: name -> whether an item passes."""
  texts = memory.texts
  found: dict[str, Callable[[int], bool]] = {}
  if "licenses" in options:
    wanted = {part.strip().lower() for part in options["licenses"].split(",")}
    given = _column(memory, "license", "licenses")
    # An item without a license has none that is wanted.
    wanted.discard("")
    found["licenses"] = lambda i: given[i].strip().lower() in wanted
  if "nsfw_column" in options:
    scores = _column(memory, options["nsfw_column"], "nsfw_column")
    # An unknown score is NaN, which is not below anything.
    found["nsfw"] = lambda i: _score(scores[i]) <= options["max_nsfw"]
  if "text_min" in options:
    found["text_min"] = lambda i: len(texts[i].strip()) >= options["text_min"]
  if "text_max" in options:
    found["text_max"] = lambda i: len(texts[i].strip()) <= options["text_max"]
  if "text_exclude" in options:
    bad = _regex("text_exclude", options["text_exclude"])
    found["text_exclude"] = lambda i: not bad.search(texts[i])
  if "text_require" in options:
    good = _regex("text_require", options["text_require"])
    found["text_require"] = lambda i: bool(good.search(texts[i]))
  return found


def _column(memory: MemorySource, name: str, option: str) -> list[str]:
  """A column by its name, whatever its case: LAION writes NSFW."""
  lower = {n.lower(): n for n in memory.columns}
  if name.lower() not in lower:
    raise UserError(
      f"config.memory.filters.{option}: {memory.name} has no column {name!r}; "
      f"its columns are {', '.join(sorted(memory.columns)) or 'none'}."
    )
  return memory.columns[lower[name.lower()]]


def _score(cell: str) -> float:
  word = str(cell).strip().lower()
  return _NSFW_WORDS[word] if word in _NSFW_WORDS else _number(word)


def _number(cell: str) -> float:
  """NaN for what is none."""
  try:
    return float(cell)
  except ValueError:
    return math.nan


def _regex(option: str, pattern: str) -> re.Pattern:
  try:
    return re.compile(pattern)
  except re.error as error:
    raise UserError(
      f"config.memory.filters.{option}={pattern}: not a regular expression "
      f"({error})."
    ) from error


def _of_images(
  memory: MemorySource, rows: np.ndarray, options: dict, dropped: dict[str, int]
) -> np.ndarray:
  """Those of `rows` that pass `min_size` and `near_duplicates`."""
  sizes = np.full(len(rows), math.nan)
  if "min_size" in options:
    sizes = _known_sizes(memory, rows)
    dropped["min_size"] = int((sizes < options["min_size"]).sum())
    large = ~(sizes < options["min_size"])
    rows, sizes = rows[large], sizes[large]
  hashed = "near_duplicates" in options
  opened = np.full(len(rows), hashed)
  if "min_size" in options:
    opened |= np.isnan(sizes)
  if opened.any() and memory.stored is not None:
    raise UserError(
      f"{memory.name}: has embeddings and no images, which "
      f"config.memory.filters.{'near_duplicates' if hashed else 'min_size'} "
      "opens; leave it out."
    )
  found = dict(
    zip(
      np.flatnonzero(opened).tolist(),
      _measure(memory.image, rows[opened], hashed=hashed),
      strict=True,
    )
  )
  hashes = [found[i][1] if i in found else None for i in range(len(rows))]
  if "min_size" in options:
    seen = [found[i][0] if i in found else s for i, s in enumerate(sizes)]
    large = np.array(seen, float) >= options["min_size"]
    dropped["min_size"] += int((~large).sum())
    rows = rows[large]
    hashes = list(itertools.compress(hashes, large))
  if hashed:
    copies = duplicates.first_copies(hashes, options["near_duplicates"])
    first = copies == np.arange(len(rows))
    dropped["near_duplicates"] = int((~first).sum())
    rows = rows[first]
  return rows


def _known_sizes(memory: MemorySource, rows: np.ndarray) -> np.ndarray:
  """The shorter sides that the columns tell; NaN where they do not."""
  lower = {n.lower(): n for n in memory.columns}
  if not {"width", "height"} <= set(lower):
    return np.full(len(rows), math.nan)
  width, height = (memory.columns[lower[n]] for n in ("width", "height"))
  # NumPy's minimum, as Python's loses a NaN that comes second.
  return np.array(
    [np.minimum(_number(width[i]), _number(height[i])) for i in rows], float
  )


def _measure(
  image: Callable[[int], np.ndarray], rows: Sequence[int], *, hashed: bool
) -> Iterator[tuple[int, int | None]]:
  """Pixels of the shorter side and hash of images, which threads open."""

  def one(row: int) -> tuple[int, int | None]:
    pixels = image(int(row))
    found = duplicates.perceptual_hash(pixels) if hashed else None
    return min(pixels.shape[:2]), found

  if not len(rows):
    return
  threads = min(16, os.cpu_count() or 1)
  with (
    futures.ThreadPoolExecutor(threads) as pool,
    progress.bar(total=len(rows), what="filter memory", unit="image") as bar,
  ):
    waiting: collections.deque[futures.Future] = collections.deque()
    try:
      for row in rows:
        waiting.append(pool.submit(one, row))
        if len(waiting) >= threads * _AHEAD:
          yield waiting.popleft().result()
          bar.update()
      while waiting:
        yield waiting.popleft().result()
        bar.update()
    finally:
      for future in waiting:
        future.cancel()


def _hint(memory: MemorySource, options: dict) -> str:
  """What there is instead of the licenses that nobody has."""
  if "licenses" not in options:
    return ""
  there = collections.Counter(_column(memory, "license", "licenses"))
  most = ", ".join(repr(name) for name, _ in there.most_common(5))
  return f" Its licenses are {most}."


def _chosen(
  memory: MemorySource, rows: np.ndarray, options: dict, dropped: dict[str, int]
) -> MemorySource:
  ids = [memory.ids[i] for i in rows]
  return dataclasses.replace(
    memory,
    ids=ids,
    image=memories.Picked(memory.image, rows),
    fingerprint={
      "filters": options,
      "format": [_FORMAT, duplicates.FORMAT],
      "dropped": dropped,
      # Another Pillow may decode an image into other pixels.
      "items": images.digest_rows(ids),
      "of": memory.fingerprint,
    },
    texts=[memory.texts[i] for i in rows],
    columns={
      name: [cells[i] for i in rows] for name, cells in memory.columns.items()
    },
    stored=vectors.take(memory.stored, rows),
  )
