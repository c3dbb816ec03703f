"""Vectors of an intrinsic dimension of 5, and what brute force finds."""

import numpy as np

from retrieval_aug.memory import search

N, Q, D, K = 211, 29, 13, 7


def vectors(n, seed, dims=D):
  """Unit rows near one plane, float32 [n, dims]."""
  rng = np.random.default_rng(seed)
  plane = np.random.default_rng(0).normal(size=(5, dims))
  x = rng.normal(size=(n, 5)) @ plane + 0.01 * rng.normal(size=(n, dims))
  return search.normalize(x, "vectors")


def oracle(keys, queries, k):
  """ids and scores by (-score, id), computed in float64."""
  scores = (queries.astype(np.float64) @ keys.astype(np.float64).T).astype(
    np.float32
  )
  ids = np.broadcast_to(np.arange(len(keys)), scores.shape)
  order = np.lexsort((ids, -scores), axis=1)[:, :k]
  return order, np.take_along_axis(scores, order, axis=1)
