"""Result rows of a sweep's points, and the table that chooses among them."""

import csv
import io
from typing import Any

from retrieval_aug.evaluation import table

COLUMNS = ("model", "point", *table.COLUMNS[1:])

# What points are chosen by, and what the table shows, of top1.
_GROUPS = ("all", "class_mean")


def rows(model: str, points: dict[str, list[dict]]) -> list[dict[str, Any]]:
  """Result rows of the points of a model, the best first.

  The best is the one with the highest accuracy on val; of equals, with the
  higher class mean; of such, the first. It alone has rows of test: nobody can
  choose by what is not there.

  Args:
    model: name for the rows.
    points: metrics of each point, one a seed; see `table.rows`. Val must have
      examples.

  Returns:
    Dicts with `COLUMNS`.
  """
  ranked = []
  for point, metrics in points.items():
    own = [row | {"point": point} for row in table.rows(model, metrics)]
    means = {_figure(row): row["mean"] for row in own}
    ranked.append(([-means["val", "top1", g] for g in _GROUPS], own))
  ranked.sort(key=lambda scored: scored[0])
  out = []
  for rank, (_, own) in enumerate(ranked):
    out += [row for row in own if row["split"] == "val"]
    if rank == 0:
      out += [row for row in own if row["split"] == "test"]
  return out


def _figure(row: dict[str, Any]) -> tuple[str, str, str]:
  return row["split"], row["metric"], row["group"]


def to_csv(all_rows: list[dict[str, Any]]) -> str:
  """The rows as CSV; an unknown figure is an empty field."""
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  writer.writerow(COLUMNS)
  writer.writerows([row[c] for c in COLUMNS] for row in all_rows)
  return text.getvalue()


def to_text(
  all_rows: list[dict[str, Any]],
  settings: dict[tuple[str, str], dict[str, Any]],
) -> str:
  """The rows as a Markdown table, with a line on how the best was chosen.

  Args:
    all_rows: from `rows`, of all models.
    settings: of (model, point), by the title of their column.
  """
  points: dict[tuple[str, str], dict] = {}
  for row in all_rows:
    own = points.setdefault((row["model"], row["point"]), {})
    own[_figure(row)] = row
  swept = list(dict.fromkeys(n for own in settings.values() for n in own))
  figures = [(s, "top1", g) for s in ("val", "test") for g in _GROUPS]
  titles = [f"{s} {g.replace('_', ' ')}" for s, _, g in figures]
  lines = [["model", *swept, *titles]]
  cell = lambda row: "" if row is None else table.cell(row)
  for at, own in points.items():
    given = [str(settings[at].get(name, "")) for name in swept]
    lines.append([at[0], *given, *(cell(own.get(f)) for f in figures)])
  return "\n".join(
    [
      "Accuracy in percent, mean ± standard deviation over seeds; of each "
      "model the best on val first:",
      *table.markdown(lines),
      "Val alone chose (all, then class mean); test is shown of its choice.",
    ]
  )
