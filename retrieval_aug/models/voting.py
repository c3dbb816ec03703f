"""Classifiers without parameters: votes of the neighbors, and prompts.

All return class scores `[B, C]` in float32, highest is best, so that they are
evaluated like logits. A neighbor votes if the mask shows it and it has a label
(labels below zero say that it has none); without any vote all scores are 0.
"""

import jax
import jax.numpy as jnp
from jax import Array

from retrieval_aug.models.neighbors import masked_softmax
from retrieval_aug.models.scaling import scaled
from retrieval_aug.models.shapes import Sizes, bind


def plurality_vote(
  labels: Array, num_classes: int, mask: Array | None = None
) -> Array:
  """Number of neighbors of each class.

  Of classes with equally many, the one whose best neighbor comes first wins:
  it has up to half a vote more.

  Args:
    labels: int `[B, k]`, best neighbor first.
    num_classes: C.
    mask: bool `[B, k]`, True where a neighbor counts; None for all.

  Returns:
    `[B, C]`: votes, plus `1 / (2 + rank)` with the rank, from 0, of the class's
    first vote.
  """
  votes = _votes(labels, num_classes, mask)  # [B, k, C]
  ranks = jnp.arange(labels.shape[1], dtype=jnp.float32)
  bonus = jnp.max(votes / (2.0 + ranks)[None, :, None], axis=1, initial=0.0)
  return jnp.sum(votes, axis=1) + bonus


def rank_vote(
  labels: Array, num_classes: int, mask: Array | None = None
) -> Array:
  """Votes that count less the later a neighbor comes.

  Args:
    labels: int `[B, k]`, best neighbor first.
    num_classes: C.
    mask: bool `[B, k]`, True where a neighbor counts; None for all.

  Returns:
    `[B, C]`: for each class the sum of `1 / (1 + rank)` over its neighbors.
    Ranks, from 0, count the neighbors that vote.
  """
  votes = _votes(labels, num_classes, mask)
  voted = jnp.sum(votes, axis=-1)  # [B, k]
  rank = jnp.cumsum(voted, axis=1) - voted
  return jnp.einsum("bk,bkc->bc", 1.0 / (1.0 + rank), votes)


def similarity_vote(
  labels: Array,
  similarities: Array,
  num_classes: int,
  mask: Array | None = None,
  *,
  temperature: float = 0.07,
) -> Array:
  """Votes weighted by a softmax of the similarities.

  Args:
    labels: int `[B, k]`.
    similarities: cosines `[B, k]`, finite where the mask shows them.
    num_classes: C.
    mask: bool `[B, k]`, True where a neighbor counts; None for all.
    temperature: what the cosines are divided by; 0.07 is what Wu et al. (CVPR
      2018) and DINO use for k-NN classification.

  Returns:
    `[B, C]`, class probabilities: rows sum to 1, or 0 without any vote.
  """
  sizes: Sizes = {}
  bind("labels", labels, "B k", sizes)
  bind("similarities", similarities, "B k", sizes)
  votes = _votes(labels, num_classes, mask)
  shown = jnp.any(votes > 0.0, axis=-1)
  # Empty slots have the similarity -inf.
  logits = jnp.where(shown, jnp.asarray(similarities, jnp.float32), 0.0)
  weights = masked_softmax(logits / temperature, shown)
  return jnp.einsum("bk,bkc->bc", weights, votes)


def zero_shot(query: Array, prompts: Array) -> Array:
  """Cosines of queries and class prompts, for encoders of a joint space.

  Args:
    query: image embeddings `[B, d]`.
    prompts: text embeddings `[C, d]`, one a class (of several templates, the
      mean of the normalised embeddings).

  Returns:
    Cosines `[B, C]`. Ranking them needs no temperature.
  """
  sizes: Sizes = {}
  bind("query", query, "B d", sizes)
  bind("prompts", prompts, "C d", sizes)
  query = scaled(query, "sqrt_d", jnp.float32)
  prompts = scaled(prompts, "sqrt_d", jnp.float32)
  return query @ prompts.T / query.shape[-1]


def _votes(labels: Array, num_classes: int, mask: Array | None) -> Array:
  """One-hot votes, float32 `[B, k, C]`; all zero for who does not vote."""
  sizes: Sizes = {}
  bind("labels", labels, "B k", sizes)
  # `one_hot` gives zeros for labels outside [0, C).
  votes = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
  if mask is not None:
    bind("mask", mask, "B k", sizes)
    votes = votes * jnp.asarray(mask, jnp.float32)[..., None]
  return votes
