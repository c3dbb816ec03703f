"""optax raises floats to integer powers, so types may be promoted here."""

import jax
import pytest


@pytest.fixture(autouse=True)
def strict_promotion():
  with jax.numpy_rank_promotion("raise"):
    yield
