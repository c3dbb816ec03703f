"""An encoder on all devices of this machine, and how many images fit at once.

    runner = devices.Runner(encoder)
    size = devices.largest_batch([runner], [images], most=1024)
    embeddings = runner(images[:size], size)

Parameters are on every device, and a batch is split among them; nothing is
exchanged, so that more devices give the same numbers sooner.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from retrieval_aug.common import free_memory
from retrieval_aug.common.errors import UserError
from retrieval_aug.encoders.encoder import Encoder

_GB = 10**9
# Of the free memory, for what else a machine has to do.
_PART = 1 / 4
# Where measuring starts: below, a batch costs little more than no batch.
_FIRST = 8


class Runner:
  """An encoder's `apply`, compiled once for each size of batch.

  Attributes:
    name: of the encoder.
    devices: how many there are; a batch is filled up to a multiple of them.
  """

  def __init__(self, encoder: Encoder):
    """Copies the parameters to all local devices, where there are several."""
    devices = jax.local_devices()
    self.devices = len(devices)
    self.name = encoder.name
    self._compiled: dict[tuple[int, ...], Any] = {}
    self._rows: NamedSharding | None = None
    self._params = encoder.params
    apply = encoder.apply
    if len(devices) > 1:
      mesh = Mesh(np.array(devices), ("batch",))
      everywhere, split = PartitionSpec(), PartitionSpec("batch")
      self._rows = NamedSharding(mesh, split)
      self._params = jax.device_put(
        encoder.params, NamedSharding(mesh, everywhere)
      )
      apply = jax.shard_map(
        apply,
        mesh=mesh,
        in_specs=(everywhere, split),
        out_specs=split,
        # An encoder makes constants of its own, which are on every device.
        check_vma=False,
      )
    self._apply = jax.jit(apply)

  def __call__(self, batch: np.ndarray, size: int) -> np.ndarray:
    """Embeds a batch, filled up to `size` so that all compile to one program.

    Args:
      batch: `[B, ...]` as the encoder's `prepare` makes it, B at most `size`.
      size: rounded up to a multiple of the devices.

    Returns:
      float32 `[B, dim]`.
    """
    rows = len(batch)
    missing = self._whole(size) - rows
    filled = np.concatenate(
      [batch, np.zeros((missing, *batch.shape[1:]), batch.dtype)]
    )
    if self._rows is not None:
      filled = jax.device_put(filled, self._rows)
    # What was compiled to be measured is not compiled again.
    apply = self._compiled.get(filled.shape, self._apply)
    return np.asarray(apply(self._params, filled))[:rows]

  def memory(self, batch: np.ndarray, size: int) -> int:
    """Bytes that a device needs to embed `size` rows, as XLA plans it.

    Args:
      batch: `[1, ...]` as the encoder's `prepare` makes it.
      size: rows of the batch in all.

    Raises:
      UserError: this kind of device does not tell.
    """
    shape = (self._whole(size), *batch.shape[1:])
    rows = jax.ShapeDtypeStruct(shape, batch.dtype, sharding=self._rows)
    compiled = self._apply.lower(self._params, rows).compile()
    plan = compiled.memory_analysis()
    if plan is None:
      raise UserError(
        f"encoder {self.name}: this device does not tell how much memory a "
        "batch needs; give a batch size instead of 0."
      )
    self._compiled[shape] = compiled
    return (
      plan.temp_size_in_bytes
      + plan.argument_size_in_bytes
      + plan.output_size_in_bytes
    )

  def forget(self, size: int) -> None:
    """Frees what was compiled for other sizes of batch."""
    kept = self._whole(size)
    self._compiled = {k: v for k, v in self._compiled.items() if k[0] == kept}

  def _whole(self, size: int) -> int:
    return math.ceil(size / self.devices) * self.devices


def largest_batch(
  runners: Sequence[Runner],
  examples: Sequence[np.ndarray],
  *,
  most: int,
  memory_gb: float | None = None,
) -> int:
  """The largest batch, a power of two on each device, that fits all encoders.

  Nothing is run: programs are compiled, and XLA tells what they will need.

  Args:
    runners: of the encoders that see each batch, one after the other.
    examples: for each, `[1, ...]` as its `prepare` makes it.
    most: rows that are worth while.
    memory_gb: what a device may give to it, in 10^9 bytes; None or 0 is a
      quarter of what is free.

  Returns:
    Rows in all, at most `most` unless there are more devices.

  Raises:
    UserError: not even one row fits on each device.
  """
  budget = memory_gb * _GB if memory_gb else _PART * _free_memory()
  found = []
  for runner, example in zip(runners, examples):
    limit = _power_of_two(most // runner.devices)
    found.append(_largest(runner, example, limit, budget) * runner.devices)
  size = min(found)
  for runner in runners:
    runner.forget(size)
  return size


def _largest(
  runner: Runner, example: np.ndarray, limit: int, budget: float
) -> int:
  """The largest power of two up to `limit` whose rows fit on each device."""
  needs: dict[int, int] = {}

  def need(rows: int) -> int:
    if rows not in needs:
      needs[rows] = runner.memory(example, rows * runner.devices)
    return needs[rows]

  rows = min(_FIRST, limit)
  # What a program needs grows by the row but for a constant: two sizes tell
  # where to look, and few others are compiled.
  if 2 * rows <= limit and need(rows) <= budget:
    slope = max(need(2 * rows) - need(rows), 1) / rows
    fitting = rows + max(budget - need(rows), 0) / slope
    rows = min(_power_of_two(int(fitting)), limit)
  while need(rows) > budget:
    if rows == 1:
      raise UserError(
        f"encoder {runner.name}: one image needs {need(1) / _GB:.3g} GB of "
        f"memory, and {budget / _GB:.3g} GB may be used; give more memory_gb, "
        "or take a smaller encoder."
      )
    rows //= 2
  while 2 * rows <= limit and need(2 * rows) <= budget:
    rows *= 2
  return rows


def _power_of_two(most: int) -> int:
  """The largest power of two up to a number, and at least 1."""
  return 1 << max(most.bit_length() - 1, 0)


def _free_memory() -> float:
  """Bytes that are free on each device; CPU devices share the machine's."""
  devices = jax.local_devices()
  if stats := devices[0].memory_stats():
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
  return free_memory.of_machine() / len(devices)
