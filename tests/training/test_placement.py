"""Where the working set lives; with several devices: `on_eight_devices*.py`."""

import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retrieval_aug.common.errors import UserError
from retrieval_aug.training import placement, sharding
from retrieval_aug.training.placement import Memory

U, B, K, D, DV = 101, 4, 7, 5, 3


def _memory(dtype=np.float16):
  rng = np.random.default_rng(0)
  return Memory(
    rng.normal(size=(U, D)).astype(dtype),
    (rng.normal(size=(U, DV)).astype(dtype),),
    rng.integers(0, 3, U).astype(np.int32),
    rng.integers(-1, 9, U).astype(np.int32),
  )


def _rows():
  rows = np.random.default_rng(1).integers(0, U, (B, K)).astype(np.int32)
  rows[::2, -3:] = -1
  return rows


def _place(memory, **options):
  return placement.place(memory, sharding.mesh(), **options)


def _gathered(placed, rows):
  """Rows as a step sees them."""
  batch = placed.join({"rows": rows, "label": None})
  assert set(batch) - {"neighbors"} == {"rows", "label"}
  if placed.kind == "host":
    assert jax.tree.leaves(placed.memory) == []
    return batch["neighbors"]
  assert "neighbors" not in batch
  return jax.jit(placed.gather)(placed.memory, rows)


def _held(placed):
  """All rows, as they are held: one device has them in their order."""
  if placed.kind == "host":
    return placed.join({"rows": np.arange(U)})["neighbors"]
  return placed.memory


KINDS = pytest.mark.parametrize("kind", ["replicated", "sharded", "host"])


@KINDS
def test_gathers_what_numpy_does(kind):
  memory, rows = _memory(), _rows()
  placed = _place(memory, kind=kind)
  assert placed.kind == kind
  found = _gathered(placed, rows)
  jax.tree.map(
    lambda x, whole: np.testing.assert_array_equal(
      x, whole[np.maximum(rows, 0)], strict=True
    ),
    jax.tree.map(np.asarray, found),
    memory,
  )


@pytest.mark.parametrize("kind", ["replicated", "host"])
def test_batches_of_several_seeds(kind):
  memory = _memory()
  rows = np.stack([_rows(), _rows()[::-1]])
  placed = _place(memory, kind=kind)
  if kind == "host":
    found = placed.join({"rows": rows})["neighbors"]
  else:
    gather = jax.jit(jax.vmap(placed.gather, (None, 0)))
    found = gather(placed.memory, rows)
  np.testing.assert_array_equal(found.keys, memory.keys[np.maximum(rows, 0)])


@KINDS
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_floats_are_held_as_asked(kind, dtype):
  memory = _memory(np.float32)
  held = _held(_place(memory, kind=kind, dtype=dtype))
  assert held.keys.dtype == held.values[0].dtype == jnp.dtype(dtype)
  assert held.labels.dtype == held.sources.dtype == jnp.int32
  np.testing.assert_array_equal(held.keys, memory.keys.astype(jnp.dtype(dtype)))


@KINDS
def test_only_what_is_needed_is_placed(kind):
  held = _held(_place(_memory(), kind=kind, needed=("values",)))
  assert held.values[0].shape == (U, DV)
  assert held.keys is held.sources is held.labels is None


@KINDS
def test_a_model_that_needs_nothing_gets_nothing(kind):
  found = _gathered(_place(_memory(), kind=kind, needed=()), _rows())
  assert found == Memory()


@KINDS
def test_memory_maps_are_read(kind, tmp_path):
  memory = _memory()
  np.save(tmp_path / "keys.npy", memory.keys)
  mapped = np.load(tmp_path / "keys.npy", mmap_mode="r")
  held = _held(_place(Memory(mapped), kind=kind))
  np.testing.assert_array_equal(held.keys, memory.keys)
  assert not isinstance(held.keys, np.memmap)


def test_the_host_reads_in_parts(monkeypatch):
  monkeypatch.setattr(placement, "_CHUNK", 5)
  memory, rows = _memory(), _rows()
  found = _gathered(_place(memory, kind="host", threads=3), rows)
  np.testing.assert_array_equal(found.keys, memory.keys[np.maximum(rows, 0)])


def test_a_row_that_there_is_not_is_an_error_on_the_host():
  with pytest.raises(IndexError):
    _place(_memory(), kind="host").join({"rows": np.array([[U]])})


@pytest.mark.parametrize("name", ["kind", "dtype"])
def test_unknown_choices_are_refused(name):
  setting = {"kind": "placement", "dtype": "dtype"}[name]
  with pytest.raises(UserError) as error:
    _place(_memory(), **{name: "device"})
  assert str(error.value).startswith(
    f"config.memory.{setting}=device: must be one of "
  )


@KINDS
def test_a_dtype_that_cannot_hold_a_number_is_refused(kind):
  memory = _memory(np.float32)
  memory.values[0][U - 1, 1] = -70000.0
  with pytest.raises(UserError) as error:
    _place(memory, kind=kind)
  assert str(error.value) == (
    "config.memory.dtype=float16: the working set has a number as large as "
    "7e+04, more than the 6.55e+04 that it can hold; take bfloat16 or float32."
  )
  _place(memory, kind=kind, dtype="bfloat16")
  _place(memory, kind=kind, needed=("keys",))


def test_why_says_sizes_and_what_is_free(monkeypatch):
  monkeypatch.setattr(placement, "free_bytes", lambda: 3_000_000)
  memory = Memory(np.zeros((1000, 500), np.float32))
  assert _place(memory).why == (
    "working set replicated: 1.0 MB on each device; 3.0 MB free on a device"
  )
  assert _place(memory, dtype="float32").why == (
    "working set host: 2.0 MB on the host, read as steps need them; 3.0 MB "
    "free on a device"
  )


def test_a_kind_that_does_not_fit_is_refused(monkeypatch):
  monkeypatch.setattr(placement, "free_bytes", lambda: 900_000)
  memory = Memory(np.zeros((1000, 500), np.float32))
  with pytest.raises(UserError) as error:
    _place(memory, kind="replicated")
  assert str(error.value) == (
    "config.memory.placement=replicated: needs 1.0 MB on each device, and one "
    "has 0.9 MB free; take auto."
  )
  _place(memory, kind="host")


def test_free_bytes_of_accelerators_are_what_the_fullest_has(monkeypatch):
  class Device:
    def __init__(self, used):
      self.used = used

    def memory_stats(self):
      return {"bytes_limit": 80 * 10**9, "bytes_in_use": self.used}

  devices = [Device(10**9), Device(5 * 10**9), Device(0)]
  monkeypatch.setattr(jax, "local_devices", lambda: devices)
  assert placement.free_bytes() == 75 * 10**9


def test_cpu_devices_share_the_machine(monkeypatch):
  monkeypatch.setattr(placement.free_memory, "of_machine", lambda: 12e9)
  assert placement.free_bytes() == 12 * 10**9 // jax.device_count()


def test_what_another_model_left_behind_is_not_counted_as_taken():
  """A trainer refers to itself, and with it to its working set."""

  class Trainer:
    def __init__(self):
      self.myself, self.held = self, jnp.zeros(1000)

  left = weakref.ref(Trainer().held)
  assert left() is not None
  placement.free_bytes()
  assert left() is None
