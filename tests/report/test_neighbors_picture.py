"""The picture shows what it is given: who, in which order, how weighted."""

import numpy as np
import PIL.Image
import pytest

from retrieval_aug.datasets import Downstream, MemorySource
from retrieval_aug.report import neighbors_picture, pictures
from retrieval_aug.training.input_pipeline import Examples

C, K, M = 5, 7, 11
# Class 3 is the rarest in training, then 1, then 4; class 0 has no test image.
TRAIN = np.repeat(np.arange(C), [13, 3, 8, 2, 5])
LABELS = np.array([4, 1, 3, 3, 2], np.int32)


@pytest.fixture
def test_split():
  rng = np.random.default_rng(0)
  return Examples(
    ids=[f"q{i}" for i in range(len(LABELS))],
    labels=LABELS,
    queries=np.zeros((len(LABELS), 2), np.float32),
    neighbors=np.stack([rng.permutation(M)[:K] for _ in LABELS]),
    scores=np.zeros((len(LABELS), K), np.float32),
  )


@pytest.fixture
def rows(test_split):
  logits = np.zeros((len(LABELS), C), np.float32)
  logits[np.arange(len(LABELS)), [4, 2, 3, 0, 2]] = 1.0
  attention = np.zeros((len(LABELS), 2, K), np.float32)
  attention[:, 0] = np.arange(K)
  attention[:, 1] = 1.0
  # Predictions in another order than the examples: they are joined by id.
  order = [4, 2, 0, 1, 3]
  return neighbors_picture.choose(
    TRAIN,
    test_split,
    [f"q{i}" for i in order],
    logits[order],
    attention[order],
    queries=3,
    neighbors=K - 2,
  )


def test_rows_are_the_first_test_queries_of_the_rarest_classes(rows):
  assert [r.example_id for r in rows] == ["q2", "q1", "q0"]
  assert [r.truth for r in rows] == [3, 1, 4]
  assert [r.train_count for r in rows] == [2, 3, 5]


def test_predictions_are_joined_by_id(rows):
  assert [r.prediction for r in rows] == [3, 2, 4]


def test_neighbors_stand_best_first_with_the_mean_weight_of_layers(
  rows, test_split
):
  for row, index in zip(rows, (2, 1, 0), strict=True):
    np.testing.assert_array_equal(
      row.neighbors, test_split.neighbors[index, : K - 2]
    )
    np.testing.assert_allclose(row.weights, (np.arange(K - 2) + 1) / 2)


def _solid(color):
  return np.broadcast_to(np.uint8(color), (9, 9, 3))


def test_the_picture_holds_the_images_and_remembers_its_version(rows, tmp_path):
  """Every query has a color of its own, every neighbor another."""
  names = [f"class {c}" for c in range(C)]
  downstream = Downstream(
    name="queries",
    ids=[f"q{i}" for i in range(len(LABELS))],
    image=lambda i: _solid([10 + i, 200, 30]),
    fingerprint={},
    labels=LABELS.astype(np.int64),
    splits=["test"] * len(LABELS),
    class_names=names,
  )
  memory = MemorySource(
    name="memory",
    ids=[f"m{i}" for i in range(M)],
    image=lambda i: _solid([90, 20 + i, 160]),
    fingerprint={},
    texts=[f"text {i}" for i in range(M)],
    columns={},
  )
  path = tmp_path / "neighbors.png"
  table_ids = [f"m{i}" for i in range(M)]
  neighbors_picture.draw(path, rows, downstream, memory, table_ids, "v1")
  assert pictures.version_of(path) == "v1"
  with PIL.Image.open(path) as image:
    seen = {tuple(c) for c in np.asarray(image.convert("RGB")).reshape(-1, 3)}
  for row in rows:
    assert (10 + int(row.example_id[1:]), 200, 30) in seen
    assert all((90, 20 + int(n), 160) in seen for n in row.neighbors)


def test_no_picture_has_no_version(tmp_path):
  assert pictures.version_of(tmp_path / "none.png") is None
  (tmp_path / "text.png").write_text("not a picture")
  assert pictures.version_of(tmp_path / "text.png") is None
