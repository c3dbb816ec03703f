"""Rearranging MAM's parameters: folding for inference, stacking of layers.

Params are those of a `MAM`, as nested dicts; those of a `Classifier` hold them
under "fusion".
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

Params = Mapping[str, Any]


def fold_for_inference(params: Params, num_heads: int = 1) -> dict[str, Any]:
  """Folds psi_Q and psi_K into one matrix a layer.

  The attention needs `W_K^T psi_Q(f)` alone, which is one affine map of f:
  kernel `W_Q W_K^T` and bias `b_Q W_K^T`, for kernels stored `[in, out]`. With
  one head this halves the work and the parameters on the query's side; with H
  it is H matrices d x d in the place of two, so only H = 1 gains.

  Args:
    params: parameters of a `MAM` (or anything that holds some: every
      attention in it is folded).
    num_heads: the module's `num_heads`.

  Returns:
    Parameters for the same module with `folded=True`.
  """
  if not isinstance(params, Mapping):
    return params
  folded = {
    name: fold_for_inference(part, num_heads)
    for name, part in params.items()
    if not ("key" in params and name in ("query", "key"))
  }
  if "key" in params and "query" in params:
    folded["folded"] = _fold(params["query"], params["key"], num_heads)
  return folded


def _fold(query: Params, key: Params, heads: int) -> dict[str, jax.Array]:
  def split(x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)

  # `...` are stacked layers.
  exact = {"precision": "highest"}
  key = split(key["kernel"])
  kernel = jnp.einsum(
    "...ihe,...mhe->...ihm", split(query["kernel"]), key, **exact
  )
  bias = jnp.einsum("...he,...mhe->...hm", split(query["bias"]), key, **exact)
  return {
    "kernel": kernel.reshape(*kernel.shape[:-2], -1),
    "bias": bias.reshape(*bias.shape[:-2], -1),
  }


def stack_layers(params: Params) -> dict[str, Any]:
  """`layer_0`, `layer_1`, ... as one `layers`, for `scan_layers=True`.

  Args:
    params: parameters of a `MAM` whose layers are not shared.

  Returns:
    `layers`, whose leaves have a new leading axis `[L, ...]`, and whatever
    else there was.
  """
  found = {name: _layer_index(name) for name in params}
  order = sorted(
    (name for name in params if found[name] is not None), key=found.get
  )
  rest = {name: params[name] for name in params if found[name] is None}
  layers = [params[name] for name in order]
  return {"layers": jax.tree.map(lambda *x: jnp.stack(x), *layers), **rest}


def unstack_layers(params: Params) -> dict[str, Any]:
  """The opposite of `stack_layers`."""
  rest = {name: part for name, part in params.items() if name != "layers"}
  count = jax.tree.leaves(params["layers"])[0].shape[0]
  layers = {
    f"layer_{i}": jax.tree.map(lambda x, i=i: x[i], params["layers"])
    for i in range(count)
  }
  return {**layers, **rest}


def _layer_index(name: str) -> int | None:
  match = re.fullmatch(r"layer_(\d+)", name)
  return int(match[1]) if match else None
