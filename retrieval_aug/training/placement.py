"""Where the working set lives, and how a step gets rows of it from there.

replicated   every device has a copy: no row is ever sent.
sharded      each of n devices has 1/n of the rows, and asks the others for
             those that its examples name (`exchange.py`).
host         none is on a device: rows are read from the (memory-mapped)
             arrays while earlier steps run, and sent with the batch.
"""

import concurrent.futures
import dataclasses
import gc
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from retrieval_aug.common import free_memory
from retrieval_aug.common.errors import UserError
from retrieval_aug.training import exchange, sharding

KINDS = ("auto", "replicated", "sharded", "host")

DTYPES = ("float16", "bfloat16", "float32")

# Of a device's free memory; activations and the state want the rest.
_SHARE = 0.5

# Rows that are read at a time from the host's memory.
_CHUNK = 1024


class Memory(NamedTuple):
  """The working set, or rows of it. What no model asks for may be None.

  Attributes:
    keys: [U, d].
    values: [U, d_v], or a tuple of such, one an encoder.
    sources: int32 [U], number of the collection that each comes from.
    labels: int32 [U], class of each, -1 for none.
  """

  keys: Array | None = None
  values: Array | tuple[Array, ...] | None = None
  sources: Array | None = None
  labels: Array | None = None


def gather(memory: Memory, rows: Array) -> Memory:
  """Rows of a working set that each device holds as a whole.

  Args:
    memory: the working set.
    rows: int [B, k]; of -1, which the model masks, row 0 is taken, which is
      finite.

  Returns:
    Every array of the memory gathered: keys [B, k, d], values [B, k, d_v],
    sources and labels [B, k].
  """
  rows = jnp.maximum(rows, 0)
  return jax.tree.map(lambda x: x[rows], memory)


@dataclasses.dataclass(frozen=True)
class Placed:
  """A working set in its place.

  Attributes:
    kind: "replicated", "sharded" or "host".
    why: one line for the user.
    memory: what jitted steps take; all None if it stays on the host.
  """

  kind: str
  why: str
  memory: Memory
  _mesh: Mesh
  _host: Memory
  _dtype: np.dtype
  _threads: concurrent.futures.ThreadPoolExecutor | None

  def gather(self, memory: Memory, rows: Array) -> Memory:
    """Rows of a memory on devices; for use inside jit.

    No gradient flows into it.

    Args:
      memory: `self.memory`.
      rows: int32 [B, k], split over "data"; where negative, row 0 is taken.

    Returns:
      Arrays [B, k, ...], split over "data", with floats as they are held.
    """
    memory = lax.stop_gradient(memory)
    if self.kind == "sharded":
      return exchange.gather(memory, jnp.maximum(rows, 0), self._mesh)
    return gather(memory, rows)

  def join(self, batch: dict[str, Any]) -> dict[str, Any]:
    """Adds what the host has to add to a batch.

    Args:
      batch: rows int [..., k], and others that are left alone.

    Returns:
      The batch; for "host" with `neighbors`, a `Memory` of NumPy arrays
      [..., k, ...] with floats in the dtype that was asked for.
    """
    if self.kind != "host":
      return batch
    rows = np.maximum(batch["rows"], 0)
    take = lambda x: _take(x, rows, _held_as(x, self._dtype), self._threads)
    return batch | {"neighbors": jax.tree.map(take, self._host)}


def _held_as(x: Any, dtype: np.dtype) -> np.dtype:
  """Numbers of classes and of sources stay as they are."""
  return dtype if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype


def _take(
  x: np.ndarray,
  rows: np.ndarray,
  dtype: np.dtype,
  threads: concurrent.futures.ThreadPoolExecutor,
) -> np.ndarray:
  """x[rows] in another dtype, read in parts by threads."""
  rows_flat = rows.reshape(-1)
  if rows.size and rows_flat.max() >= len(x):
    raise IndexError(f"row {rows_flat.max()} of {len(x)}")
  out = np.empty((rows.size, *x.shape[1:]), dtype)

  def part(first):
    chosen = slice(first, first + _CHUNK)
    if x.dtype == dtype:  # without a copy; the rows were looked at above
      np.take(x, rows_flat[chosen], 0, out[chosen], mode="clip")
    else:
      out[chosen] = x[rows_flat[chosen]]

  for _ in threads.map(part, range(0, rows.size, _CHUNK)):
    pass  # what a part raises is raised here
  return out.reshape(*rows.shape, *x.shape[1:])


def place(
  memory: Memory,
  on: Mesh,
  *,
  kind: str = "auto",
  dtype: str = "float16",
  needed: tuple[str, ...] = Memory._fields,
  threads: int = 2,
) -> Placed:
  """Puts a working set where it fits.

  All processes must call it, with the same arrays; each reads those rows that
  its devices hold.

  Args:
    memory: NumPy arrays or memory maps.
    on: the mesh.
    kind: where to; "auto" takes the first of "replicated", "sharded" and
      "host" that leaves half of a device's free memory to the rest.
    dtype: that floats are held in.
    needed: fields of the memory that the model asks for.
    threads: that read rows of "host".

  Raises:
    UserError: no such kind or dtype; a number is too large for the dtype; the
      devices have no room for the kind.
  """
  for name, given, known in (
    ("placement", kind, KINDS),
    ("dtype", dtype, DTYPES),
  ):
    if given not in known:
      raise UserError(
        f"config.memory.{name}={given}: must be one of {', '.join(known)}."
      )
  dtype = jnp.dtype(dtype)
  fields = memory._asdict().items()
  memory = Memory(**{n: x if n in needed else None for n, x in fields})
  for x in jax.tree.leaves(memory):
    _check_range(x, dtype)
  kind, why = _choose(kind, memory, dtype, on)
  pool = None
  if kind == "host":
    pool = concurrent.futures.ThreadPoolExecutor(threads, "neighbors")
    placed = Memory()
  elif kind == "sharded":
    put = lambda x: exchange.split(x, _held_as(x, dtype), on)
    placed = jax.tree.map(put, memory)
  else:
    put = lambda x: _copy_everywhere(x, _held_as(x, dtype), on)
    placed = jax.tree.map(put, memory)
  return Placed(kind, why, placed, on, memory, dtype, pool)


def _check_range(x: np.ndarray, dtype: np.dtype) -> None:
  """Raises a `UserError` if the dtype makes a finite number infinite."""
  if not jnp.issubdtype(x.dtype, jnp.floating):
    return
  most = float(jnp.finfo(dtype).max)
  if float(jnp.finfo(x.dtype).max) <= most:
    return
  for first in range(0, len(x), _CHUNK):
    largest = np.abs(x[first : first + _CHUNK]).max()
    if largest > most:
      raise UserError(
        f"config.memory.dtype={dtype}: the working set has a number as large "
        f"as {largest:.3g}, more than the {most:.3g} that it can hold; take "
        "bfloat16 or float32."
      )


def _choose(
  kind: str, memory: Memory, dtype: np.dtype, on: Mesh
) -> tuple[str, str]:
  """Where to, and why."""
  size = sum(
    x.size * _held_as(x, dtype).itemsize for x in jax.tree.leaves(memory)
  )
  part = math.ceil(size / on.size)
  free = free_bytes()
  on_device = {"replicated": size, "sharded": part, "host": 0}
  given = kind
  if kind == "auto":
    kind = next(n for n, x in on_device.items() if x <= _SHARE * free)
  in_mb = lambda x: f"{x / 1e6:,.1f} MB"
  if on_device[kind] > free:
    raise UserError(
      f"config.memory.placement={given}: needs {in_mb(on_device[kind])} on "
      f"each device, and one has {in_mb(free)} free; take auto."
    )
  where = {
    "replicated": f"{in_mb(size)} on each device",
    "sharded": f"{in_mb(part)} on each of {on.size} devices",
    "host": f"{in_mb(size)} on the host, read as steps need them",
  }
  return kind, (
    f"working set {kind}: {where[kind]}; {in_mb(free)} free on a device"
  )


def free_bytes() -> int:
  """Free memory of a device: the least among all of all processes."""
  # What the trainer of another model held, and nobody does any more.
  gc.collect()
  devices = jax.local_devices()
  stats = [d.memory_stats() for d in devices]
  if all(stats):
    free = min(s["bytes_limit"] - s.get("bytes_in_use", 0) for s in stats)
  else:
    # CPU devices share the machine's.
    free = free_memory.of_machine() / len(devices)
  # In MB, for the integers of jax have 32 bits.
  of_processes = multihost_utils.process_allgather(np.int32(max(free, 0) / 1e6))
  return int(of_processes.min()) * 10**6


def _copy_everywhere(x: np.ndarray, dtype: np.dtype, on: Mesh) -> Array:
  return jax.make_array_from_callback(
    x.shape, sharding.everywhere(on), lambda _: np.asarray(x, dtype)
  )
