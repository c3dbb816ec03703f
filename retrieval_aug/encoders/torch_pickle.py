"""Reads PyTorch's old-style `.pth` files without torch and without trust.

Such a file is five pickles (magic number, protocol version, machine facts, the
object, the storages' keys) followed by the storages' raw bytes, each after its
int64 number of elements. A pickle may name any function of any module to be
called; this reader knows the few names that a state dict needs, maps them to
its own inert stand-ins, and refuses the rest.
"""

import collections
import contextlib
import dataclasses
import io
import math
import os
import pathlib
import pickle
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from retrieval_aug.common.errors import UserError

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001

_DTYPES = {
  "FloatStorage": "<f4",
  "DoubleStorage": "<f8",
  "HalfStorage": "<f2",
  "LongStorage": "<i8",
  "IntStorage": "<i4",
}


@dataclasses.dataclass(frozen=True, slots=True)
class _StorageType:
  """Stands for `torch.FloatStorage` and its like."""

  dtype: str


@dataclasses.dataclass(frozen=True, slots=True)
class _Storage:
  """A storage that the object names; its bytes come later in the file."""

  key: str
  dtype: str
  count: int


@dataclasses.dataclass(frozen=True, slots=True)
class _Tensor:
  """A strided view of a storage, in elements."""

  storage: _Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


class _Refused(Exception):
  """Why the file is refused, without its name."""


class _RebuildTensor:
  """Stands for `torch._utils._rebuild_tensor_v2`.

  An object without attributes, because the BUILD opcode may set attributes on
  whatever the unpickler holds.
  """

  __slots__ = ()

  def __call__(self, storage, offset, shape, strides, *_):
    whole = all(
      type(n) is int and n >= 0 for n in (offset, *shape, *strides)
    ) and len(shape) == len(strides)
    if type(storage) is not _Storage or not whole:
      raise _Refused("a tensor has a malformed storage, shape or stride")
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


# The unpickler written in Python: the one in C fills its memo up to any index
# that the file names, which takes all memory for one hostile opcode.
class _Unpickler(pickle._Unpickler):
  def find_class(self, module: str, name: str) -> Any:
    if (module, name) == ("collections", "OrderedDict"):
      return collections.OrderedDict
    if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
      return _RebuildTensor()
    if module == "torch" and name in _DTYPES:
      return _StorageType(_DTYPES[name])
    raise _Refused(
      f"it asks for {module}.{name}, which a file of weights does not need "
      "and which may run code"
    )

  def persistent_load(self, pid: Any) -> _Storage:
    kinds = (str, _StorageType, str, str, int, type(None))
    if type(pid) is not tuple or tuple(map(type, pid)) != kinds:
      raise _Refused("a storage is described in a way that is not supported")
    _, storage_type, key, _, count, _ = pid
    if pid[0] != "storage" or count < 0:
      raise _Refused("a storage is described in a way that is not supported")
    return _Storage(key, storage_type.dtype, count)


def read_state_dict(
  file: str | os.PathLike | BinaryIO, name: str
) -> dict[str, np.ndarray]:
  """Reads the state dict in an old-style (not zip) `.pth` file.

  Args:
    file: a path or an open binary file.
    name: what to call the file in messages.

  Returns:
    Arrays by parameter name, contiguous, in the file's order.

  Raises:
    UserError: the file is truncated, is no old-style state dict, or asks for
      anything but tensors.
  """
  with _opened(file) as f:
    try:
      return _read(f)
    except _Refused as error:
      raise UserError(
        f"{name}: refused: {error}; use weights from a source that you trust, "
        "saved by torch.save(model.state_dict(), path, "
        "_use_new_zipfile_serialization=False)."
      ) from error
    # A broken pickle raises nearly anything.
    except Exception as error:
      raise UserError(
        f"{name}: truncated or not an old-style PyTorch file "
        f"({type(error).__name__}: {error}); download it again."
      ) from error


@contextlib.contextmanager
def _opened(file: str | os.PathLike | BinaryIO) -> Iterator[BinaryIO]:
  if isinstance(file, (str, os.PathLike)):
    with io.BytesIO(pathlib.Path(file).read_bytes()) as f:
      yield f
  else:
    yield file


def _read(f: BinaryIO) -> dict[str, np.ndarray]:
  start = f.tell()
  if f.read(4) == b"PK\x03\x04":
    raise _Refused("it is in PyTorch's newer zip format")
  f.seek(start)
  if _Unpickler(f).load() != _MAGIC:
    raise _Refused("its magic number is not PyTorch's")
  if _Unpickler(f).load() != _PROTOCOL:
    raise _Refused(f"its protocol version is not {_PROTOCOL}")
  facts = _Unpickler(f).load()
  if type(facts) is not dict or facts.get("little_endian") is not True:
    raise _Refused("it was not written on a little-endian machine")
  tensors = _Unpickler(f).load()
  if not isinstance(tensors, dict):
    raise _Refused("it does not hold a state dict")
  # By the type's own method: the file may have set attributes of the object.
  tensors = dict(dict.items(tensors))
  for key, tensor in tensors.items():
    if type(key) is not str or type(tensor) is not _Tensor:
      raise _Refused("its state dict holds something else than named tensors")
  keys = _Unpickler(f).load()
  storages = _read_storages(f, keys, [t.storage for t in tensors.values()])
  return {key: _view(key, t, storages) for key, t in tensors.items()}


def _read_storages(
  f: BinaryIO, keys: Any, wanted: list[_Storage]
) -> dict[str, np.ndarray]:
  """Reads the raw storages, which lie in the order of `keys`."""
  declared: dict[str, _Storage] = {}
  for storage in wanted:
    if declared.setdefault(storage.key, storage) != storage:
      raise _Refused("two tensors disagree about the storage that they share")
  if type(keys) is not list or not all(type(key) is str for key in keys):
    raise _Refused("its list of storages is malformed")
  if sorted(keys) != sorted(declared):
    raise _Refused("its tensors do not match its list of storages")
  storages = {}
  for key in keys:
    count = int.from_bytes(_exactly(f, 8), "little", signed=True)
    storage = declared[key]
    if count != storage.count:
      raise _Refused(
        f"a storage holds {count} elements where its tensors say "
        f"{storage.count}"
      )
    data = _exactly(f, count * np.dtype(storage.dtype).itemsize)
    storages[key] = np.frombuffer(data, storage.dtype)
  return storages


def _exactly(f: BinaryIO, size: int) -> bytes:
  """Reads `size` bytes, after a look at whether the file has so many.

  A read of a promised size would reserve memory for it first.
  """
  here = f.tell()
  left = f.seek(0, os.SEEK_END) - here
  f.seek(here)
  if left < size:
    raise EOFError(f"{size} bytes expected at {here}, {left} left")
  return f.read(size)


def _view(
  key: str, tensor: _Tensor, storages: dict[str, np.ndarray]
) -> np.ndarray:
  """A copy of the strided view, all of whose elements lie in its storage."""
  storage = storages[tensor.storage.key]
  size = math.prod(tensor.shape)
  last = tensor.offset + sum(
    (n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides)
  )
  # The size too: with strides of 0, few elements make an array of any size.
  if size and (last >= storage.size or size > storage.size):
    raise _Refused(f"tensor {key[:80]!r} reaches beyond its storage")
  if not size:
    return np.zeros(tensor.shape, storage.dtype)
  view = np.lib.stride_tricks.as_strided(
    storage[tensor.offset :],
    tensor.shape,
    [stride * storage.itemsize for stride in tensor.strides],
    writeable=False,
  )
  return np.array(view, order="C")
