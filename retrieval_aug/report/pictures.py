"""What all pictures share: plain frames, and a version kept in the file."""

import pathlib

import PIL.Image
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from retrieval_aug.common import files

_VERSION = "retrieval_aug"


def hide(axes: Axes) -> None:
  """Leaves an image without ticks, in a light frame."""
  axes.set(xticks=[], yticks=[])
  for spine in axes.spines.values():
    spine.set_color("#dddddd")


def save(figure: Figure, path: pathlib.Path, version: str) -> None:
  """Writes a PNG that remembers its version, atomically."""
  with files.atomic_path(path) as temporary:
    figure.savefig(temporary, format="png", metadata={_VERSION: version})


def version_of(path: pathlib.Path) -> str | None:
  """The version of a picture; None where there is no picture."""
  try:
    with PIL.Image.open(path) as image:
      return image.info.get(_VERSION)
  except OSError:
    return None
