"""Texts to embeddings, each distinct one once."""

import contextlib

import jax
import numpy as np

from retrieval_aug.common import progress
from retrieval_aug.encoders import Encoder, prefetch


def embed_texts(
  encoder: Encoder,
  texts: list[str],
  batch_size: int = 64,
  what: str | None = None,
  faults: dict[str, str] | None = None,
) -> np.ndarray:
  """Embeds texts, each distinct one once: float32 [len(texts), dim].

  Texts of similar length share a batch, so that little is padding. With `what`
  there is a progress bar of that label.

  Args:
    encoder: of texts.
    texts: any number.
    batch_size: texts that the encoder sees at once.
    what: label of a progress bar; None for none.
    faults: gets the reason of each text that cannot be tokenised, whose rows
      are NaN. None: such a text raises.
  """
  # jit keeps its compilations by function, so calls for other shards share
  # them.
  apply = jax.jit(encoder.apply)
  distinct = sorted(set(texts), key=lambda t: (len(t), t))
  rows = {}
  bar = contextlib.nullcontext()
  if what is not None:
    bar = progress.bar(total=len(distinct), what=what, unit="text")
  with bar:
    for start in range(0, len(distinct), batch_size):
      batch = distinct[start : start + batch_size]
      filled = batch + [""] * (batch_size - len(batch))
      prepared = _prepared(encoder, filled, faults)
      out = np.asarray(apply(encoder.params, prepared))
      rows.update(zip(batch, out))
      if what is not None:
        bar.update(len(batch))
  for text in (faults or {}).keys() & rows.keys():
    rows[text] = np.full(encoder.dim, np.nan, np.float32)
  if not rows:
    return np.zeros((0, encoder.dim), np.float32)
  return np.stack([rows[t] for t in texts])


def _prepared(
  encoder: Encoder, texts: list[str], faults: dict[str, str] | None
) -> dict[str, np.ndarray]:
  """Tokens of a batch; those of a text at fault are of an empty one."""
  try:
    return encoder.prepare(texts)
  except MemoryError:  # no fault of the texts'
    raise
  except Exception:
    if faults is None:
      raise
  # It does not say which: they are tried one by one.
  for text in dict.fromkeys(filter(None, texts)):
    try:
      encoder.prepare([text])
    except Exception as error:
      faults[text] = prefetch.reason(error)
  return encoder.prepare(["" if t in faults else t for t in texts])
