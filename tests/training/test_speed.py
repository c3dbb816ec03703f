"""Rates by a clock of our own, costs against counts by hand."""

import json
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from retrieval_aug.training import speed


@pytest.fixture
def clock(monkeypatch):
  """Time goes on by `clock(seconds)` alone."""
  now = [100.0]

  def forward(seconds):
    now[0] += seconds

  fake = types.SimpleNamespace(perf_counter=lambda: now[0])
  monkeypatch.setattr(speed, "time", fake)
  return forward


def _step(meter, clock, wait, compute):
  with meter.waiting():
    clock(wait)
  clock(compute)
  meter.step()


def test_rates_are_those_since_the_last_call(clock):
  meter = speed.Meter(32)
  _step(meter, clock, 1.0, 5.0)
  _step(meter, clock, 1.0, 1.0)
  assert meter.rates() == (64 / 8, 2 / 8, 2, 8.0)
  _step(meter, clock, 0.25, 0.75)
  assert meter.rates() == speed.Rates(32.0, 0.25, 1, 1.0)


def test_total_leaves_out_the_first_step_which_compiles(clock):
  meter = speed.Meter(7)
  _step(meter, clock, 3.0, 60.0)
  _step(meter, clock, 0.5, 1.5)
  meter.rates()
  _step(meter, clock, 0.5, 1.5)
  assert meter.total() == (14 / 4, 1 / 4, 2, 4.0)


def test_pauses_are_not_counted(clock):
  meter = speed.Meter(4)
  _step(meter, clock, 0.0, 9.0)
  _step(meter, clock, 0.5, 0.5)
  with meter.paused():
    clock(50.0)
  assert meter.total() == (4.0, 0.5, 1, 1.0)
  assert meter.rates() == (8 / 10, 0.5 / 10, 2, 10.0)
  _step(meter, clock, 0.0, 1.0)
  assert meter.rates() == (4.0, 0.0, 1, 1.0)


def test_no_step_is_no_division_by_zero(clock):
  meter = speed.Meter(4)
  assert meter.rates() == meter.total() == (0.0, 0.0, 0, 0.0)
  _step(meter, clock, 1.0, 1.0)
  assert meter.total().steps == 0


def test_a_wait_that_ends_by_an_error_is_counted(clock):
  meter = speed.Meter(1)
  with pytest.raises(StopIteration), meter.waiting():
    clock(2.0)
    raise StopIteration
  clock(2.0)
  meter.step()
  assert meter.rates().input_wait == 0.5


def _stages(f, *shapes):
  traced = jax.jit(f).trace(
    *(jax.ShapeDtypeStruct(s, "float32") for s in shapes)
  )
  return traced, traced.lower().compile()


def test_costs_are_those_of_an_example():
  traced, compiled = _stages(lambda x, w: x @ w, (64, 101), (101, 53))
  found = speed.costs(compiled, 64, 1)
  assert found.flops == pytest.approx(2 * 101 * 53, rel=0.01)
  read_and_written = 4 * (64 * 101 + 101 * 53 + 64 * 53)
  assert found.bytes == pytest.approx(read_and_written / 64, rel=0.01)
  assert speed.costs(compiled, 64, 1, traced) == found


_ON_DEVICES = """
import jax, json
from jax.sharding import NamedSharding, PartitionSpec as P
from retrieval_aug.training import speed
mesh = jax.make_mesh((4, 2), ("data", "model"))
at = lambda *axes: NamedSharding(mesh, P(*axes))
x = jax.ShapeDtypeStruct((64, 101), "float32", sharding=at("data"))
w = jax.ShapeDtypeStruct((101, 54), "float32", sharding=at(None, "model"))
compiled = jax.jit(lambda x, w: x @ w).lower(x, w).compile()
print(json.dumps(speed.costs(compiled, 64, 8).flops))
"""


def test_costs_are_of_all_devices():
  flags = "--xla_force_host_platform_device_count=8"
  done = subprocess.run(
    [sys.executable, "-c", _ON_DEVICES],
    env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    check=True,
  )
  assert json.loads(done.stdout) == pytest.approx(2 * 101 * 54, rel=0.01)


def _layers(parts, weights):
  """Gradients of three layers in two parts, all in loops."""
  layer = jax.checkpoint(lambda x, w: (jnp.maximum(x @ w, 0), None))
  loss = lambda w, x: jax.lax.scan(layer, x, w)[0].sum()
  add = lambda total, x: (total + jax.grad(loss)(weights, x), None)
  return jax.lax.scan(add, jnp.zeros_like(weights), parts)[0]


def test_products_in_loops_cost_as_often_as_they_run():
  traced, compiled = _stages(_layers, (2, 67, 71), (3, 71, 71))
  flops = 2 * 67 * 71 * 71
  once = speed.costs(compiled, 1, 1)
  found = speed.costs(compiled, 1, 1, traced)
  # Forward, forward again and two products backward.
  assert once.flops == pytest.approx(4 * flops, rel=0.1)
  assert found.flops == pytest.approx(2 * 3 * 4 * flops, rel=0.05)


def test_bytes_in_loops_are_about_those_of_the_same_written_out():
  def loop(x, w):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

  def written_out(x, w):
    for i in range(8):
      x = jnp.tanh(x @ w[i])
    return x

  shapes = (67, 71), (8, 71, 71)
  traced, compiled = _stages(loop, *shapes)
  expected = speed.costs(_stages(written_out, *shapes)[1], 1, 1).bytes
  found = speed.costs(compiled, 1, 1, traced).bytes
  assert 0.5 < found / expected < 2
  assert speed.costs(compiled, 1, 1).bytes < expected / 3


def test_convolutions_in_loops_cost_as_often_as_they_run():
  def f(images, kernel):
    one = lambda x: jax.lax.conv_general_dilated(
      x[None],
      kernel,
      (1, 1),
      "VALID",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return jax.lax.map(one, images)

  traced, compiled = _stages(f, (5, 13, 13, 7), (3, 3, 7, 11))
  found = speed.costs(compiled, 5, 1, traced)
  assert found.flops == pytest.approx(2 * 11 * 11 * 11 * 3 * 3 * 7, rel=0.05)


def test_no_numbers_of_xla_are_no_costs():
  for found in (None, {}, {"flops": 1.0}):
    compiled = types.SimpleNamespace(cost_analysis=lambda found=found: found)
    assert speed.costs(compiled, 1, 1) is None


def _devices(kind, count=1, platform="gpu", processes=1):
  return [
    types.SimpleNamespace(
      platform=platform, device_kind=kind, id=i, process_index=i % processes
    )
    for i in range(count)
  ]


@pytest.mark.parametrize(
  "kind, flops, moved",
  [
    ("TPU v5 lite", 197e12, 819e9),
    ("TPU v5p", 459e12, 2765e9),
    ("NVIDIA H100 80GB HBM3", 989e12, 3350e9),
    ("NVIDIA L4", 121e12, 300e9),
  ],
)
def test_known_devices_have_the_peak_of_their_data_sheet(kind, flops, moved):
  (device,) = _devices(kind)
  assert speed.peak(device)[:2] == (flops, moved)


@pytest.mark.parametrize(
  "kind", ["NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA L40", "TPU v9"]
)
def test_unknown_devices_have_no_peak(kind):
  (device,) = _devices(kind)
  assert speed.peak(device) is None


def test_the_peak_of_a_cpu_is_measured_once():
  device = jax.devices("cpu")[0]
  found = speed.peak(device)
  assert 1e9 < found.flops < 1e14
  assert 1e8 < found.bytes < 1e13
  assert speed.peak(device) is found


_COSTS = speed.Costs(2e6, 3e5)
_TOTAL = speed.Rates(1000.0, 0.0125, 9, 18.0)


def test_shares_of_the_peak_are_of_all_devices():
  found = speed.summary(_COSTS, _TOTAL, _devices("NVIDIA L4", 4))
  assert found["flops_of_peak"] == pytest.approx(1000 * 2e6 / (4 * 121e12))
  assert found["bytes_of_peak"] == pytest.approx(1000 * 3e5 / (4 * 300e9))
  assert found["devices"] == 4


def test_cpu_devices_of_a_process_share_its_cores(monkeypatch):
  best = speed.Peak(1e12, 1e10, "measured")
  monkeypatch.setattr(speed, "_measured", lambda: best)
  for processes in (1, 2):
    devices = _devices("cpu", 8, "cpu", processes)
    found = speed.summary(_COSTS, _TOTAL, devices)
    assert found["flops_of_peak"] == pytest.approx(2e-3 / processes)
    assert found["peak"]["flops_per_second"] == processes * 1e12


def test_a_summary_is_described_in_two_lines():
  found = speed.summary(_COSTS, _TOTAL, _devices("NVIDIA L4", 2))
  assert json.loads(json.dumps(found, allow_nan=False)) == found
  assert speed.describe(found) == (
    "speed: 1,000 examples/s on 2 x NVIDIA L4, input wait 1.2 % of the time\n"
    "by XLA's count 2.0 MFLOP and 0.30 MB an example: 0.0 % of the peak of "
    "242.00 TFLOP/s and 0.1 % of 600 GB/s (data sheet, bfloat16)"
  )


def test_what_is_not_known_is_left_out():
  unknown = speed.summary(_COSTS, _TOTAL, _devices("TPU v9"))
  assert unknown["flops_of_peak"] is None
  assert speed.describe(unknown).endswith("2.0 MFLOP and 0.30 MB an example")
  uncounted = speed.summary(None, _TOTAL, _devices("NVIDIA L4"))
  assert uncounted["flops_per_example"] is None
  assert speed.describe(uncounted).endswith("input wait 1.2 % of the time")
  nothing = speed.Rates(0.0, 0.0, 0, 0.0)
  short = speed.summary(_COSTS, nothing, _devices("NVIDIA L4"))
  assert short["examples_per_second"] is None
  assert "nothing is measured" in speed.describe(short)


def test_postfix_shows_loss_rate_and_wait():
  rates = speed.Rates(12345.4, 0.0031, 50, 1.0)
  assert speed.postfix(1.23449, rates) == (
    "loss 1.2345, 12,345 examples/s, input 0.3 %"
  )
