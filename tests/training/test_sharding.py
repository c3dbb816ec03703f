"""The mesh, rules of what is split, and batches on one device.

What needs several devices runs in a child process, for XLA makes virtual ones
only as it starts: the files `on_eight_devices*.py`.
"""

import os
import pathlib
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from retrieval_aug import models
from retrieval_aug.common.errors import UserError
from retrieval_aug.training import sharding, step

# What is compiled runs a few times: optimizing it takes longer.
_EIGHT_DEVICES = (
  "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)

_MESH = AbstractMesh((4, 2), sharding.AXES)


def test_on_eight_devices():
  folder = pathlib.Path(__file__).parent
  files = sorted(folder.glob("on_eight_devices*.py"))
  done = subprocess.run(
    [sys.executable, "-m", "pytest", "-n", "0", "-q", *files],
    cwd=folder.parents[1],
    env=os.environ | {"XLA_FLAGS": _EIGHT_DEVICES},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout + done.stderr


# --- The mesh.


def test_mesh_has_all_devices_along_data():
  mesh = sharding.mesh()
  assert dict(mesh.shape) == {"data": jax.device_count(), "model": 1}


@pytest.mark.parametrize("model", [0, -1, 3])
def test_mesh_that_does_not_divide_the_devices_is_refused(model):
  with pytest.raises(UserError) as error:
    sharding.mesh(model)
  assert str(error.value) == (
    f"config.mesh.model={model}: must divide the number of devices, 1."
  )


def _gpus(slices, each):
  """What jax tells of the GPUs of some hosts, the hosts interleaved."""
  return [
    types.SimpleNamespace(
      id=s * each + i,
      slice_index=s,
      process_index=s,
      platform="gpu",
      device_kind="gpu",
    )
    for i in range(each)
    for s in range(slices)
  ]


@pytest.mark.parametrize("model", [1, 2, 4, 6, 12])
def test_devices_along_model_share_as_few_hosts_as_they_can(model):
  grid = sharding._grid(_gpus(slices=3, each=4), model)
  assert grid.shape == (12 // model, model)
  assert sorted(d.id for d in grid.flat) == list(range(12))
  # Of 6 devices, 2 fit on each of 3 hosts: 4 do not divide them.
  hosts = {1: 1, 2: 1, 4: 1, 6: 3, 12: 3}[model]
  assert {len({d.slice_index for d in row}) for row in grid} == {hosts}


# --- Rules.


@pytest.mark.parametrize("preset", ["replicate", "fsdp", "tensor"])
def test_an_action_alone_is_for_all(preset):
  assert sharding.parse_rules(preset) == ((".*", preset),)


@pytest.mark.parametrize(
  "value, message",
  [
    ("fsdpp", "'fsdpp' is no action; take one of replicate, fsdp, tensor, or"),
    ([(".*", "-,modle")], "'-,modle' is no action"),
    ([(".*", "data,data")], "with each axis once"),
    ([("(", "fsdp")], "'(' is no regular expression: missing )"),
    ([("a", "fsdp", "b")], "is no pair of a regex and an action"),
    (["abc"], "'abc' is no pair of a regex and an action"),
    ([(".*", 3)], "is no pair of a regex and an action"),
  ],
)
def test_rules_that_make_no_sense_are_refused(value, message):
  with pytest.raises(UserError, match=re.escape(message)) as error:
    sharding.parse_rules(value)
  assert str(error.value).startswith("config.mesh.sharding: ")


def _specs(tree, *rules):
  """Axes by name of the parameter."""
  placed = sharding.shardings(tree, sharding.parse_rules(rules), _MESH)
  return jax.tree.map(lambda s: s.spec, placed)


def _shape(*sizes):
  return jax.ShapeDtypeStruct(sizes, jnp.float32)


@pytest.mark.parametrize(
  "action, shape, spec",
  [
    ("replicate", (8, 8), ()),
    ("fsdp", (8, 12), (None, "data")),
    ("fsdp", (8, 8), ("data", None)),
    ("fsdp", (8, 13), ("data", None)),  # the largest does not divide
    ("fsdp", (7, 13), ()),
    ("fsdp", (), ()),
    ("tensor", (8, 12), (None, "model")),
    ("tensor", (8, 13), ("model", None)),
    ("tensor", (7, 13), ()),
    ("-,model", (7, 6), (None, "model")),
    ("data,model", (4, 6), ("data", "model")),
    ("data+model,-", (8, 7), (("data", "model"), None)),
    ("-,-,-", (3, 5, 7), (None, None, None)),
  ],
)
def test_actions_split(action, shape, spec):
  assert _specs({"w": _shape(*shape)}, (".*", action)) == {
    "w": PartitionSpec(*spec)
  }


def test_the_first_regex_that_matches_the_whole_name_decides():
  tree = {"a": {"kernel": _shape(8, 6), "bias": _shape(6)}}
  assert _specs(tree, ("a/k.*", "tensor"), ("a/.*", "fsdp")) == {
    "a": {"kernel": PartitionSpec(None, "model"), "bias": PartitionSpec()}
  }


def test_every_parameter_must_be_covered():
  tree = {n: _shape(2) for n in "abcde"}
  with pytest.raises(UserError) as error:
    _specs(tree, ("a", "fsdp"))
  assert str(error.value) == (
    "config.mesh.sharding: no regex matches the whole name of b, c, d and 1 "
    "more; end with ('.*', 'replicate')."
  )


@pytest.mark.parametrize(
  "rules",
  [
    [("w/kernle", "fsdp"), (".*", "replicate")],
    [("kernel", "fsdp"), (".*", "replicate")],  # not the whole name
    [(".*", "replicate"), ("w/kernel", "fsdp"), ("w/.*", "fsdp")],
    [(".*", "replicate"), ("v/.*", "fsdp")],
  ],
)
def test_a_rule_that_decides_nothing_is_refused(rules):
  with pytest.raises(
    UserError, match="matches no parameter's whole name, such"
  ):
    _specs({"w": {"kernel": _shape(8, 8)}}, *rules)


def test_the_last_rule_may_be_left_nothing():
  tree = {"w": {"kernel": _shape(8, 8)}}
  assert _specs(tree, ("w/.*", "fsdp"), (".*", "replicate")) == _specs(
    tree, ("w/.*", "fsdp")
  )


def test_a_state_without_parameters_has_nothing_to_match():
  assert _specs({"step": None}, (".*", "fsdp")) == {"step": None}


@pytest.mark.parametrize(
  "action, message",
  [
    ("-,model,-", "give one of -, data, model for each of its 2 dimensions."),
    ("data,-", "6 is no multiple of the 4 devices of data."),
    ("-,data+model", "4 is no multiple of the 8 devices of data+model."),
  ],
)
def test_a_spec_that_does_not_fit_names_parameter_and_rule(action, message):
  with pytest.raises(UserError) as error:
    _specs({"a": {"w": _shape(6, 4)}}, ("a/w", action))
  assert str(error.value) == (
    f"config.mesh.sharding: ('a/w', '{action}') does not fit a/w (6, 4): "
    f"{message}"
  )


def test_moments_and_averages_are_split_as_their_parameters():
  model = models.build("mam", 6, num_layers=2)
  neighbors = jnp.zeros((1, 3, 8)), jnp.zeros((1, 3, 8)), jnp.ones((1, 3), bool)
  make = lambda: model.init(jax.random.key(0), jnp.zeros((1, 8)), *neighbors)
  params = jax.eval_shape(make)["params"]
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1))
  state = step.State(
    params=params,
    opt_state=jax.eval_shape(optimizer.init, params),
    step=jax.ShapeDtypeStruct((), jnp.int32),
    ema=params,
    rng=jax.ShapeDtypeStruct((2,), jnp.uint32),
  )
  query = "fusion/layer_1/query/kernel"
  specs = _specs(state, (query, "-,model"), (".*", "fsdp"))
  flat = {}
  for path, spec in jax.tree.leaves_with_path(specs):
    flat[jax.tree_util.keystr(path, simple=True, separator="/")] = spec
  of_query = [s for name, s in flat.items() if name.endswith(query)]
  assert of_query == [PartitionSpec(None, "model")] * 4
  of_head = [s for name, s in flat.items() if name.endswith("head/kernel")]
  assert of_head == [PartitionSpec("data", None)] * 4
  counts = [
    s for name, s in flat.items() if not name.endswith(("kernel", "bias"))
  ]
  assert counts == [PartitionSpec()] * len(counts) and len(counts) >= 3


# --- Batches.


def test_one_process_feeds_the_whole_batch():
  positions = sharding.local_positions(sharding.mesh(), 7)
  assert positions.dtype == np.int64
  np.testing.assert_array_equal(positions, np.arange(7))


def test_put_batch_keeps_the_tree():
  batch = {
    "rows": np.arange(6).reshape(3, 2).astype(np.int32),
    "neighbors": step.Memory(np.ones((3, 2, 5), np.float16), None),
  }
  put = sharding.put_batch(batch, sharding.mesh(), 3)
  assert jax.tree.structure(put) == jax.tree.structure(batch)
  jax.tree.map(np.testing.assert_array_equal, put, batch)
  assert put["neighbors"].keys.dtype == jnp.float16
  chunk = jax.tree.map(lambda x: np.stack([x, x]), batch)
  put = sharding.put_batch(chunk, sharding.mesh(), 3, before=1)
  jax.tree.map(np.testing.assert_array_equal, put, chunk)


def test_what_is_fetched_survives_a_step():
  add = jax.jit(lambda x: x + 1, donate_argnums=0)
  x = jnp.arange(1000.0)
  fetched = sharding.fetch({"x": x, "none": None})
  add(x).block_until_ready()
  np.testing.assert_array_equal(fetched["x"], np.arange(1000.0))
  fetched["x"][0] = 5  # its own


@pytest.mark.parametrize("size", [0, -8])
def test_a_batch_has_examples(size):
  with pytest.raises(UserError, match=f"config.train.batch_size={size}: must"):
    sharding.check_batch_size("train.batch_size", size, sharding.mesh())
