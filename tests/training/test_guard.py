"""What stops a run, where what was drawn decides whether a step is finite."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from retrieval_aug.common.errors import UserError
from retrieval_aug.training import guard
from retrieval_aug.training import step as steps
from retrieval_aug.training.placement import Memory

B, DONE = 12, 3


def _loss(params, given, batch, rng, step):
  """Not finite where a draw is high: dropout that hits what it should not."""
  del given, step
  drawn = jax.random.uniform(rng, batch["label"].shape)
  losses = params["w"] * batch["label"]
  return jnp.where(drawn > 0.8, jnp.nan, losses), losses[:, None]


def _state(seed):
  params = {"w": jnp.ones([])}
  return steps.State(
    params,
    optax.sgd(0.1).init(params),
    jnp.asarray(DONE, jnp.int32),
    None,
    jax.random.key_data(jax.random.key(seed)),
  )


def _batch():
  return {
    "label": np.arange(B, dtype=np.float32),
    "rows": np.zeros((B, 2), np.int32),
    "neighbors": Memory(np.zeros((B, 2, 3), np.float32), None),
  }


def _bad(parts):
  """From a seed to numbers of the examples that a step makes not finite."""

  def ok(seed, number):
    # A loss that counts for nothing but in one example.
    def one(*args):
      losses, logits = _loss(*args)
      return jnp.where(args[2]["label"] == number, losses, 0.0), logits

    step = steps.make_train_step(one, optax.sgd(0.1), accumulate=parts)
    return step(_state(seed), Memory(None, None), _batch(), DONE)[1].ok

  of_each = jax.jit(jax.vmap(ok, (None, 0)))
  return lambda seed: np.flatnonzero(~of_each(seed, np.arange(B))).tolist()


@pytest.mark.parametrize("parts", [1, 3])
def test_what_is_looked_at_draws_what_the_step_drew(tmp_path, parts):
  bad = _bad(parts)
  seed = next(s for s in range(99) if len(bad(s)) == 1)
  with pytest.raises(guard.Diverged, match="first in the loss"):
    guard.stop(
      _loss,
      lambda params: jax.tree.map(lambda _: False, params),
      _state(seed),
      _batch(),
      step=DONE + 1,
      ids=[f"id/{i}" for i in range(B)],
      what="train",
      folder=tmp_path,
      accumulate=parts,
    )
  (path,) = tmp_path.iterdir()
  report = json.loads(path.read_text())
  assert report["examples"] == [f"id/{i}" for i in bad(seed)]
  assert len(report["batch"]) == B


@pytest.mark.parametrize("what", ["params", "batch"])
def test_what_was_given_so_has_not_diverged(what):
  state, batch = _state(0), _batch()
  if what == "params":
    state = state._replace(params={"w": jnp.inf * jnp.ones([])})
  else:
    batch["label"][3] = np.nan
  with pytest.raises(UserError) as caught:
    guard.stop(
      _loss,
      lambda params: jax.tree.map(lambda _: False, params),
      state,
      batch,
      step=DONE + 1,
      ids=range(B),
      what="train",
      folder=None,
    )
  assert not isinstance(caught.value, guard.Diverged)
