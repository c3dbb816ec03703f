"""The embed stage of a memory that no single machine lists: file by file.

A unit is a file of pairs, which becomes one or more shards of the table. How
many is known only to who lists it; the shards' names are ordered by file.
"""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow.parquet as pq

from retrieval_aug.common import manifest, progress
from retrieval_aug.common.errors import UserError
from retrieval_aug.datasets import by_file
from retrieval_aug.datasets.types import MemorySource
from retrieval_aug.encoders import Encoder, prefetch, prompts
from retrieval_aug.memory import dead_letters, embed, table
from retrieval_aug.memory.embed_images import ImageEncoders
from retrieval_aug.memory.embed_shard import Shard, write_images

# Numbers of shards: those of a file begin at its own. All have twelve digits,
# so that their names are ordered as they are.
_FIRST, _PARTS = 10**6, 10**5


def artifact(
  folder: str | pathlib.Path,
  files: by_file.PairFiles,
  encoder: Encoder,
  value_encoders: Sequence[Encoder],
  shard_rows: int,
) -> manifest.Artifact:
  """The table that a `ByFileJob` writes, named by its inputs.

  Raises:
    UserError: as `embed.table_artifact`.
  """
  found = embed.table_artifact(
    folder, files, encoder, value_encoders, shard_rows
  )
  return _Table(found.folder, found.kind, found.inputs)


class _Table(manifest.Artifact):
  """A table whose shards may have other columns than each other."""

  def record(self, shard: str, names: list[str], info: Any = None) -> None:
    """Notes a finished shard, with its columns, if it has any."""
    for name in names:
      if name.startswith("metadata_"):
        fields = pq.read_schema(self.folder / name)
        info = info | {"columns": {f.name: str(f.type) for f in fields}}
    super().record(shard, names, info)


@dataclasses.dataclass(eq=False)
class ByFileJob:
  """The table of some files of pairs, a file a unit; see `jobs.Job`.

  Attributes:
    artifact: from `artifact` with the same arguments.
    files: what to embed.
    encoder: image encoder, for the keys.
    value_encoders: of texts or of images, for the values.
    batch_size: see `embed.EmbedJob`, as all that follow.
    shard_rows: most rows of a shard.
    threads: that load images.
    processes: that do so instead; they are started for each file.
    memory_gb: of each device.
    on_error: "fail" or "skip" pairs that cannot be read or embedded, and files
      that cannot be read.
    max_errors: share of the pairs, and of the files, that may be skipped.
  """

  artifact: manifest.Artifact
  files: by_file.PairFiles
  encoder: Encoder
  value_encoders: Sequence[Encoder]
  _: dataclasses.KW_ONLY
  batch_size: int
  shard_rows: int
  threads: int
  processes: int = 0
  memory_gb: float | None = None
  on_error: str = "fail"
  max_errors: float = 0.01

  what = "embed pairs"
  counted = "file"

  def __post_init__(self):
    self.policy = dead_letters.Policy(self.on_error, self.max_errors)
    self._seeing = [e for e in self.value_encoders if e.modality == "image"]
    self._reading = [e for e in self.value_encoders if e.modality != "image"]
    self._units = {f"file_{i:06d}": i for i in range(len(self.files))}

  def announce(self) -> None:
    """Says what there is to do."""
    progress.note(
      f"{self.what}: {len(self.files):,} files of "
      f"{by_file.size(self.files) / 1e9:,.2f} GB, each listed by who embeds it"
    )

  def phases(self) -> list[str]:
    """One."""
    return ["embed"]

  def units(self, phase: str) -> list[str]:
    """Files that are not done yet."""
    done = functools.partial(dead_letters.recorded, self.artifact)
    return [unit for unit in self._units if done(unit) is None]

  def size(self, phase: str, unit: str) -> int:
    """One file."""
    return 1

  def do(self, phase: str, unit: str, tick: Callable[[int], None]) -> None:
    """Lists a file, and writes its shards; those that are there stay.

    Raises:
      UserError: something cannot be read or embedded, and is not to be left
        out.
    """
    number = self._units[unit]
    listed = self.files.load(number, self.on_error)
    memory = listed.memory
    shards = self._shards(number, memory)
    todo = [n for n in shards if self.artifact.recorded(n) is None]
    sifter = self._encoders.sifter(memory, dead_letters.HINT, self.policy.skip)
    workers = contextlib.nullcontext()
    if todo:
      workers = prefetch.pool(
        sifter, threads=self.threads, processes=self.processes
      )
    with workers as pool:
      for name in todo:
        write_images(
          Shard(
            self.artifact, int(name), memory, list(shards[name]), self.policy
          ),
          self._encoders,
          self._reading,
          [e.name for e in self.value_encoders],
          pool,
          sifter,
          lambda _: None,
        )
    dead_letters.record(
      self.artifact,
      unit,
      0,
      [dead_letters.Letter(*fault) for fault in listed.faults],
      shards=list(shards),
      found=listed.found,
      items=len(memory),
      broken=listed.broken,
      cut=self._cut(memory, shards),
    )
    tick(1)

  def finish(self) -> None:
    """Lists what was left out, and marks the table complete.

    Raises:
      UserError: too much was left out.
    """
    found = items = broken = 0
    cut: dict[str, dict[str, int] | None] = {}
    shards: list[str] = []
    for unit in self._units:
      record = dead_letters.recorded(self.artifact, unit)
      found += record["found"]
      items += record["items"]
      broken += record["broken"]
      cut = {
        name: _sum_cut(cut.get(name), own)
        for name, own in record["cut"].items()
      }
      counts = {n: self._recorded(n) for n in record["shards"]}
      given = sum(x["rows"] + len(x["letters"]) for x in counts.values())
      if given != record["items"]:
        raise UserError(
          f"{self.artifact.folder}: {unit} has {record['items']:,} items, and "
          f"its shards account for {given:,}; {self.artifact.remedy}."
        )
      # Shards that nothing is left of are none.
      shards += [n for n, x in counts.items() if x["rows"]]
    facts = dead_letters.gather(
      self.artifact, self._accounts(), None, self.policy
    )
    self._check_files(broken)
    if not shards:
      raise UserError(
        f"config.memory.pairs: {len(self.files):,} files, {found:,} pairs and "
        f"none chosen ({items:,} items); see whether their downloads failed, "
        "or loosen config.memory.filters."
      )
    if items < found:
      progress.note(f"{self.what}: filters keep {items:,} of {found:,} items")
    for name, numbers in cut.items():
      if numbers is not None:
        progress.note(f"{self.what}: {name}: {prompts.Cut(**numbers)}")
    info = {
      "key_dims": self.encoder.dim,
      "value_dims": {e.name: e.dim for e in self.value_encoders},
      "cut_texts": cut,
      "files": len(self.files),
    }
    self.artifact.finish(shards, info | facts)

  def close(self) -> None:
    """Nothing is open between two files."""

  def _accounts(self) -> Iterator[str]:
    """Where letters are recorded, in order."""
    for unit in self._units:
      yield unit
      yield from dead_letters.recorded(self.artifact, unit)["shards"]

  def _recorded(self, shard: str) -> dict[str, Any]:
    return dead_letters.recorded(self.artifact, shard)

  def _check_files(self, broken: int) -> None:
    share = broken / len(self.files)
    if share > self.max_errors:
      raise UserError(
        f"{self.artifact.folder / dead_letters.NAME}: {broken:,} of "
        f"{len(self.files):,} files cannot be read, a share of {share:.2g}, "
        f"and config.memory.max_errors is {self.max_errors:g}; allow more, "
        "which redoes no finished file, or mend them and delete "
        f"{self.artifact.folder}."
      )

  def _shards(self, number: int, memory: MemorySource) -> dict[str, range]:
    """Items of each shard of a file, by its name."""
    rows, step = len(memory), self.shard_rows
    starts = range(0, rows, step)
    if len(starts) > _PARTS:
      raise UserError(
        f"{self.files.found[number].path}: {rows:,} items are more than "
        f"{_PARTS:,} shards; give a larger --config.embed.shard_rows."
      )
    first = (_FIRST + number) * _PARTS
    return {
      table.shard_name(first + part): range(start, min(start + step, rows))
      for part, start in enumerate(starts)
    }

  def _cut(
    self, memory: MemorySource, shards: dict[str, range]
  ) -> dict[str, dict[str, int] | None]:
    """How much of the texts that were embedded is cut, by encoder."""
    lost = {
      letter[0] for name in shards for letter in self._recorded(name)["letters"]
    }
    texts = [t for i, t in zip(memory.ids, memory.texts) if i not in lost]
    return {
      e.name: None
      if e.lengths is None
      else dataclasses.asdict(prompts.count_cut(texts, e.lengths, e.max_length))
      for e in self._reading
    }

  @functools.cached_property
  def _encoders(self) -> ImageEncoders:
    return ImageEncoders(
      [self.encoder, *self._seeing],
      batch_size=self.batch_size,
      most=self.shard_rows,
      memory_gb=self.memory_gb,
    )


def _sum_cut(
  total: dict[str, int] | None, own: dict[str, int] | None
) -> dict[str, int] | None:
  """What is cut of the texts of several files."""
  if total is None or own is None:
    return own
  found = {n: total[n] + own[n] for n in ("texts", "total", "tokens")}
  found["longest"] = max(total["longest"], own["longest"])
  return found | {"max_length": own["max_length"]}
