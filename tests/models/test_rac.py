"""RAC's model: summed logits of an image and a text branch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retrieval_aug.models import JoinedText, build
from tests.models import reference

B, D, DT, C = 3, 5, 11, 13


def make_inputs(seed=0):
  rng = np.random.default_rng(seed)
  return (
    rng.normal(size=(B, D)).astype(np.float32),
    None,
    rng.normal(size=(B, 1, DT)).astype(np.float32),
    np.array([[True], [False], [True]]),
  )


def test_logits_are_the_sum_of_both_branches():
  query, _, texts, mask = inputs = make_inputs()
  model = build("rac", C)
  params = model.init(jax.random.key(0), *inputs)["params"]
  params = jax.tree.map(lambda x: x + 0.1, params)
  logits = model.apply({"params": params}, *inputs)
  exact = reference.to_numpy(params)
  z = [reference.scale(x, "sqrt_d") for x in query.astype(np.float64)]
  t = [reference.scale(x, "sqrt_d") for x in texts[:, 0].astype(np.float64)]
  t = np.where(mask, np.stack(t), 0.0)  # no neighbor, no text
  expected = reference.linear(exact["branch"], np.stack(z))
  expected = expected + reference.linear(exact["head"], t)
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_parameters_are_two_linear_heads():
  params = build("rac", C).init(jax.random.key(0), *make_inputs())["params"]
  assert jax.tree.map(jnp.shape, params) == {
    "branch": {"kernel": (D, C), "bias": (C,)},
    "head": {"kernel": (DT, C), "bias": (C,)},
  }


def test_more_than_one_text_an_example_is_refused():
  query, _, texts, _ = make_inputs()
  with pytest.raises(
    ValueError, match=r"expected \[B, 1, d_t\]: RAC takes one"
  ):
    JoinedText().apply({}, query, None, np.repeat(texts, 2, axis=1))
