"""The train and predict steps: gather, fuse, classify, update."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import Array

from retrieval_aug.training import loss as losses
from retrieval_aug.training.placement import Memory, gather

# From parameters of the encoder and uint8 images [B, S, S, 3] to [B, d].
Query = Callable[[Any, Array], Array]

# From the working set and rows [B, k] to what stands there.
Gather = Callable[[Memory, Array], Memory]


class State(NamedTuple):
  """Everything that training changes, and what it draws from.

  Attributes:
    params: of the model, and `encoder/...` of one that is fine-tuned.
    opt_state: of the optimizer.
    step: int32 [], steps done.
    ema: moving average of the parameters; None without.
    rng: uint32 [2], data of the run's key, which never changes.
  """

  params: Any
  opt_state: Any
  step: Array
  ema: Any
  rng: Array


class Metrics(NamedTuple):
  """What a step tells, each a scalar.

  Attributes:
    loss: mean over the batch.
    grad_norm: global norm of the gradient before it is clipped.
    ok: whether the step was done; see `make_train_step`.
  """

  loss: Array
  grad_norm: Array
  ok: Array


def inputs(
  memory: Memory, batch: dict[str, Any], take: Gather = gather
) -> dict[str, Any]:
  """What a model is called with beside the query.

  Args:
    memory: the working set.
    batch: rows [B, k]; and `neighbors`, if they were gathered on the host.
    take: gathers, where they were not.

  Returns:
    keys, values, sources, labels, with floats in float32, and mask [B, k].
  """
  found = batch.get("neighbors")
  if found is None:
    found = take(memory, batch["rows"])
  floats = lambda x: (
    x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x
  )
  found = Memory(*jax.tree.map(floats, tuple(found)))
  return found._asdict() | {"mask": batch["rows"] >= 0}


def _split(params, batch, query: Query | None):
  """The model's own parameters, and the queries."""
  if query is None:
    return params, batch["query"].astype(jnp.float32)
  params = dict(params)
  return params, query(params.pop("encoder"), batch["images"])


def needed(
  model: nn.Module, like: Memory, dims: int, k: int
) -> tuple[str, ...]:
  """Names of the arrays of a working set that a model looks at.

  Args:
    model: called with (query, keys, values, mask).
    like: the working set, as anything with shapes and types.
    dims: width of a query.
    k: neighbours an example.
  """
  example = _example(like, dims, k)

  def call(memory, query, rows):
    given = inputs(memory, {"rows": rows}, lambda memory, _: memory)
    return model.init_with_output(jax.random.key(0), query, **given)[0]

  traced = jax.make_jaxpr(call)(*example).jaxpr
  used = {id(v) for equation in traced.eqns for v in equation.invars}
  named = zip(jax.tree.leaves_with_path(example[0]), traced.invars)
  found = {path[0].name for (path, _), v in named if id(v) in used}
  return tuple(name for name in Memory._fields if name in found)


def _example(like: Memory, dims: int, k: int):
  """Shapes of one example's neighbours as `inputs` has them, query and rows."""
  floating = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
  one = lambda x: jax.ShapeDtypeStruct(
    (1, k, *x.shape[1:]), jnp.float32 if floating(x) else x.dtype
  )
  return (
    jax.tree.map(one, like),
    jax.ShapeDtypeStruct((1, dims), jnp.float32),
    jax.ShapeDtypeStruct((1, k), jnp.int32),
  )


def init(
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  like: Memory,
  dims: int,
  k: int,
  seed: Array | int,
  *,
  encoder_params: Any = None,
  ema: bool = False,
) -> State:
  """A fresh state; parameters are a function of the seed alone. For `jit`.

  Args:
    model: the classifier.
    optimizer: of all parameters.
    like: the working set, as anything with shapes and types.
    dims: width of a query.
    k: neighbours an example.
    seed: of the parameters, and of all that training draws.
    encoder_params: where those of a fine-tuned encoder start.
    ema: whether to keep a moving average of the parameters.
  """
  zeros = lambda x: jnp.zeros(x.shape, x.dtype)
  neighbors, query, rows = jax.tree.map(zeros, _example(like, dims, k))
  given = inputs(Memory(None, None), {"rows": rows, "neighbors": neighbors})
  key = jax.random.key(seed)
  # XLA drops all of this but the drawing of the parameters.
  params = model.init(key, query, **given).get("params", {})  # a vote has none
  if encoder_params is not None:
    # Copies: steps overwrite the state, and other seeds start here too.
    params = {"encoder": jax.tree.map(jnp.copy, encoder_params), **params}
  return State(
    params,
    optimizer.init(params),
    jnp.zeros([], jnp.int32),
    jax.tree.map(jnp.copy, params) if ema else None,
    jax.random.key_data(key),
  )


def make_loss(
  model: nn.Module,
  loss: losses.Loss,
  *,
  mixup: float = 0.0,
  query: Query | None = None,
  remat: bool = False,
  constrain: Callable[[Any], Any] = lambda tree: tree,
) -> Callable[..., tuple[Array, Array]]:
  """`(params, given, batch, rng, step)` to losses [B] and logits [B, C].

  Args:
    model: called with (query, keys, values, mask).
    loss: `(logits [B, C], labels, step) -> [B]`, from `loss.make_loss`.
    mixup: alpha of Mixup on what the heads see; 0 is off.
    query: from `finetune.query`, to train the encoder too; None takes the
      stored queries.
    remat: keep only products with parameters for the backward pass, and
      compute the rest again.
    constrain: keeps activations, whose first axis is the batch's, split over
      devices as the batch is.
  """

  def logits_of(params, given, batch, rng, mix):
    own, z = _split(params, batch, query)
    z, given = constrain((z, given))
    logits = model.apply(
      {"params": own}, z, **given, mix=mix, train=True, rngs={"dropout": rng}
    )
    return constrain(logits)

  if remat:
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    logits_of = jax.checkpoint(logits_of, policy=policy)

  def call(params, given, batch, rng, step):
    labels, mix = batch["label"], None
    if mixup > 0.0:
      # A fold of its own: turning Mixup on leaves the dropout as it was.
      mix = losses.sample_mix(jax.random.fold_in(rng, 1), len(labels), mixup)
    logits = logits_of(params, given, batch, rng, mix)
    if mix is not None:
      labels = losses.mix_labels(labels, mix, logits.shape[-1])
    return loss(logits, labels, step), logits

  return call


def make_train_step(
  loss_of: Callable[..., tuple[Array, Array]],
  optimizer: optax.GradientTransformation,
  *,
  take: Gather = gather,
  frozen: Callable[[Any], Any] | None = None,
  accumulate: int = 1,
  ema: float = 0.0,
) -> Callable[[State, Memory, Any, Array], tuple[State, Metrics]]:
  """A `(state, memory, batch, number) -> (state, metrics)`, for `jit`.

  A step whose loss, gradient or result is not finite changes nothing: not even
  the state's count of steps, so that none of those after it, whose `number` is
  then another, is done either. The state stays as it was before the first step
  that failed, until the host looks.

  Args:
    loss_of: from `make_loss`.
    optimizer: of the parameters.
    take: gathers rows of the working set.
    frozen: from the parameters to a tree of bools: those whose gradient is not
      computed, but zero.
    accumulate: parts that the batch is cut into, one after the other; their
      mean gradient is that of the batch.
    ema: how much of the moving average stays in a step; 0 is off.

  Returns:
    The step. `batch` holds rows [B, k], label [B] and query [B, d], or images
    [B, S, S, 3] with the parameters in `encoder`. `number` is how many steps
    were done before. What is drawn is a function of the state's rng and step.
  """

  def loss_and_gradients(params, memory, batch, rng, step):
    def mean(params):
      if frozen is not None:
        keep = lambda fixed, x: jax.lax.stop_gradient(x) if fixed else x
        params = jax.tree.map(keep, frozen(params), params)
      given = inputs(memory, batch, take)
      return loss_of(params, given, batch, rng, step)[0].mean()

    return jax.value_and_grad(mean)(params)

  def in_parts(params, memory, batch, rng, step):
    if accumulate == 1:
      return loss_and_gradients(params, memory, batch, rng, step)

    def one(sums, part):
      found = loss_and_gradients(params, memory, *part, step)
      return jax.tree.map(jnp.add, sums, found), None

    zeros = jnp.zeros([]), jax.tree.map(jnp.zeros_like, params)
    sums, _ = jax.lax.scan(one, zeros, cut(batch, rng, accumulate))
    return jax.tree.map(lambda x: x / accumulate, sums)

  def train_step(state, memory, batch, number):
    key = jax.random.wrap_key_data(state.rng)
    rng = jax.random.fold_in(key, state.step)
    value, gradients = in_parts(state.params, memory, batch, rng, state.step)
    norm = optax.tree.norm(gradients)
    updates, opt_state = optimizer.update(
      gradients, state.opt_state, state.params
    )
    params = optax.apply_updates(state.params, updates)
    ok = jnp.isfinite(value) & jnp.isfinite(norm) & (number == state.step)
    ok &= _all_finite(params)
    average = state.ema
    if average is not None:
      average = optax.incremental_update(params, average, 1.0 - ema)
    new = State(params, opt_state, state.step + 1, average, state.rng)
    new = jax.tree.map(lambda x, old: jnp.where(ok, x, old), new, state)
    return new, Metrics(value, norm, ok)

  return train_step


def _all_finite(tree: Any) -> Array:
  found = [jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]
  return jnp.all(jnp.array(found))


def cut(batch: Any, rng: Array, parts: int) -> tuple[Any, Array]:
  """The parts of a batch, and what each draws from.

  Every part has examples from the whole batch, so that one which is split over
  devices stays split: the i-th of part p is number i * parts + p of the batch.

  Args:
    batch: arrays [B, ...].
    rng: of the step.
    parts: how many; must divide B.

  Returns:
    Arrays [parts, B / parts, ...], and keys [parts]; of one part, `rng` itself.
  """

  def split(x):
    return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)

  rngs = rng[None]
  if parts > 1:
    fold = lambda number: jax.random.fold_in(rng, 2 + number)
    rngs = jax.vmap(fold)(jnp.arange(parts))
  return jax.tree.map(split, batch), rngs


def make_predict_step(
  model: nn.Module, query: Query | None = None, take: Gather = gather
) -> Callable[..., tuple[Array, Array]]:
  """A `(params, memory, batch)` to logits and attention weights, for `jit`.

  Args:
    model: called with (query, keys, values, mask).
    query: see `make_loss`.
    take: gathers rows of the working set.
  """

  def predict(params, memory, batch):
    own, z = _split(params, batch, query)
    given = inputs(memory, batch, take)
    return model.apply({"params": own}, z, **given, return_attention=True)

  return predict
