"""Result rows over seeds, and the table that a run ends with."""

import statistics
from typing import Any

import numpy as np

from retrieval_aug.evaluation import accuracy

GROUPS = ("all", *accuracy.GROUPS, "class_mean")
COLUMNS = ("model", "split", "metric", "group", "mean", "std", "n_seeds")


def rows(model: str, metrics: list[dict]) -> list[dict[str, Any]]:
  """One row a figure: mean and standard deviation over seeds.

  Args:
    model: name for the rows.
    metrics: one a seed: split -> metric -> group -> percent or None.

  Returns:
    Dicts with `COLUMNS`; `mean` and `std` are None for a group without test
    images, `std` (of the sample, n - 1) also for a single seed.
  """
  out = []
  for split, by_metric in metrics[0].items():
    for metric, by_group in by_metric.items():
      for group in by_group:
        figures = [m[split][metric][group] for m in metrics]
        known = None not in figures
        std = len(figures) > 1 and known
        row = (
          model,
          split,
          metric,
          group,
          round(statistics.fmean(figures), 4) if known else None,
          round(statistics.stdev(figures), 4) if std else None,
          len(figures),
        )
        out.append(dict(zip(COLUMNS, row)))
  return out


def to_csv(all_rows: list[dict[str, Any]]) -> str:
  """The rows as CSV; an unknown figure is an empty field."""
  lines = [",".join(COLUMNS)]
  for row in all_rows:
    fields = ("" if row[c] is None else str(row[c]) for c in COLUMNS)
    lines.append(",".join(fields))
  return "\n".join(lines) + "\n"


def to_text(
  all_rows: list[dict[str, Any]],
  split: str,
  train_counts: np.ndarray,
  test_labels: np.ndarray,
  bounds: str,
) -> str:
  """The rows of one split as a Markdown table, with its groups explained.

  Args:
    all_rows: from `rows`.
    split: which to show.
    train_counts: int [C], training images a class.
    test_labels: int [N], labels of the split.
    bounds: see `accuracy.shot_groups`.
  """
  figures = {
    (r["model"], r["metric"], r["group"]): r
    for r in all_rows
    if r["split"] == split
  }
  columns = [("top1", g) for g in GROUPS] + [("top5", "all")]
  titles = [g if m == "top1" else f"{m} {g}" for m, g in columns]
  titles = [t.replace("_", " ") for t in titles]
  body = []
  for model in dict.fromkeys(r["model"] for r in all_rows):
    body.append([model, *(cell(figures[model, m, g]) for m, g in columns)])
  return "\n".join(
    [
      f"Accuracy on {split} in percent, mean ± standard deviation over seeds:",
      *markdown([["model", *titles], *body]),
      _groups_line(train_counts, test_labels, split, bounds),
    ]
  )


def markdown(lines: list[list[str]]) -> list[str]:
  """The lines of a Markdown table, aligned: a header, and rows of cells."""
  widths = [max(map(len, column)) for column in zip(*lines)]
  out = [
    "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths)) + " |"
    for line in lines
  ]
  out.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
  return out


def cell(row: dict[str, Any]) -> str:
  """A row's mean and standard deviation, in percent."""
  if row["mean"] is None:
    return "no images"
  if row["std"] is None:
    return f"{row['mean']:.1f}"
  return f"{row['mean']:.1f} ± {row['std']:.1f}"


def _groups_line(
  train_counts: np.ndarray, labels: np.ndarray, split: str, bounds: str
) -> str:
  words = {
    "paper": ("> 100", "20..100", "< 20"),
    "oltr_code": (">= 100", "21..99", "<= 20"),
  }[bounds]
  groups = accuracy.shot_groups(train_counts, bounds)
  parts = []
  for (name, classes), limit in zip(groups.items(), words):
    count = int(classes.sum())
    images = int(classes[labels].sum())
    what = f"{count} classes, {images} {split} images"
    if not count:
      what = "no classes"
    parts.append(f"{name} ({limit} training images): {what}")
  return "Groups: " + "; ".join(parts) + "."
