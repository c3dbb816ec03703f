"""Tiny tars of image-text pairs, as img2dataset writes them."""

import io
import pathlib
import tarfile

import numpy as np
from PIL import Image


def pixels(number):
  """uint8 [3, 3, 3] of a pair."""
  rng = np.random.default_rng(number)
  return rng.integers(0, 256, (3, 3, 3), np.uint8)


def _files(numbers, without_text, broken, facts):
  """Name and bytes of each file of the pairs."""
  for number in numbers:
    data = io.BytesIO()
    Image.fromarray(pixels(number)).save(data, "png")
    # A broken one begins as an image does.
    image = data.getvalue()[: 40 if number in broken else None]
    yield f"{number}.png", image
    if number not in without_text:
      yield f"{number}.txt", b"x" * (number % 6 + 1)
    if facts:
      yield f"{number}.json", facts.encode()


def write(path, numbers, without_text=(), broken=(), facts=""):
  """Writes a tar of pairs; some have no text, or an image that is broken.

  Args:
    path: of the tar.
    numbers: of the pairs.
    without_text: some of them.
    broken: likewise.
    facts: the JSON of each.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, "w") as tar:
    for name, data in _files(numbers, without_text, broken, facts):
      info = tarfile.TarInfo(name)
      info.size = len(data)
      tar.addfile(info, io.BytesIO(data))


def write_folder(path, numbers):
  """Writes the same to a folder."""
  path.mkdir(parents=True)
  for name, data in _files(numbers, (), (), ""):
    (path / name).write_bytes(data)
