"""Stricter JAX than users have, and damage that tests do to files.

dtype promotion is strict and rank promotion an error: a silent float64, or a
[B] that is broadcast against a [B, C], fails here before it reaches a user.
Programs are compiled quickly rather than made fast, which is a quarter of the
time of all tests; in the processes that tests start (the main job, notebooks,
what is killed) they are compiled as users have them.
"""

import pathlib

import jax
import pytest


@pytest.fixture(autouse=True)
def strict_promotion():
  with (
    jax.numpy_dtype_promotion("strict"),
    jax.numpy_rank_promotion("raise"),
  ):
    yield


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


def _flip_bit(path: pathlib.Path, offset: int = -1) -> None:
  data = bytearray(path.read_bytes())
  data[offset] ^= 1
  path.write_bytes(bytes(data))


def _truncate(path: pathlib.Path, missing: int = 7) -> None:
  path.write_bytes(path.read_bytes()[:-missing])


@pytest.fixture
def flip_bit():
  """`flip_bit(path)` changes one bit of a file, by default in its last byte."""
  return _flip_bit


@pytest.fixture
def truncate():
  """`truncate(path)` cuts the end of a file off."""
  return _truncate
