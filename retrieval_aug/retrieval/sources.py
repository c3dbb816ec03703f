"""What an experiment is made of: examples, memory and encoders."""

import functools
from collections.abc import Iterable
from typing import Any

import numpy as np

from retrieval_aug import datasets
from retrieval_aug import encoders as all_encoders
from retrieval_aug.common.errors import UserError
from retrieval_aug.datasets import by_file, memories
from retrieval_aug.datasets import filters as item_filters
from retrieval_aug.datasets.vectors import NoImageError
from retrieval_aug.memory import captions, stand_ins
from retrieval_aug.memory.table import Table
from retrieval_aug.settings import Settings


class Sources:
  """Loads what is asked for, once."""

  def __init__(self, settings: Settings):
    """Nothing is read yet."""
    self._settings = settings

  @functools.cached_property
  def _dataset(
    self,
  ) -> tuple[datasets.Downstream, datasets.MemorySource | None]:
    """The examples, and the memory that the dataset itself brings."""
    return datasets.load(**self._settings.dataset.options())

  @property
  def downstream(self) -> datasets.Downstream:
    """The examples."""
    return self._dataset[0]

  @functools.cached_property
  def both(self) -> tuple[datasets.Downstream, datasets.MemorySource]:
    """The examples, and the whole memory; not for one that nobody lists."""
    s = self._settings.memory
    options = s.options("filters", *memories.OF_LATER_STAGES)
    filters = s.filters.options()
    memory = datasets.load_memory(*self._dataset, filters=filters, **options)
    return self.downstream, captions.clean(memory, s.clean)

  @functools.cached_property
  def files(self) -> by_file.PairFiles | None:
    """The files of the memory, if each is listed by who embeds it."""
    if not self._settings.embed.by_file:
      return None
    s = self._settings.memory
    given = s.options("filters", "on_error", "max_errors", "digest")
    filters = s.filters.options()
    for name, fits in (
      ("memory.pairs", given["pairs"]),
      ("memory.sources", given["sources"] in ("auto", "pairs")),
      ("memory.filters.near_duplicates", filters["near_duplicates"] < 0),
      ("memory.exclude_leaks", not given["exclude_leaks"]),
      *(
        (f"memory.{n}", not given[n])
        for n in ("manifest", "captions", "embeddings")
      ),
    ):
      if not fits:
        raise UserError(
          f"config.{name}: with config.embed.by_file the memory is made of "
          "config.memory.pairs alone, and nobody sees all of it; change one of "
          "the two."
        )
    return by_file.find(
      given["pairs"],
      digest=s.digest,
      choose=functools.partial(_choose, filters, given["clean"]),
      options={"filters": filters, "clean": given["clean"]},
    )

  def memory_items(self, ids: Iterable[str]) -> datasets.MemorySource:
    """Items of the memory with their images, at least those with these ids."""
    if self.files is not None:
      return self.files.some(ids)
    return self.both[1]

  def memory_size(self) -> int:
    """Items of the memory; of one that nobody lists, by its first file."""
    if self.files is None:
      return len(self.both[1])
    on_error = self._settings.memory.on_error
    return len(self.files) * self.files.load(0, on_error).found

  @functools.cached_property
  def encoders(self) -> tuple[all_encoders.Encoder, list[all_encoders.Encoder]]:
    """Of the keys and queries, and of the values."""
    load = lambda: all_encoders.load(**self._settings.encoder.options())
    if self.files is not None:
      sections = self._value_sections.values()
      return load(), [all_encoders.load(**options) for options in sections]
    downstream, memory = self.both
    values = [
      stand_ins.values(name, memory)
      if stand_ins.is_stored(options)
      else all_encoders.load(**options)
      for name, options in zip(self.value_names, self._value_sections.values())
    ]
    return stand_ins.key_encoder((downstream, memory), load), values

  @functools.cached_property
  def _value_sections(self) -> dict[str, dict[str, Any]]:
    """Options of the encoders of values by section, at least one."""
    sections = self._settings.value_encoders
    found = {
      name: getattr(sections, name).options() for name in sections.names()
    }
    if not found:
      raise UserError("config.value_encoders: none; a memory needs values.")
    return found

  @property
  def value_names(self) -> list[str]:
    """Of the values in the memory table."""
    return [stand_ins.value_name(*x) for x in self._value_sections.items()]

  @functools.cached_property
  def text_options(self) -> dict[str, Any]:
    """Options of the first encoder of values that reads texts."""
    for options in self._value_sections.values():
      if stand_ins.is_stored(options):
        continue
      if all_encoders.modality(options["name"]) == "text":
        return options
    raise UserError(
      "config.model.name=rac: it joins texts, and no encoder of "
      f"config.value_encoders reads them ({', '.join(self.value_names)}); "
      "leave rac out, or add a text encoder."
    )


class RowImages:
  """The image of a row of a table, found by its id."""

  def __init__(self, table: Table, items: datasets.ImageItems):
    self._table, self._items = table, items
    self._index = {x: i for i, x in enumerate(items.ids)}

  def __call__(self, row: int) -> np.ndarray:
    """uint8 [H, W, 3]; a `NoImageError` for an item without an image."""
    (name,) = self._table.column_rows("id", np.array([row]))
    if name not in self._index:  # it was added to the table later
      raise NoImageError(f"{self._table.folder}: no image of {name!r}.")
    return self._items.image(self._index[name])


def _choose(
  filters: dict[str, Any], clean: str, memory: datasets.MemorySource
) -> datasets.MemorySource:
  """What filters and cleaning make of the items of a file."""
  memory = item_filters.apply(memory, **filters, allow_none=True)
  return captions.clean(memory, clean)
