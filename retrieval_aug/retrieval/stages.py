"""The offline half of an experiment: what is embedded, searched and gathered.

Each step is a job over one folder of the workdir. The same config and workdir
give the same job in any process, which is how workers of a cluster come by it.

A folder that was made from an earlier version of an edited memory is brought up
to date where that is cheaper than making it anew: neighbours are found again
for the queries that the edit concerns, and what follows from them is remade.
"""

import functools
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from retrieval_aug import encoders
from retrieval_aug.common import files, manifest, progress
from retrieval_aug.common.manifest import Artifact
from retrieval_aug.memory import (
  embed,
  embed_by_file,
  estimate,
  find,
  jobs,
  known_keys,
  leakage,
  neighbors,
  rac,
  update,
  working_set,
)
from retrieval_aug.memory.table import Table
from retrieval_aug.retrieval.sources import RowImages, Sources
from retrieval_aug.retrieval.version import Leaks, Version
from retrieval_aug.settings import Settings, train_settings

Recipe = Callable[[], jobs.Job]
Runner = Callable[[jobs.Job, Recipe], None]


def run_here(job: jobs.Job, recipe: Recipe) -> None:
  """Does a job in this process."""
  del recipe
  jobs.run(job)


class Retrieval:
  """Embedding tables, neighbours and working set in a workdir."""

  def __init__(
    self,
    config: Any,
    workdir: pathlib.Path,
    models: list[str],
    settings: Settings | None = None,
    runner: Runner = run_here,
  ):
    """Nothing is read or computed yet.

    Args:
      config: a ConfigDict from a file of `configs/`.
      workdir: for everything that is written.
      models: that are asked for.
      settings: a view of `config` that notes what is read.
      runner: does the jobs.
    """
    self._config = config
    self._settings = settings or Settings(config)
    self.sources = Sources(self._settings)
    self._workdir = workdir
    self._models = models
    self._runner = runner

  # The steps.

  def embed(self) -> bool:
    """Images and texts to embedding tables; whether there was any to do."""
    worked = False
    for name in ("queries", "memory"):
      artifact = self._table_artifact(name)
      if not artifact.is_complete():
        worked = True
        self._do(name)
      Table(artifact.folder).verify()
    return worked

  def search(self) -> bool:
    """Tables to neighbour shards and their working set."""
    self._catch_up()
    now = self.now
    worked = self._complete("searched", now.searched)
    if self._before.exists():
      shutil.rmtree(self._before)
    if self._leak_sample and self._no_leaks_yet():
      worked = True
      self._find_leaks()
    if now.neighbors is not now.searched:
      worked |= self._complete("neighbors", now.neighbors)
    worked |= self._complete("working_set", now.working_set)
    if "rac" in self._models:
      worked |= self._join_texts()
    return worked

  def _complete(self, name: str, artifact: Artifact) -> bool:
    """Does a job unless it is done; whether it was not."""
    worked = not artifact.is_complete()
    if worked:
      self._do(name)
    artifact.verify()
    return worked

  def _do(self, name: str) -> None:
    recipe = functools.partial(
      make_job, self._config, self._workdir, self._models, name
    )
    job = self.job(name)
    job.announce()
    self._runner(job, recipe)

  def job(self, name: str) -> jobs.Job:
    """The job of a step.

    Args:
      name: queries or memory, which embed; searched; neighbors, which leaves
        leaks out of that; or working_set.
    """
    if name in ("queries", "memory"):
      return self._embed_job(name)
    queries, memory = self.tables
    now, settings = self.now, self._search_settings
    if name == "searched":
      return find.SearchJob(
        now.searched, queries, memory, settings, self._previous()
      )
    if name == "neighbors":
      unchanged = memory.since(memory.fingerprint)
      without = update.Without(
        leakage.rows_to_drop(now.leaks), leakage.train_pairs(now.leaks)
      )
      return find.SearchJob(
        now.neighbors,
        queries,
        memory,
        settings,
        update.Previous(now.searched, unchanged),
        without,
      )
    return working_set.GatherJob(
      now.working_set, now.neighbors, queries, memory, self.sources.value_names
    )

  def estimate(self) -> str:
    """What embedding and searching would need; nothing of it is done."""
    sources, search = self.sources, self._search_settings
    key, values = sources.encoders
    dims = key.dim
    if search["key_transform"] in ("pca", "whiten") and search["key_dims"]:
      dims = search["key_dims"]
    return estimate.for_config(
      keys=sources.memory_size(),
      queries=len(sources.downstream),
      k=search["k"],
      dims=dims,
      raw_dims=key.dim,
      encoder=key.name,
      value_encoders=[(e.name, e.dim) for e in values],
      searcher=search["searcher"],
      index_rows=search["index_rows"],
      memory_gb=search["memory_gb"],
      workers=search["groups"],
      cores=os.cpu_count() or 1,
      embed_rows=self._settings.embed.shard_rows,
      recall_sample=search["recall_sample"],
      embedded=sources.downstream.stored is not None,
      accelerators=int(jax.default_backend() != "cpu"),
    )

  # Tables.

  def _table_artifact(self, name: str) -> Artifact:
    key, values = self.sources.encoders
    folder, rows = self._workdir / name, self._settings.embed.shard_rows
    if name == "queries":
      return embed.table_artifact(
        folder, self.sources.downstream, key, [], rows
      )
    if self.sources.files is not None:
      return embed_by_file.artifact(
        folder, self.sources.files, key, values, rows
      )
    return embed.table_artifact(folder, self.sources.both[1], key, values, rows)

  def _embed_job(self, name: str) -> jobs.Job:
    key, values = self.sources.encoders
    artifact = self._table_artifact(name)
    options = self._settings.embed.options("by_file")
    if name == "queries":
      return embed.EmbedJob(
        artifact, self.sources.downstream, key, [], **options
      )
    memory = self._settings.memory
    options |= {"on_error": memory.on_error, "max_errors": memory.max_errors}
    if self.sources.files is not None:
      return embed_by_file.ByFileJob(
        artifact, self.sources.files, key, values, **options
      )
    known = known_keys.Known(
      self.sources.downstream, Table(self._workdir / "queries")
    )
    return embed.EmbedJob(
      artifact, self.sources.both[1], key, values, known=known, **options
    )

  @functools.cached_property
  def tables(self) -> tuple[Table, Table]:
    """The query table and the memory table, as the embed stage left them."""
    return Table(self._workdir / "queries"), Table(self._workdir / "memory")

  # What is made from the memory, as it is and as it was.

  @functools.cached_property
  def now(self) -> Version:
    """What is made from the memory as it is."""
    return self._version(self.tables[1].fingerprint)

  @functools.cached_property
  def earlier(self) -> list[Version]:
    """What was made from the memory before it was edited, newest first."""
    memory = self.tables[1]
    prints = dict.fromkeys(reversed(memory.history))
    return [self._version(x) for x in prints if x != memory.fingerprint]

  def _version(self, memory: str) -> Version:
    s = self._settings.memory
    return Version(
      self._workdir,
      self.tables,
      memory,
      self._search_settings,
      Leaks(s.exclude_leaks, s.leak_cosine, self._leak_sample),
      self.sources.value_names,
      lambda: (self.sources.text_options["name"], self._rac_neighbors),
    )

  @functools.cached_property
  def _search_settings(self) -> dict[str, Any]:
    self._settings.search.mark_read()
    return self._settings.search.as_dict()

  @property
  def _before(self) -> pathlib.Path:
    """Where neighbours of an earlier version wait until theirs are found."""
    return self._workdir / "neighbors_before"

  def _catch_up(self) -> None:
    """Makes room for what is to follow from an edited memory."""
    folder = self.now.searched.folder
    outdated = {v.searched.fingerprint for v in self.earlier}
    found = _fingerprint_in(folder)
    if self._before.exists():
      # An update was going on. If the memory was edited again since, it begins
      # anew, from where that one did.
      if found in outdated:
        shutil.rmtree(folder)
    elif found in outdated and neighbors.found_in(folder):
      progress.note(
        "search: the memory was edited; only queries that this concerns are "
        "searched again, and nothing is retrained"
      )
      os.rename(folder, self._before)
    for name in ("leaks", "neighbors", "working_set", "joined"):
      if name == "joined" and "rac" not in self._models:
        continue
      folder = getattr(self.now, name).folder
      if folder == self.now.searched.folder:
        continue
      earlier = {getattr(v, name).fingerprint for v in self.earlier}
      if _fingerprint_in(folder) in earlier:
        shutil.rmtree(folder)

  def _previous(self) -> find.Previous | None:
    if not self._before.exists():
      return None
    artifact = neighbors.found_in(self._before)
    changes = self.tables[1].since(artifact.inputs["memory"])
    return find.Previous(artifact, changes)

  # Leaks.

  @property
  def _leak_sample(self) -> int:
    s = self._settings.memory
    return -1 if s.exclude_leaks else s.leak_sample

  def _no_leaks_yet(self) -> bool:
    """Whether leaks are still to be found; a report of other settings goes."""
    folder, wanted = self.now.leaks.folder, self.now.leaks.fingerprint
    if _fingerprint_in(folder) not in (None, wanted):
      shutil.rmtree(folder)
    return not self.now.leaks.is_complete()

  def _find_leaks(self) -> None:
    """Looks for near copies of the examples in the memory."""
    now, (queries, memory) = self.now, self.tables
    leakage.find(
      now.leaks,
      queries,
      memory,
      {
        split: neighbors.read_split(now.searched, split).ids
        for split in neighbors.SPLITS
      },
      *self.images_of_rows(),
      leak_cosine=self._settings.memory.leak_cosine,
      sample=self._leak_sample,
      left_out=now.searched.info()["examples_in_memory"],
      threads=self._settings.embed.threads,
    )
    progress.note(f"leaks: {leakage.describe(now.leaks)}")

  def leaks(self) -> dict[str, Any] | None:
    """What was found, if it was looked for."""
    return leakage.load(self.now.leaks) if self._leak_sample else None

  def images_of_rows(
    self,
  ) -> tuple[Callable[[int], np.ndarray], Callable[[int], np.ndarray]]:
    """What gives the image of a row of the query table, and of the memory."""
    queries, memory = self.tables
    # Of a memory that nobody lists, no image is found by its row.
    items = self.sources.memory_items(())
    return RowImages(queries, self.sources.downstream), RowImages(memory, items)

  # The joined texts of RAC.

  @property
  def _rac_neighbors(self) -> int:
    return train_settings(self._settings, "rac")["k"]

  def _join_texts(self) -> bool:
    """The texts of each example's neighbours as one embedding, for RAC."""
    joined = self.now.joined
    worked = not joined.is_complete()
    if worked:
      lists = {
        split: neighbors.read_split(self.now.neighbors, split)
        for split in neighbors.SPLITS
      }
      rac.embed_joined(
        joined,
        self.tables[1],
        encoders.load(**self.sources.text_options),
        {s: found.ids[:, : self._rac_neighbors] for s, found in lists.items()},
      )
      progress.note(f"joined texts of rac: {rac.describe(joined)}")
    joined.verify()
    return worked


def make_job(
  config: Any, workdir: pathlib.Path, models: list[str], name: str
) -> jobs.Job:
  """A job of an experiment, in whichever process."""
  return Retrieval(config, workdir, models).job(name)


def _fingerprint_in(folder: pathlib.Path) -> str | None:
  """Of whatever a folder holds, finished or not."""
  path = folder / manifest.NAME
  if not path.exists():
    return None
  found = files.read_json(path)
  return found.get("fingerprint") if isinstance(found, dict) else None
