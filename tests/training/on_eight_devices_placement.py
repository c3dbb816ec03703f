"""Run by `test_sharding.py` in a process with 8 virtual devices."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from retrieval_aug.training import exchange, placement, sharding
from retrieval_aug.training.placement import Memory

U, B, K, D, DV, DW = 409, 16, 11, 7, 5, 3


@pytest.fixture(params=[1, 2, 8], ids=["8x1", "4x2", "1x8"])
def mesh(request):
  return sharding.mesh(request.param)


def _memory(u=U):
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float16)
  return Memory(
    normal(u, D),
    (normal(u, DV), normal(u, DW)),
    None,
    rng.integers(-1, 9, u).astype(np.int32),
  )


def _rows():
  """Neighbour lists [B, K] that ask for rows in all ways."""
  rng = np.random.default_rng(1)
  return {
    "random": rng.integers(0, U, (B, K)),
    "pads": rng.integers(-1, 2, (B, K)),
    "no neighbors": np.full((B, K), -1),
    "one row": np.full((B, K), U - 1),
    # 51 rows are on device 3: three rounds.
    "one device": 8 * rng.integers(0, U // 8, (B, K)) + 3,
    "one device asks one device": np.where(
      np.arange(B)[:, None] < 2, 8 * rng.permutation(U // 8)[:K] + 3, 0
    ),
    "each row once": rng.permutation(U)[: B * K].reshape(B, K),
  }


@pytest.mark.parametrize("kind", ["replicated", "sharded", "host"])
def test_gathers_what_numpy_does(mesh, kind):
  memory = _memory()
  placed = placement.place(memory, mesh, kind=kind)

  def joined(rows):
    batch = placed.join({"rows": rows.astype(np.int32)})
    return sharding.put_batch(batch, mesh, B)

  def gather(on_device, batch):
    if kind == "host":
      return batch["neighbors"]
    return placed.gather(on_device, batch["rows"])

  cases = _rows()
  # One program for all of them.
  program = jax.jit(gather).lower(placed.memory, joined(cases["random"]))
  program = program.compile()
  for name, rows in cases.items():
    found = program(placed.memory, joined(rows))
    for array, every in zip(jax.tree.leaves(found), jax.tree.leaves(memory)):
      expected = every[np.maximum(rows, 0)]
      np.testing.assert_array_equal(array, expected, err_msg=name)
      assert array.sharding.is_equivalent_to(
        sharding.by_example(mesh), array.ndim
      )
  expected = 0
  if kind == "sharded":
    expected = exchange.traffic(placed.memory, mesh, B * K)
  assert _sent(program) == expected


def test_fewer_rows_than_devices_and_requests_that_do_not_divide():
  mesh = sharding.mesh(2)
  memory = Memory(_memory(3).keys)
  placed = placement.place(memory, mesh, kind="sharded")
  # A part of 33 requests, for two devices.
  rows = np.arange(12 * K, dtype=np.int32).reshape(12, K) % 3
  found = jax.jit(placed.gather)(placed.memory, rows)
  np.testing.assert_array_equal(found.keys, memory.keys[rows])


def test_a_device_has_each_eighth_row_and_nothing_else(mesh):
  memory = _memory()
  keys = placement.place(memory, mesh, kind="sharded").memory.keys
  each = math.ceil(U / 8)
  assert keys.shape == (8 * each, D)
  by_device = {s.device: np.asarray(s.data) for s in keys.addressable_shards}
  for i, device in enumerate(mesh.devices.flat):
    own = memory.keys[i::8]
    np.testing.assert_array_equal(by_device[device][: len(own)], own)
    assert not by_device[device][len(own) :].any()


def _sent(compiled):
  """Bytes that a device sends in the collectives of a program, each once."""
  sizes = {"f16": 2, "f32": 4, "s32": 4, "u32": 4, "pred": 1}
  total = 0
  for line in compiled.as_text().splitlines():
    found = re.search(
      r"= (.+?) (all-to-all|all-gather|all-reduce|reduce-scatter)\(", line
    )
    if not found:
      continue
    results = 0
    for kind, shape in re.findall(r"(\w+)\[([\d,]*)\]", found[1]):
      if shape:  # numbers that are agreed on count as nothing
        results += sizes[kind] * math.prod(map(int, shape.split(",")))
    group = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    others = 1 - 1 / len(group[1].split(",")) if group else 1
    # A sum is sent twice: its parts to where they are added, and back.
    total += results * others * (2 if found[2] == "all-reduce" else 1)
  return total


def test_traffic_is_far_less_than_what_the_compiler_makes():
  mesh = sharding.mesh()
  split = NamedSharding(mesh, PartitionSpec(sharding.AXES))
  shape = lambda *args: jax.ShapeDtypeStruct(*args[:2], sharding=args[2])
  keys = shape((80_000, 64), jnp.float16, split)
  rows = shape((64, 16), jnp.int32, sharding.by_example(mesh))
  plain = jax.jit(
    lambda keys, rows: keys[rows], out_shardings=sharding.by_example(mesh)
  )
  sent = _sent(plain.lower(keys, rows).compile())
  assert sent > 8 * exchange.traffic(keys, mesh, rows.size)


def test_gradients_flow_around_the_memory():
  memory = Memory(_memory().keys)
  placed = placement.place(memory, sharding.mesh(2), kind="sharded")
  rows = _rows()["one device"].astype(np.int32)

  def loss(w, memory):
    keys = placed.gather(memory, rows).keys.astype(jnp.float32)
    return jnp.sum(jnp.square(keys @ w))

  w = np.arange(D, dtype=np.float32)
  of_w, of_memory = jax.jit(jax.grad(loss, (0, 1)))(w, placed.memory)
  keys = memory.keys[rows].astype(np.float64).reshape(-1, D)
  np.testing.assert_allclose(of_w, 2 * keys.T @ (keys @ w), rtol=1e-5)
  assert not np.any(of_memory.keys)


@pytest.mark.parametrize(
  "free, kind",
  [
    (2.01, "replicated"),
    (1.99, "sharded"),
    (0.26, "sharded"),
    (0.24, "host"),
  ],
)
def test_auto_takes_the_first_that_needs_half_of_what_is_free(
  monkeypatch, free, kind
):
  memory = Memory(np.zeros((8000, 10), np.float32))
  size = 8000 * 10 * 2
  monkeypatch.setattr(placement, "free_bytes", lambda: int(free * size))
  assert placement.place(memory, sharding.mesh(2)).kind == kind
