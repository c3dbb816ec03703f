"""The equations in float64 NumPy, one example and one neighbor at a time.

Written from the papers and DESIGN section 5, not from the modules: all keys
are projected, hidden neighbors are left out rather than masked.
"""

import numpy as np


def scale(x, how):
  """DESIGN decision 2: `x / ||x|| * sqrt(d)`; zero stays zero."""
  norm = np.sqrt(np.sum(x * x))
  if how == "none" or norm == 0:
    return x
  return x / norm * np.sqrt(x.size)


def dense(x, params):
  """`x W + b`; psi_K has no bias."""
  return x @ params["kernel"] + params.get("bias", 0.0)


def softmax(logits):
  raised = np.exp(logits - np.max(logits))
  return raised / np.sum(raised)


def mean_knn(params, query, keys, values, mask, *, value_scale="none"):
  """Eq. 4. Returns embeddings `[B, d]` and weights `[B, 1, k]`."""
  del keys
  out = np.zeros_like(query)
  attention = np.zeros((query.shape[0], 1, values.shape[1]))
  for i, z in enumerate(query):
    used = np.flatnonzero(mask[i])
    if used.size == 0:
      out[i] = z
      continue
    attention[i, 0, used] = 1 / used.size
    mean = sum(scale(values[i, j], value_scale) for j in used) / used.size
    out[i] = z + dense(mean, params["output"])
  return out, attention


def mam(
  params,
  query,
  keys,
  values,
  mask,
  *,
  num_layers=8,
  residual="query",
  share_layers=False,
  input_scale="sqrt_d",
  value_scale="none",
):
  """Eq. 5 and 6. Returns embeddings `[B, d]` and weights `[B, L, k]`."""
  d = query.shape[-1]
  out = np.zeros_like(query)
  attention = np.zeros((query.shape[0], num_layers, keys.shape[1]))
  for i, z in enumerate(query):
    used = np.flatnonzero(mask[i])
    f = z
    for layer in range(num_layers):
      if used.size == 0:
        continue
      p = params["layer_0" if share_layers else f"layer_{layer}"]
      psi_q = dense(scale(f, input_scale), p["query"])
      logits = np.array(
        [
          psi_q @ dense(scale(keys[i, j], input_scale), p["key"]) / np.sqrt(d)
          for j in used
        ]
      )
      weights = softmax(logits)
      attention[i, layer, used] = weights
      attended = sum(
        w * scale(values[i, j], value_scale)
        for w, j in zip(weights, used, strict=True)
      )
      f = (z if residual == "query" else f) + dense(attended, p["output"])
    out[i] = f
  return out, attention


def linear(params, x):
  """Eq. 1 with a linear h."""
  return dense(x, params)


def mlp(params, x):
  """Two layers with a ReLU in the middle."""
  return dense(np.maximum(dense(x, params["hidden"]), 0.0), params["output"])


def to_numpy(tree):
  """A parameter tree as nested dicts of float64 arrays."""
  if isinstance(tree, dict):
    return {key: to_numpy(value) for key, value in tree.items()}
  return np.asarray(tree, np.float64)


def numeric_gradient(function, params, step=1e-6):
  """Central differences of a scalar function of a tree of float64 arrays."""
  if isinstance(params, dict):
    return {
      key: numeric_gradient(
        lambda part, key=key: function({**params, key: part}),
        params[key],
        step,
      )
      for key in params
    }
  gradient = np.zeros_like(params)
  for index in np.ndindex(params.shape):
    above, below = params.copy(), params.copy()
    above[index] += step
    below[index] -= step
    gradient[index] = (function(above) - function(below)) / (2 * step)
  return gradient
