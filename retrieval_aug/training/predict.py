"""Predictions of a trained model, in order, on all devices."""

import contextlib
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from retrieval_aug.common import distributed, progress
from retrieval_aug.training import (
  input_pipeline,
  placement,
  sharding,
)
from retrieval_aug.training import loss as losses
from retrieval_aug.training import step as steps
from retrieval_aug.training.settings import Layout


class Predictor:
  """A model's predict step, compiled once for all that it is asked."""

  def __init__(
    self,
    model: nn.Module,
    memory: placement.Placed,
    mesh: jax.sharding.Mesh,
    rules: sharding.Rules,
    query: steps.Query | None = None,
  ):
    """Nothing is compiled yet.

    Args:
      model: called with (query, keys, values, mask).
      memory: the working set.
      mesh: of all devices.
      rules: how parameters are split over them.
      query: see `step.make_loss`.
    """
    self._memory, self._mesh, self._rules = memory, mesh, rules
    step = steps.make_predict_step(model, query, memory.gather)
    # Every process gets all, so that each counts every example once.
    self._step = jax.jit(step, out_shardings=sharding.everywhere(mesh))

  def __call__(
    self,
    params: Any,
    arrays: dict[str, Any],
    batch_size: int,
    what: str | None = None,
  ) -> tuple[np.ndarray, np.ndarray]:
    """Predicts examples in order.

    Args:
      params: of the model, and of the encoder that `query` takes.
      arrays: rows int32 [N, k], and query [N, d] or the prepared images.
      batch_size: examples a step, of all processes.
      what: label of a progress bar; None for none.

    Returns:
      Logits float32 [N, C] and attention weights float32 [N, L, k].
    """
    mesh = self._mesh
    sharding.check_batch_size("evaluate.batch_size", batch_size, mesh)
    at = sharding.shardings(params, self._rules, mesh)
    params = jax.tree.map(jax.device_put, params, at)
    logits, weights = [], []
    bar = contextlib.nullcontext()
    if what is not None and distributed.is_first():
      bar = progress.bar(total=len(arrays["rows"]), what=what, unit="example")
    local = sharding.local_positions(mesh, batch_size)

    def put(counted):
      count, batch = counted
      batch = self._memory.join(batch)
      return count, sharding.put_batch(batch, mesh, batch_size)

    seen = {n: x for n, x in arrays.items() if n != "label"}
    batches = input_pipeline.eval_batches(seen, batch_size, local)
    with bar as shown:
      for count, batch in input_pipeline.ahead(batches, put):
        out = self._step(params, self._memory.memory, batch)
        logits.append(np.asarray(out[0])[:count])
        weights.append(np.asarray(out[1])[:count])
        if shown is not None:
          shown.update(count)
    return np.concatenate(logits), np.concatenate(weights)


def corrected(
  logits: np.ndarray, class_counts: np.ndarray, tau: float
) -> np.ndarray:
  """Logits after the post-hoc correction of `train.post_hoc_tau`.

  Args:
    logits: [N, C].
    class_counts: training examples a class, [C].
    tau: strength; 0 leaves them.
  """
  if not tau:
    return logits
  return np.asarray(
    losses.post_hoc(logits, losses.log_prior(class_counts), tau)
  )


def predictor(
  model: nn.Module,
  memory: steps.Memory,
  arrays: dict[str, np.ndarray],
  layout: Layout = Layout(),
  query: steps.Query | None = None,
) -> Predictor:
  """Puts a working set where the model can look at it.

  Args:
    model: called with (query, keys, values, mask).
    memory: the working set, on the host.
    arrays: query [N, d] and rows [N, k], for their widths.
    layout: where arrays lie.
    query: see `step.make_loss`.
  """
  mesh = sharding.mesh(layout.model)
  placed = place(model, memory, arrays, mesh, layout)
  rules = sharding.parse_rules(layout.sharding)
  return Predictor(model, placed, mesh, rules, query)


def place(
  model: nn.Module,
  memory: steps.Memory,
  arrays: dict[str, np.ndarray],
  mesh: jax.sharding.Mesh,
  layout: Layout,
) -> placement.Placed:
  """The arrays of a working set that a model looks at, where they belong."""
  dims, k = arrays["query"].shape[1], arrays["rows"].shape[1]
  return placement.place(
    memory,
    mesh,
    kind=layout.placement,
    dtype=layout.dtype,
    needed=steps.needed(model, memory, dims, k),
  )


def predict(
  model: nn.Module,
  params: Any,
  memory: steps.Memory,
  arrays: dict[str, np.ndarray],
  batch_size: int,
) -> tuple[np.ndarray, np.ndarray]:
  """As `Predictor`, for a model that is asked once."""
  return predictor(model, memory, arrays)(params, arrays, batch_size)
