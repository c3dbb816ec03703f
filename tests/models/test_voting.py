"""Votes by hand and against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retrieval_aug.models import voting

B, K, C = 5, 7, 3


def make_inputs(seed=0):
  rng = np.random.default_rng(seed)
  labels = rng.integers(-1, C, size=(B, K))  # -1: no label
  mask = rng.random((B, K)) < 0.7
  mask[1] = False
  return labels, np.sort(rng.random((B, K)))[:, ::-1].astype("f4"), mask


def voters(labels, mask, row):
  return [j for j in range(K) if mask[row, j] and labels[row, j] >= 0]


def test_plurality_by_hand():
  scores = voting.plurality_vote(jnp.array([[2, 0, 0, 1]]), C)
  np.testing.assert_allclose(scores, [[2 + 1 / 3, 1 + 1 / 5, 1 + 1 / 2]])


def test_plurality_tie_goes_to_the_class_that_comes_first():
  labels = jnp.array([[1, 0, 0, 1], [0, 1, 1, 0]])
  best = jnp.argmax(voting.plurality_vote(labels, C), axis=-1)
  np.testing.assert_array_equal(best, [1, 0])


def test_plurality_bonus_never_outweighs_a_vote():
  labels = jnp.array([[1, 0, 0]])
  assert jnp.argmax(voting.plurality_vote(labels, C)) == 0


def test_plurality_counts_votes():
  labels, _, mask = make_inputs()
  scores = np.asarray(voting.plurality_vote(labels, C, mask))
  for i in range(B):
    votes = [labels[i, j] for j in voters(labels, mask, i)]
    np.testing.assert_array_equal(
      np.floor(scores[i]), [votes.count(c) for c in range(C)]
    )


def test_rank_vote_equals_a_loop():
  labels, _, mask = make_inputs()
  scores = voting.rank_vote(labels, C, mask)
  expected = np.zeros((B, C))
  for i in range(B):
    for rank, j in enumerate(voters(labels, mask, i)):
      expected[i, labels[i, j]] += 1 / (1 + rank)
  np.testing.assert_allclose(scores, expected, rtol=1e-6)


def test_similarity_vote_equals_a_loop_and_sums_to_one():
  labels, similarities, mask = make_inputs()
  similarities = np.where(mask, similarities, -np.inf)  # as empty slots are
  scores = voting.similarity_vote(
    labels, similarities, C, mask, temperature=0.1
  )
  expected = np.zeros((B, C))
  for i in range(B):
    used = voters(labels, mask, i)
    weights = np.exp(similarities[i, used].astype(np.float64) / 0.1)
    for w, j in zip(weights, used, strict=True):
      expected[i, labels[i, j]] += w / weights.sum()
  np.testing.assert_allclose(scores, expected, rtol=1e-5)
  total = np.delete(np.asarray(scores.sum(-1)), 1)
  np.testing.assert_allclose(total, 1.0, rtol=1e-6)


@pytest.mark.parametrize(
  "vote",
  [
    lambda labels, s, mask: voting.plurality_vote(labels, C, mask),
    lambda labels, s, mask: voting.rank_vote(labels, C, mask),
    lambda labels, s, mask: voting.similarity_vote(labels, s, C, mask),
  ],
  ids=["plurality", "rank", "similarity"],
)
def test_every_vote_shares_these(vote):
  labels, similarities, mask = make_inputs()
  scores = vote(labels, similarities, mask)
  assert scores.shape == (B, C)
  assert scores.dtype == jnp.float32
  np.testing.assert_array_equal(scores[1], np.zeros(C))  # nobody votes
  np.testing.assert_allclose(
    jax.jit(vote)(labels, similarities, mask), scores, rtol=1e-6
  )
  with pytest.raises(ValueError, match=r"`labels` has shape \(5,\)"):
    vote(labels[:, 0], similarities, mask)
  with pytest.raises(ValueError, match=r"`mask` has shape \(5, 6\)"):
    vote(labels, similarities, mask[:, 1:])


def test_zero_shot_is_the_cosine():
  rng = np.random.default_rng(0)
  query, prompts = rng.normal(size=(B, 11)), rng.normal(size=(C, 11))
  expected = query @ prompts.T
  expected /= np.linalg.norm(query, axis=-1)[:, None]
  expected /= np.linalg.norm(prompts, axis=-1)
  got = voting.zero_shot(query.astype("f4"), prompts.astype("f4"))
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
  with pytest.raises(ValueError, match=r"`prompts` has shape \(3, 10\); expec"):
    voting.zero_shot(query, prompts[:, 1:])
