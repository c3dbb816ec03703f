"""What follows from one version of the memory, by its fingerprints."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

from retrieval_aug.common.manifest import Artifact
from retrieval_aug.memory import leakage, neighbors, rac, working_set
from retrieval_aug.memory.table import Table


@dataclasses.dataclass(frozen=True)
class Leaks:
  """How leaks are looked for.

  Attributes:
    exclude: whether they are left out.
    cosine: see `leakage.find`.
    sample: examples of each split, -1 for all.
  """

  exclude: bool
  cosine: float
  sample: int


@dataclasses.dataclass(frozen=True, eq=False)
class Version:
  """Artifacts that are made from one version of the memory.

  They are named, and nothing is read for that: so it can be told of a folder
  whether it is of an earlier version.

  Attributes:
    workdir: where they are.
    tables: of the queries and of the memory.
    memory: fingerprint of the version.
    search: the search section.
    leaks_wanted: how leaks are looked for.
    value_names: that the working set holds.
    text: gives the name of the encoder of joined texts, and their number.
  """

  workdir: pathlib.Path
  tables: tuple[Table, Table]
  memory: str
  search: dict[str, Any]
  leaks_wanted: Leaks
  value_names: list[str]
  text: Callable[[], tuple[str, int]]

  @functools.cached_property
  def searched(self) -> Artifact:
    """Neighbours in all of the memory."""
    excluding = self.leaks_wanted.exclude
    return self._shards("neighbors_all" if excluding else "neighbors")

  @functools.cached_property
  def leaks(self) -> Artifact:
    """Near copies of the examples."""
    wanted = self.leaks_wanted
    return leakage.leaks_artifact(
      self.workdir / "leaks", self.searched, wanted.cosine, wanted.sample
    )

  @functools.cached_property
  def neighbors(self) -> Artifact:
    """Neighbours, without leaks if these are excluded."""
    if not self.leaks_wanted.exclude:
      return self.searched
    return self._shards("neighbors", without=self.leaks.fingerprint)

  def _shards(self, name: str, without: str | None = None) -> Artifact:
    return neighbors.neighbors_artifact(
      self.workdir / name,
      *self.tables,
      self.search,
      memory_fingerprint=self.memory,
      without=without,
    )

  @functools.cached_property
  def working_set(self) -> Artifact:
    """The rows that neighbours name."""
    return working_set.working_set_artifact(
      self.workdir / "working_set", self.neighbors, self.value_names
    )

  @functools.cached_property
  def joined(self) -> Artifact:
    """The joined texts of RAC."""
    name, k = self.text()
    return rac.joined_artifact(
      self.workdir / "joined_texts", self.neighbors, self.tables[1], name, k
    )

  def seen_by(self, model: str) -> Artifact:
    """The data of a model's runs."""
    return self.joined if model == "rac" else self.working_set
