"""Training over a mesh, run by `test_sharding.py` with 8 virtual devices.

Whatever lies where, it must be what one device does, which draws the same.
"""

import functools
import json
import re
from unittest import mock

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from retrieval_aug import models
from retrieval_aug.common import distributed
from retrieval_aug.training import loop, profiler, sharding, step
from retrieval_aug.training.settings import Layout
from tests.training import tiny

# N and VAL are no multiples of a batch; the others can be split.
N, VAL, U, K, D, DV, CLASSES, B = 61, 29, 23, 5, 16, 8, 8, 32
STEPS = 8

QUERY, OUTPUT = "fusion/layer_0/query/kernel", "fusion/layer_0/output/kernel"
HEAD, BIAS = "head/kernel", "head/bias"

RULES = (
  (QUERY, "data,model"),
  (HEAD, "-,data+model"),
  ("fusion/.*/kernel", "tensor"),
  (".*", "replicate"),
)

# Layout, and what each device then has of the parameters.
CASES = {
  "8x1 replicated, replicate": (
    Layout(1, "replicate", "replicated"),
    {QUERY: (16, 16), OUTPUT: (8, 16), HEAD: (16, 8), BIAS: (8,)},
  ),
  "8x1 sharded, fsdp": (
    Layout(1, "fsdp", "sharded"),
    {QUERY: (2, 16), OUTPUT: (8, 2), HEAD: (2, 8), BIAS: (1,)},
  ),
  "4x2 host, tensor": (
    Layout(2, "tensor", "host"),
    {QUERY: (16, 8), OUTPUT: (8, 8), HEAD: (16, 4), BIAS: (4,)},
  ),
  "2x4 sharded, rules": (
    Layout(4, RULES, "sharded"),
    {QUERY: (8, 4), OUTPUT: (8, 4), HEAD: (16, 1), BIAS: (8,)},
  ),
}
ONE, WHOLE = "one device", "8x1 replicated, replicate"


def _examples(n: int, seed: int) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(seed)
  rows = rng.integers(0, U, (n, K))
  rows[::3, -2:] = -1
  return {
    "query": rng.normal(size=(n, D)).astype(np.float32),
    "rows": rows.astype(np.int32),
    "label": (np.arange(n) % CLASSES).astype(np.int32),
  }


def _memory() -> step.Memory:
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  return step.Memory(normal(U, D), normal(U, DV))


@functools.cache
def _trainer(name: str) -> loop.Trainer:
  """Of one of the cases, or on one of the devices; compiles once."""
  model = models.build("mam", CLASSES, num_layers=1, neighbor_dropout=0.3)
  settings = tiny.settings(
    epochs=STEPS * B / N,
    batch_size=B,
    accumulate=2,
    ema=0.5,
    eval_epochs=4 * B / N,
    checkpoint_epochs=100.0,
  )
  train = _examples(N, 1)
  make = functools.partial(
    loop.Trainer,
    model,
    settings,
    _memory(),
    train,
    np.bincount(train["label"]),
    val=_examples(VAL, 2),
  )
  if name != ONE:
    return make(layout=CASES[name][0])
  only = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), sharding.AXES)
  with mock.patch.object(sharding, "mesh", lambda model: only):
    return make()


def _rows(folder):
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def _logits(name, params):
  return _trainer(name)._predictor(params, _examples(VAL, 2), B)[0]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
  """By one device: (rows, parameters, logits)."""
  folder = tmp_path_factory.mktemp("one")
  with jax.numpy_rank_promotion("raise"):
    params = _trainer(ONE).run(0, folder)
    return _rows(folder), params, _logits(ONE, params)


@pytest.fixture
def parts(monkeypatch):
  """Gets what the devices have before each step: see `_parts`."""
  seen = []
  monkeypatch.setattr(
    profiler.Profiler,
    "step",
    lambda _, number, state: seen.append(_parts(state)),
  )
  return seen


def _parts(state):
  """As `_places`, of parameters; moments and averages must be as they are."""
  found = _places(state)
  assert all(len(x) == 4 and len(set(x)) == 1 for x in found.values())
  return {name: x[0] for name, x in found.items()}


def _places(tree):
  """Devices that have a part, and its shape, of arrays by parameters' names."""
  found = {}
  for path, x in jax.tree.leaves_with_path(tree):
    path = jax.tree_util.keystr(path, simple=True, separator="/")
    shards = x.addressable_shards
    (part,) = {shard.data.shape for shard in shards}
    for name in CASES[WHOLE][1]:
      if path.endswith(name):
        found.setdefault(name, []).append((len(shards), part))
  return found


def _assert_close(found, expected):
  # Sums over the batch are added in another order.
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4),
    found,
    expected,
  )


def _assert_same_rows(found, expected):
  assert [x["step"] for x in found] == list(range(1, STEPS + 1))
  assert [set(x) for x in found] == [set(x) for x in expected]
  names = ("loss", "grad_norm", "learning_rate")
  _assert_close(
    [[x[n] for n in names] for x in found],
    [[x[n] for n in names] for x in expected],
  )


@pytest.mark.parametrize("name", CASES)
def test_a_mesh_trains_as_one_device(
  tmp_path, expected, parts, monkeypatch, name
):
  predictor, looked = _trainer(name)._predictor, []
  predict = predictor._step

  def look(params, *rest):
    looked.append(_places(params))
    return predict(params, *rest)

  monkeypatch.setattr(predictor, "_step", look)
  params = _trainer(name).run(0, tmp_path)
  rows, expected_params, expected_logits = expected
  found = _rows(tmp_path)
  _assert_same_rows(found, rows)
  _assert_close(params, expected_params)
  logits = _logits(name, params)
  _assert_close(logits, expected_logits)
  # Each of 29 examples is counted once.
  right = (logits.argmax(1) == _examples(VAL, 2)["label"]).mean()
  assert found[-1]["val_top1"] == pytest.approx(100 * right)
  # From the first step to the last, everything lies where it should.
  places = {n: (8, x) for n, x in CASES[name][1].items()}
  assert parts == [places] * STEPS
  # And where it is looked at: no device ever has to hold all.
  assert looked and all(
    x == {n: [place] for n, place in places.items()} for x in looked
  )


def test_a_state_is_made_in_parts():
  """No device computes more of a parameter than it keeps."""
  program = _trainer("8x1 sharded, fsdp").compiled._init.lower(
    np.uint32(0), None
  )
  text = program.compile().as_text()
  assert "f32[2,16]" in text
  assert not re.search(r"\[(16,16|256)\]", text)


def test_from_eight_devices_to_one_and_back(
  tmp_path, expected, parts, monkeypatch
):
  rows, expected_params, _ = expected
  eight = "8x1 sharded, fsdp"

  def run(name, stop):
    reached = lambda _, number: number == stop
    monkeypatch.setattr(distributed.Preemption, "reached", reached)
    return _trainer(name).run(0, tmp_path)

  for name, stop in ((eight, 3), (ONE, 6)):
    with pytest.raises(distributed.Preempted, match=f"after step {stop} of"):
      run(name, stop)
  params = run(eight, None)
  _assert_same_rows(_rows(tmp_path), rows)
  _assert_close(params, expected_params)
  split = {n: (8, x) for n, x in CASES[eight][1].items()}
  whole = {n: (1, x) for n, x in CASES[WHOLE][1].items()}
  assert parts == [split] * 3 + [whole] * 3 + [split] * 2
