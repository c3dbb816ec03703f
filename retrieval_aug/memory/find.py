"""The search stage as a job: every query against every index shard.

The rows of the memory are cut into index shards, which are dealt to groups, one
a worker. A worker takes its index shards in turn: it reads and transforms the
keys, builds an index once, searches the queries of every neighbour shard in it
and merges what it finds into their running top-k. At last the running top-k of
all groups are merged by (-score, id) and written as neighbour shards. One
machine does the same with one group, and mostly one index shard.

Where an earlier version of the memory was searched already, only queries that
lost a neighbour see all keys again; the others see what is new.
"""

import dataclasses
import functools
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np

from retrieval_aug.common import manifest, progress
from retrieval_aug.common.errors import UserError
from retrieval_aug.memory import (
  index_shards,
  jobs,
  neighbors,
  partial,
  searchers,
  tune,
)
from retrieval_aug.memory import key_transform as transforms
from retrieval_aug.memory import search as searching
from retrieval_aug.memory.exclusion import Exclusion
from retrieval_aug.memory.index_shards import IndexShard, Rows
from retrieval_aug.memory.plan import ALL, LOST, REST, Plan
from retrieval_aug.memory.table import Table
from retrieval_aug.memory.update import Previous, Without

# Rows on which a key transform is fitted, if there are more: mean and
# covariance of 768 dims do not gain by others.
_FIT_ROWS = 1 << 18

# Queries that search an index at once, between two steps of the progress bar:
# many, as an inverted file makes a matrix product of all that visit a list.
_PIECE = 16384

_ENGINE = "engine"
_PARTIAL = "partial"


@dataclasses.dataclass(eq=False)
class SearchJob:
  """Neighbours of every query; see `jobs.Job`.

  Attributes:
    artifact: from `neighbors.neighbors_artifact`.
    queries: table of the downstream examples.
    memory: table of the memory.
    settings: the search section of a config, as a dict.
    previous: what there is of an earlier version of the memory.
    without: what is left out beside the rows that the table has removed.
  """

  artifact: manifest.Artifact
  queries: Table
  memory: Table
  settings: dict[str, Any]
  previous: Previous | None = None
  without: Without | None = None

  what = "search"
  counted = "query"

  def __post_init__(self):
    for name in ("k", "recall_sample", "shard_rows", "groups"):
      if self.settings[name] < 1:
        raise UserError(
          f"config.search.{name}={self.settings[name]}: must be at least 1."
        )
    if self.settings["on_low_recall"] not in ("fail", "warn"):
      raise UserError(
        f"config.search.on_low_recall={self.settings['on_low_recall']!r}: not "
        "fail or warn."
      )
    self._engines: dict[int, searchers.Searcher] = {}

  def announce(self) -> None:
    """Says how much is searched, and what it writes."""
    n, s = self.queries.rows, self.settings
    row = 12 * s["k"] + 2 * (s["key_dims"] or self.memory.dims) + 100
    live = self.memory.rows - len(self._plan.gone)
    progress.note(
      f"search: {n:,} queries in {live:,} keys, about {n * row / 1e6:,.0f} MB "
      "on disk"
    )

  # The phases.

  def phases(self) -> list[str]:
    """Choose an engine, search, merge."""
    return ["prepare", "search", "merge"]

  def units(self, phase: str) -> list[str]:
    """What is not done yet."""
    if phase == "prepare":
      return [] if self.artifact.has(_ENGINE) else [_ENGINE]
    if phase == "merge":
      return [s.name for s in self._open]
    return [
      name
      for name, numbers in self._groups.items()
      if any(self._done(name, s) < len(numbers) for s in self._open)
    ]

  def size(self, phase: str, unit: str) -> int:
    """Queries, times the index shards that they are still to search."""
    if phase != "search":
      return 0
    numbers = self._groups[unit]
    return sum(
      int(self._plan.mask(s, self._index[i].queries).sum())
      for s in self._open
      for i in numbers[self._done(unit, s) :]
    )

  def do(self, phase: str, unit: str, tick: Callable[[int], None]) -> None:
    """One unit; see `jobs.Job`."""
    if phase == "prepare":
      self._prepare()
    elif phase == "search":
      self._search(unit, tick)
    else:
      self._merge(self._plan.shards[unit])

  def finish(self) -> None:
    """Checks the recall and completes the artifact."""
    infos = [self.artifact.recorded(n)["info"] for n in self._plan.shards]
    weight = sum(i["sample"] for i in infos)
    recall = sum(i["recall"] * i["sample"] for i in infos) / weight
    engine = self._engine
    self._check_recall(recall, engine["kind"])
    if (self.artifact.folder / _PARTIAL).exists():
      shutil.rmtree(self.artifact.folder / _PARTIAL)
    self.artifact.finish(
      ["key_transform", _ENGINE, *self._plan.shards],
      {
        "searcher": engine["kind"],
        "why": engine["why"],
        "parameters": engine["parameters"],
        "measured": engine["measured"],
        "index_shards": len(self._index),
        "k": self.settings["k"],
        "dims": self._transform.dims,
        "recall": recall,
        "recall_queries": weight,
        "examples_in_memory": sum(i["left_out"] for i in infos),
        "searched_anew": sum(i["searched_anew"] for i in infos),
      },
    )

  def close(self) -> None:
    """Frees the indexes."""
    self._engines.clear()

  # Prepare: the key transform, and the engine.

  def _prepare(self) -> None:
    s = self.settings
    raw, key = self.queries.dims, self.memory.dims
    if raw != key:
      raise UserError(
        f"{self.queries.folder}: queries have {raw} dims, the keys of "
        f"{self.memory.folder} {key}; embed both with one encoder."
      )
    live = self.memory.rows - len(self._plan.gone)
    if not live:
      raise UserError(
        f"{self.memory.folder}: every row is removed; restore some, or add "
        "others (python -m retrieval_aug.memory --help)."
      )
    n, k = self.queries.rows, s["k"]
    if self._plan.update is None:
      transform = transforms.fit(
        self._fit_keys(), s["key_transform"], s["key_dims"]
      )
    else:
      transform = transforms.load(self._plan.update.transform)
    transform.save(self.artifact.folder / neighbors.TRANSFORM)
    self.artifact.record(
      "key_transform", [neighbors.TRANSFORM], {"dims": transform.dims}
    )
    index_rows = s["index_rows"] or index_shards.rows_that_fit(
      s["memory_gb"], key, transform.dims, n, s["groups"]
    )
    plan = self._plan.index(index_rows)
    choices = {}
    for number, index in enumerate(plan):
      if index.queries in choices:
        continue
      chosen = self._plan.chosen(index.queries)
      rows, keys = self._index_keys(index)
      exclude = self._exclusion.groups(rows)
      choice = tune.choose(
        s["searcher"],
        {kind: s[kind] for kind in searchers.KINDS if kind in s},
        keys,
        self._unit[chosen],
        k,
        n_keys=live if index.queries != REST else len(self._plan.gained),
        n_queries=len(chosen),
        recall_target=s["recall_target"],
        memory_gb=s["memory_gb"],
        exclude=exclude.of(chosen) if exclude else None,
      )
      progress.note(choice.why)
      self._engines[number] = choice.engine
      choices[index.queries] = {
        "kind": choice.kind,
        "parameters": choice.parameters,
        "why": choice.why,
        "measured": choice.measured,
      }
    self.artifact.record(
      _ENGINE, [], {"choices": choices, "index_rows": index_rows}
    )

  def _fit_keys(self) -> np.ndarray:
    """Raw keys on which the transform is fitted."""
    rows = index_shards.without(range(self.memory.rows), self._plan.gone)
    if len(rows) > _FIT_ROWS:
      even = np.linspace(0, len(rows) - 1, _FIT_ROWS).astype(np.int64)
      rows = np.asarray(rows)[even]
    return self.memory.key_rows(rows)

  # Search: index shards, in turn.

  def _search(self, group: str, tick: Callable[[int], None]) -> None:
    for place, number in enumerate(self._groups[group]):
      index = self._index[number]
      todo = [s for s in self._open if self._done(group, s) <= place]
      if not any(self._plan.mask(s, index.queries).any() for s in todo):
        for shard in todo:
          self._advance(group, shard, place + 1)
        continue
      rows, keys = self._index_keys(index)
      exclude = self._exclusion.groups(rows)
      engine = self._built(number, keys, exclude)
      for shard in todo:
        found = self._search_shard(
          index, shard, rows, keys, engine, exclude, tick
        )
        running = self._running(group, shard).plus(*found, place + 1)
        partial.save(self._path(group, shard), running)
      self._engines.pop(number, None)

  def _built(
    self, number: int, keys: np.ndarray, exclude: searching.Groups | None
  ) -> searchers.Searcher:
    """The index of an index shard; that of the tuning run is used again."""
    if number not in self._engines:
      choice = self._choices[self._index[number].queries]
      k = searching.wanted(self.settings["k"], len(keys), exclude)
      self._engines[number] = searchers.build(
        choice["kind"], keys, k, choice["parameters"]
      )
    return self._engines[number]

  def _search_shard(
    self,
    index: IndexShard,
    shard: neighbors.Shard,
    rows: Rows,
    keys: np.ndarray,
    engine: searchers.Searcher,
    exclude: searching.Groups | None,
    tick: Callable[[int], None],
  ) -> tuple[searching.SearchResult, np.ndarray, np.ndarray]:
    """What the queries of a shard find, the truth on a sample, and who lost."""
    k = self.settings["k"]
    mask = self._plan.mask(shard, index.queries)
    result = partial.no_neighbors(len(mask), k)
    left_out = np.zeros(len(mask), bool)
    numbers = np.asarray(rows)
    for start in range(0, int(mask.sum()), _PIECE):
      places = np.flatnonzero(mask)[start : start + _PIECE]
      chosen = shard.rows[places]
      own = exclude.of(chosen) if exclude else None
      found = searching.search(engine, keys, self._unit[chosen], k, exclude=own)
      ids = np.where(found.ids < 0, -1, numbers[found.ids])
      result.ids[places], result.scores[places] = ids, found.scores
      if own is not None:
        left_out[places] = own.queries >= 0
        if own.pairs is not None:
          left_out[places[own.pairs[:, 0]]] = True
      tick(len(places))
    sample = self._plan.sample(shard)
    best = np.full((len(sample), k), -np.inf, np.float32)
    asked = mask[sample]
    if asked.any():
      checked = shard.rows[sample[asked]]
      best[asked] = searching.best_scores(
        keys, self._unit[checked], k, exclude.of(checked) if exclude else None
      )
    return result, best, left_out

  def _advance(self, group: str, shard: neighbors.Shard, done: int) -> None:
    """Notes that nobody in a shard had to search an index shard."""
    running = self._running(group, shard)._replace(done=done)
    partial.save(self._path(group, shard), running)

  def _running(self, group: str, shard: neighbors.Shard) -> partial.Partial:
    path = self._path(group, shard)
    if partial.done(path):
      return partial.load(path)
    return partial.empty(
      len(shard.rows), self.settings["k"], len(self._plan.sample(shard))
    )

  def _done(self, group: str, shard: neighbors.Shard) -> int:
    return partial.done(self._path(group, shard))

  def _path(self, group: str, shard: neighbors.Shard) -> pathlib.Path:
    return self.artifact.folder / _PARTIAL / f"{group}-{shard.name}.npz"

  # Merge: the running top-k of all groups.

  def _merge(self, shard: neighbors.Shard) -> None:
    sample = self._plan.sample(shard)
    total = self._kept(shard)
    for group in self._groups:
      p = self._running(group, shard)
      total = total.plus(p.result, p.best, p.left_out, 0)
    recall = searching.recall(total.result.scores[sample], total.best)
    searched = self._plan.mask(shard, ALL) | self._plan.mask(shard, LOST)
    if len(sample):
      # The others' old neighbours were the truth to which new ones came.
      share = searched[sample].mean()
      recall *= share + (1 - share) * (
        self._plan.update.recall if self._plan.update else 1
      )
    ids, labels = (
      self.queries.column_rows(n, shard.rows) for n in ("id", "label")
    )
    neighbors.write_shard(
      self.artifact.folder / f"{shard.name}.tfrecord",
      ids,
      labels,
      self._transform(self.queries.key_rows(shard.rows)),
      total.result,
    )
    info = {
      "rows": len(shard.rows),
      "recall": recall,
      "sample": len(sample),
      "left_out": int(total.left_out.sum()),
      "searched_anew": int(searched.sum()),
    }
    self.artifact.record(shard.name, [f"{shard.name}.tfrecord"], info)

  def _kept(self, shard: neighbors.Shard) -> partial.Partial:
    """What queries keep of an earlier search."""
    sample = self._plan.sample(shard)
    start = partial.empty(len(shard.rows), self.settings["k"], len(sample))
    if self._plan.update is None:
      return start
    result = self._plan.update.kept(shard)
    return start.plus(result, result.scores[sample], start.left_out, 0)

  # What all phases look up.

  @functools.cached_property
  def _plan(self) -> Plan:
    s = self.settings
    return Plan(
      self.queries,
      self.memory,
      s["shard_rows"],
      s["recall_sample"],
      self.previous,
      self.without,
    )

  @property
  def _open(self) -> list[neighbors.Shard]:
    """Neighbour shards that are not written yet."""
    return [
      s for s in self._plan.shards.values() if not self.artifact.has(s.name)
    ]

  @functools.cached_property
  def _transform(self) -> transforms.KeyTransform:
    return transforms.load(self.artifact.folder / neighbors.TRANSFORM)

  @functools.cached_property
  def _unit(self) -> np.ndarray:
    """float32 [q, d], of unit length."""
    vectors = self._transform(self.queries.keys())
    return searching.normalize(vectors, f"queries of {self.queries.folder}")

  @property
  def _record(self) -> dict[str, Any]:
    return self.artifact.recorded(_ENGINE)["info"]

  @functools.cached_property
  def _choices(self) -> dict[str, Any]:
    return self._record["choices"]

  @property
  def _engine(self) -> dict[str, Any]:
    """The engine of most work."""
    return next(
      (self._choices[q] for q in (ALL, LOST, REST) if q in self._choices),
      {"kind": "none", "why": "no key", "parameters": {}, "measured": {}},
    )

  @functools.cached_property
  def _index(self) -> list[IndexShard]:
    return self._plan.index(self._record["index_rows"])

  @functools.cached_property
  def _groups(self) -> dict[str, list[int]]:
    """Numbers of index shards by group; the name says which they are."""
    return index_shards.deal(len(self._index), self.settings["groups"])

  @functools.cached_property
  def _exclusion(self) -> Exclusion:
    pairs = self.without.pairs if self.without is not None else None
    return Exclusion(self.queries, self.memory, pairs)

  def _index_keys(self, index: IndexShard) -> tuple[Rows, np.ndarray]:
    """Rows that can be found, and their keys, float32 [n, d] of unit length."""
    rows = index_shards.without(index.rows, self._plan.gone)
    keys = self._transform(self.memory.key_rows(rows))
    return rows, searching.normalize(keys, f"keys of {self.memory.folder}")

  def _check_recall(self, recall: float, kind: str) -> None:
    s = self.settings
    if recall >= s["recall_target"]:
      return
    text = (
      f"{self.artifact.folder}: {kind} search reached recall@{s['k']} "
      f"{recall:.3f}, below config.search.recall_target={s['recall_target']}"
    )
    if s["on_low_recall"] == "warn":
      progress.note(f"{text}; it is kept, as config.search.on_low_recall says")
      return
    raise UserError(
      f"{text}; set --config.search.searcher=exact, or accept it with "
      "--config.search.on_low_recall=warn."
    )


def find(
  artifact: manifest.Artifact,
  queries: Table,
  memory: Table,
  settings: dict[str, Any],
) -> None:
  """Finds the neighbours of every query in this process; see `SearchJob`."""
  job = SearchJob(artifact, queries, memory, settings)
  job.announce()
  jobs.run(job)
