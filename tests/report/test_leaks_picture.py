"""The picture of leaks shows the worst pairs, and goes when there are none."""

import numpy as np
import PIL.Image
import pytest

from retrieval_aug.datasets.vectors import NoImageError, NoImages
from retrieval_aug.report import leaks_picture, pictures


def _pair(n, split="test", **changes):
  return {
    "split": split,
    "example": f"a/long/folder/of/many/words/and/more/words/{n}" * 3,
    "memory": f"m{n}",
    "source": None,
    "cosine": 0.9,
    "bits": 3,
    "difference": 0.1,
    "example_row": n,
    "memory_row": n,
  } | changes


def _query_image(row):
  return np.broadcast_to(np.uint8([10 + row, 200, 30]), (9, 7, 3))


def _memory_image(row):
  return np.broadcast_to(np.uint8([90, 20 + row, 160]), (9, 9, 3))


def _draw(path, pairs, images=(_query_image, _memory_image), **options):
  return leaks_picture.draw(path, pairs, *images, "v1", **options)


def _colors(path):
  with PIL.Image.open(path) as image:
    pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
  return {tuple(color) for color in np.unique(pixels, axis=0).tolist()}


@pytest.mark.parametrize("count", [1, 8])
def test_both_images_of_every_pair_are_shown(tmp_path, count):
  path = tmp_path / "leaks.png"
  pairs = [_pair(n, ("test", "val", "train")[n % 3]) for n in range(count)]
  assert _draw(path, pairs)
  seen = _colors(path)
  for n in range(count):
    assert (10 + n, 200, 30) in seen and (90, 20 + n, 160) in seen
  assert pictures.version_of(path) == "v1"


def test_the_first_pairs_are_shown_up_to_the_limit(tmp_path):
  path = tmp_path / "leaks.png"
  _draw(path, [_pair(n) for n in (5, 2, 9)], limit=2)
  seen = _colors(path)
  assert (15, 200, 30) in seen and (12, 200, 30) in seen
  assert (19, 200, 30) not in seen


def test_without_leaks_an_earlier_picture_goes(tmp_path):
  path = tmp_path / "leaks.png"
  assert not _draw(path, [])
  _draw(path, [_pair(0)])
  assert not _draw(path, [])
  assert not path.exists()


def test_pairs_without_images_are_left_out(tmp_path):
  path = tmp_path / "leaks.png"

  def some(row):
    if row == 0:
      raise NoImageError("only a vector")
    return _memory_image(row)

  pairs = [_pair(0, bits=None, difference=None), _pair(1)]
  assert _draw(path, pairs, (_query_image, some))
  assert (90, 21, 160) in _colors(path)
  never = NoImages("vectors")
  assert not _draw(path, pairs, (_query_image, never))
  assert not path.exists()


def test_source_and_reason_stand_below():
  assert leaks_picture.memory_text(_pair(1, source="laion")) == "m1 (laion)"
  assert leaks_picture.memory_text(_pair(1)) == "m1"
  assert leaks_picture.how_near(_pair(1)) == "cosine 0.900, 3 bits"
  assert leaks_picture.how_near(_pair(1, bits=None)) == "cosine 0.900"


def test_no_picture_has_no_version(tmp_path):
  assert pictures.version_of(tmp_path / "none.png") is None
  (tmp_path / "text.png").write_text("not a picture")
  assert pictures.version_of(tmp_path / "text.png") is None
