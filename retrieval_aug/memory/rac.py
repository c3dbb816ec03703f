"""The offline part of RAC (Long et al., CVPR 2022): texts of neighbors, joined.

The texts of an example's neighbors, best first, become one text, which a text
encoder embeds once; `models.build("rac", ...)` classifies with that embedding.
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from retrieval_aug.common import files, manifest
from retrieval_aug.encoders import Encoder
from retrieval_aug.memory.embed_texts import embed_texts
from retrieval_aug.memory.matrices import read_matrix
from retrieval_aug.memory.table import Table


class JoinedTexts(NamedTuple):
  """One text an example.

  Attributes:
    texts: joined texts, empty where no neighbor has one.
    num_cut: texts longer than the encoder's limit, whose end it will not see.
    num_tokens: tokens of all texts, for the mean length.
  """

  texts: list[str]
  num_cut: int
  num_tokens: int


def join_texts(
  neighbor_texts: Sequence[Sequence[str]],
  count_tokens: Callable[[str], int],
  max_tokens: int,
  *,
  separator: str = ", ",
) -> JoinedTexts:
  """Joins the texts of each example's neighbors.

  Nothing is cut here: the text encoder truncates by its own limit, and since
  the best neighbor comes first, it is the worst that are lost.

  Args:
    neighbor_texts: for each example, the texts of its neighbors, best first;
      empty texts are left out.
    count_tokens: tokens of a text by the encoder's tokenizer, without
      truncation, special tokens included.
    max_tokens: the encoder's limit.
    separator: what stands between two texts.

  Returns:
    A text for each example, in order, and the counts.
  """
  texts, num_cut, num_tokens = [], 0, 0
  for own in neighbor_texts:
    text = separator.join(part for part in map(str.strip, own) if part)
    length = count_tokens(text)
    num_cut += length > max_tokens
    num_tokens += length
    texts.append(text)
  return JoinedTexts(texts, num_cut, num_tokens)


def joined_artifact(
  folder: pathlib.Path,
  neighbors: manifest.Artifact,
  memory: Table,
  value_name: str,
  k: int,
) -> manifest.Artifact:
  """The embedded joined texts of some neighbour shards, named by their inputs.

  Args:
    folder: where they are or will be.
    neighbors: the shards.
    memory: has the texts, and knows which weights the text encoder had.
    value_name: the text encoder.
    k: neighbours whose texts are joined.
  """
  return manifest.Artifact(
    folder,
    "joined texts",
    {
      "neighbors": neighbors.fingerprint,
      "encoder": memory.inputs["values"][value_name],
      "k": k,
    },
  )


def embed_joined(
  artifact: manifest.Artifact,
  memory: Table,
  encoder: Encoder,
  lists: dict[str, np.ndarray],
) -> None:
  """Embeds one joined text an example, a finished split of a killed run kept.

  Args:
    artifact: from `joined_artifact`.
    memory: has the texts.
    encoder: of texts.
    lists: split -> int64 [N, k], rows of the memory table, best first, -1 pads.
  """
  rows = np.unique(np.concatenate([x.ravel() for x in lists.values()]))
  rows = rows[rows >= 0]
  texts = dict(zip(rows.tolist(), memory.column_rows("text", rows)))
  count = lambda text: int(encoder.lengths([text])[0])
  with files.lock(artifact.folder):
    artifact.start()
    for split, rows in lists.items():
      if artifact.recorded(split):
        continue
      own = [[texts[r] for r in line if r >= 0] for line in rows.tolist()]
      joined = join_texts(own, count, encoder.max_length)
      embedded = embed_texts(
        encoder, joined.texts, what=f"joined texts of {split}"
      )
      # Without any text there is nothing to embed: such rows are masked.
      empty = [i for i, text in enumerate(joined.texts) if not text]
      path = artifact.folder / f"{split}.npy"
      with files.atomic_path(path) as temporary, open(temporary, "wb") as f:
        np.save(f, embedded.astype(np.float16))
      info = {
        "shape": list(embedded.shape),
        "empty": empty,
        "cut": joined.num_cut,
        "tokens": joined.num_tokens,
      }
      artifact.record(split, [path.name], info)
    artifact.finish(list(lists), {"limit": encoder.max_length})


def describe(artifact: manifest.Artifact) -> str:
  """One line on how many joined texts are cut, for the user.

  A cut text looks like a smaller k.
  """
  infos = [record["info"] for record in artifact.shards().values()]
  texts = sum(info["shape"][0] for info in infos)
  mean = sum(info["tokens"] for info in infos) / texts
  cut = sum(info["cut"] for info in infos)
  return (
    f"{cut:,} of {texts:,} are longer than the text encoder's "
    f"{artifact.info()['limit']} tokens and lose their end, mean length "
    f"{mean:,.0f} tokens"
  )


def load_joined(
  artifact: manifest.Artifact, split: str
) -> tuple[np.ndarray, np.ndarray]:
  """Embeddings float16 [N, d_t] of a split, and bool [N]: whether it has any.

  Raises:
    UserError: the file is damaged, of another shape, or not finite.
  """
  info = artifact.shards()[split]["info"]
  path = artifact.folder / f"{split}.npy"
  embedded = read_matrix(path, *info["shape"], artifact.remedy)
  has_text = np.ones(len(embedded), bool)
  has_text[info["empty"]] = False
  return embedded, has_text
