"""ScaNN: a tree, anisotropic hashing and reordering; Linux only.

Guarded on both sides of the call, for some mistakes kill the process and
others are answered in silence: keys and queries are finite and of one width
before it (`searchers.build`), there are enough keys for each leaf, and what it
pads with id 0 and a NaN distance becomes -1 after it.
"""

import sys
from typing import Any

import numpy as np

from retrieval_aug.common.errors import UserError

REORDER_TYPES = ("float32", "bfloat16", "int8")
# Below it ScaNN's own advice is brute force. Hashing needs 16 keys at least.
_BRUTE_FORCE = 20_000
# Of keys a leaf. With fewer, ScaNN's default `min_partition_size` of 50 merges
# leaves, and recall falls to a third without a word.
_LEAF = 150
_SOAR_LAMBDA = 1.5
_BLOCK = 4096


class ScannTree:
  """ScaNN over unit keys [n, d].

  Args:
    keys: float32 [n, d], unit rows.
    k: neighbors that will be asked for.
    leaves: of the tree; 0 takes 2 sqrt(n).
    leaves_to_search: by a query; 0 takes a tenth.
    reorder: candidates that are scored by their keys; 0 takes 4 k.
    reorder_type: precision of the keys held for that.
    soar: a second leaf for each key.
  """

  name = "scann"

  def __init__(
    self,
    keys: np.ndarray,
    *,
    k: int,
    leaves: int = 0,
    leaves_to_search: int = 0,
    reorder: int = 0,
    reorder_type: str = "float32",
    soar: bool = False,
  ):
    if reorder_type not in REORDER_TYPES:
      raise UserError(
        f"config.search.scann.reorder_type={reorder_type!r}: not one of "
        f"{', '.join(REORDER_TYPES)}."
      )
    scann = import_scann()
    n, self._dims = keys.shape
    builder = scann.scann_ops_pybind.builder(keys, min(k, n), "dot_product")
    self._reorder_type, self._soar = reorder_type, soar
    self._tree = n >= _BRUTE_FORCE
    if not self._tree:
      self.effort = self.most_effort = self.reorder = 1
      self._searcher = builder.score_brute_force().build()
      return
    # Not more leaves than keys: that is refused.
    leaves = min(leaves or round(2 * n**0.5), n)
    if leaves * _LEAF > n:
      leaves = max(1, n // _LEAF)
    self.most_effort = leaves
    self.effort = min(leaves, leaves_to_search or max(10, leaves // 10))
    self.reorder = max(reorder or 4 * k, k)
    self._searcher = (
      builder.tree(
        num_leaves=leaves,
        num_leaves_to_search=self.effort,
        training_sample_size=min(n, max(100_000, leaves)),
        soar_lambda=_SOAR_LAMBDA if soar else None,
      )
      .score_ah(
        min(2, self._dims),
        anisotropic_quantization_threshold=0.2,
      )
      .reorder(
        min(self.reorder, n),
        quantize=getattr(scann.ReorderType, reorder_type.upper()),
      )
      .build()
    )

  @property
  def parameters(self) -> dict[str, Any]:
    """What a tree was built and is searched with; none of brute force."""
    if not self._tree:
      return {}
    return {
      "leaves": self.most_effort,
      "leaves_to_search": self.effort,
      "reorder": self.reorder,
      "reorder_type": self._reorder_type,
      "soar": self._soar,
    }

  @property
  def bytes_per_key(self) -> float:
    """Of keys, codes (4 bits for 2 dims; of SOAR twice), leaf and number."""
    if not self._tree:
      return 4.0 * self._dims
    width = {"float32": 4, "bfloat16": 2, "int8": 1}[self._reorder_type]
    codes = self._dims / 4 + 4
    return self._dims * width + codes * (2 if self._soar else 1)

  def candidates(self, queries: np.ndarray, k: int) -> np.ndarray:
    """Probably the best k; -1 where too few keys are in the leaves searched."""
    options = {"final_num_neighbors": k}
    if self._tree:
      options["pre_reorder_num_neighbors"] = max(self.reorder, k)
      options["leaves_to_search"] = min(self.effort, self.most_effort)
    out = []
    starts = range(0, len(queries), _BLOCK)
    for start in starts:
      ids, distances = self._searcher.search_batched_parallel(
        queries[start : start + _BLOCK], **options
      )
      ids = np.where(np.isnan(distances), -1, ids.astype(np.int64))
      missing = k - ids.shape[1]
      out.append(np.pad(ids, ((0, 0), (0, missing)), constant_values=-1))
    return np.concatenate(out)


def import_scann():
  """ScaNN without TensorFlow, where that is not loaded yet.

  ScaNN imports it if it can, for operations that are not used here: seconds,
  and a failure where the version is another.

  Raises:
    UserError: it is not installed.
  """
  hide = "tensorflow" not in sys.modules and "scann" not in sys.modules
  if hide:
    sys.modules["tensorflow"] = None
  try:
    import scann
  except ImportError as error:
    raise UserError(
      f"ScaNN cannot be imported ({error}); on Linux pip install "
      "'retrieval_aug[run]', or set --config.search.searcher=auto."
    ) from error
  finally:
    if hide:
      del sys.modules["tensorflow"]
  return scann
