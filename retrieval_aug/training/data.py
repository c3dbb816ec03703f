"""What every run of an experiment sees: examples, neighbours, working set."""

from typing import NamedTuple

import numpy as np

from retrieval_aug.common import manifest
from retrieval_aug.memory import neighbors, rac
from retrieval_aug.memory.table import Table
from retrieval_aug.memory.working_set import WorkingSet
from retrieval_aug.training import input_pipeline
from retrieval_aug.training import loss as losses
from retrieval_aug.training.placement import Memory


class Data(NamedTuple):
  """What every run of an experiment shares.

  Attributes:
    examples: split -> examples with their neighbours.
    memory: the working set, on the host; matrices may be memory-mapped.
    rows: split -> int32 [N, k], working-set rows of the neighbours.
    class_counts: int64 [C], training examples a class.
    source_names: name of each source of the memory.
    fingerprint: of the neighbours and values behind all this.
  """

  examples: dict[str, input_pipeline.Examples]
  memory: Memory
  rows: dict[str, np.ndarray]
  class_counts: np.ndarray
  source_names: list[str]
  fingerprint: str

  def arrays(self, split: str, k: int) -> dict[str, np.ndarray]:
    """query [N, d], rows [N, k] and label [N] of one split."""
    examples = self.examples[split]
    return {
      "query": examples.queries,
      "rows": self.rows[split][:, :k],
      "label": examples.labels,
    }


def read_examples(
  artifact: manifest.Artifact, queries: Table
) -> dict[str, input_pipeline.Examples]:
  """Joins every split of the query table with its neighbours."""
  info = artifact.info()
  columns = [queries.column(n) for n in ("id", "label", "split")]
  out = {}
  for split in neighbors.SPLITS:
    chosen = [(i, label) for i, label, s in zip(*columns) if s == split]
    out[split] = input_pipeline.read(
      neighbors.shard_paths(artifact, split),
      [i for i, _ in chosen],
      [label for _, label in chosen],
      info["dims"],
      info["k"],
    )
  return out


def load_data(
  examples: dict[str, input_pipeline.Examples],
  working_set: WorkingSet,
  fingerprint: str,
) -> Data:
  """Brings examples and working set into the form that runs use."""
  labels = np.concatenate([e.labels for e in examples.values()])
  values = tuple(working_set.values.values())
  return Data(
    examples=examples,
    memory=Memory(
      working_set.keys,
      values[0] if len(values) == 1 else values,
      working_set.sources,
      working_set.labels,
    ),
    rows={s: working_set.renumber(e.neighbors) for s, e in examples.items()},
    class_counts=losses.class_counts(
      examples["train"].labels, int(labels.max()) + 1
    ),
    source_names=working_set.source_names,
    fingerprint=fingerprint,
  )


def joined_data(data: Data, joined: manifest.Artifact) -> Data:
  """What RAC sees: each example has one neighbour, its joined text.

  Args:
    data: what the others see.
    joined: from `rac.joined_artifact`.
  """
  values, rows, first = [], {}, 0
  for split in data.examples:
    embedded, has_text = rac.load_joined(joined, split)
    values.append(embedded)
    own = np.arange(first, first + len(embedded), dtype=np.int32)
    rows[split] = np.where(has_text, own, -1)[:, None]
    first += len(embedded)
  return data._replace(
    memory=Memory(None, np.concatenate(values)),
    rows=rows,
    fingerprint=joined.fingerprint,
  )
