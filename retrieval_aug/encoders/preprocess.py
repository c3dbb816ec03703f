"""From an image of any size to the square that an encoder expects."""

import dataclasses
from typing import Any

import numpy as np
from PIL import Image

from retrieval_aug.common.errors import UserError

_FILTERS = {
  "bicubic": Image.Resampling.BICUBIC,
  "bilinear": Image.Resampling.BILINEAR,
}


@dataclasses.dataclass(frozen=True)
class ImageSpec:
  """What an encoder does to an image before its first layer.

  Attributes:
    size: side of the square input, in pixels.
    resize: length that the shorter side gets before the centre crop.
    mean: of the channels R, G, B, in 0..255; subtracted on the device.
    std: of the channels; divided by on the device.
    interpolation: "bicubic" or "bilinear", antialiased.
  """

  size: int
  resize: int
  mean: tuple[float, float, float]
  std: tuple[float, float, float]
  interpolation: str = "bicubic"

  def __post_init__(self):
    if not 0 < self.size <= self.resize:
      raise UserError(
        f"ImageSpec: size must be in 1..{self.resize} (resize), got "
        f"{self.size}; give a larger resize."
      )
    if self.interpolation not in _FILTERS:
      raise UserError(
        f"ImageSpec: unknown interpolation {self.interpolation!r}; choose one "
        f"of {', '.join(_FILTERS)}."
      )

  def to_dict(self) -> dict[str, Any]:
    """A JSON value for fingerprints."""
    return dataclasses.asdict(self)


def prepare(image: np.ndarray, spec: ImageSpec) -> np.ndarray:
  """Resizes the shorter side and crops the centre.

  An image that has the spec's size already is taken as prepared, and returned
  as it is.

  Args:
    image: uint8 `[H, W, 3]`, RGB.
    spec: the encoder's.

  Returns:
    uint8 `[size, size, 3]`.
  """
  image = np.asarray(image)
  if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
    raise UserError(
      f"image: expected uint8 [H, W, 3], got {image.dtype} "
      f"{list(image.shape)}; convert it to RGB first."
    )
  height, width, _ = image.shape
  if not (height and width):
    raise UserError(f"image: empty, {list(image.shape)}; leave it out.")
  if height == width == spec.size:
    return image
  # Resize and crop in one step, so that a long thin image is never blown up
  # as a whole.
  side = min(height, width) * spec.size / spec.resize
  left, top = (width - side) / 2, (height - side) / 2
  resized = Image.fromarray(image).resize(
    (spec.size, spec.size),
    _FILTERS[spec.interpolation],
    box=(left, top, left + side, top + side),
  )
  return np.asarray(resized)


def prepare_batch(images: list[np.ndarray], spec: ImageSpec) -> np.ndarray:
  """`prepare` over a list: uint8 `[B, size, size, 3]`."""
  if not len(images):
    return np.zeros((0, spec.size, spec.size, 3), np.uint8)
  return np.stack([prepare(image, spec) for image in images])
