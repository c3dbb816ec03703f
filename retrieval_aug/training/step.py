"""The jitted train and predict steps: gather, fuse, classify."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import Array

from retrieval_aug.training import loss as losses


class State(NamedTuple):
  """Everything that training changes."""

  params: Any
  opt_state: Any
  step: Array  # int32 []


class Memory(NamedTuple):
  """The working set on the device.

  Attributes:
    keys: [U, d].
    values: [U, d_v].
  """

  keys: Array
  values: Array


def gather(memory: Memory, rows: Array) -> tuple[Array, Array, Array]:
  """Keys [B, k, d], values [B, k, d_v] and mask [B, k] of rows [B, k].

  Rows of -1 are masked; what stands in their place is row 0, which is finite.
  """
  mask = rows >= 0
  safe = jnp.where(mask, rows, 0)
  return memory.keys[safe], memory.values[safe], mask


def _apply(model: nn.Module, params, memory: Memory, batch, **kwargs):
  neighbors = gather(memory, batch["rows"])
  return model.apply({"params": params}, batch["query"], *neighbors, **kwargs)


def init(
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  memory: Memory,
  batch: dict[str, Array],
  seed: int,
) -> State:
  """A fresh state; parameters are a function of the seed alone."""

  @jax.jit
  def make(key, memory, batch):
    neighbors = gather(memory, batch["rows"])
    variables = model.init(key, batch["query"], *neighbors)
    params = variables["params"]
    return State(params, optimizer.init(params), jnp.zeros([], jnp.int32))

  return make(jax.random.key(seed), memory, batch)


def make_train_step(
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  *,
  tau: float,
  label_smoothing: float,
) -> Callable[..., tuple[State, Array]]:
  """A jitted `(state, memory, batch, key, log_prior) -> (state, loss)`.

  `batch` holds query [B, d], rows [B, k] and label [B]; `key` is the run's,
  folded with the step, so that dropout is a function of (seed, step) too;
  `log_prior` [C] and `tau` are those of the LACE loss. The state is donated.
  """

  @functools.partial(jax.jit, donate_argnums=0)
  def train_step(state, memory, batch, key, log_prior):
    rng = jax.random.fold_in(key, state.step)

    def loss_of(params):
      logits = _apply(
        model, params, memory, batch, train=True, rngs={"dropout": rng}
      )
      return losses.lace(
        logits,
        batch["label"],
        log_prior,
        tau=tau,
        label_smoothing=label_smoothing,
      ).mean()

    loss, gradients = jax.value_and_grad(loss_of)(state.params)
    updates, opt_state = optimizer.update(
      gradients, state.opt_state, state.params
    )
    params = optax.apply_updates(state.params, updates)
    return State(params, opt_state, state.step + 1), loss

  return train_step


def make_predict_step(model: nn.Module) -> Callable[..., tuple[Array, Array]]:
  """A jitted `(params, memory, batch)` to logits and attention weights."""

  @jax.jit
  def predict(params, memory, batch):
    return _apply(model, params, memory, batch, return_attention=True)

  return predict
