"""Models by name, as a configuration gives them."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from retrieval_aug.models.classifier import Classifier
from retrieval_aug.models.heads import MLP, Linear
from retrieval_aug.models.mam import MAM
from retrieval_aug.models.mean_knn import MeanKNN
from retrieval_aug.models.shapes import check_choice


@dataclasses.dataclass(frozen=True)
class _Entry:
  fusion: type[nn.Module] | None
  head: type[nn.Module]
  # What this name sets that its modules do not; a caller's option wins.
  preset: dict[str, Any]


_MODELS = {
  "linear": _Entry(None, Linear, {}),
  "mlp": _Entry(None, MLP, {}),
  "mean_knn": _Entry(MeanKNN, Linear, {}),
  "mam": _Entry(MAM, Linear, {}),
  # Eq. 6 to the letter: psi and chi carry no layer index, the residual is z.
  "mam_paper": _Entry(
    MAM,
    Linear,
    {"num_layers": 8, "share_layers": True, "qk_init": "lecun_normal"},
  ),
}

# The same for all models, so that comparisons are fair. Unit-norm values have
# entries of 1 / sqrt(d_v): next to a query of norm sqrt(d) chi would have to
# grow them 20-fold against the weight decay before they had a say.
_COMMON = {"input_scale": "sqrt_d", "value_scale": "sqrt_d"}


def names() -> tuple[str, ...]:
  """The names that `build` knows."""
  return tuple(_MODELS)


def options(name: str) -> dict[str, Any]:
  """The options of a model, with the values that `build` gives them.

  Args:
    name: one of `names()`.

  Returns:
    Option name to default.
  """
  check_choice("model", name, _MODELS)
  entry = _MODELS[name]
  found = {"dtype": jnp.float32, "param_dtype": jnp.float32, **_COMMON}
  for module in (entry.head, entry.fusion):
    if module is not None:
      found.update(_fields(module))
  found.update(_COMMON)
  found.update(entry.preset)
  return found


def build(name: str, num_classes: int, **given: Any) -> Classifier:
  """Makes a classifier.

  Args:
    name: "linear", "mlp", "mean_knn", "mam" or "mam_paper".
    num_classes: C.
    **given: attributes of the model's modules, such as `num_layers`. All
      models take `input_scale`, `value_scale`, `dtype` and `param_dtype`.
      Types may be given by name ("bfloat16").

  Returns:
    A module called with `(query, keys, values, mask)`.

  Raises:
    ValueError: no such model or option; the message names the nearest.
  """
  known = options(name)
  for option in given:
    check_choice(f"option of model {name!r}", option, known)
  chosen = {**known, **given}
  for kind in ("dtype", "param_dtype"):
    chosen[kind] = jnp.dtype(chosen[kind])
  entry = _MODELS[name]

  def make(module: type[nn.Module], **extra: Any) -> nn.Module:
    wanted = {key: chosen[key] for key in _fields(module)}
    return module(**wanted, **extra)

  return Classifier(
    head=make(entry.head, num_classes=num_classes),
    fusion=None if entry.fusion is None else make(entry.fusion),
    input_scale=chosen["input_scale"],
  )


def _fields(module: type[nn.Module]) -> dict[str, Any]:
  """A module's options and their defaults."""
  return {
    field.name: field.default
    for field in dataclasses.fields(module)
    if field.name not in ("parent", "name", "num_classes")
  }
