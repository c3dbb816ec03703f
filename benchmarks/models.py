"""MAM against straightforward versions of it, in Flax and in PyTorch.

  python -m benchmarks.models [--batch=64] [--neighbors=32,100,256]
    [--layers=1,8] [--repeats=5]

All contenders have the same shapes and run in one process, in turn, so that a
noisy machine is noisy for all of them: read the ratios, not the milliseconds.
"forward" gives logits, "train" the loss's gradient with regard to all
parameters (no optimizer, which is the same for all).

  plain   Flax, every key projected: what one would write first, and the oracle
          of tests/models
  torch   the same in PyTorch, where it is installed (the CPU build will do)
  ours    `build("mam")`, which never projects a key; bf16: bfloat16 keys,
          values and products; folded: `fold_for_inference`
  floor   of ours: the time of its dense matrix products alone, and of reading
          K and V once a layer and direction

GFLOP and MB are XLA's own counts an example; temp is the memory that XLA needs
beside inputs and outputs.
"""

import argparse
import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from retrieval_aug.models import build, fold_for_inference
from tests.models.plain import PlainClassifier

PLAIN = "plain"


class Shape(NamedTuple):
  """One row of the table. Letters as in `models.shapes`."""

  batch: int
  neighbors: int
  layers: int
  dim: int
  classes: int


class Contender(NamedTuple):
  """Something to time, and what XLA says of it (None where it cannot)."""

  name: str
  run: Callable[[], Any]
  gflop: float | None = None
  megabytes: float | None = None
  temp: float | None = None


def make_inputs(shape: Shape, seed: int = 0) -> dict[str, np.ndarray]:
  """Random query, keys, values and labels."""
  rng = np.random.default_rng(seed)
  neighbors = (shape.batch, shape.neighbors, shape.dim)
  normal = lambda *size: rng.standard_normal(size, np.float32)
  return {
    "query": normal(shape.batch, shape.dim),
    "keys": normal(*neighbors),
    "values": normal(*neighbors),
    "labels": rng.integers(0, shape.classes, shape.batch),
  }


def compiled(name: str, function: Callable, shape: Shape, *args) -> Contender:
  """A jitted function as a contender."""
  ready = jax.jit(function).lower(*args).compile()
  cost, memory = ready.cost_analysis(), ready.memory_analysis()
  return Contender(
    name,
    lambda: jax.block_until_ready(ready(*args)),
    gflop=cost["flops"] / shape.batch / 1e9,
    megabytes=cost["bytes accessed"] / shape.batch / 1e6,
    temp=memory.temp_size_in_bytes / 1e6,
  )


def flax_contender(
  name: str, model: Any, shape: Shape, train: bool, dtype: Any = jnp.float32
) -> Contender:
  """A Flax classifier's forward pass or gradient."""
  inputs = make_inputs(shape)
  labels = jnp.asarray(inputs["labels"])
  arrays = [jnp.asarray(inputs["query"])]
  arrays += [jnp.asarray(inputs[part], dtype) for part in ("keys", "values")]
  if getattr(model.fusion if hasattr(model, "fusion") else None, "folded", 0):
    unfolded = build("mam", shape.classes, num_layers=shape.layers)
    params = unfolded.init(jax.random.key(0), *arrays)["params"]
    params = fold_for_inference(params)
  else:
    params = model.init(jax.random.key(0), *arrays)["params"]

  def forward(params, *arrays):
    return model.apply({"params": params}, *arrays)

  def loss(params, *arrays):
    log_p = jax.nn.log_softmax(forward(params, *arrays))
    return -jnp.take_along_axis(log_p, labels[:, None], axis=1).mean()

  function = jax.value_and_grad(loss) if train else forward
  return compiled(name, function, shape, params, *arrays)


def torch_contender(shape: Shape, train: bool) -> Contender:
  """The plain model in PyTorch."""
  import torch

  torch.set_num_threads(len(os.sched_getaffinity(0)))

  class Layer(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.query = torch.nn.Linear(shape.dim, shape.dim)
      self.key = torch.nn.Linear(shape.dim, shape.dim, bias=False)
      self.output = torch.nn.Linear(shape.dim, shape.dim)

    def forward(self, f, keys, values):
      logits = self.key(keys) @ self.query(f)[:, :, None] / shape.dim**0.5
      weights = logits.squeeze(-1).softmax(-1)
      return self.output((weights[:, None] @ values).squeeze(1))

  class Model(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.layers = torch.nn.ModuleList(Layer() for _ in range(shape.layers))
      self.head = torch.nn.Linear(shape.dim, shape.classes)

    def forward(self, query, keys, values):
      f = query
      for layer in self.layers:
        f = query + layer(f, keys, values)
      return self.head(f)

  model = Model()
  inputs = {k: torch.from_numpy(v) for k, v in make_inputs(shape).items()}
  labels = inputs.pop("labels")

  def run():
    if not train:
      with torch.inference_mode():
        return model(**inputs)
    model.zero_grad(set_to_none=True)
    loss = torch.nn.functional.cross_entropy(model(**inputs), labels)
    loss.backward()
    return loss

  return Contender("torch", run)


def floor_contenders(shape: Shape, train: bool) -> list[Contender]:
  """What ours cannot do without, timed by itself.

  A dense layer costs one product forward and two backward (for its input and
  for its kernel). Reading is one matrix-vector product of K and one of V, a
  layer and direction.
  """
  inputs = make_inputs(shape)
  rng = np.random.default_rng(1)
  square = jnp.asarray(rng.standard_normal((shape.dim, shape.dim), np.float32))
  wide = jnp.asarray(
    rng.standard_normal((shape.dim, shape.classes), np.float32)
  )
  x = jnp.asarray(inputs["query"])
  keys, values = jnp.asarray(inputs["keys"]), jnp.asarray(inputs["values"])

  def products(x, square, wide):
    results = []
    for index in range(3 * shape.layers):
      # Another operand each time, or XLA would compute one product for all.
      y = x + index
      results.append(y @ square)
      if train:
        results += [(y + 1) @ square.T, y.T @ (y + 2)]
    logits = x @ wide
    results.append(logits)
    if train:
      results += [logits @ wide.T, x.T @ logits]
    return results

  def reads(vector, *tables):
    for _ in range(shape.layers * (2 if train else 1)):
      for table in tables:
        # Each read waits for the one before, as those of layers do.
        found = table.reshape(-1, shape.dim) @ vector
        vector = vector + 1e-6 * jnp.mean(found)
    return vector

  return [
    compiled("products", products, shape, x, square, wide),
    compiled("reads", reads, shape, x[0], keys, values),
  ]


def contenders(shape: Shape, train: bool, with_torch: bool) -> list[Contender]:
  """All that run at a shape, the baseline first."""
  options = {"num_layers": shape.layers}
  ours = build("mam", shape.classes, **options)
  half = build("mam", shape.classes, dtype="bfloat16", **options)
  found = [
    flax_contender(
      PLAIN, PlainClassifier(shape.classes, shape.layers), shape, train
    ),
    flax_contender("ours", ours, shape, train),
    flax_contender("ours bf16", half, shape, train, jnp.bfloat16),
  ]
  if not train:
    folded = build("mam", shape.classes, folded=True, **options)
    found.append(flax_contender("ours folded", folded, shape, train))
  if with_torch:
    found.append(torch_contender(shape, train))
  return found + floor_contenders(shape, train)


def time_all(found: list[Contender], repeats: int) -> dict[str, list[float]]:
  """Seconds of each repeat, the contenders in turn."""
  for contender in found:
    contender.run()
  times = {contender.name: [] for contender in found}
  for _ in range(repeats):
    for contender in found:
      start = time.perf_counter()
      contender.run()
      times[contender.name].append(time.perf_counter() - start)
  return times


def report(shape: Shape, train: bool, found: list[Contender], times: dict):
  """Prints the rows of one shape."""
  print(
    f"\n{'train' if train else 'forward'}  B={shape.batch} "
    f"k={shape.neighbors} L={shape.layers} d={shape.dim} C={shape.classes}"
  )
  print(
    f"{'':12s}{'ms, median (least)':>20s}{'examples/s':>12s}{'x plain':>9s}"
    f"{'GFLOP/ex':>10s}{'MB/ex':>8s}{'temp MB':>9s}"
  )
  median = {name: statistics.median(t) for name, t in times.items()}
  number = lambda x, form: format(x, form) if x is not None else "-"
  for contender in found:
    name = contender.name
    print(
      f"{name:12s}"
      f"{median[name] * 1e3:11.1f} ({min(times[name]) * 1e3:6.1f})"
      f"{shape.batch / median[name]:12.0f}{median[PLAIN] / median[name]:9.1f}"
      f"{number(contender.gflop, '10.4f'):>10s}"
      f"{number(contender.megabytes, '8.1f'):>8s}"
      f"{number(contender.temp, '9.1f'):>9s}"
    )
  floor = median["products"] + median["reads"]
  print(
    f"ours / (products + reads) = {median['ours'] / floor:.2f} (of medians), "
    f"{min(times['ours']) / (min(times['products']) + min(times['reads'])):.2f}"
    " (of least)"
  )


def main() -> None:
  """Runs the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  numbers = lambda text: [int(part) for part in text.split(",")]
  parser.add_argument("--batch", type=numbers, default=[64])
  parser.add_argument("--neighbors", type=numbers, default=[32, 100, 256])
  parser.add_argument("--layers", type=numbers, default=[1, 8])
  parser.add_argument("--dim", type=int, default=768)
  parser.add_argument("--classes", type=int, default=1000)
  parser.add_argument("--repeats", type=int, default=5)
  flags = parser.parse_args()
  with_torch = importlib.util.find_spec("torch") is not None
  if not with_torch:
    print("PyTorch is not installed: `pip install torch` adds its column")
  print(
    f"jax {jax.__version__} on {jax.devices()[0].device_kind}, "
    f"{len(os.sched_getaffinity(0))} cores"
  )
  for batch in flags.batch:
    for neighbors in flags.neighbors:
      for layers in flags.layers:
        shape = Shape(batch, neighbors, layers, flags.dim, flags.classes)
        for train in (False, True):
          found = contenders(shape, train, with_torch)
          report(shape, train, found, time_all(found, flags.repeats))


if __name__ == "__main__":
  main()
