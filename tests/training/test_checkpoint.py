"""Checkpoints come back as they were, or say that they cannot."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retrieval_aug.common.errors import UserError
from retrieval_aug.training.checkpoint import (
  Checkpoints,
  load_params,
  save_params,
)
from retrieval_aug.training.step import State

# A restore that fails leaves Orbax's own coroutines behind, never awaited.
pytestmark = [
  pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning"),
  pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(autouse=True)
def collected():
  """They are collected here, and not in a test that does not expect them."""
  yield
  for _ in range(3):  # closing one coroutine frees the next
    gc.collect()


def _state(scale=1.0, width=7):
  params = {"head": {"kernel": scale * jnp.arange(3.0 * width).reshape(3, -1)}}
  moments = jax.tree.map(lambda x: x + 0.5, params)
  key = jnp.arange(2, dtype=jnp.uint32)
  return State(params, (moments, jnp.int32(2)), jnp.int32(5), params, key)


def _saved(folder, steps=(5,)):
  with Checkpoints(folder) as checkpoints:
    for step in steps:
      checkpoints.save(step, _state(step))


def _restore(folder, like=None):
  with Checkpoints(folder) as checkpoints:
    return checkpoints.restore(_state(0.0) if like is None else like)


def test_without_a_checkpoint_the_given_state_is_step_zero(tmp_path):
  like = _state(3.0)
  step, state = _restore(tmp_path / "checkpoints", like)
  assert step == 0 and state is like


def test_a_state_comes_back_whole(tmp_path):
  _saved(tmp_path / "checkpoints")
  step, state = _restore(tmp_path / "checkpoints")
  assert step == 5
  jax.tree.map(np.testing.assert_array_equal, state, _state(5.0))
  assert jax.tree.structure(state) == jax.tree.structure(_state())


def test_the_latest_is_restored_and_older_ones_are_gone(tmp_path):
  folder = tmp_path / "checkpoints"
  _saved(folder, steps=(5, 10, 14))
  step, state = _restore(folder)
  assert step == 14
  assert float(state.params["head"]["kernel"][2, 6]) == 14 * 20
  assert [p.name for p in folder.glob("[0-9]*")] == ["14"]


def _files(folder):
  found = [p for p in (folder / "5").rglob("*") if p.is_file()]
  return sorted(found, key=lambda p: -p.stat().st_size)


def _refusal(folder, like=None):
  with pytest.raises(UserError) as caught:
    _restore(folder, like)
  gc.collect()  # those coroutines, while their warnings are ignored
  message = str(caught.value)
  assert "\n" not in message
  assert f"{folder / '5'}: this checkpoint cannot be restored" in message
  assert f"delete {folder.parent} to train this run again" in message
  return message


@pytest.mark.parametrize("pattern", ["*", "*/d/*"])
def test_an_emptied_checkpoint_is_a_user_error_that_names_it(tmp_path, pattern):
  """Every file cut to nothing, or only those with the arrays."""
  folder = tmp_path / "checkpoints"
  _saved(folder)
  chosen = [p for p in _files(folder) if p.match(pattern)]
  assert chosen
  for path in chosen:
    path.write_bytes(b"")
  _refusal(folder)


def test_a_flipped_bit_in_the_arrays_is_a_user_error(tmp_path, flip_bit):
  folder = tmp_path / "checkpoints"
  _saved(folder)
  for path in [p for p in _files(folder) if p.match("*/d/*")]:
    flip_bit(path, path.stat().st_size // 2)
  _refusal(folder)


def test_a_checkpoint_of_another_shape_is_a_user_error(tmp_path):
  folder = tmp_path / "checkpoints"
  _saved(folder)
  _refusal(folder, _state(width=11))


def test_parameters_come_back_under_their_names(tmp_path):
  params = {"fusion": {"layer_0": {"bias": np.arange(3.0)}}, "b": np.ones(2)}
  save_params(tmp_path / "params.npz", params)
  with np.load(tmp_path / "params.npz") as data:
    assert set(data.files) == {"fusion/layer_0/bias", "b"}
  jax.tree.map(
    np.testing.assert_array_equal, load_params(tmp_path / "params.npz"), params
  )
