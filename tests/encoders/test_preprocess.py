import json

import numpy as np
import pytest

from retrieval_aug.common.errors import UserError
from retrieval_aug.encoders import preprocess

_SPEC = preprocess.ImageSpec(
  size=28, resize=32, mean=(127.0,) * 3, std=(128.0,) * 3
)


def _image(height, width):
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_prepare_crops_the_centre_of_the_resized_image():
  image = _image(64, 32)  # The shorter side has its length already.
  expected = image[18:46, 2:30]
  np.testing.assert_array_equal(preprocess.prepare(image, _SPEC), expected)


def test_prepare_halves_the_shorter_side():
  columns = np.repeat(np.arange(0, 128, 2, dtype=np.uint8), 2)  # [128]
  image = np.broadcast_to(columns[None, :, None], (64, 128, 3))
  found = preprocess.prepare(image, _SPEC)
  # 128 columns become 64; of these the crop is 18..45, each of value 2 i.
  expected = np.broadcast_to(
    np.arange(36, 92, 2, dtype=np.uint8)[None, :, None], (28, 28, 3)
  )
  np.testing.assert_array_equal(found, expected)


def test_prepare_returns_a_prepared_image_as_it_is():
  image = _image(28, 28)
  assert preprocess.prepare(image, _SPEC) is image


@pytest.mark.parametrize("shape", [(1, 1), (1, 60_000), (5, 7), (301, 197)])
def test_prepare_takes_any_shape(shape):
  found = preprocess.prepare(_image(*shape), _SPEC)
  assert found.shape == (28, 28, 3) and found.dtype == np.uint8


@pytest.mark.parametrize(
  "image",
  [
    np.zeros((9, 9), np.uint8),
    np.zeros((9, 9, 4), np.uint8),
    np.zeros((9, 9, 3), np.float32),
    np.zeros((0, 9, 3), np.uint8),
  ],
)
def test_prepare_refuses_what_is_no_rgb_image(image):
  with pytest.raises(UserError, match="image: "):
    preprocess.prepare(image, _SPEC)


def test_prepare_batch_stacks():
  images = [_image(64, 32), _image(28, 28)]
  batch = preprocess.prepare_batch(images, _SPEC)
  np.testing.assert_array_equal(batch[0], images[0][18:46, 2:30])
  np.testing.assert_array_equal(batch[1], images[1])
  assert preprocess.prepare_batch([], _SPEC).shape == (0, 28, 28, 3)


def test_spec_is_a_json_value_that_names_every_field():
  assert json.loads(json.dumps(_SPEC.to_dict())) == {
    "size": 28,
    "resize": 32,
    "mean": [127.0] * 3,
    "std": [128.0] * 3,
    "interpolation": "bicubic",
  }


@pytest.mark.parametrize(
  "change", [{"size": 33}, {"size": 0}, {"interpolation": "cubic"}]
)
def test_spec_refuses_bad_fields(change):
  with pytest.raises(UserError, match="ImageSpec: "):
    preprocess.ImageSpec(**(_SPEC.to_dict() | change))
