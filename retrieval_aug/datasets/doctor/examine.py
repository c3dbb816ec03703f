"""Looks at all that a config names: what is wrong with its data."""

from typing import Any

import ml_collections
import numpy as np

from retrieval_aug import datasets
from retrieval_aug.common.errors import UserError
from retrieval_aug.datasets import memories
from retrieval_aug.datasets.doctor import (
  classes,
  copies,
  lists,
  own_files,
  pixels,
  report,
  texts,
)
from retrieval_aug.datasets.doctor.items import Items, of_downstream, of_memory
from retrieval_aug.datasets.doctor.report import Finding
from retrieval_aug.datasets.types import Downstream, MemorySource

# Sources of a memory that need no examples.
_ALONE = ("pairs", "captions", "embeddings")


def examine(
  config: ml_collections.ConfigDict, sample: int | None = None
) -> list[Finding]:
  """Finds what is wrong with the data of an experiment.

  Args:
    config: from a file of `configs/`; its sections `dataset` and `memory` are
      read.
    sample: how many images are opened of each set; None is all.

  Returns:
    The findings, worst first.
  """
  options = config.dataset.to_dict()
  name = options.pop("name")
  own = name == "own_data"
  items, findings = _listed(name, options)
  if items is not None:
    findings += classes.check(items)
  loaded = None
  # What the loader refuses is told already, if there is an error.
  if not report.has_errors(findings):
    loaded, refused = _load(name, options)
    findings += refused
  if items is None and loaded is not None:
    items = of_downstream(loaded[0])
    findings += classes.check(items)
  memory, found = _memory(config, items, loaded)
  findings += found
  if memory is not None:
    clean = config.memory.get("clean", "none")
    findings += texts.check(memory, cleaned=clean != "none")
  facts, memory_facts = (
    {} if part is None else pixels.read(part, pixels.choose(part, sample))
    for part in (items, memory)
  )
  if items is not None:
    findings += pixels.check(items, facts)
    findings += copies.within(items, facts, own)
    findings += _opened(items, facts)
  if memory is not None:
    findings += pixels.check(memory, memory_facts)
    findings += copies.in_memory(memory, memory_facts)
    findings += _opened(memory, memory_facts)
  if items is not None and memory is not None:
    findings += copies.between(items, facts, memory, memory_facts)
  return report.in_order(findings)


def _opened(items: Items, facts: dict) -> list[Finding]:
  what = f"{items.what}: {len(facts):,} of {len(items):,} images were opened"
  return [Finding("info", what)]


def _listed(
  name: str, options: dict[str, Any]
) -> tuple[Items | None, list[Finding]]:
  """What can be read of the examples without their strict loader."""
  if name != "own_data":
    return None, lists.check(name, **options)
  items, findings = own_files.dataset(**options)
  if items is not None:
    fractions = {
      split: options.get(f"{split}_fraction", 0.0) for split in ("val", "test")
    }
    findings += own_files.missing_splits(items, fractions)
  return items, findings


def _load(
  name: str, options: dict[str, Any]
) -> tuple[tuple[Downstream, MemorySource | None] | None, list[Finding]]:
  try:
    return datasets.load(name, **options), []
  except UserError as refused:
    return None, _refused(f"dataset {name!r} that cannot be loaded", refused)


def _refused(what: str, refused: UserError) -> list[Finding]:
  # The message ends with the remedy.
  return report.error(what, [str(refused)], "as the message says")


def _memory(
  config: ml_collections.ConfigDict,
  items: Items | None,
  loaded: tuple[Downstream, MemorySource | None] | None,
) -> tuple[Items | None, list[Finding]]:
  """The memory, as far as it can be read."""
  options = config.memory.to_dict()
  for name in memories.OF_LATER_STAGES:
    options.pop(name, None)
  found, findings = None, []
  if options.get("manifest"):
    found, findings = own_files.memory(options["manifest"], items)
  if report.has_errors(findings):
    return found, findings
  downstream, own = loaded or (_nothing(), None)
  alone = [name for name in _ALONE if options.get(name)]
  if loaded is None:
    if not alone:
      return found, findings
    options |= {"manifest": "", "sources": ",".join(alone)}
  try:
    memory = datasets.load_memory(downstream, own, **options)
  except UserError as refused:
    return found, findings + _refused("memory that cannot be made", refused)
  if found is not None and not alone:
    return found.having(memory.ids), findings
  # The training images are looked at as examples already.
  if _is_training(memory):
    return None, findings
  return of_memory(memory), findings


def _is_training(memory: MemorySource) -> bool:
  return set(memory.columns.get("source", [""])) == {"train"}


def _nothing() -> Downstream:
  """A dataset that could not be loaded, for sources that need none."""
  return Downstream(
    name="dataset",
    ids=[],
    image=lambda index: np.zeros((1, 1, 3), np.uint8),
    fingerprint={},
    labels=np.zeros(0, np.int64),
    splits=[],
    class_names=[],
  )
