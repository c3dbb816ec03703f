"""Linear maps fitted on the memory keys, applied to queries and keys alike.

Features of a ReLU network all point the same way; their mean must go before a
cosine means anything (DESIGN decision 2).
"""

import dataclasses
import pathlib

import numpy as np

from retrieval_aug.common import files
from retrieval_aug.common.errors import UserError
from retrieval_aug.memory.searchers import running

KINDS = ("none", "center", "pca", "whiten")


@dataclasses.dataclass(frozen=True)
class KeyTransform:
  """x -> (x - mean) @ matrix.

  Attributes:
    mean: [d] float32.
    matrix: [d, dims] float32, or None for the identity.
  """

  mean: np.ndarray
  matrix: np.ndarray | None

  def __call__(self, x: np.ndarray) -> np.ndarray:
    """Maps [n, d] to float32 [n, dims]."""
    x = np.asarray(x, np.float32) - self.mean
    return x if self.matrix is None else x @ self.matrix

  @property
  def dims(self) -> int:
    """Width of the output."""
    return len(self.mean) if self.matrix is None else self.matrix.shape[1]

  def save(self, path: pathlib.Path) -> None:
    """Writes it to an `.npz`, atomically."""
    arrays = {"mean": self.mean}
    if self.matrix is not None:
      arrays["matrix"] = self.matrix
    with files.atomic_path(path) as temporary, open(temporary, "wb") as f:
      np.savez(f, **arrays)


def load(path: pathlib.Path) -> KeyTransform:
  """Reads what `save` wrote."""
  with np.load(path, allow_pickle=False) as data:
    matrix = data.get("matrix")
    return KeyTransform(data["mean"], matrix)


def fit(keys: np.ndarray, kind: str, dims: int) -> KeyTransform:
  """Fits a transform on memory keys.

  Args:
    keys: [n, d].
    kind: "none", "center" (subtract the mean), "pca" (and keep the `dims`
      directions of most variance) or "whiten" (and give each variance 1).
    dims: directions kept by pca and whiten; 0 keeps all.

  Raises:
    UserError: unknown kind, or more dims than keys have.
  """
  if kind not in KINDS:
    raise UserError(
      f"config.search.key_transform={kind!r}: not one of {', '.join(KINDS)}."
    )
  n, d = keys.shape
  if kind == "none":
    return KeyTransform(np.zeros(d, np.float32), None)
  x = np.asarray(keys, np.float64)
  mean = x.mean(axis=0)
  if kind == "center":
    return KeyTransform(mean.astype(np.float32), None)
  dims = dims or min(d, n - 1)
  if dims > min(d, n - 1):
    raise UserError(
      f"config.search.key_dims={dims}: {n} keys of {d} dims span at most "
      f"{min(d, n - 1)}; choose a smaller value."
    )
  x = x - mean
  # In how many threads a product is summed changes its last bits: with one, a
  # worker of a cluster gets what a machine of many cores does.
  with running.one_blas_thread():
    variance, directions = np.linalg.eigh(x.T @ x / n)
  variance, directions = variance[::-1][:dims], directions[:, ::-1][:, :dims]
  # An eigenvector's sign is arbitrary: fix it, so that every run agrees.
  largest = np.abs(directions).argmax(axis=0)
  directions = directions * np.sign(directions[largest, np.arange(dims)])
  if kind == "whiten":
    floor = 1e-6 * variance[0]
    directions = directions / np.sqrt(np.maximum(variance, floor))
  return KeyTransform(mean.astype(np.float32), directions.astype(np.float32))
