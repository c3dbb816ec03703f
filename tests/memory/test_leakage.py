"""Planted near copies are found in their split, and nothing else is."""

import csv
import io

import numpy as np
import pytest
from PIL import Image

from retrieval_aug.common import manifest
from retrieval_aug.common.errors import UserError
from retrieval_aug.datasets.vectors import NoImageError, NoImages
from retrieval_aug.memory import leakage, pixel_copies, table

N, M, D, K = 13, 139, 17, 5
SPLITS = ["train"] * 6 + ["val"] * 3 + ["test"] * 4
# Row of the query table -> row of the memory, and how it was changed.
PLANTED = {1: (7, "jpeg"), 4: (71, "half"), 6: (90, "light"), 9: (3, "crop")}
PLANTED |= {12: (138, "same")}


def _picture(seed):
  """Soft shapes in several colors."""
  coarse = np.random.default_rng(seed).integers(20, 236, (7, 7, 3), np.uint8)
  big = Image.fromarray(coarse).resize((96, 80), Image.Resampling.BICUBIC)
  return np.asarray(big)


def _face(mouth):
  """A line drawing: all differ in one small part."""
  y, x = np.mgrid[:96, :96] - 48
  image = np.full((96, 96, 3), 255, np.uint8)
  ring = np.abs(np.hypot(x, y) - 40) < 2
  eyes = np.hypot(np.abs(x) - 14, y + 12) < 5
  wide = np.abs(x) < 18
  line = wide & (np.abs(y - 16 - mouth * (x / 18) ** 2) < 3)
  image[ring | eyes | line] = 0
  return image


def _changed(image, how):
  picture = Image.fromarray(image)
  width, height = picture.size
  if how == "half":
    picture = picture.resize((width // 2, height // 2))
  if how == "crop":
    picture = picture.crop((2, 0, width, height - 2))
  if how == "light":
    return np.clip(image * 1.08, 0, 255).astype(np.uint8)
  if how == "jpeg":
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=50)
    picture = Image.open(io.BytesIO(data.getvalue()))
  return np.asarray(picture)


def _query_image(row):
  if row in PLANTED:
    return _changed(_memory_image(PLANTED[row][0]), PLANTED[row][1])
  return _picture(1000 + row)


def _memory_image(row):
  return _picture(row)


def _table(folder, keys, **columns):
  artifact = manifest.Artifact(
    folder, table.KIND, {"items": folder.name, "encoder": {"name": "tiny"}}
  )
  artifact.start()
  ids = [f"{folder.name}/{i}" for i in range(len(keys))]
  metadata = {"id": ids} | columns
  table.write_shard(artifact, 0, keys=keys, values={}, metadata=metadata)
  artifact.finish(["00000"], {"key_dims": keys.shape[1], "value_dims": {}})
  return table.Table(folder)


def _keys():
  """Of queries and memory; a constant makes all raw cosines high."""
  rng = np.random.default_rng(0)
  memory = rng.normal(size=(M, D))
  queries = rng.normal(size=(N, D))
  for row, (item, _) in PLANTED.items():
    queries[row] = memory[item] + 0.15 * queries[row]
  return queries + 9, memory + 9


def _lists(queries, memory, splits=SPLITS):
  mean = memory.mean(axis=0)
  unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
  order = np.argsort(-unit(queries - mean) @ unit(memory - mean).T, axis=1)
  order[:, K - 1 :] = -1
  rows = lambda s: [i for i, x in enumerate(splits) if x == s]
  return {s: order[rows(s), :K] for s in ("train", "val", "test")}


class World:
  """Two tables, the lists of one for the other, and leaks of these."""

  def __init__(self, folder, splits=SPLITS, columns=None, own=None):
    keys, items = _keys()
    self.folder = folder
    self.lists = _lists(keys, items, splits)
    self.queries = _table(folder / "q", keys, split=splits, **own or {})
    sources = {"source": ["a", "b"] * (M // 2) + ["a"]}
    self.memory = _table(folder / "m", items, **sources | (columns or {}))
    self.neighbors = manifest.Artifact(folder / "n", "neighbor shards", {})

  def find(self, name="leaks", cosine=0.5, images=None, left_out=0):
    artifact = leakage.leaks_artifact(
      self.folder / name, self.neighbors, cosine
    )
    query_image, memory_image = images or (_query_image, _memory_image)
    leakage.find(
      artifact,
      self.queries,
      self.memory,
      self.lists,
      query_image,
      memory_image,
      leak_cosine=cosine,
      left_out=left_out,
      threads=2,
    )
    return artifact


@pytest.fixture
def world(tmp_path):
  return World(tmp_path)


def _found(artifact):
  pairs = leakage.load(artifact)["pairs"]
  return {(p["example_row"], p["memory_row"]) for p in pairs}


class TestFind:
  def test_copies_of_every_kind_are_found_and_no_other_picture(self, world):
    artifact = world.find()
    assert _found(artifact) == {(q, m) for q, (m, _) in PLANTED.items()}
    splits = artifact.info()["splits"]
    names = ("examples", "examples_with_copy", "memory_rows")
    counts = {s: [splits[s][n] for n in names] for s in splits}
    assert counts == {"test": [4, 2, 2], "val": [3, 1, 1], "train": [6, 2, 2]}

  def test_the_worst_stand_first_test_before_val_before_train(self, world):
    pairs = leakage.load(world.find())["pairs"]
    assert [p["split"] for p in pairs] == ["test"] * 2 + ["val"] + ["train"] * 2
    assert pairs[0]["example"] == "q/12" and pairs[0]["memory"] == "m/138"
    assert pairs[0]["source"] == "a" and pairs[0]["bits"] == 0
    assert pairs[0]["difference"] < 0.01 < pairs[1]["difference"]

  def test_csv_says_what_json_says(self, world):
    artifact = world.find()
    pairs = leakage.load(artifact)["pairs"]
    text = (artifact.folder / "leaks.csv").read_text()
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [r["example"] for r in rows] == [p["example"] for p in pairs]
    assert [float(r["cosine"]) for r in rows] == [p["cosine"] for p in pairs]
    assert "example_row" not in rows[0]

  def test_rows_to_drop_are_of_val_and_test_and_pairs_of_train(self, world):
    artifact = world.find()
    assert leakage.rows_to_drop(artifact).tolist() == [3, 90, 138]
    assert leakage.train_pairs(artifact).tolist() == [[1, 7], [4, 71]]

  def test_one_line_tells_the_user(self, world):
    assert leakage.describe(world.find()) == (
      "2 of 4 test examples (50.0 %) and 1 of 3 val have a near copy in "
      "the memory, and 2 training examples another; leaks.csv, leaks.png"
    )

  def test_a_finished_artifact_is_left_alone(self, world):
    before = world.find()
    time = (before.folder / "leaks.json").stat().st_mtime_ns
    never = NoImages("must not be read")
    again = world.find(images=(never, never))
    assert (again.folder / "leaks.json").stat().st_mtime_ns == time
    assert len(_found(again)) == len(PLANTED)

  def test_another_threshold_is_another_artifact(self, world):
    world.find()
    with pytest.raises(UserError, match=r"leak_cosine: 0\.5 -> 0\.6"):
      world.find(cosine=0.6)

  def test_a_damaged_file_is_named(self, world, flip_bit):
    artifact = world.find()
    flip_bit(artifact.folder / "leaks.json")
    with pytest.raises(UserError, match=r"leaks\.json.*delete"):
      leakage.rows_to_drop(artifact)

  def test_each_image_is_opened_once(self, world):
    seen = []

    def counted(row):
      seen.append(row)
      return _memory_image(row)

    world.lists = {s: np.repeat(x, 2, axis=1) for s, x in world.lists.items()}
    world.find(cosine=-1.0, images=(_query_image, counted))
    assert len(seen) == len(set(seen)) > 20

  def test_two_equal_memory_items_are_both_found(self, tmp_path):
    world = World(tmp_path)
    world.lists["test"][3, :2] = [138, 20]
    keys, items = _keys()
    items[20] = items[138]
    world.memory = _table(tmp_path / "twins", items)
    image = lambda row: _memory_image(138 if row == 20 else row)
    artifact = world.find(images=(_query_image, image))
    assert {(12, 20), (12, 138)} <= _found(artifact)
    assert artifact.info()["splits"]["test"]["examples_with_copy"] == 2
    assert leakage.rows_to_drop(artifact).tolist() == [3, 20, 90, 138]
    assert leakage.load(artifact)["pairs"][0]["source"] is None


class TestSplits:
  def test_an_empty_split_has_no_leaks(self, tmp_path):
    splits = ["train" if s == "val" else s for s in SPLITS]
    world = World(tmp_path, splits=splits)
    artifact = world.find()
    assert artifact.info()["splits"]["val"] == {
      "examples": 0,
      "examples_with_copy": 0,
      "memory_rows": 0,
    }
    assert len(leakage.train_pairs(artifact)) == 3

  def test_pads_only_give_no_candidates(self, world):
    world.lists = {s: np.full_like(x, -1) for s, x in world.lists.items()}
    artifact = world.find()
    assert artifact.info()["candidates"] == 0
    assert leakage.train_pairs(artifact).shape == (0, 2)
    assert leakage.rows_to_drop(artifact).dtype == np.int64
    assert leakage.describe(artifact).endswith("memory; leaks.csv")

  def test_own_groups_of_training_examples_are_no_leaks(self, tmp_path):
    groups = [f"m/{i}" for i in range(M)]
    own = [f"q/{i}" for i in range(N)]
    own[1], own[12] = "m/7", "m/138"  # of train, and of test
    world = World(tmp_path, columns={"group": groups}, own={"group": own})
    artifact = world.find(left_out=1)
    assert leakage.train_pairs(artifact).tolist() == [[4, 71]]
    assert 138 in leakage.rows_to_drop(artifact)
    assert artifact.info()["splits"]["train"]["left_out"] == 1


class TestCandidates:
  def test_cosines_are_of_raw_keys_without_the_mean(self, world):
    rows = np.arange(9, 13)
    pairs = leakage.candidates(
      world.queries, world.memory, rows, world.lists["test"], -1.0
    )
    keys = world.memory.keys().astype(np.float64)
    mean = keys.mean(axis=0)
    a = world.queries.keys()[pairs.queries] - mean
    b = keys[pairs.memory] - mean
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(pairs.cosine, (a * b).sum(1) / norms, atol=1e-5)
    assert len(pairs.cosine) == 4 * (K - 1)

  def test_only_the_nearest_and_only_from_the_cosine_on(self, world):
    rows = np.arange(9, 13)
    ids = np.tile(np.arange(leakage.NEAREST + 3), (4, 1))
    all_of = leakage.candidates(world.queries, world.memory, rows, ids, -1.0)
    assert all_of.memory.max() == leakage.NEAREST - 1
    limit = float(np.sort(all_of.cosine)[-7])
    high = leakage.candidates(world.queries, world.memory, rows, ids, limit)
    assert len(high.cosine) == 7  # equal counts

  def test_a_memory_of_a_few_rows_is_compared_without_a_mean(self, tmp_path):
    keys = np.array([[1.0, 2.0], [5.0, -1.0]])
    queries = _table(tmp_path / "q", keys, split=["test", "test"])
    memory = _table(tmp_path / "m", keys[:1])
    pairs = leakage.candidates(
      queries, memory, np.arange(2), np.zeros((2, 1), np.int64), 0.9
    )
    assert pairs.queries.tolist() == [0] and pairs.cosine[0] > 0.9999


class TestWithoutImages:
  def test_the_cosine_decides_from_a_higher_value_on(self, world):
    never = NoImages("vectors")
    artifact = world.find(images=(never, never))
    pairs = leakage.load(artifact)["pairs"]
    assert _found(artifact) == {(q, m) for q, (m, _) in PLANTED.items()}
    assert min(p["cosine"] for p in pairs) >= leakage.EMBEDDED_COSINE
    assert {(p["bits"], p["difference"]) for p in pairs} == {(None, None)}
    line = leakage.describe(artifact)
    assert line.endswith("; by embeddings alone; leaks.csv")

  def test_below_that_value_is_no_copy(self):
    rows = np.array([0, 0])
    limit = leakage.EMBEDDED_COSINE
    cosine = np.array([limit - 1e-3, limit], np.float32)
    pairs = leakage.Pairs(rows, np.array([0, 1]), cosine)
    never = NoImages("vectors")
    copies = leakage.confirm(pairs, never, never, threads=1).copies
    assert copies.tolist() == [False, True]

  def test_items_with_images_are_still_compared(self, world):
    def some(row):
      if row == 138:
        raise NoImageError("only a vector")
      return _picture(5000 + row)  # of another thing than the vector says

    artifact = world.find(images=(_query_image, some))
    assert _found(artifact) == {(12, 138)}
    assert "by embeddings alone where no images" in leakage.describe(artifact)


class TestPixelCopies:
  def _compare(self, a, b):
    return pixel_copies.compare(pixel_copies.look(a), pixel_copies.look(b))

  @pytest.mark.parametrize("how", ["same", "jpeg", "half", "light", "crop"])
  def test_a_changed_copy_is_one_either_way(self, how):
    image, other = _picture(3), _changed(_picture(3), how)
    assert self._compare(image, other)[0]
    assert self._compare(other, image)[0]

  @pytest.mark.parametrize("how", ["jpeg", "half", "light"])
  def test_a_changed_line_drawing_is_a_copy(self, how):
    assert self._compare(_face(9), _changed(_face(9), how))[0]

  def test_line_drawings_that_differ_in_one_part_are_none(self):
    """The hash alone takes them for copies."""
    copy, bits, apart = self._compare(_face(-9), _face(9))
    assert bits <= pixel_copies.BITS
    assert not copy and apart > pixel_copies.DIFFERENCE

  def test_another_color_is_another_thing(self):
    heart = _picture(3)
    assert not self._compare(heart, heart[:, :, [1, 2, 0]])[0]

  def test_an_image_of_one_color_is_no_copy_of_anything(self):
    flat = np.full((40, 40, 3), 77, np.uint8)
    assert self._compare(flat, flat)[:2] == (False, 64)

  def test_a_nearly_empty_picture_explains_none(self):
    faint = 255 - (255 - _face(9)) // 20
    apart = pixel_copies.difference(
      pixel_copies.look(_face(9)).small, pixel_copies.look(faint).small
    )
    assert apart > pixel_copies.DIFFERENCE

  def test_an_image_smaller_than_the_comparison_is_enlarged(self):
    small = np.asarray(Image.fromarray(_picture(3)).resize((28, 28)))
    assert self._compare(small, _picture(3))[0]
