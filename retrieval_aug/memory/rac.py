"""The offline part of RAC (Long et al., CVPR 2022): texts of neighbors, joined.

The texts of an example's neighbors, best first, become one text, which a text
encoder embeds once; `models.build("rac", ...)` classifies with that embedding.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from absl import logging


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
  the best neighbor comes first, it is the worst that are lost. How many
  examples lose some is logged, because it looks like a small k.

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
  if num_cut:
    logging.info(
      "RAC: %d of %d joined neighbor texts are longer than the text encoder's "
      "%d tokens and lose their end; take a smaller k to keep whole lists",
      num_cut,
      len(texts),
      max_tokens,
    )
  return JoinedTexts(texts, num_cut, num_tokens)
