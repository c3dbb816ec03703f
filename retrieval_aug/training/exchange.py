"""Rows of arrays that are split over all devices, sent to who asks for them.

`x[rows]` on a split array makes XLA sum over all devices an array of the size
of the result, most of it zeros. Here each device asks each other for the rows
that it wants and gets those alone, once each.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from retrieval_aug.training import sharding

# Rows are split over all devices, whatever the mesh's shape.
_ROWS = PartitionSpec(sharding.AXES)

_INT32 = 4  # bytes


def split(x: np.ndarray, dtype: np.dtype, on: Mesh) -> Array:
  """Splits rows over all devices; each process reads those of its own.

  Row r goes to device r % n, as its row r // n: neighbours that stand side by
  side in a working set, such as those of one class, are so on different
  devices, and none is asked for more than the others.

  Args:
    x: [U, ...], such as a memory map.
    dtype: that rows are converted to.
    on: the mesh, of n devices.

  Returns:
    [n * ceil(U / n), ...], as `gather` takes it.
  """
  each = -(-len(x) // on.size)

  def part(index):
    device = (index[0].start or 0) // each
    out = np.zeros((each, *x.shape[1:]), dtype)
    own = x[device :: on.size]
    out[: len(own)] = own
    return out

  return jax.make_array_from_callback(
    (each * on.size, *x.shape[1:]), NamedSharding(on, _ROWS), part
  )


def _requests(rows: int, on: Mesh) -> int:
  """Rows that a device asks for, of those of the whole batch."""
  return -(-rows // on.size)


def _capacity(requests: int, on: Mesh) -> int:
  """Rows that a device can ask of another in one round.

  Of rows at random, as many as the mean and four standard deviations more: a
  second round is rare, and little of the first is empty.
  """
  mean = requests / on.size
  return min(requests, math.ceil(mean + 4 * math.sqrt(mean)))


def traffic(tree: Any, on: Mesh, rows: int) -> int:
  """Bytes that a device sends to others for a gather of one round.

  Args:
    tree: arrays from `split`, or their shapes and types.
    on: the mesh.
    rows: B * k of the whole batch.
  """
  row = sum(
    x.dtype.itemsize * math.prod(x.shape[1:]) for x in jax.tree.leaves(tree)
  )
  requests = _requests(rows, on)
  asked = (on.size - 1) * _capacity(requests, on) * (_INT32 + row)
  # Each of the devices along "model" asks for a part of the same rows.
  shared = (on.shape["model"] - 1) * requests * row
  return asked + shared


def gather(tree: Any, rows: Array, on: Mesh) -> Any:
  """Rows of arrays that are split; for use inside jit.

  All messages have one size, which few steps outgrow. Then all devices go on
  for as many rounds as the one that needs most, so that the result is right
  whatever rows are asked for.

  Args:
    tree: arrays from `split`, of one number of rows.
    rows: int32 [B, k] in 0..U-1, split over "data".
    on: the mesh.

  Returns:
    The same tree of arrays [B, k, ...], split over "data".
  """
  if not jax.tree.leaves(tree):
    return tree  # of a model that asks for no neighbours
  return jax.shard_map(
    functools.partial(_on_one_device, on=on),
    mesh=on,
    in_specs=(_ROWS, PartitionSpec("data")),
    out_specs=PartitionSpec("data"),
    check_vma=False,  # equal along "model", which it cannot see
  )(tree, rows)


def _on_one_device(tree: Any, rows: Array, on: Mesh) -> Any:
  """What one device does: its arrays [each, ...], and rows [b, k] for it."""
  arrays, structure = jax.tree.flatten(tree)
  model = on.shape["model"]
  requests = _requests(rows.size * on.shape["data"], on)
  capacity = _capacity(requests, on)
  # Devices along "model" have the same examples: each asks for a part.
  pad = (0, requests * model - rows.size)
  asked = jnp.pad(rows.reshape(-1), pad, mode="edge").reshape(model, requests)
  asked = asked[lax.axis_index("model")]
  owner, local = asked % on.size, asked // on.size
  rank, most = _rank(owner, local, on.size, len(arrays[0]))
  rounds = lax.pmax(-(-most // capacity), sharding.AXES)

  def swap(x):
    return lax.all_to_all(x, sharding.AXES, 0, 0, tiled=True)

  def one_round(number, found):
    slot = rank - number * capacity
    now = (slot >= 0) & (slot < capacity)
    wanted = jnp.zeros((on.size, capacity), jnp.int32)
    wanted = wanted.at[owner, jnp.where(now, slot, capacity)].set(
      local, mode="drop"
    )
    wanted = swap(wanted)

    def receive(x, before):
      got = swap(x[wanted])[owner, jnp.clip(slot, 0, capacity - 1)]
      return jnp.where(now.reshape(-1, *[1] * (x.ndim - 1)), got, before)

    return [receive(x, before) for x, before in zip(arrays, found)]

  found = [jnp.zeros((requests, *x.shape[1:]), x.dtype) for x in arrays]
  found = lax.fori_loop(0, rounds, one_round, found)
  if model > 1:
    found = [lax.all_gather(x, "model", tiled=True) for x in found]
  found = [x[: rows.size].reshape(*rows.shape, *x.shape[1:]) for x in found]
  return jax.tree.unflatten(structure, found)


def _rank(
  owner: Array, local: Array, devices: int, each: int
) -> tuple[Array, Array]:
  """Numbers the distinct rows that are asked of each owner.

  Args:
    owner: int32 [q].
    local: int32 [q], which of the owner's rows.
    devices: number of owners.
    each: rows of an owner.

  Returns:
    Numbers int32 [q], from 0 for each owner, the same for the same row; and
    how many there are of the owner who has most.
  """
  place = owner * each + local
  order = jnp.argsort(place)
  place = place[order]
  is_new = jnp.ones_like(place).at[1:].set(place[1:] != place[:-1])
  owner = place // each
  counts = jax.ops.segment_sum(is_new, owner, devices)
  first = jnp.cumsum(counts) - counts
  rank = jnp.cumsum(is_new) - 1 - first[owner]
  return jnp.zeros_like(rank).at[order].set(rank), counts.max()
