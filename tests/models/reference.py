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


def attend(p, f, keys, d, heads, norm, temperature, gates):
  """The softmax weights `[H, k]` of eq. 5, for keys scaled and in use."""
  psi_q = dense(f, p["query"])
  width = d // heads
  weights = np.zeros((heads, len(keys)))
  for h in range(heads):
    part = slice(h * width, (h + 1) * width)
    divisor = temperature
    if temperature == "learned":
      divisor = np.exp(p["log_temperature"][h])
    logits = np.zeros(len(keys))
    for j, m in enumerate(keys):
      if norm == "qk":
        g = p["key"]["kernel"][:, part] @ psi_q[part]
        cosine = g @ m / (np.linalg.norm(g) * np.linalg.norm(m))
        logits[j] = np.sqrt(d) * cosine / divisor
      else:
        psi_k = dense(m, p["key"])
        logits[j] = psi_q[part] @ psi_k[part] / np.sqrt(width) / divisor
    weights[h] = softmax(logits + gates)
  return weights


def mam(
  params,
  query,
  keys,
  values,
  mask,
  *,
  sources=None,
  num_layers=8,
  residual="query",
  share_layers=False,
  input_scale="sqrt_d",
  value_scale="none",
  value_fusion="concatenate",
  num_heads=1,
  norm=None,
  attention_temperature=1.0,
):
  """Eq. 5 and 6. Returns embeddings `[B, d]` and weights `[B, L, k]`."""
  d = query.shape[-1]
  values = values if isinstance(values, (tuple, list)) else (values,)
  groups = (
    [(v,) for v in values] if value_fusion == "separate" else [tuple(values)]
  )
  out = np.zeros_like(query)
  attention = np.zeros((query.shape[0], num_layers, keys.shape[1]))
  for i, z in enumerate(query):
    used = np.flatnonzero(mask[i])
    f = z
    for layer in range(num_layers):
      if used.size == 0:
        continue
      p = params["layer_0" if share_layers else f"layer_{layer}"]
      delta = 0.0
      for n, group in enumerate(groups):
        own = p[f"value_{n}"] if value_fusion == "separate" else p
        gates = 0.0 if sources is None else own["source_gate"][sources[i, used]]
        weights = attend(
          own,
          scale(f, input_scale),
          [scale(m, input_scale) for m in keys[i, used]],
          d,
          num_heads,
          norm,
          attention_temperature,
          gates,
        )
        attended = [
          sum(
            w * scale(v[i, j], value_scale)
            for w, j in zip(row, used, strict=True)
          )
          for row in weights
          for v in group
        ]
        delta = delta + dense(np.concatenate(attended), own["output"])
        attention[i, layer, used] += weights.mean(axis=0) / len(groups)
      f = (z if residual == "query" else f) + delta
    out[i] = f
  return out, attention


def layer_norm(x, params):
  centered = x - x.mean(axis=-1, keepdims=True)
  variance = np.mean(centered**2, axis=-1, keepdims=True)
  normed = centered / np.sqrt(variance + 1e-6)
  return normed * params["scale"] + params["bias"]


def gelu(x):
  """The tanh form, Flax's default."""
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def att(q, k, v, heads):
  """Eq. 5 of RetFormer. Returns `[P, d]` and weights `[H, P, P]`."""
  width = q.shape[-1] // heads
  found, weights = [], []
  for h in range(heads):
    part = slice(h * width, (h + 1) * width)
    logits = q[:, part] @ k[:, part].T / np.sqrt(width)
    w = np.stack([softmax(row) for row in logits])
    found.append(w @ v[:, part])
    weights.append(w)
  return np.concatenate(found, axis=-1), np.stack(weights)


def retformer(
  params,
  query,
  keys,
  values,
  mask,
  *,
  num_layers=4,
  block="literal",
  text_stream="cross",
  streams="both",
  position="learned",
  max_neighbors=32,
  num_heads=1,
  feedforward_dim=None,
  input_scale="sqrt_d",
  value_scale="sqrt_d",
):
  """Read-outs and class-token weights, with all rows of all layers."""
  del max_neighbors, feedforward_dim
  names = {"image_only": ["image"], "text_only": ["text"]}.get(
    streams, ["image", "text"]
  )
  outs = []
  attention = np.zeros((query.shape[0], num_layers, keys.shape[1]))
  for i, z in enumerate(query):
    used = np.flatnonzero(mask[i])
    tokens = {}
    for s in names:
      if s == "image":
        first = scale(z, input_scale)
        others = [scale(keys[i, j], input_scale) for j in used]
      else:
        first = np.zeros_like(z)
        others = [scale(values[i, j], value_scale) for j in used]
        if "text_input" in params:
          others = [dense(x, params["text_input"]) for x in others]
      tokens[s] = np.stack([params[f"{s}_cls"], first, *others])
      if position == "learned":
        slots = [0, 1, *(j + 2 for j in used)]
        tokens[s] = tokens[s] + params[f"{s}_position"][slots]
    for layer in range(num_layers):
      p = params[f"layer_{layer}"]
      normed = {s: layer_norm(x, p[f"{s}_norm"]) for s, x in tokens.items()}
      fused = {}
      for s, x in tokens.items():
        asks = s
        if len(names) == 2:
          asks = "text" if s == "image" or text_stream == "self" else "image"
        found, weights = att(
          dense(normed[asks], p[f"{asks}_query"]),
          dense(normed[s], p[f"{s}_key"]),
          dense(normed[s], p[f"{s}_value"]),
          num_heads,
        )
        if block == "vanilla":
          found = dense(found, p[f"{s}_output"])
        fused[s] = x + found
        if block == "vanilla":
          name = f"{s}_feedforward"
          hidden = layer_norm(fused[s], p[f"{name}_norm"])
          hidden = gelu(dense(hidden, p[f"{name}_hidden"]))
          fused[s] = fused[s] + dense(hidden, p[f"{name}_output"])
        attention[i, layer, used] += weights[:, 0, 2:].mean(0) / len(names)
      tokens = fused
    outs.append(
      np.concatenate(
        [layer_norm(tokens[s][0], params[f"{s}_norm"]) for s in names]
      )
    )
  return np.stack(outs), attention


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
