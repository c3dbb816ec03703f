"""A model's state and steps for `jit`, laid out over a mesh."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from retrieval_aug.training import loss as losses
from retrieval_aug.training import optimizer, sharding
from retrieval_aug.training import step as steps
from retrieval_aug.training.placement import Memory, Placed
from retrieval_aug.training.settings import TrainSettings


class Compiled:
  """Makes states and steps; each kind is compiled once.

  Attributes:
    step: `(state, memory, chunk, place, number) -> (state, metrics)`: a
      chunk has batches, [C, B, ...], of which the one at a place is taken; the
      state is donated.
    steps_together: the same of several seeds, in an axis in front (of a chunk,
      in its second), on one device.
    schedule: from the steps done to the learning rate.
  """

  def __init__(
    self,
    model: nn.Module,
    settings: TrainSettings,
    loss: losses.Loss,
    memory: Memory,
    widths: tuple[int, int],
    placed: Placed,
    mesh: Mesh,
    rules: sharding.Rules,
    steps_in_all: tuple[int, int],
    query: steps.Query | None = None,
    encoder_params: Any = None,
  ):
    """Nothing is compiled yet.

    Args:
      model: called with (query, keys, values, mask).
      settings: how to train.
      loss: from `settings.make_loss`.
      memory: the working set, for its shapes.
      widths: d of a query, and k.
      placed: the working set.
      mesh: of all devices.
      rules: how parameters are split over them.
      steps_in_all: of the training, and of its warm-up.
      query: from `finetune.query`, to train the encoder too.
      encoder_params: where those of the encoder start.
    """
    self._model, self._settings, self._mesh = model, settings, mesh
    self._memory, self._widths = memory, widths
    self._rules, self._encoder_params = rules, encoder_params
    rate = {
      "learning_rate": settings.learning_rate,
      "total_steps": steps_in_all[0],
      "warmup_steps": steps_in_all[1],
    }
    self.schedule = optimizer.schedule(**rate)
    self._optimizer = optimizer.make(
      **rate,
      weight_decay=settings.weight_decay,
      gradient_clip=settings.gradient_clip,
      lr_factors=settings.lr_factors,
    )
    self.loss = functools.partial(
      steps.make_loss, model, loss, mixup=settings.mixup, query=query
    )
    self._take = placed.gather
    step = self._make_step()
    self.step = jax.jit(
      _picking(step),
      donate_argnums=0,
      out_shardings=(self.shardings, sharding.everywhere(mesh)),
    )
    self.steps_together = jax.jit(
      _picking(jax.vmap(step, in_axes=(0, None, 0, None))),
      donate_argnums=0,
      out_shardings=sharding.everywhere(mesh),
    )

  def _make_step(self):
    settings = self._settings
    return steps.make_train_step(
      self.loss(remat=settings.remat, constrain=self._constrain),
      self._optimizer,
      take=self._take,
      frozen=self.frozen,
      accumulate=settings.accumulate,
      ema=settings.ema,
    )

  def frozen(self, params: Any) -> Any:
    """Which parameters are not trained, as a tree of bools."""
    return optimizer.frozen(params, self._settings.lr_factors)

  def _constrain(self, tree: Any) -> Any:
    if self._mesh.size == 1:
      return tree
    return sharding.constrain(tree, self._mesh)

  def _fresh(self, seed: Any, encoder_params: Any) -> steps.State:
    return steps.init(
      self._model,
      self._optimizer,
      self._memory,
      *self._widths,
      seed,
      encoder_params=encoder_params,
      ema=self._settings.ema > 0,
    )

  @functools.cached_property
  def shapes(self) -> steps.State:
    """Shapes and types of the state."""
    return jax.eval_shape(self._fresh, np.uint32(0), self._encoder_params)

  @functools.cached_property
  def shardings(self) -> steps.State:
    """Where each array of the state lies."""
    return sharding.shardings(self.shapes, self._rules, self._mesh)

  def init(self, seed: int) -> steps.State:
    """The state before the first step, each array made where it lies."""
    return self._init(np.uint32(seed), self._encoder_params)

  @functools.cached_property
  def _init(self):
    return jax.jit(self._fresh, out_shardings=self.shardings)

  def init_together(self, seeds: Sequence[int]) -> steps.State:
    """The states of several seeds, stacked."""
    return self._init_together(np.asarray(seeds, np.uint32))

  @functools.cached_property
  def _init_together(self):
    return jax.jit(
      jax.vmap(lambda seed: self._fresh(seed, None)),
      out_shardings=sharding.everywhere(self._mesh),
    )

  def begin_with(self, state: steps.State, params: Any) -> steps.State:
    """A fresh state with other parameters.

    What the optimizer holds is zero at first, whatever the parameters are.
    """
    put = lambda at: jax.tree.map(jax.device_put, params, at)
    ema = None if state.ema is None else put(self.shardings.ema)
    return state._replace(params=put(self.shardings.params), ema=ema)

  def traced(
    self, memory: Memory, chunk: dict[str, Any], together: int = 1
  ) -> jax.stages.Traced:
    """The step, which tells what it does and, compiled, what it needs.

    Args:
      memory: of the working set's place.
      chunk: any, on the devices.
      together: seeds that train together.
    """
    on = lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at)
    state = jax.tree.map(on, self.shapes, self.shardings)
    step = self.step
    if together > 1:
      at = sharding.everywhere(self._mesh)
      like = lambda x, *shape: jax.ShapeDtypeStruct(shape, x.dtype, sharding=at)
      stacked = lambda x: like(x, together, *x.shape)
      state = jax.tree.map(stacked, state)
      stacked = lambda x: like(x, x.shape[0], together, *x.shape[1:])
      chunk = jax.tree.map(stacked, chunk)
      step = self.steps_together
    return step.trace(state, memory, chunk, np.int32(0), np.int32(0))


def _picking(step):
  """A step that takes its batch from a chunk."""

  def train_step(state, memory, chunk, place, number):
    batch = jax.tree.map(lambda x: x[place], chunk)
    return step(state, memory, batch, number)

  return train_step


def of_seed(tree: Any, number: int) -> Any:
  """One seed's part of what several have together."""
  return jax.tree.map(lambda x: x[number], tree)
