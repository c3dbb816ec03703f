"""The one place where TensorFlow is imported."""

import functools
import os
import warnings
from types import ModuleType

from retrieval_aug.common.errors import UserError


@functools.cache
def import_tensorflow() -> ModuleType:
  """Imports TensorFlow for input only: CPU, quiet, no claim on accelerators.

  TensorFlow reserves the whole memory of every GPU that it sees, and would
  take it from JAX.
  """
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      import tensorflow as tf
  except ImportError as error:
    raise UserError(
      f"TensorFlow cannot be imported ({error}); install it with "
      "pip install 'retrieval_aug[run]'."
    ) from error
  for kind in ("GPU", "TPU"):
    tf.config.set_visible_devices([], kind)
  return tf
