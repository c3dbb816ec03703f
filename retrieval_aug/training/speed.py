"""How fast training is: rates, XLA's costs, and the peaks they are held to."""

import contextlib
import functools
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

# What a program is nested in that is run once. `cond` is left out, of which
# one branch is run, and `shard_map`, whose program is one device's.
_CALLS = {"jit", "pjit", "closed_call", "checkpoint", "remat2"}


class Rates(NamedTuple):
  """Over some steps.

  Attributes:
    examples_per_second: of all processes.
    input_wait: share of the time, 0 to 1, that the devices of this process had
      nothing to do but wait for input.
    steps: how many.
    seconds: how long they took.
  """

  examples_per_second: float
  input_wait: float
  steps: int
  seconds: float


class Meter:
  """Takes the time of steps, and of the waits between them."""

  def __init__(self, batch_size: int):
    """Starts the clock.

    Args:
      batch_size: examples a step, of all processes.
    """
    self._batch_size = batch_size
    self._lap = _Clock()
    # From the end of the first step's call, which compiles.
    self._run: _Clock | None = None

  @contextlib.contextmanager
  def waiting(self, under_way: jax.Array | None = None) -> Iterator[None]:
    """Around what fetches the next batch.

    Args:
      under_way: what the last step gives. While it is being computed the
        device has not waited for anything; a wait in whose course it comes
        counts whole.
    """
    begin = time.perf_counter()
    try:
      yield
    finally:
      if under_way is None or under_way.is_ready():
        self._add("waited", time.perf_counter() - begin)

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Around what is no training: evaluation, for example."""
    begin = time.perf_counter()
    try:
      yield
    finally:
      self._add("paused", time.perf_counter() - begin)

  def step(self) -> None:
    """Counts a step; called after it was started."""
    if self._run is None:
      self._lap.steps += 1
      self._run = _Clock()
    else:
      self._add("steps", 1)

  def rates(self) -> Rates:
    """Since the last call, or the start.

    Steps run while the host goes on: called when the device has finished
    those that were counted.
    """
    rates = self._lap.rates(self._batch_size)
    self._lap = _Clock()
    return rates

  def total(self) -> Rates:
    """Over all steps but the first, which compiles; called as `rates` is."""
    return (self._run or _Clock()).rates(self._batch_size)

  def _add(self, name: str, amount: float) -> None:
    for clock in (self._lap, self._run):
      if clock is not None:
        setattr(clock, name, getattr(clock, name) + amount)


class _Clock:
  def __init__(self):
    self.begin = time.perf_counter()
    self.waited = 0.0
    self.paused = 0.0
    self.steps = 0

  def rates(self, batch_size: int) -> Rates:
    seconds = time.perf_counter() - self.begin - self.paused
    if not self.steps:
      return Rates(0.0, 0.0, 0, seconds)
    examples = self.steps * batch_size
    waited = self.waited / seconds
    return Rates(examples / seconds, waited, self.steps, seconds)


class Costs(NamedTuple):
  """What XLA counts for an example, over all devices.

  Attributes:
    flops: floating-point operations.
    bytes: that operations read and write, in caches or memory.
  """

  flops: float
  bytes: float


def costs(
  compiled: jax.stages.Compiled,
  batch_size: int,
  devices: int,
  traced: jax.stages.Traced | None = None,
) -> Costs | None:
  """What a compiled step costs an example.

  XLA counts the body of a loop once, however often it runs: the layers of an
  `nn.scan`, the parts of a batch. With `traced`, the products of the further
  rounds are added, and the bytes grow by the share that such rounds have of
  them before XLA fuses operations. Loops inside `shard_map`, and those that
  end at run time, stay counted once.

  Args:
    compiled: from `traced.lower().compile()`. Under SPMD its program is one
      device's, and so are XLA's numbers.
    batch_size: examples that it takes, over all devices.
    devices: that run it.
    traced: from `jax.jit(...).trace(...)`.

  Returns:
    None where XLA gives no numbers.
  """
  found = compiled.cost_analysis() or {}
  if not {"flops", "bytes accessed"} <= set(found):
    return None
  flops, moved = found["flops"] * devices, found["bytes accessed"] * devices
  if traced is not None:
    once, in_all = _work(traced.jaxpr.jaxpr)
    flops += in_all[0] - once[0]
    moved *= in_all[1] / once[1]
  return Costs(float(flops / batch_size), float(moved / batch_size))


def _work(jaxpr: core.Jaxpr) -> np.ndarray:
  """About what a program does, to tell how much of it is in loops.

  Returns:
    FLOPs of products and bytes in and out of all operations, with the bodies
    of loops counted once and as often as they run; float64 [2, 2].
  """
  out = np.zeros((2, 2))
  for equation in jaxpr.eqns:
    params = equation.params
    if equation.primitive.name == "scan":
      rounds = np.array([[1.0], [params["length"]]])
      out += rounds * _work(params["jaxpr"].jaxpr)
    elif equation.primitive.name in _CALLS:
      for inner in core.jaxprs_in_params(params):
        out += _work(inner)
    else:
      arrays = [x.aval for x in (*equation.invars, *equation.outvars)]
      moved = sum(
        x.size * x.dtype.itemsize for x in arrays if hasattr(x, "size")
      )
      out += _product_flops(equation), moved
  return out


def _product_flops(equation: core.JaxprEqn) -> float:
  if equation.primitive.name == "dot_general":
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    rounds = math.prod(shape[i] for i in contracted)
    return 2.0 * rounds * equation.outvars[0].aval.size
  if equation.primitive.name == "conv_general_dilated":
    kernel = equation.invars[1].aval
    features = kernel.shape[equation.params["dimension_numbers"].rhs_spec[0]]
    return 2.0 * kernel.size / features * equation.outvars[0].aval.size
  return 0.0


class Peak(NamedTuple):
  """What a device can do at best.

  Attributes:
    flops: a second.
    bytes: to or from memory, a second.
    what: whose numbers these are.
  """

  flops: float
  bytes: float
  what: str


# By `device_kind`: TFLOP/s in bfloat16, dense, and GB/s of memory, as Google's
# and NVIDIA's data sheets have them for a device. Other names, slices of a GPU
# among them, are unknown rather than guessed.
_PEAKS = {
  "TPU v3": (61.5, 450.0),  # half a chip of 123 and 900
  "TPU v4": (275.0, 1200.0),
  "TPU v5 lite": (197.0, 819.0),  # v5e
  "TPU v5": (459.0, 2765.0),  # v5p
  "TPU v5p": (459.0, 2765.0),
  "TPU v6 lite": (918.0, 1638.0),  # v6e
  "TPU7x": (1153.5, 3690.0),  # half a chip of 2307 and 7380
  "Tesla T4": (65.0, 320.0),  # in float16, as the V100s: they have no bfloat16
  "Tesla V100-PCIE-16GB": (112.0, 900.0),
  "Tesla V100-SXM2-16GB": (125.0, 900.0),
  "NVIDIA L4": (121.0, 300.0),
  "NVIDIA L40S": (362.0, 864.0),
  "NVIDIA A100-PCIE-40GB": (312.0, 1555.0),
  "NVIDIA A100-SXM4-40GB": (312.0, 1555.0),
  "NVIDIA A100 80GB PCIe": (312.0, 1935.0),
  "NVIDIA A100-SXM4-80GB": (312.0, 2039.0),
  "NVIDIA H100 PCIe": (756.0, 2000.0),
  "NVIDIA H100 NVL": (835.0, 3900.0),
  "NVIDIA H100 80GB HBM3": (989.0, 3350.0),  # SXM
  "NVIDIA H200": (989.0, 4800.0),
}


def peak(device: jax.Device) -> Peak | None:
  """The peak of a device by its kind; a CPU's is measured, as all cores' are.

  Returns:
    None for a kind that is not known.
  """
  if device.platform == "cpu":
    return _measured()
  if device.device_kind not in _PEAKS:
    return None
  tflops, gigabytes = _PEAKS[device.device_kind]
  return Peak(tflops * 1e12, gigabytes * 1e9, "data sheet, bfloat16")


@functools.cache
def _measured() -> Peak:
  """By a product in float32 and a copy past the caches; tens of ms."""
  a = np.ones((1024, 1024), np.float32)
  source = np.ones(1 << 24, np.float32)  # 64 MB
  target = np.empty_like(source)
  flops = 2 * 1024**3 / _best(lambda: a @ a)
  moved = 2 * source.nbytes / _best(lambda: np.copyto(target, source))
  return Peak(flops, moved, "this CPU, measured, float32")


def _best(call) -> float:
  """Seconds of the fastest of a few calls, the first apart."""
  call()
  seconds = []
  for _ in range(3):
    begin = time.perf_counter()
    call()
    seconds.append(time.perf_counter() - begin)
  return min(seconds)


def summary(
  costs: Costs | None, total: Rates, devices: Sequence[jax.Device]
) -> dict[str, Any]:
  """What the end of a run says about its speed, as JSON.

  Args:
    costs: from `costs`.
    total: from `Meter.total`.
    devices: that ran the steps, of all processes.

  Returns:
    Rates; and None for what is not known among device, devices,
    flops_per_example, bytes_per_example, peak, flops_of_peak and
    bytes_of_peak, which are shares from 0 to 1.
  """
  measured = total.steps > 0
  out = {
    "steps": total.steps,
    "seconds": total.seconds,
    "examples_per_second": total.examples_per_second if measured else None,
    "input_wait": total.input_wait if measured else None,
    "device": devices[0].device_kind,
    "devices": len(devices),
    "flops_per_example": costs and costs.flops,
    "bytes_per_example": costs and costs.bytes,
  }
  best = peak(devices[0])
  at_best = None
  if best is not None:
    # All CPU devices of a process are the same cores.
    shared = devices[0].platform == "cpu"
    count = len({d.process_index if shared else d.id for d in devices})
    at_best = Costs(best.flops * count, best.bytes * count)
    out["peak"] = {
      "what": best.what,
      "flops_per_second": at_best.flops,
      "bytes_per_second": at_best.bytes,
    }
  share = lambda cost, limit: total.examples_per_second * cost / limit
  known = measured and costs is not None and at_best is not None
  out["flops_of_peak"] = share(costs.flops, at_best.flops) if known else None
  out["bytes_of_peak"] = share(costs.bytes, at_best.bytes) if known else None
  return out


def describe(summary: dict[str, Any]) -> str:
  """A summary in a line or two."""
  if summary["examples_per_second"] is None:
    return "speed: one step only, which compiled; nothing is measured"
  lines = [
    f"speed: {summary['examples_per_second']:,.0f} examples/s on "
    f"{summary['devices']} x {summary['device']}, input wait "
    f"{100 * summary['input_wait']:.1f} % of the time"
  ]
  if summary["flops_per_example"] is not None:
    text = (
      f"by XLA's count {summary['flops_per_example'] / 1e6:,.1f} MFLOP and "
      f"{summary['bytes_per_example'] / 1e6:,.2f} MB an example"
    )
    if summary["flops_of_peak"] is not None:
      best = summary["peak"]
      text += (
        f": {100 * summary['flops_of_peak']:.1f} % of the peak of "
        f"{best['flops_per_second'] / 1e12:,.2f} TFLOP/s and "
        f"{100 * summary['bytes_of_peak']:.1f} % of "
        f"{best['bytes_per_second'] / 1e9:,.0f} GB/s ({best['what']})"
      )
    lines.append(text)
  return "\n".join(lines)


def postfix(loss: float, rates: Rates) -> str:
  """What a progress bar shows beside its count."""
  return (
    f"loss {loss:.4f}, {rates.examples_per_second:,.0f} examples/s, input "
    f"{100 * rates.input_wait:.1f} %"
  )
