"""What is retrieved from: one memory, made of all sources that are named.

| source     | items                                                          |
|------------|----------------------------------------------------------------|
| train      | the training images                                            |
| own        | what the dataset itself brings                                 |
| manifest   | what a table of images and texts lists (`own_memory.py`)       |
| pairs      | what img2dataset wrote (`pairs.py`)                            |
| captions   | a set of tensorflow-datasets with captions (`captions.py`)     |
| embeddings | keys and values that exist already (`stored.py`)               |
"""

import bisect
import dataclasses
import difflib
import importlib
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from retrieval_aug.common import progress
from retrieval_aug.common.errors import UserError
from retrieval_aug.datasets import images, own_memory, vectors
from retrieval_aug.datasets.on_error import ON_ERROR
from retrieval_aug.datasets.types import Downstream, MemorySource, validate

# Sources that an option of their name gives; the others need none.
_GIVEN = ("manifest", "pairs", "captions", "embeddings")
SOURCES = ("train", "own", *_GIVEN)

# Options of config.memory that matter once the memory is made.
OF_LATER_STAGES = (
  "clean",
  "exclude_leaks",
  "leak_cosine",
  "leak_sample",
  "placement",
  "dtype",
)

# Filters that look at more than one item.
_OF_ALL = ("near_duplicates",)

# Imported only when they are asked for: what they read needs packages that
# others do without.
_MODULES = {
  "pairs": "retrieval_aug.datasets.pairs",
  "captions": "retrieval_aug.datasets.captions",
  "embeddings": "retrieval_aug.datasets.stored",
  "filters": "retrieval_aug.datasets.filters",
}


def load_memory(
  downstream: Downstream,
  own: MemorySource | None,
  *,
  sources: str = "auto",
  text: str = "a photo of {label}",
  manifest: str = "",
  pairs: str = "",
  captions: str = "",
  data_dir: str = "",
  embeddings: str = "",
  on_error: str = "fail",
  max_errors: float = 0.01,
  digest: str = "stat",
  filters: dict[str, Any] | None = None,
) -> MemorySource:
  """What to retrieve from: the union of all sources that are named.

  Args:
    downstream: the examples to classify.
    own: the memory that their dataset brings, if it does.
    sources: some of `SOURCES` with commas; of items with one id, the union
      keeps that of the source named first. "auto": all whose option is given,
      in this order, or else `own` where there is one, or else `train`.
    text: of a training image, see `of_training`.
    manifest: tables of `image,text`: a path, a glob, or several with commas.
    pairs: what img2dataset wrote: likewise.
    captions: name of a set of tensorflow-datasets.
    data_dir: folder of that set.
    embeddings: folders of tables: likewise. A source of images cannot be named
      beside them.
    on_error: "fail" or "skip", for items of `pairs` and `captions` that cannot
      be read.
    max_errors: share of them that may be skipped.
    digest: how a changed file is noticed, see `images.stamps`.
    filters: options of `filters.apply`, which leaves items out: of each
      source, but near copies of the union.

  Raises:
    UserError: sources that do not fit the options, or data that cannot be used.
  """
  given = {
    "manifest": manifest,
    "pairs": pairs,
    "captions": captions,
    "embeddings": embeddings,
  }
  names = _names(sources, given, own is not None)
  _check(downstream, own, names, given)
  if data_dir and "captions" not in names:
    raise UserError(
      f"config.memory.data_dir={data_dir}: of captions, which no source is; "
      "give --config.memory.captions=NAME, or leave it out."
    )
  if on_error not in ON_ERROR:
    raise UserError(
      f"config.memory.on_error={on_error}: not {' or '.join(ON_ERROR)}."
    )
  if not 0 <= max_errors <= 1:
    raise UserError(f"config.memory.max_errors={max_errors}: not from 0 to 1.")
  if digest not in images.DIGESTS:
    raise UserError(
      f"config.memory.digest={digest}: not one of {', '.join(images.DIGESTS)}."
    )
  reading = {"on_error": on_error, "max_errors": max_errors, "digest": digest}
  makers = {
    "train": lambda: of_training(downstream, text),
    "own": lambda: own,
    "manifest": lambda: own_memory.from_manifest(manifest, downstream, digest),
    "pairs": lambda: _module("pairs").load(pairs, **reading),
    "captions": lambda: _module("captions").load(
      captions, data_dir=data_dir, **reading
    ),
    "embeddings": lambda: _module("embeddings").load(embeddings, digest=digest),
  }
  parts = []
  for name in names:
    part = makers[name]()
    validate(part)
    parts.append(_filtered(part, name, names, filters or {}))
  memory = parts[0] if len(parts) == 1 else union(parts)
  left = sum(map(len, parts)) - len(memory)
  if left:
    progress.note(
      f"memory: {left:,} items are left out, whose ids earlier sources have"
    )
  copies = {n: v for n, v in (filters or {}).items() if n in _OF_ALL}
  if copies:
    memory = _module("filters").apply(memory, **copies)
  return memory


def _filtered(
  part: MemorySource, name: str, names: list[str], filters: dict[str, Any]
) -> MemorySource:
  """What filters leave of one source, but for those of the union.

  Training images beside others are the user's own: nobody rated or licensed
  them, and they are not asked for it.
  """
  without = set(_OF_ALL)
  if name == "train" and len(names) > 1:
    without |= {"licenses", "nsfw_column"}
  own = {n: v for n, v in filters.items() if n not in without}
  return _module("filters").apply(part, **own)


def _module(name: str) -> Any:
  return importlib.import_module(_MODULES[name])


def _names(text: str, given: dict[str, str], has_own: bool) -> list[str]:
  """The sources that `config.memory.sources` names."""
  names = re.split(r"[,\s]+", text.strip())
  if names == ["auto"]:
    found = [name for name, value in given.items() if value]
    return found or ["own" if has_own else "train"]
  for name in names:
    if name == "auto":
      raise UserError(
        f"config.memory.sources={text}: auto stands alone; name all sources."
      )
    if name not in SOURCES:
      near = difflib.get_close_matches(name, SOURCES, n=1)
      hint = f"did you mean {near[0]}?" if near else f"one of {SOURCES}."
      raise UserError(
        f"config.memory.sources={text}: no source {name!r}; {hint}"
      )
  if len(set(names)) < len(names):
    raise UserError(f"config.memory.sources={text}: name each source once.")
  return names


def _check(
  downstream: Downstream,
  own: MemorySource | None,
  names: list[str],
  given: dict[str, str],
) -> None:
  """Refuses sources without their option, and options without their source."""
  named = ",".join(names)
  for name, value in given.items():
    if name in names and not value:
      raise UserError(
        f"config.memory.sources={named}: give --config.memory.{name}=..., or "
        f"leave {name} out."
      )
    if value and name not in names:
      raise UserError(
        f"config.memory.sources={named}: does not read memory.{name}={value}; "
        f"name {name} there, or leave the option out."
      )
  if "own" in names and own is None:
    raise UserError(
      f"config.memory.sources={named}: the dataset {downstream.name} brings no "
      "memory of its own; leave own out (train is its training images)."
    )
  stored = {"embeddings"}
  if downstream.stored is not None:
    stored.add("train")
  of_images = [name for name in names if name not in stored]
  if of_images and len(of_images) < len(names):
    raise UserError(
      f"config.memory.sources={named}: embeddings cannot be united with the "
      f"images of {of_images[0]}, whose keys are still to be made; embed those "
      "first, as the memory of another workdir, and list its folder memory/ in "
      "--config.memory.embeddings, too."
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Picked:
  """Some of the images of a reader, in an order of their own.

  Attributes:
    image: index -> uint8 `[H, W, 3]`.
    rows: index into those, per image.
  """

  image: Callable[[int], np.ndarray]
  rows: Sequence[int]

  def __call__(self, index: int) -> np.ndarray:
    """uint8 `[H, W, 3]`."""
    return self.image(int(self.rows[index]))


@dataclasses.dataclass(frozen=True, eq=False)
class Joined:
  """The images of several readers, one reader after the other.

  Attributes:
    images: the readers.
    ends: number of images up to the end of each.
  """

  images: tuple[Callable[[int], np.ndarray], ...]
  ends: tuple[int, ...]

  def __call__(self, index: int) -> np.ndarray:
    """uint8 `[H, W, 3]`."""
    image, index = self.part(index)
    return image(index)

  def part(self, index: int) -> tuple[Callable[[int], np.ndarray], int]:
    """The reader of an image, and its index there."""
    if not 0 <= index < self.ends[-1]:
      raise IndexError(f"image {index} of {self.ends[-1]}")
    which = bisect.bisect_right(self.ends, index)
    return self.images[which], index - (self.ends[which - 1] if which else 0)


def origin(
  image: Callable[[int], np.ndarray], index: int
) -> tuple[Callable[[int], np.ndarray], int]:
  """The reader that reads an image in the end, and its index there."""
  while True:
    if isinstance(image, Picked):
      image, index = image.image, int(image.rows[index])
    elif isinstance(image, Joined):
      image, index = image.part(index)
    else:
      return image, index


def of_training(
  downstream: Downstream, template: str = "a photo of {label}"
) -> MemorySource:
  """The training images as the memory of what is learned from them.

  Each keeps its id and has its `group`, so that the search hides it from
  itself.

  Args:
    downstream: the examples.
    template: text of an image; `{label}` becomes the name of its class, with
      spaces for underscores, and `{text}` the text that the dataset has of it.

  Raises:
    UserError: the template is empty, or asks for what there is not.
  """
  if not template.strip():
    raise UserError(
      "config.memory.text is empty; for example 'a photo of {label}'."
    )
  known = ("label",) if downstream.texts is None else ("label", "text")
  for field in re.findall(r"\{(\w*)\}", template):
    if field not in known:
      raise UserError(
        f"config.memory.text={template}: {{{field}}} is nothing that "
        f"{downstream.name} has of an example; write "
        f"{' or '.join(f'{{{name}}}' for name in known)}."
      )
  chosen = [i for i, s in enumerate(downstream.splits) if s == "train"]
  names = downstream.class_names
  labels = downstream.labels[chosen].tolist()
  own_texts = downstream.texts or [""] * len(downstream)
  groups = downstream.groups or downstream.ids
  return MemorySource(
    name=f"{downstream.name} memory",
    ids=[downstream.ids[i] for i in chosen],
    image=Picked(downstream.image, np.array(chosen, np.int64)),
    fingerprint={
      "memory": "train",
      "text": template,
      "of": downstream.fingerprint,
    },
    texts=[
      _fill(template, label=names[x].replace("_", " "), text=own_texts[i])
      for i, x in zip(chosen, labels)
    ],
    columns={
      "source": ["train"] * len(chosen),
      "group": [groups[i] for i in chosen],
      "label": [names[label] for label in labels],
    },
    stored=vectors.take(downstream.stored, chosen),
  )


def _fill(template: str, **values: str) -> str:
  """A template with values; what looks like a field in a value stays."""
  return re.sub(r"\{(\w+)\}", lambda found: values[found[1]], template)


def union(sources: Sequence[MemorySource]) -> MemorySource:
  """Several memories as one; of items with one id, the first.

  Every item keeps its `source`, or gets the name of its memory, and its
  `group`, or gets its id. A column that only some have is empty in others.
  Either all have embeddings already, or none has.
  """
  had: set[str] = set()
  parts = []
  for source in sources:
    rows = [i for i, name in enumerate(source.ids) if name not in had]
    had.update(source.ids)
    parts.append((source, rows))
  columns = {}
  for name in dict.fromkeys(n for s in sources for n in ("source", *s.columns)):
    cells = []
    for source, rows in parts:
      if name in source.columns:
        cells += [source.columns[name][i] for i in rows]
      elif name == "group":
        cells += [source.ids[i] for i in rows]
      else:
        cells += [source.name if name == "source" else ""] * len(rows)
    columns[name] = cells
  taken = [vectors.take(source.stored, rows) for source, rows in parts]
  return MemorySource(
    name=" and ".join(source.name for source in sources),
    ids=[source.ids[i] for source, rows in parts for i in rows],
    image=Joined(
      tuple(Picked(source.image, np.array(rows)) for source, rows in parts),
      tuple(itertools.accumulate(len(rows) for _, rows in parts)),
    ),
    fingerprint={"union": [source.fingerprint for source in sources]},
    texts=[source.texts[i] for source, rows in parts for i in rows],
    columns=columns,
    stored=None if None in taken else tuple(itertools.chain(*taken)),
  )
