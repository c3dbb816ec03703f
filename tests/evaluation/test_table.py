"""Figures over seeds: the rows, the CSV and the table that people read."""

import csv
import io

import numpy as np
import pytest

from retrieval_aug.evaluation import table


def _seed(top1, many=None):
  figures = {
    "all": top1,
    "many": many,
    "mid": top1 + 1,
    "few": top1 - 1,
    "class_mean": top1 - 2,
  }
  return {"val": {"top1": figures}, "test": {"top1": figures, "top5": figures}}


@pytest.fixture
def rows():
  return table.rows("linear", [_seed(50.0), _seed(53.0), _seed(56.0)]) + (
    table.rows("mam", [_seed(61.25, many=70.0)])
  )


def _find(rows, *name):
  (row,) = [
    r for r in rows if (r["model"], r["split"], r["metric"], r["group"]) == name
  ]
  return row


def test_a_row_is_mean_and_sample_deviation_over_seeds(rows):
  row = _find(rows, "linear", "test", "top1", "mid")
  assert (row["mean"], row["std"], row["n_seeds"]) == (54.0, 3.0, 3)


def test_one_seed_has_a_mean_and_no_deviation(rows):
  row = _find(rows, "mam", "test", "top1", "all")
  assert (row["mean"], row["std"], row["n_seeds"]) == (61.25, None, 1)


def test_a_group_without_images_has_neither(rows):
  row = _find(rows, "linear", "val", "top1", "many")
  assert (row["mean"], row["std"], row["n_seeds"]) == (None, None, 3)


def test_there_is_one_row_a_figure(rows):
  names = [(r["model"], r["split"], r["metric"], r["group"]) for r in rows]
  assert len(set(names)) == len(names) == 2 * 3 * 5


def test_csv_has_the_published_columns_and_one_line_a_row(rows):
  text = table.to_csv(rows)
  assert text.splitlines()[0] == "model,split,metric,group,mean,std,n_seeds"
  found = list(csv.DictReader(io.StringIO(text)))
  assert len(found) == len(rows)
  assert found[0] == {
    "model": "linear",
    "split": "val",
    "metric": "top1",
    "group": "all",
    "mean": "53.0",
    "std": "3.0",
    "n_seeds": "3",
  }


def test_an_unknown_figure_is_an_empty_field(rows):
  text = table.to_csv(rows)
  assert "linear,test,top1,many,,,3\n" in text
  assert "mam,test,top1,many,70.0,,1\n" in text
  assert text.endswith("\n") and "None" not in text and "nan" not in text


@pytest.fixture
def text(rows):
  # Training images 60, 5, 5: no class has more than 100.
  return table.to_text(
    rows, "test", np.array([60, 5, 5]), np.array([0, 0, 1, 2, 2]), "paper"
  )


def test_text_has_a_line_a_model_and_a_column_a_group(text):
  header, rule, *lines = [x for x in text.splitlines() if x.startswith("|")]
  cells = [c.strip() for c in header.strip("|").split("|")]
  assert cells == [
    "model",
    "all",
    "many",
    "mid",
    "few",
    "class mean",
    "top5 all",
  ]
  assert set(rule) == {"|", "-"}
  assert len({len(x) for x in (header, rule, *lines)}) == 1
  linear, mam = ([c.strip() for c in x.strip("|").split("|")] for x in lines)
  assert linear == [
    "linear",
    "53.0 ± 3.0",
    "no images",
    "54.0 ± 3.0",
    "52.0 ± 3.0",
    "51.0 ± 3.0",
    "53.0 ± 3.0",
  ]
  assert mam[:3] == ["mam", "61.2", "70.0"]


def test_text_counts_the_classes_and_images_of_the_groups(text):
  assert text.splitlines()[-1] == (
    "Groups: many (> 100 training images): no classes; mid (20..100 training "
    "images): 1 classes, 2 test images; few (< 20 training images): 2 classes, "
    "3 test images."
  )


def test_text_states_the_bounds_that_were_used(rows):
  text = table.to_text(
    rows, "test", np.array([100, 20]), np.array([0, 1]), "oltr_code"
  )
  assert "many (>= 100 training images): 1 classes" in text
  assert "mid (21..99 training images): no classes" in text
  assert "few (<= 20 training images): 1 classes" in text
