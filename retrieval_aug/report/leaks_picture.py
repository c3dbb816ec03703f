"""Near copies of examples in the memory, side by side, for the eye to judge."""

import pathlib
import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from retrieval_aug.datasets.vectors import NoImageError
from retrieval_aug.report import pictures

_COLORS = {"test": "#c4302b", "val": "#b35900", "train": "#444444"}
_ACROSS = 3  # pairs beside each other


def draw(
  path: pathlib.Path,
  pairs: list[dict[str, Any]],
  query_image: Callable[[int], np.ndarray],
  memory_image: Callable[[int], np.ndarray],
  version: str,
  *,
  limit: int = 24,
) -> bool:
  """Draws the worst pairs to a PNG, atomically.

  Without any, or without images, there is no picture; an earlier one goes.

  Args:
    path: of the PNG.
    pairs: of `memory.leakage.report`, worst first.
    query_image: row of the query table -> uint8 [H, W, 3].
    memory_image: row of the memory table -> uint8 [H, W, 3].
    version: kept in the file, see `pictures.version_of`.
    limit: pairs at the most.

  Returns:
    Whether there is a picture.
  """
  seen = []
  for pair in pairs:
    if len(seen) == limit:
      break
    try:
      images = (
        query_image(pair["example_row"]),
        memory_image(pair["memory_row"]),
      )
    except NoImageError:
      continue
    seen.append((pair, images))
  if not seen:
    path.unlink(missing_ok=True)
    return False
  across = min(_ACROSS, len(seen))
  rows = -(-len(seen) // across)
  # Inches: of a row, and of what stands above all rows.
  height, head = 2.6, 0.35
  total = rows * height + head
  figure = Figure(figsize=(3.6 * across, total), dpi=100)
  FigureCanvasAgg(figure)
  figure.text(
    0.5,
    1 - 0.2 / total,
    f"{len(seen)} of {len(pairs)} near copies: example left, memory right",
    ha="center",
    va="center",
    fontsize=9,
  )
  # Images, and room for the texts above and below them.
  grid = figure.add_gridspec(
    3 * rows,
    3 * across,
    width_ratios=[1, 1, 0.12] * across,
    height_ratios=[0.3, 1.55, 0.75] * rows,
    left=0.02,
    right=0.99,
    top=1 - head / total,
    bottom=0.0,
    hspace=0,
    wspace=0.06,
  )
  for n, (pair, images) in enumerate(seen):
    y, x = divmod(n, across)
    below = (pair["example"], memory_text(pair))
    for side in (0, 1):
      axes = figure.add_subplot(grid[3 * y + 1, 3 * x + side])
      axes.imshow(images[side])
      pictures.hide(axes)
      axes.set_xlabel(
        _wrap(below[side]), fontsize=6.5, color="#444444", labelpad=2
      )
      title = pair["split"] if side == 0 else how_near(pair)
      axes.set_title(
        title, fontsize=8, color=_COLORS[pair["split"]], pad=3, loc="left"
      )
  pictures.save(figure, path, version)
  return True


def how_near(pair: dict[str, Any]) -> str:
  """Cosine, and bits of the hash where images were compared."""
  text = f"cosine {pair['cosine']:.3f}"
  return text if pair["bits"] is None else f"{text}, {pair['bits']} bits"


def memory_text(pair: dict[str, Any]) -> str:
  """Id of the memory item, and the collection that it comes from."""
  source = pair["source"]
  return pair["memory"] if source is None else f"{pair['memory']} ({source})"


def _wrap(text: str) -> str:
  """At most three lines; of a long path the end tells most."""
  lines = textwrap.wrap(text, 30) or [""]
  if len(lines) > 3:
    lines = ["..." + lines[-3][3:], *lines[-2:]]
  return "\n".join(lines)
