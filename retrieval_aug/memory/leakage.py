"""Near copies of downstream examples in the memory: candidates, proof, report.

A near copy is among the nearest neighbours, so that the neighbour lists hold
all candidates. Their cosine does not decide: of drawings, JPEG of quality 50 at
half the size keeps a cosine of 0.5 to 0.75 with the original, and other
pictures of one thing reach 0.95. Where there are images these decide, by
perceptual hash and then pixel by pixel; where there are embeddings only, the
cosine alone does, from a higher value on.
"""

import concurrent.futures
import csv
import io
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from retrieval_aug.common import files, manifest, progress
from retrieval_aug.datasets import duplicates
from retrieval_aug.datasets.vectors import NoImageError
from retrieval_aug.memory import pixel_copies
from retrieval_aug.memory.exclusion import Exclusion
from retrieval_aug.memory.search import even_sample
from retrieval_aug.memory.table import Table

SPLITS = ("test", "val", "train")  # worst first

# Of each example, the neighbours that are looked at.
NEAREST = 10

# Cosine from which on a pair without images is a near copy.
EMBEDDED_COSINE = 0.95

# Rows of the memory that its mean is taken from, and the fewest that have one.
_MEAN_ROWS = 10_000
_FEWEST_ROWS = 100
_BLOCK = 4096


class Pairs(NamedTuple):
  """Examples and memory items.

  Attributes:
    queries: int64 [p], rows of the query table.
    memory: int64 [p], rows of the memory table.
    cosine: float32 [p], of the raw keys without the memory's mean.
  """

  queries: np.ndarray
  memory: np.ndarray
  cosine: np.ndarray


class Verdicts(NamedTuple):
  """What is known of pairs.

  Attributes:
    copies: bool [p], whether one is a near copy of the other.
    bits: int64 [p], in which the perceptual hashes differ; -1 without images,
      64 where one of them has nothing to compare.
    difference: float32 [p], see `pixel_copies`; NaN where it was not needed.
  """

  copies: np.ndarray
  bits: np.ndarray
  difference: np.ndarray


def candidates(
  queries: Table,
  memory: Table,
  rows: np.ndarray,
  ids: np.ndarray,
  leak_cosine: float,
) -> Pairs:
  """Pairs of examples and near neighbours that may be near copies.

  The cosine of the lists is that after the key transform, where it means
  something else with every kind; so it is taken anew from the raw keys, less
  the mean of the memory, as features of a ReLU network all point the same way.

  Args:
    queries: table of the downstream examples.
    memory: table of the memory.
    rows: int64 [q], rows of the query table.
    ids: int64 [q, k], their neighbours, best first; -1 pads.
    leak_cosine: least cosine of a candidate.
  """
  mean = _mean(memory)
  parts = [Pairs(*(np.zeros(0, t) for t in (np.int64, np.int64, np.float32)))]
  for start in range(0, len(rows), _BLOCK):
    near = ids[start : start + _BLOCK, :NEAREST]
    which, place = np.nonzero(near >= 0)
    own, found = rows[start + which], near[which, place]
    one, two = _directions(queries, own, mean), _directions(memory, found, mean)
    cosine = np.einsum("pd,pd->p", one, two, dtype=np.float64)
    cosine = np.clip(cosine, -1, 1).astype(np.float32)
    high = cosine >= np.float32(leak_cosine)
    parts.append(Pairs(own[high], found[high], cosine[high]))
  return Pairs(*(np.concatenate(x) for x in zip(*parts)))


def _mean(memory: Table) -> np.ndarray:
  """Mean key of the memory; zero of one so small that it is near its keys."""
  if memory.rows < _FEWEST_ROWS:
    return np.zeros(memory.dims, np.float32)
  rows = np.linspace(0, memory.rows - 1, min(memory.rows, _MEAN_ROWS))
  keys = memory.key_rows(rows.astype(np.int64))
  return keys.mean(axis=0, dtype=np.float64).astype(np.float32)


def _directions(table: Table, rows: np.ndarray, mean: np.ndarray) -> np.ndarray:
  """Unit keys without the mean, float32 [len(rows), d]; zero stays zero."""
  distinct, which = np.unique(rows, return_inverse=True)
  keys = table.key_rows(distinct).astype(np.float32) - mean
  norms = np.linalg.norm(keys, axis=1, keepdims=True)
  return (keys / np.maximum(norms, 1e-12))[which]


def _looks(
  rows: np.ndarray,
  image: Callable[[int], np.ndarray],
  what: str,
  threads: int,
) -> dict[int, pixel_copies.Look | None]:
  """Opens each image once; None of an item that has none."""

  def read(row: int) -> pixel_copies.Look | None:
    try:
      return pixel_copies.look(image(row))
    except NoImageError:
      return None

  rows = [int(row) for row in np.unique(rows)]
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    read_all = pool.map(read, rows)
    bar = progress.bar(read_all, total=len(rows), what=what, unit="image")
    return dict(zip(rows, bar, strict=True))


def confirm(
  pairs: Pairs,
  query_image: Callable[[int], np.ndarray],
  memory_image: Callable[[int], np.ndarray],
  *,
  threads: int = 8,
) -> Verdicts:
  """Decides which pairs are near copies; opens each image once.

  Of each image 3 KB are held until all are compared.

  Args:
    pairs: from `candidates`.
    query_image: row of the query table -> uint8 [H, W, 3]; a `NoImageError`
      if it has none: then the cosine decides.
    memory_image: the same of the memory.
    threads: that read images.
  """
  one = _looks(pairs.queries, query_image, "leaks: examples", threads)
  two = _looks(pairs.memory, memory_image, "leaks: memory", threads)
  count = len(pairs.cosine)
  bits = np.full(count, -1, np.int64)
  apart = np.full(count, np.nan, np.float32)
  copies = pairs.cosine >= np.float32(EMBEDDED_COSINE)
  for i, (query, row) in enumerate(zip(pairs.queries, pairs.memory)):
    a, b = one[int(query)], two[int(row)]
    if a is None or b is None:
      continue
    copies[i], bits[i], apart[i] = pixel_copies.compare(a, b)
  return Verdicts(copies, bits, apart)


def report(
  queries: Table,
  memory: Table,
  pairs: Pairs,
  verdicts: Verdicts,
  checked: Mapping[str, int],
  left_out: int = 0,
) -> dict[str, Any]:
  """What was found, as JSON: near copies by split, and one by one.

  Args:
    queries: table of the downstream examples.
    memory: table of the memory.
    pairs: candidates.
    verdicts: on them.
    checked: number of examples that were looked at, by split.
    left_out: training examples whose own id or group is in the memory: these
      near copies are forbidden to them already.

  Returns:
    `splits`: by split `examples`, `examples_with_copy`, `memory_rows`, and of
    train `left_out`; `pairs`, worst first, test before val before train.
  """
  splits = queries.column("split")
  found = np.flatnonzero(verdicts.copies)
  query_rows, rows = pairs.queries[found], pairs.memory[found]
  ids = queries.column_rows("id", query_rows)
  item_ids = memory.column_rows("id", rows)
  sources = [None] * len(rows)
  if memory.has_column("source"):
    sources = memory.column_rows("source", rows)
  out = [
    {
      "split": splits[query_rows[n]],
      "example": ids[n],
      "memory": item_ids[n],
      "source": sources[n],
      "cosine": round(float(pairs.cosine[i]), 4),
      "bits": None if verdicts.bits[i] < 0 else int(verdicts.bits[i]),
      "difference": (
        None
        if np.isnan(verdicts.difference[i])
        else round(float(verdicts.difference[i]), 4)
      ),
      "example_row": int(query_rows[n]),
      "memory_row": int(rows[n]),
    }
    for n, i in enumerate(found)
  ]
  out.sort(key=_worst_first)
  counts = {}
  for split in SPLITS:
    own = [pair for pair in out if pair["split"] == split]
    counts[split] = {
      "examples": checked[split],
      "examples_with_copy": len({pair["example_row"] for pair in own}),
      "memory_rows": len({pair["memory_row"] for pair in own}),
    }
  counts["train"]["left_out"] = left_out
  by_cosine = int((verdicts.bits < 0).sum())
  return {
    "splits": counts,
    "candidates": len(pairs.cosine),
    "candidates_without_images": by_cosine,
    "copies_with_images": sum(pair["bits"] is not None for pair in out),
    "pairs": out,
  }


def _worst_first(pair: dict[str, Any]) -> tuple:
  apart = 1.0 if pair["difference"] is None else pair["difference"]
  rows = (pair["example_row"], pair["memory_row"])
  return (SPLITS.index(pair["split"]), apart, -pair["cosine"], *rows)


def leaks_artifact(
  folder: pathlib.Path,
  neighbors: manifest.Artifact,
  leak_cosine: float,
  sample: int = -1,
) -> manifest.Artifact:
  """The leaks of some neighbour shards, named by their inputs.

  Args:
    folder: where they are or will be.
    neighbors: the shards, found with nothing excluded as a leak.
    leak_cosine: cosine from which on a pair is looked at.
    sample: examples of each split that are looked at; -1 is all.
  """
  limits = {
    "sample": sample,
    "leak_cosine": leak_cosine,
    "embedded_cosine": EMBEDDED_COSINE,
    "nearest": NEAREST,
    "bits": pixel_copies.BITS,
    "difference": pixel_copies.DIFFERENCE,
    "hash": duplicates.FORMAT,
  }
  inputs = {"neighbors": neighbors.fingerprint, "limits": limits}
  return manifest.Artifact(folder, "leak report", inputs)


def find(
  artifact: manifest.Artifact,
  queries: Table,
  memory: Table,
  lists: Mapping[str, np.ndarray],
  query_image: Callable[[int], np.ndarray],
  memory_image: Callable[[int], np.ndarray],
  *,
  leak_cosine: float,
  sample: int = -1,
  left_out: int = 0,
  threads: int = 8,
) -> None:
  """Finds near copies of examples and writes `leaks.json` and `leaks.csv`.

  Args:
    artifact: from `leaks_artifact`; a finished one is left alone.
    queries: table of the downstream examples.
    memory: table of the memory.
    lists: split -> int64 [N, k], neighbours of its examples in table order.
    query_image: see `confirm`.
    memory_image: see `confirm`.
    leak_cosine: as the artifact has it.
    sample: likewise.
    left_out: see `report`.
    threads: that read images.
  """
  if artifact.is_complete():
    return
  splits = np.asarray(queries.column("split"))
  with files.lock(artifact.folder):
    artifact.start()
    parts, checked = [], {}
    for split, ids in lists.items():
      size = len(ids) if sample < 0 else sample
      chosen = even_sample(len(ids), size)
      rows = np.flatnonzero(splits == split)[chosen]
      checked[split] = len(rows)
      parts.append(candidates(queries, memory, rows, ids[chosen], leak_cosine))
    pairs = Pairs(*(np.concatenate(x) for x in zip(*parts)))
    pairs = _allowed(pairs, queries, memory)
    verdicts = confirm(pairs, query_image, memory_image, threads=threads)
    found = report(queries, memory, pairs, verdicts, checked, left_out)
    files.write_json(artifact.folder / "leaks.json", found)
    files.write_bytes(artifact.folder / "leaks.csv", _csv(found["pairs"]))
    artifact.record("leaks", ["leaks.json", "leaks.csv"])
    artifact.finish(["leaks"], {n: v for n, v in found.items() if n != "pairs"})


def _allowed(pairs: Pairs, queries: Table, memory: Table) -> Pairs:
  """Without what training examples are not to find, by id or group."""
  rows, which = np.unique(pairs.memory, return_inverse=True)
  groups = Exclusion(queries, memory).groups(rows)
  if groups is None:
    return pairs
  own = groups.of(pairs.queries).forbidden(which[:, None])[:, 0]
  return Pairs(*(x[~own] for x in pairs))


def _csv(pairs: list[dict[str, Any]]) -> bytes:
  out = io.StringIO()
  names = ["split", "example", "memory", "source"]
  names += ["cosine", "bits", "difference"]
  writer = csv.DictWriter(
    out, names, extrasaction="ignore", lineterminator="\n"
  )
  writer.writeheader()
  writer.writerows(pairs)
  return out.getvalue().encode()


def load(artifact: manifest.Artifact) -> dict[str, Any]:
  """What `report` gave, verified.

  Raises:
    UserError: a file is damaged.
  """
  artifact.verify()
  return files.read_json(artifact.folder / "leaks.json")


def rows_to_drop(artifact: manifest.Artifact) -> np.ndarray:
  """Memory rows that are near copies of val or test examples, ascending."""
  pairs = load(artifact)["pairs"]
  rows = {p["memory_row"] for p in pairs if p["split"] != "train"}
  return np.array(sorted(rows), np.int64)


def train_pairs(artifact: manifest.Artifact) -> np.ndarray:
  """Near copies of training examples that no id or group forbids.

  Returns:
    int64 [p, 2], rows of the query table and of the memory, ascending.
  """
  pairs = load(artifact)["pairs"]
  rows = [
    (p["example_row"], p["memory_row"]) for p in pairs if p["split"] == "train"
  ]
  return np.array(sorted(rows), np.int64).reshape(-1, 2)


def describe(artifact: manifest.Artifact) -> str:
  """One line on the leaks, for the user."""
  info = artifact.info()
  test, val, train = (info["splits"][split] for split in SPLITS)
  share = 100 * test["examples_with_copy"] / max(test["examples"], 1)
  text = (
    f"{test['examples_with_copy']:,} of {test['examples']:,} test "
    f"examples ({share:.1f} %) and {val['examples_with_copy']:,} of "
    f"{val['examples']:,} val have a near copy in the memory"
  )
  if train["examples_with_copy"]:
    text += f", and {train['examples_with_copy']:,} training examples another"
  blind = info["candidates_without_images"]
  if blind:
    all_blind = blind == info["candidates"]
    text += "; by embeddings alone" + ("" if all_blind else " where no images")
  # Without images there is nothing to draw.
  return (
    text + "; leaks.csv" + (", leaks.png" if info["copies_with_images"] else "")
  )
