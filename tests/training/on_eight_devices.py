"""Run by `test_sharding.py` in a process with 8 virtual devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from retrieval_aug import models
from retrieval_aug.common.errors import UserError
from retrieval_aug.training import sharding

B, K, D, C = 24, 5, 16, 8


@pytest.fixture(params=[1, 2, 8], ids=["8x1", "4x2", "1x8"])
def mesh(request):
  return sharding.mesh(request.param)


def test_there_are_eight():
  assert jax.device_count() == 8


def test_mesh_shape(mesh):
  assert mesh.shape["data"] * mesh.shape["model"] == 8
  assert {d.id for d in mesh.devices.flat} == set(range(8))


def test_three_do_not_divide_eight():
  with pytest.raises(UserError, match="config.mesh.model=3: must divide the"):
    sharding.mesh(3)
  with pytest.raises(
    UserError, match="=12: must be a positive multiple of the"
  ):
    sharding.check_batch_size("train.batch_size", 12, sharding.mesh())


def test_examples_are_split_over_data(mesh):
  data = mesh.shape["data"]
  rows = np.arange(B * K).reshape(B, K)
  put = sharding.put_batch({"rows": rows}, mesh, B)
  assert put["rows"].sharding.spec == PartitionSpec("data")
  assert {s.data.shape for s in put["rows"].addressable_shards} == {
    (B // data, K)
  }
  fetched = sharding.fetch(put)
  np.testing.assert_array_equal(fetched["rows"], rows)
  put = sharding.put_batch(np.stack([rows, -rows]), mesh, B, before=1)
  assert {s.data.shape for s in put.addressable_shards} == {(2, B // data, K)}
  np.testing.assert_array_equal(sharding.fetch(put)[1], -rows)


def test_positions_do_not_depend_on_the_order_of_devices():
  order = np.array(jax.devices())[[5, 2, 7, 0, 1, 4, 6, 3]]
  mesh = Mesh(order.reshape(4, 2), sharding.AXES)
  np.testing.assert_array_equal(sharding.local_positions(mesh, B), np.arange(B))


def test_constrain_splits_by_example_and_leaves_the_rest(mesh):
  placed = NamedSharding(mesh, PartitionSpec(None, "model"))
  x = jax.device_put(jnp.ones((B, D)), placed)
  constrained = jax.jit(lambda x: sharding.constrain({"x": x * 2}, mesh))(x)
  found = constrained["x"].addressable_shards[0].data.shape
  assert found == (B // mesh.shape["data"], D // mesh.shape["model"])


def _problem():
  """A model's state, a function that trains it, and a batch."""
  model = models.build("mam", C, num_layers=1)
  optimizer = optax.adamw(0.01)
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  inputs = normal(B, D), normal(B, K, D), normal(B, K, D), np.ones((B, K), bool)
  batch = inputs, np.arange(B) % C

  def step(state, batch, mesh):
    params, moments = state
    inputs, labels = sharding.constrain(batch, mesh)

    def loss(params):
      logits = model.apply({"params": params}, *inputs)
      return optax.losses.softmax_cross_entropy_with_integer_labels(
        logits, labels
      ).mean()

    updates, moments = optimizer.update(jax.grad(loss)(params), moments, params)
    return optax.apply_updates(params, updates), moments

  shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
  params = jax.tree.map(lambda x: normal(*x.shape) / 4, shapes)
  return (params, optimizer.init(params)), step, batch


def test_training_does_not_depend_on_where_parameters_live():
  first, step, batch = _problem()
  query = "fusion/layer_0/query/kernel"

  def train(model, rules):
    mesh = sharding.mesh(model)
    places = sharding.shardings(first, sharding.parse_rules(rules), mesh)
    one_step = jax.jit(lambda *x: step(*x, mesh), out_shardings=places)
    state = jax.device_put(first, places)
    for _ in range(3):
      state = one_step(state, sharding.put_batch(batch, mesh, B))
    return state

  expected = sharding.fetch(train(1, "replicate"))
  state = train(
    2, ((query, "data,model"), ("fusion/.*/kernel", "tensor"), (".*", "fsdp"))
  )
  params, (moments, *_) = state
  for tree in (params, moments.mu, moments.nu):
    layer = tree["fusion"]["layer_0"]
    for kernel, part in (
      (layer["query"]["kernel"], (D // 4, D // 2)),
      (layer["output"]["kernel"], (D, D // 2)),
      (tree["head"]["kernel"], (D // 4, C)),
    ):
      assert kernel.addressable_shards[0].data.shape == part
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
    sharding.fetch(state),
    expected,
  )
