"""One shard of a table, from the items that are meant to be in it.

What is written is a function of the items alone, whichever process does it.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from retrieval_aug.common import manifest
from retrieval_aug.datasets import types, vectors
from retrieval_aug.encoders import Encoder, prefetch
from retrieval_aug.memory import dead_letters, known_keys, table
from retrieval_aug.memory.embed_images import ImageEncoders
from retrieval_aug.memory.embed_texts import embed_texts


@dataclasses.dataclass
class Shard:
  """Items on their way into a shard of a table.

  Attributes:
    artifact: the table.
    number: of the shard.
    items: some of which it holds.
    rows: indices of those that can be embedded, as far as is known.
    policy: for the others; None: nothing may be left out, and it is up to
      `table.write_shard` to find what is not finite.
    faults: why those that are left out cannot be embedded, by index.
  """

  artifact: manifest.Artifact
  number: int
  items: types.ImageItems
  rows: list[int]
  policy: dead_letters.Policy | None
  faults: dict[int, str] = dataclasses.field(default_factory=dict)

  def leave_out(self, faults: dict[int, str]) -> None:
    """Notes items that cannot be embedded."""
    if faults:
      self.faults |= faults
      self.rows = [i for i in self.rows if i not in self.faults]

  def embed_texts(self, encoders: Sequence[Encoder]) -> dict[str, np.ndarray]:
    """Values of the items' texts: float32 `[rows, dim]`, by encoder.

    The rows of texts that cannot be tokenised are NaN.
    """
    texts = [self.items.texts[i] for i in self.rows] if encoders else []
    values, bad = {}, {}
    for e in encoders:
      own = None if self.policy is None else {}
      values[e.name] = embed_texts(e, texts, faults=own)
      for text, why in (own or {}).items():
        bad.setdefault(text, f"{e.name} cannot take its text: {why}")
    self.faults |= {i: bad[t] for i, t in zip(self.rows, texts) if t in bad}
    return values

  def write(
    self,
    keys: np.ndarray | None,
    values: dict[str, np.ndarray],
    stored: Mapping[str, vectors.Matrix] | None = None,
  ) -> None:
    """Writes the shard without what is not finite, and records its letters.

    Of a shard that nothing is left of there is a record alone.

    Args:
      keys: `[rows, d]`, of `rows`; None if they are `stored`.
      values: by name, `[rows, d_v]`.
      stored: embeddings that stay where they are.

    Raises:
      UserError: an item cannot be embedded, and is not to be left out.
    """
    stored = dict(stored or {})
    if self.policy is not None:
      arrays = ({} if keys is None else {"": keys}) | values
      for row, why in dead_letters.not_finite(arrays).items():
        self.faults.setdefault(self.rows[row], why)
      kept = [p for p, i in enumerate(self.rows) if i not in self.faults]
      if len(kept) < len(self.rows):
        self.rows = [self.rows[p] for p in kept]
        keys = None if keys is None else keys[kept]
        values = {name: x[kept] for name, x in values.items()}
        stored = {n: m.take(np.array(kept, int)) for n, m in stored.items()}
      self._record_letters(self.policy)
    if not self.rows:
      self.artifact.record(table.shard_name(self.number), [], {"rows": 0})
      return
    table.write_shard(
      self.artifact,
      self.number,
      keys=keys,
      values=values,
      metadata=_metadata(self.items, self.rows),
      stored=stored,
    )

  def _record_letters(self, policy: dead_letters.Policy) -> None:
    letters = [
      dead_letters.Letter(
        self.items.ids[i], dead_letters.place(self.items, i), self.faults[i]
      )
      for i in sorted(self.faults)
    ]
    if letters and not policy.skip:
      dead_letters.refuse(self.artifact.folder, letters)
    name = table.shard_name(self.number)
    dead_letters.record(self.artifact, name, len(self.rows), letters)


def write_images(
  shard: Shard,
  encoders: ImageEncoders,
  reading: Sequence[Encoder],
  names: Sequence[str],
  pool: prefetch.Pool,
  sifter: prefetch.Sifter,
  tick: Callable[[int], None],
  had: np.ndarray | None = None,
  known: known_keys.Known | None = None,
) -> None:
  """Embeds the items of a shard that have images, and writes it.

  Args:
    shard: with the items.
    encoders: of the keys, and of visual values.
    reading: encoders of values of texts.
    names: of all values, in the order in which they are written.
    pool: of workers that run `sifter`.
    sifter: loads images.
    tick: is told how many items were done since it was last called.
    had: row in `known` of each of all items, -1 of those that it has not.
    known: a finished table of the same encoder.

  Raises:
    UserError: an item cannot be embedded, and is not to be left out.
  """
  if had is None:
    had = np.full(len(shard.items), -1, np.int64)
  new = [i for i in shard.rows if had[i] < 0]
  tick(len(shard.rows) - len(new))
  (keys, *seen), faults = encoders.embed(pool, sifter, new, tick)
  shard.leave_out(faults)
  values = {e.name: x for e, x in zip(encoders.encoders[1:], seen)}
  values |= shard.embed_texts(reading)
  keys = known_keys.fill(keys, had[shard.rows], known)
  shard.write(keys, {name: values[name] for name in names})


def _metadata(items: types.ImageItems, rows: Sequence[int]) -> dict[str, list]:
  columns = {"id": items.ids}
  if isinstance(items, types.Downstream):
    columns |= {
      "label": [int(x) for x in items.labels],
      "class_name": [items.class_names[x] for x in items.labels],
      "split": items.splits,
      "group": items.groups or items.ids,
    }
  if isinstance(items, types.MemorySource):
    columns |= {"text": items.texts, **items.columns}
  return {n: [c[i] for i in rows] for n, c in columns.items()}
