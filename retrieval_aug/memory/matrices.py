"""Matrices in `.npy` files, opened and looked at."""

import pathlib
import re

import numpy as np

from retrieval_aug.common.errors import UserError

_BLOCK = 1 << 14  # rows that are looked at together


def read_matrix(
  path: pathlib.Path,
  rows: int | None,
  dims: int,
  remedy: str,
  *,
  mapped: bool = False,
  check: bool = True,
) -> np.ndarray:
  """Reads a finite float matrix [rows, dims] or says what is wrong with it.

  Args:
    path: of a `.npy` file.
    rows: that it must have; None for any.
    dims: likewise.
    remedy: what to do if it is damaged.
    mapped: leave it on disk, and map it into memory.
    check: whether to read all of it to see that it is finite.
  """
  if not path.exists():
    raise UserError(f"{path}: missing; {remedy}.")
  try:
    mode = "r" if mapped else None
    array = np.load(path, mmap_mode=mode, allow_pickle=False)
  except (ValueError, OSError, EOFError) as error:
    # NumPy's reason may run over several lines.
    reason = re.sub(r"\s+", " ", str(error))[:120]
    raise UserError(
      f"{path}: not a whole .npy file ({reason}); {remedy}."
    ) from error
  wanted = (len(array) if rows is None and array.ndim else rows, dims)
  if array.shape != wanted or array.dtype.kind != "f":
    raise UserError(
      f"{path}: holds {array.dtype} {list(array.shape)} where floats "
      f"{list(wanted)} are expected; {remedy}."
    )
  if not check:
    return array
  # In blocks, as there may be more of it than memory.
  starts = range(0, len(array), _BLOCK)
  parts = [np.isfinite(array[i : i + _BLOCK]).all(axis=1) for i in starts]
  finite = np.concatenate([np.zeros(0, bool), *parts])
  if not finite.all():
    row = int(np.flatnonzero(~finite)[0])
    raise UserError(
      f"{path}: row {row} holds NaN or infinity "
      f"({int((~finite).sum())} such rows); {remedy}."
    )
  return array
