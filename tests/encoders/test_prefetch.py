"""Batches loaded ahead by threads and by processes."""

import concurrent.futures
import dataclasses
import functools
import threading

import numpy as np
import pytest

from retrieval_aug.common.errors import UserError
from retrieval_aug.encoders import prefetch
from tests.encoders import pictures

_BATCHES = [range(0, 4), range(4, 8), range(8, 9)]


def _loader(images, *prepares):
  ids = [f"item/{i}" for i in range(pictures.N)]
  return prefetch.Loader("tiny", ids, images, prepares or (np.stack,))


def _load(images, processes=0, batches=_BATCHES):
  loader = _loader(images, np.stack, functools.partial(np.stack, axis=1))
  with prefetch.pool(loader, threads=2, processes=processes) as pool:
    return list(pool.ahead(batches))


def _check(found):
  assert [batch for batch, _ in found] == _BATCHES
  for batch, (first, second) in found:
    expected = np.stack([pictures.pixels(i) for i in batch])
    np.testing.assert_array_equal(first, expected)
    np.testing.assert_array_equal(second, expected.swapaxes(0, 1))


def test_threads_load_batches_in_order_for_each_encoder():
  images = pictures.Pictures()
  _check(_load(images))
  assert images.loads[:9] == [1] * 9 and sum(images.loads) == 9


def test_processes_load_the_same_and_name_the_broken_item():
  images = pictures.Pictures()
  loader = _loader(images, np.stack, functools.partial(np.stack, axis=1))
  images.broken[17] = OSError("image file is truncated")
  images.broken[20] = UserError("a.svg: install another renderer.")
  with prefetch.pool(loader, threads=1, processes=1) as pool:
    _check(list(pool.ahead(_BATCHES)))
    with pytest.raises(UserError) as error:
      list(pool.ahead([range(16, 18)]))
    assert str(error.value) == (
      "tiny: the image of item 'item/17' cannot be read (OSError: image file "
      "is truncated); mend or remove it."
    )
    with pytest.raises(UserError, match="^a.svg: install another renderer.$"):
      list(pool.ahead([range(18, 21)]))
  assert sum(images.loads) == 0


def _sifted(images, skip=True, **changes):
  loader = dataclasses.replace(_loader(images), **changes)
  return prefetch.Sifter(loader, skip)([3, 4, 5, 6])


def test_a_sifter_leaves_out_what_cannot_be_read_and_says_why():
  images = pictures.Pictures()
  images.broken[4] = OSError("cut\nshort, <file object at 0x7f09ab>")
  images.broken[6] = UserError("a.svg: install another renderer.")
  found = _sifted(images)
  assert found.indices == [3, 5]
  (first,) = found.prepared
  np.testing.assert_array_equal(first, [pictures.pixels(3), pictures.pixels(5)])
  assert found.faults == {
    4: "OSError: cut short, <file object>",
    6: "a.svg: install another renderer.",
  }
  hint = "Such items are skipped with X."
  with pytest.raises(UserError, match="'item/4' .*; mend or remove it. Such"):
    _sifted(images, skip=False, hint=hint)
  del images.broken[4]
  with pytest.raises(UserError, match="renderer. Such items are skipped with"):
    _sifted(images, skip=False, hint=hint)


def test_an_image_that_cannot_be_prepared_is_found_among_the_others():
  def prepare(batch):
    if any((x == pictures.pixels(5)).all() for x in batch):
      raise ValueError("too narrow")
    return np.stack(batch)

  found = _sifted(pictures.Pictures(), prepares=(np.stack, prepare))
  assert found.indices == [3, 4, 6]
  assert [len(x) for x in found.prepared] == [3, 3]
  assert found.faults == {5: "ValueError: too narrow"}


def test_nothing_left_is_nothing_prepared_and_no_memory_is_no_fault():
  images = pictures.Pictures()
  images.broken = {i: OSError() for i in range(3, 7)}
  assert _sifted(images) == ([], [], dict.fromkeys(range(3, 7), "OSError"))
  images.broken[5] = MemoryError()
  with pytest.raises(MemoryError):
    _sifted(images)


def test_a_process_that_ends_is_reported():
  images = pictures.Pictures()
  images.broken[5] = "exit"
  with pytest.raises(UserError, match="process that loads images ended .* 0 "):
    _load(images, processes=1)


def test_what_cannot_be_sent_to_a_process_is_refused():
  lock = threading.Lock()
  with pytest.raises(UserError, match="^tiny: its images cannot be loaded by"):
    _load(lambda index: lock, processes=2)


def test_no_more_than_a_window_is_loaded_ahead():
  images = pictures.Pictures()
  loader = _loader(images)
  batches = [range(i, i + 1) for i in range(20)]
  with prefetch.pool(loader, threads=1, processes=0) as pool:
    ahead = pool.ahead(batches)
    next(ahead)
    ahead.close()
  assert sum(images.loads) <= 5


def test_a_fault_stops_what_is_under_way():
  images = pictures.Pictures()
  images.broken[0] = OSError("broken")
  with pytest.raises(UserError, match="item/0"):
    _load(images, batches=[range(i, i + 1) for i in range(20)])
  assert sum(images.loads) <= 6


def test_a_pool_ends_with_its_context():
  loader = _loader(pictures.Pictures())
  with prefetch.pool(loader, threads=1, processes=0) as pool:
    pass
  with pytest.raises(RuntimeError):
    list(pool.ahead(_BATCHES))
  assert isinstance(pool._executor, concurrent.futures.ThreadPoolExecutor)
