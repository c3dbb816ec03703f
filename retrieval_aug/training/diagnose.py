"""The first tensor of a step that is not finite, and whose it is.

A step whose loss is not finite says that something is wrong, not what. Here it
is computed once more, eagerly, and looked at in the order in which it depends
on itself: parameters, batch, what each module is called with and gives, losses,
gradients. What comes first is the cause, or next to it; all that follows is
not finite because of it.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax import Array

# Ids that a message names; the report has all.
_NAMED = 3

# From parameters and inputs to losses [B] and logits [B, C].
LossOf = Callable[[Any, Any], tuple[Array, Array]]


@dataclasses.dataclass(frozen=True)
class Bad:
  """A tensor that is not finite.

  Attributes:
    name: of a parameter or gradient, `fusion/layer_0/query/kernel`; of an
      input, `batch/query`; of an activation, the path and method of a module
      and what of it, `fusion/layer_0/query (output)`.
    kind: "parameter", "input", "activation", "logits", "loss" or "gradient".
    shape: of the tensor.
    dtype: likewise.
    count: numbers in it that are not finite.
    sample: the first of them: "nan", "inf" or "-inf".
    examples: positions in the batch of those affected, ascending: rows with
      such numbers where the first axis is the batch, else those whose loss is
      not finite; None where they are not known, as of parameters.
  """

  name: str
  kind: str
  shape: tuple[int, ...]
  dtype: str
  count: int
  sample: str
  examples: np.ndarray | None = None


def first_bad(loss_of: LossOf, params: Any, inputs: Any) -> Bad | None:
  """Finds the first tensor of a step that is not finite.

  Not for `jit`: what is traced, as the layers of an `nn.scan` or `nn.remat`,
  has no numbers to look at, and the module around it is named instead.

  Args:
    loss_of: losses [B] and logits [B, C] of (params, inputs), by `apply` of
      Flax modules; the mean of the losses is what is trained on.
    params: nested dict of arrays.
    inputs: tree of arrays, such as query [B, d], label [B] and neighbors. What
      a mask hides counts too: 0 times infinity is no number.

  Returns:
    What was found, or None: computed like this, all is finite.
  """
  # NumPy warns of an overflow, where JAX computes on.
  params, inputs = jax.tree.map(jnp.asarray, (params, inputs))
  bad = _first_of(params, "parameter", "")
  if bad is not None:
    return bad
  batch = jax.eval_shape(lambda: loss_of(params, inputs))[0].shape[0]
  bad = _first_of(inputs, "input", "batch/", batch)
  if bad is not None:
    return bad
  watch = _Watch(batch)
  with nn.intercept_methods(watch):
    losses, logits = loss_of(params, inputs)
  bad = watch.found or _look("logits", "logits", logits, batch)
  bad_loss = _look("loss", "loss", losses, batch)
  if bad is not None:
    if bad.examples is None and bad_loss is not None:
      bad = dataclasses.replace(bad, examples=bad_loss.examples)
    return bad
  if bad_loss is not None:
    return bad_loss
  # Compiled, for there is nothing to look at on the way.
  mean = lambda params, inputs: loss_of(params, inputs)[0].mean()
  value, gradients = jax.jit(jax.value_and_grad(mean))(params, inputs)
  bad = _look("loss (mean)", "loss", value)
  bad = bad or _first_of(gradients, "gradient", "")
  if bad is not None:
    return bad
  # Numbers whose squares are not finite are finite themselves.
  return _look("gradient (global norm)", "gradient", optax.tree.norm(gradients))


class _Watch:
  """Looks at what modules are called with and give, until something is bad."""

  def __init__(self, batch: int):
    self.found: Bad | None = None
    self._batch = batch

  def __call__(
    self,
    method: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
  ) -> Any:
    """Called by Flax in the place of each method of each module."""
    where = "/".join(context.module.path) or type(context.module).__name__
    if context.method_name != "__call__":
      where = f"{where}.{context.method_name}"
    # Also what a module is called with, for no module gave a sum of two.
    bound = inspect.signature(method).bind(*args, **kwargs)
    self._look(where, "input", bound.arguments)
    given = method(*args, **kwargs)
    self._look(where, "output", given)
    return given

  def _look(self, where: str, what: str, tree: Any) -> None:
    for name, x in _floats(tree):
      label = f"{where} ({f'{what} {name}'.rstrip()})"
      self.found = self.found or _look(label, "activation", x, self._batch)


def _floats(tree: Any) -> Iterator[tuple[str, Any]]:
  """Names and values of arrays of floats, less those that are being traced."""
  for path, x in jax.tree.leaves_with_path(tree):
    if isinstance(x, jax.core.Tracer):
      continue
    is_array = isinstance(x, (jax.Array, np.ndarray))  # and no type or module
    if is_array and jnp.issubdtype(x.dtype, jnp.floating):
      yield jax.tree_util.keystr(path, simple=True, separator="/"), x


def _first_of(
  tree: Any, kind: str, prefix: str, batch: int | None = None
) -> Bad | None:
  """The first bad one of a tree."""
  for name, x in _floats(tree):
    bad = _look(prefix + name, kind, x, batch)
    if bad is not None:
      return bad
  return None


def _look(name: str, kind: str, x: Any, batch: int | None = None) -> Bad | None:
  """An array as a `Bad` if it is, with examples if its first axis is theirs."""
  # Not `jnp`, which would be traced where what is called is.
  x = np.asarray(x)
  wrong = ~np.isfinite(x)
  if not wrong.any():
    return None
  examples = None
  if batch is not None and x.shape[:1] == (batch,):
    examples = np.flatnonzero(wrong.reshape(batch, -1).any(axis=1))
  return Bad(
    name,
    kind,
    x.shape,
    x.dtype.name,
    int(wrong.sum()),
    str(float(x[wrong][0])),
    examples,
  )


def message(
  bad: Bad | None,
  *,
  what: str,
  step: int,
  ids: Sequence[str],
  saved: str | None = None,
  processes: int = 1,
) -> str:
  """The one line that a `UserError` says.

  Args:
    bad: from `first_bad`.
    what: which run, such as "train mam seed 0".
    step: the step that failed, counted as in `metrics.jsonl`.
    ids: of the examples of the batch, [B].
    saved: path of the file that has the `report`, if there is one.
    processes: how many have a part of the batch each, of which this is one.
  """
  everyone = _some(ids, saved)
  end = "The last good checkpoint is kept."
  if bad is None and processes > 1:
    return (
      f"{what}: step {step} is not finite, but is when computed on this "
      f"process's part of the batch alone, {everyone}; see what the other "
      f"processes say. {end}"
    )
  if bad is None:
    return (
      f"{what}: step {step} is not finite, but its loss and gradient are when "
      f"computed alone, on the batch of {everyone}: what it makes of the "
      "parameters may be too large; lower train.learning_rate, or start again "
      f"to go on from the last checkpoint. {end}"
    )
  whose = f"in the batch of {everyone}"
  if bad.examples is not None:
    whose = f"of {_some([ids[i] for i in bad.examples], saved)}"
    if len(bad.examples) == len(ids):
      whose = f"of all {len(ids)} examples, {everyone}"
  name = bad.name
  if not name.startswith(bad.kind):
    name = f"{bad.kind} {name}"
  shape = ", ".join(str(n) for n in bad.shape)
  numbers = "1 number" if bad.count == 1 else f"{bad.count} numbers"
  return (
    f"{what}: step {step} is not finite, first in the {name}, {bad.dtype} "
    f"[{shape}]: {numbers} ({bad.sample}) {whose}; {_remedy(bad)}. {end}"
  )


def report(bad: Bad | None, step: int, ids: Sequence[str]) -> dict[str, Any]:
  """What a message leaves out, for a JSON file.

  Args:
    bad: from `first_bad`.
    step: the step that failed.
    ids: of the examples of the batch, [B].

  Returns:
    step; batch, all ids; tensor, the fields of `bad`, or None; examples, ids of
    those affected, or None where they are not known.
  """
  ids = [str(i) for i in ids]
  found = {"step": step, "batch": ids, "tensor": None, "examples": None}
  if bad is not None:
    fields = dataclasses.asdict(bad)
    examples = fields.pop("examples")
    found["tensor"] = fields | {"shape": list(bad.shape)}
    if examples is not None:
      found["examples"] = [ids[i] for i in examples]
  return found


def _some(ids: Sequence[str], saved: str | None) -> str:
  named = ", ".join(repr(str(i)) for i in ids[:_NAMED])
  if len(ids) <= _NAMED:
    return named
  named += f" and {len(ids) - _NAMED} more"
  return f"{named} (all in {saved})" if saved else named


def _remedy(bad: Bad) -> str:
  if bad.kind == "parameter":
    return (
      "it was so before this step: mend the parameters that it began with "
      "(train.start_from, config.encoder), or lower train.learning_rate"
    )
  if bad.kind == "input":
    what, where = "images or embeddings", "config.dataset"
    if "neighbors" in bad.name:
      what, where = "embeddings of the memory", "config.memory"
    return (
      f"the {what} are damaged, not the training: look at {where}, and delete "
      "what was made of it in the --workdir to have it embedded again"
    )
  lower = "lower train.learning_rate"
  if bad.dtype in ("float16", "bfloat16"):
    return f"compute in float32 (the model's option dtype), or {lower}"
  if bad.kind == "gradient":
    return f"bound the steps before it by train.gradient_clip, or {lower}"
  return f"{lower}, or bound its steps by train.gradient_clip"
