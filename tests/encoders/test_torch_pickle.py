import io
import os
import pickle
import struct

import numpy as np
import pytest

from retrieval_aug.common.errors import UserError
from retrieval_aug.encoders import torch_pickle

# Old-style files, put together opcode by opcode: torch is not needed, and
# files that torch would not write can be made.


def _str(text):
  data = text.encode()
  return b"X" + struct.pack("<I", len(data)) + data


def _int(n):
  return b"J" + struct.pack("<i", n)


def _tuple(*parts):
  return b"(" + b"".join(parts) + b"t"


def _global(module, name):
  return f"c{module}\n{name}\n".encode()


_EMPTY = _global("collections", "OrderedDict") + b")R"


def _tensor(key, kind, count, shape, strides, offset=0):
  pid = _tuple(
    _str("storage"),
    _global("torch", kind),
    _str(key),
    _str("cpu"),
    _int(count),
    b"N",
  )
  arguments = _tuple(
    pid + b"Q",
    _int(offset),
    _tuple(*map(_int, shape)),
    _tuple(*map(_int, strides)),
    b"\x89",
    _EMPTY,
  )
  return _global("torch._utils", "_rebuild_tensor_v2") + arguments + b"R"


def _file(tensors, storages, keys=None):
  """A `.pth`: opcodes of tensors by name, arrays of storages by key."""
  items = b"".join(_str(name) + code for name, code in tensors.items())
  # As torch has it: attributes set on the dictionary by BUILD.
  metadata = b"}" + _str("_metadata") + _EMPTY + b"s" + b"b"
  parts = [
    pickle.dumps(0x1950A86A20F9469CFC6C, 2),
    pickle.dumps(1001, 2),
    pickle.dumps({"little_endian": True}, 2),
    b"\x80\x02" + _EMPTY + b"(" + items + b"u" + metadata + b".",
    pickle.dumps(list(storages) if keys is None else keys, 2),
  ]
  for array in storages.values():
    parts += [struct.pack("<q", array.size), array.tobytes()]
  return b"".join(parts)


def _read(data):
  return torch_pickle.read_state_dict(io.BytesIO(data), "weights.pth")


_STORAGE = np.arange(30, dtype=np.float32)
_GOOD = _file(
  {
    "a": _tensor("7", "FloatStorage", 30, (2, 3, 4), (1, 2, 6), offset=5),
    "b": _tensor("7", "FloatStorage", 30, (30,), (1,)),
    "n": _tensor("8", "LongStorage", 1, (), ()),
  },
  {"7": _STORAGE, "8": np.array([41])},
)


def test_read_state_dict_gives_strided_views_as_contiguous_arrays():
  found = _read(_GOOD)
  assert list(found) == ["a", "b", "n"]
  transposed = _STORAGE[5:29].reshape(4, 3, 2).transpose(2, 1, 0)
  np.testing.assert_array_equal(found["a"], transposed)
  np.testing.assert_array_equal(found["b"], _STORAGE)
  assert found["a"].flags.c_contiguous and found["a"].flags.writeable
  assert found["n"].shape == () and found["n"].dtype == np.int64
  assert found["n"] == 41


@pytest.mark.parametrize(
  "kind, dtype",
  [
    ("FloatStorage", np.float32),
    ("DoubleStorage", np.float64),
    ("HalfStorage", np.float16),
    ("LongStorage", np.int64),
    ("IntStorage", np.int32),
  ],
)
def test_read_state_dict_keeps_the_dtype(kind, dtype):
  values = np.array([3, 1, 2], dtype)
  found = _read(_file({"x": _tensor("0", kind, 3, (3,), (1,))}, {"0": values}))
  assert found["x"].dtype == dtype
  np.testing.assert_array_equal(found["x"], values)


def test_read_state_dict_takes_a_path(tmp_path):
  path = tmp_path / "weights.pth"
  path.write_bytes(_GOOD)
  assert list(torch_pickle.read_state_dict(path, "w")) == ["a", "b", "n"]


class _Hostile:
  def __init__(self, marker):
    self.marker = marker

  def __reduce__(self):
    return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("position", range(3))
def test_hostile_pickle_is_refused_by_name_and_not_run(
  tmp_path, protocol, position
):
  harmless = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
  marker = tmp_path / "ran"
  parts = [pickle.dumps(value, 2) for value in harmless[:position]]
  parts.append(pickle.dumps(_Hostile(marker), protocol))
  expected = rf"weights\.pth: refused: it asks for {os.mkdir.__module__}\.mkdir"
  with pytest.raises(UserError, match=expected):
    _read(b"".join(parts))
  assert not marker.exists()


@pytest.mark.parametrize(
  "module, name",
  [
    ("builtins", "eval"),
    ("torch", "load"),
    ("torch._utils", "_rebuild_tensor"),
    ("collections", "namedtuple"),
    ("collections", "OrderedDict.fromkeys"),
    ("numpy", "fromfile"),
  ],
)
def test_any_other_global_is_refused_by_name(module, name):
  with pytest.raises(UserError, match=f"asks for {module}.{name}, "):
    _read(_file({"x": _global(module, name)}, {}))


def test_file_truncated_anywhere_is_refused():
  for length in range(len(_GOOD)):
    with pytest.raises(UserError, match="weights.pth: (truncated|refused)"):
      _read(_GOOD[:length])


def test_damaged_file_gives_arrays_or_a_user_error():
  refused = 0
  for position in range(len(_GOOD)):
    for flip in (1, 0x80, 0xFF):
      data = bytearray(_GOOD)
      data[position] ^= flip
      try:
        found = _read(bytes(data))
      except UserError:
        refused += 1
      else:
        assert all(type(v) is np.ndarray for v in found.values())
  assert refused > len(_GOOD)


@pytest.mark.parametrize(
  "shape, strides, offset",
  [
    ((31,), (1,), 0),
    ((30,), (1,), 1),
    ((2, 3), (29, 1), 0),
    ((1000, 1000), (0, 0), 0),
  ],
)
def test_view_beyond_its_storage_is_refused(shape, strides, offset):
  tensor = _tensor("0", "FloatStorage", 30, shape, strides, offset)
  with pytest.raises(UserError, match="'x' reaches beyond its storage"):
    _read(_file({"x": tensor}, {"0": _STORAGE}))


@pytest.mark.parametrize(
  "shape, strides, offset",
  [((-3,), (1,), 0), ((3,), (-1,), 5), ((3,), (1,), -1), ((3, 1), (1,), 0)],
)
def test_malformed_view_is_refused(shape, strides, offset):
  tensor = _tensor("0", "FloatStorage", 30, shape, strides, offset)
  with pytest.raises(UserError, match="malformed"):
    _read(_file({"x": tensor}, {"0": _STORAGE}))


def test_count_that_differs_from_the_pickle_is_refused():
  tensor = _tensor("0", "FloatStorage", 29, (3,), (1,))
  with pytest.raises(UserError, match="holds 30 elements .* say 29"):
    _read(_file({"x": tensor}, {"0": _STORAGE}))


def test_promised_count_is_compared_with_the_file_before_memory_is_taken():
  huge = 2**31 - 1
  tensor = _tensor("0", "DoubleStorage", huge, (1,), (1,))
  data = _file({"x": tensor}, {}, keys=["0"]) + struct.pack("<q", huge)
  with pytest.raises(UserError, match=f"{8 * huge} bytes expected .* 0 left"):
    _read(data)


def test_storages_that_do_not_match_the_tensors_are_refused():
  tensor = _tensor("0", "FloatStorage", 30, (3,), (1,))
  with pytest.raises(UserError, match="do not match its list of storages"):
    _read(_file({"x": tensor}, {"1": _STORAGE}))


def test_zip_format_is_refused_with_the_remedy():
  remedy = "newer zip format.*_use_new_zipfile_serialization=False"
  with pytest.raises(UserError, match=remedy):
    _read(b"PK\x03\x04" + bytes(100))


def test_state_dict_of_other_things_is_refused():
  with pytest.raises(UserError, match="something else than named tensors"):
    _read(_file({"epoch": _int(3)}, {}))
