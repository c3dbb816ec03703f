"""The embed stage: images and texts to embedding tables, shard by shard."""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from retrieval_aug.common import manifest, progress
from retrieval_aug.common.errors import UserError
from retrieval_aug.datasets import types
from retrieval_aug.encoders import Encoder, prefetch
from retrieval_aug.memory import (
  captions,
  dead_letters,
  embed_stored,
  jobs,
  known_keys,
  table,
)
from retrieval_aug.memory.embed_images import ImageEncoders
from retrieval_aug.memory.embed_shard import Shard, write_images


def table_artifact(
  folder: str | pathlib.Path,
  items: types.ImageItems,
  encoder: Encoder,
  value_encoders: Sequence[Encoder],
  shard_rows: int,
) -> manifest.Artifact:
  """The table that `embed` writes for these items, named by its inputs.

  Raises:
    UserError: the encoder of the keys is not one of images, two encoders of
      values have one name, or one needs images where there are none.
  """
  if encoder.modality != "image":
    raise UserError(
      f"config.encoder.name={encoder.name}: an encoder of {encoder.modality}s; "
      "keys and queries are images."
    )
  values = {e.name: e.fingerprint for e in value_encoders}
  if len(values) < len(value_encoders):
    raise UserError(
      "config.value_encoders: two have one name; every one must be another."
    )
  if items.stored is not None:
    for e in value_encoders:
      if e.modality == "image" and not embed_stored.made_by(e, items):
        raise UserError(
          f"config.value_encoders: {e.name} is an encoder of images, and "
          f"{items.name} has embeddings only; name one of texts."
        )
  return manifest.Artifact(
    pathlib.Path(folder),
    table.KIND,
    {
      "items": items.fingerprint,
      "encoder": encoder.fingerprint,
      "values": values,
      "shard_rows": shard_rows,
    },
  )


def estimate(
  items: types.ImageItems,
  encoder: Encoder,
  value_encoders: Sequence[Encoder],
  shard_rows: int,
) -> str:
  """One line: what embedding `items` will write and hold in memory."""
  if items.stored is not None:
    keys = [part.keys for part in items.stored]
    width = max(m.dims for m in keys)
    place = f"{keys[0].path}{' and others' if len(keys) > 1 else ''}"
    return (
      f"embed {items.name}: {len(items):,} items, whose embeddings of {width} "
      f"dims are there: {place}"
    )
  used = (encoder, *value_encoders)
  row = 2 * sum(e.dim for e in used)
  weights = sum(x.nbytes for e in used for x in jax.tree.leaves(e.params))
  rows = len(items.ids)
  # A shard is held in float32 until it is written.
  memory = weights + 2 * row * min(rows, shard_rows)
  return (
    f"embed {items.name}: {rows:,} items, about {rows * row / 1e6:,.0f} MB on "
    f"disk, {memory / 1e6:,.0f} MB of memory beside the encoder's activations"
  )


def embed(
  artifact: manifest.Artifact,
  items: types.ImageItems,
  encoder: Encoder,
  value_encoders: Sequence[Encoder],
  **options: Any,
) -> None:
  """Writes the table of `items`; finished shards of a killed run are kept.

  Args:
    artifact: from `table_artifact` with the same arguments.
    items: what to embed.
    encoder: for the keys.
    value_encoders: for the values.
    **options: of `EmbedJob`.

  Raises:
    UserError: an item cannot be embedded, and is not to be left out.
  """
  job = EmbedJob(artifact, items, encoder, value_encoders, **options)
  job.announce()
  jobs.run(job)


@dataclasses.dataclass(eq=False)
class EmbedJob:
  """The table of some items, a shard a unit; see `jobs.Job`.

  All devices of this machine share each batch. Of items whose embeddings exist
  already only texts are embedded, where their values do not exist; and images
  that stand in a finished table are not embedded again.

  A shard is the same whichever process makes it, if all give the same
  `batch_size`, and it is not 0: a batch of another shape may round another way.

  Attributes:
    artifact: from `table_artifact` with the same arguments.
    items: what to embed; a `MemorySource` has texts, a `Downstream` labels.
    encoder: image encoder, for the keys.
    value_encoders: of texts or of images, for the values; none for queries.
    batch_size: images an encoder sees at once; 0 for the largest power of two
      that fits into `memory_gb`, found once a process.
    shard_rows: rows a shard.
    threads: that load images while the encoder computes.
    processes: that do so instead of threads; for images whose loading holds
      Python's lock.
    memory_gb: of each device, in 10^9 bytes; None or 0 is a quarter of what is
      free.
    known: a finished table of the same encoder, with its items.
    on_error: of a memory, "fail" or "skip" items that cannot be embedded; see
      `dead_letters.py`. Queries always fail.
    max_errors: share of the items that may be skipped.
  """

  artifact: manifest.Artifact
  items: types.ImageItems
  encoder: Encoder
  value_encoders: Sequence[Encoder]
  _: dataclasses.KW_ONLY
  batch_size: int
  shard_rows: int
  threads: int
  processes: int = 0
  memory_gb: float | None = None
  known: known_keys.Known | None = None
  on_error: str = "fail"
  max_errors: float = 0.01

  def __post_init__(self):
    self.policy = None
    if isinstance(self.items, types.MemorySource):
      self.policy = dead_letters.Policy(self.on_error, self.max_errors)
    stored = self.items.stored is not None
    self.what = f"embed {self.items.name}"
    self.counted = "item" if stored else "image"
    there = [
      e
      for e in self.value_encoders
      if (embed_stored.made_by(e, self.items) if stored else _sees(e))
    ]
    self._there = there
    self._reading = [e for e in self.value_encoders if e not in there]
    self._open = contextlib.ExitStack()

  def announce(self) -> None:
    """Says what embedding will write, and what need not be embedded."""
    name = self.items.name
    progress.note(
      estimate(self.items, self.encoder, self.value_encoders, self.shard_rows)
    )
    if self.items.stored is not None:
      embed_stored.note_unused(self.items, self.value_encoders)
    elif (self._had >= 0).any():
      progress.note(
        f"embed {name}: {(self._had >= 0).sum():,} of its images are among the "
        f"queries, whose keys are there"
      )

  def phases(self) -> list[str]:
    """One."""
    return ["embed"]

  def units(self, phase: str) -> list[str]:
    """Shards that are not written yet."""
    return [n for n in self._shards if self.artifact.recorded(n) is None]

  def size(self, phase: str, unit: str) -> int:
    """Its items."""
    return len(self._shards[unit])

  def do(self, phase: str, unit: str, tick: Callable[[int], None]) -> None:
    """Writes a shard.

    Raises:
      UserError: an item cannot be embedded, and is not to be left out.
    """
    number = int(unit)
    rows = self._shards[unit]
    shard = Shard(self.artifact, number, self.items, list(rows), self.policy)
    if self.items.stored is not None:
      self._stored.write(shard, self._pieces[number])
      tick(len(rows))
      return
    names = [e.name for e in self.value_encoders]
    write_images(
      shard,
      self._encoders,
      self._reading,
      names,
      self._pool,
      self._sifter,
      tick,
      self._had,
      self.known,
    )

  def finish(self) -> None:
    """Lists what was left out, and marks the table complete.

    Raises:
      UserError: too much was left out.
    """
    names, lost, facts = list(self._shards), set(), {}
    if self.policy is not None:
      for name in names:
        found = dead_letters.recorded(self.artifact, name)
        if found is None:
          # Of a version of this program in which nothing could be left out.
          rows = self.artifact.recorded(name)["info"]["rows"]
          dead_letters.record(self.artifact, name, rows, [])
      facts = dead_letters.gather(
        self.artifact, names, len(self.items), self.policy
      )
      letters = list(dead_letters.read(self.artifact.folder))
      lost = {letter["id"] for letter in letters}
      # Shards that nothing is left of are none.
      full = lambda name: dead_letters.recorded(self.artifact, name)["rows"]
      names = [name for name in names if full(name)] if letters else names
    self.artifact.finish(names, self._info(lost) | facts)

  def close(self) -> None:
    """Ends the threads or processes that load images."""
    self._open.close()
    self.__dict__.pop("_pool", None)

  def _info(self, lost: set[str]) -> dict[str, Any]:
    """Facts for readers of the table; tells how many texts were cut."""
    texts = self.items.texts if self._reading else []
    if lost:
      texts = [t for i, t in zip(self.items.ids, texts) if i not in lost]
    return {
      "key_dims": self.encoder.dim,
      "value_dims": {e.name: e.dim for e in self.value_encoders},
      "cut_texts": {
        e.name: captions.note_cut(self.items.name, e, texts)
        for e in self._reading
      },
    }

  # Made when first needed: a process that only lists units has none of it.

  @functools.cached_property
  def _shards(self) -> dict[str, range]:
    """Items of each shard, by its name."""
    rows, step = len(self.items), self.shard_rows
    if self.items.stored is not None:
      found = [piece.rows for piece in self._pieces]
    else:
      found = [range(i, min(i + step, rows)) for i in range(0, rows, step)]
    return {table.shard_name(i): chosen for i, chosen in enumerate(found)}

  @functools.cached_property
  def _pieces(self) -> list[embed_stored.Piece]:
    return embed_stored.pieces(self.items, self._reading, self.shard_rows)

  @functools.cached_property
  def _stored(self) -> embed_stored.StoredShards:
    return embed_stored.StoredShards(self.items, self._there, self._reading)

  @functools.cached_property
  def _had(self) -> np.ndarray:
    """Row of each item among those that are known; -1 of none."""
    # With visual values every image has to be looked at all the same.
    return known_keys.rows(self.items, None if self._there else self.known)

  @functools.cached_property
  def _encoders(self) -> ImageEncoders:
    return ImageEncoders(
      [self.encoder, *self._there],
      batch_size=self.batch_size,
      most=min(len(self.items), self.shard_rows),
      memory_gb=self.memory_gb,
    )

  @functools.cached_property
  def _sifter(self) -> prefetch.Sifter:
    hint = "" if self.policy is None else dead_letters.HINT
    skip = self.policy is not None and self.policy.skip
    return self._encoders.sifter(self.items, hint, skip)

  @functools.cached_property
  def _pool(self) -> prefetch.Pool:
    workers = prefetch.pool(
      self._sifter, threads=self.threads, processes=self.processes
    )
    return self._open.enter_context(workers)


def _sees(encoder: Encoder) -> bool:
  """Whether values are of images."""
  return encoder.modality == "image"
