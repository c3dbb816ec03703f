"""Queries with their neighbours and what the model makes of them.

The form of Fig. 4 of Iscen et al., CVPR 2023: the query on the left, its
neighbours best first, and the learned weight of each above it.
"""

import pathlib
import textwrap
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from retrieval_aug.datasets import Downstream, MemorySource
from retrieval_aug.report import pictures
from retrieval_aug.training.input_pipeline import Examples

_RIGHT, _WRONG, _BAR = "#1a7f37", "#c4302b", "#3b6fb6"


class Row(NamedTuple):
  """One query of the picture.

  Attributes:
    example_id: of the query.
    truth: its class.
    prediction: the class that the model chose.
    train_count: training images of its class.
    neighbors: int64 [n], rows of the memory table, best first; -1 pads.
    weights: float32 [n], attention averaged over layers.
  """

  example_id: str
  truth: int
  prediction: int
  train_count: int
  neighbors: np.ndarray
  weights: np.ndarray


def choose(
  train_labels: np.ndarray,
  test: Examples,
  ids: list[str],
  logits: np.ndarray,
  attention: np.ndarray,
  *,
  queries: int,
  neighbors: int,
) -> list[Row]:
  """The first test query of each of the rarest classes: nothing is picked.

  Args:
    train_labels: int [N], of the training split.
    test: the test split with its neighbours.
    ids: ids of the predictions below.
    logits: [M, C].
    attention: [M, L, k].
    queries: rows wanted.
    neighbors: neighbours a row.
  """
  counts = np.bincount(train_labels, minlength=logits.shape[1])
  position = {example_id: i for i, example_id in enumerate(ids)}
  rows = []
  for label in np.lexsort((np.arange(len(counts)), counts)):
    members = np.flatnonzero(test.labels == label)
    if not len(members) or len(rows) == queries:
      continue
    example_id = test.ids[members[0]]
    i = position[example_id]
    rows.append(
      Row(
        example_id,
        int(label),
        int(logits[i].argmax()),
        int(counts[label]),
        test.neighbors[members[0], :neighbors],
        attention[i].mean(axis=0)[:neighbors],
      )
    )
  return rows


def draw(
  path: pathlib.Path,
  rows: list[Row],
  downstream: Downstream,
  memory: MemorySource,
  table_ids: Mapping[int, str],
  version: str,
) -> None:
  """Draws the rows to a PNG, atomically.

  Args:
    path: of the PNG.
    rows: from `choose`.
    downstream: has the query images and class names.
    memory: has the neighbours' images and texts; of those that it does not
      have, which were added to the table later, the id stands in their place.
    table_ids: id of the rows of the memory table that are neighbours.
    version: kept in the file, see `pictures.version_of`.
  """
  query_of = {x: i for i, x in enumerate(downstream.ids)}
  item_of = {x: i for i, x in enumerate(memory.ids)}
  columns = max(len(r.neighbors) for r in rows)
  figure = Figure(figsize=(1.4 * (columns + 1.5), 2.5 * len(rows)), dpi=100)
  FigureCanvasAgg(figure)
  # Three bands a query: weights, images, and room for the texts below them.
  grid = figure.add_gridspec(
    3 * len(rows),
    columns + 1,
    width_ratios=[1.5] + [1] * columns,
    height_ratios=[0.5, 1.4, 0.6] * len(rows),
    left=0.01,
    right=0.99,
    top=0.985,
    bottom=0.005,
    hspace=0,
    wspace=0.12,
  )
  for y, row in enumerate(rows):
    axes = figure.add_subplot(grid[3 * y : 3 * y + 2, 0])
    axes.imshow(downstream.image(query_of[row.example_id]))
    pictures.hide(axes)
    names = downstream.class_names
    right = row.prediction == row.truth
    axes.set_title(
      f"truth: {names[row.truth]}\n{row.train_count} training images",
      fontsize=8.5,
      color=_RIGHT,
      pad=3,
    )
    axes.set_xlabel(
      f"predicted: {names[row.prediction]}",
      fontsize=8.5,
      color=_RIGHT if right else _WRONG,
      labelpad=3,
    )
    highest = max(float(row.weights.max()), 1e-9)
    for x, (neighbor, weight) in enumerate(zip(row.neighbors, row.weights)):
      if neighbor < 0:
        continue
      bar = figure.add_subplot(grid[3 * y, x + 1])
      bar.bar([0], [weight], width=0.8, color=_BAR)
      # One scale a query: bars of different queries are not comparable, the
      # numbers above them are.
      bar.set(xlim=(-0.9, 0.9), ylim=(0, highest * 1.9))
      bar.text(
        0, weight + highest * 0.1, f"{weight:.3f}", ha="center", fontsize=8
      )
      bar.axis("off")
      axes = figure.add_subplot(grid[3 * y + 1, x + 1])
      item = item_of.get(table_ids[neighbor])
      text = table_ids[neighbor]
      if item is None:
        axes.set(aspect="equal")
      else:
        axes.imshow(memory.image(item))
        text = memory.texts[item]
      pictures.hide(axes)
      text = textwrap.shorten(text, 40, placeholder="...")
      axes.set_xlabel(
        textwrap.fill(text, 20), fontsize=6.5, color="#444444", labelpad=2
      )
  pictures.save(figure, path, version)
