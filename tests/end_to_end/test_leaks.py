"""The main job on a memory that holds copies of the examples."""

import csv
import importlib.util
import json
import pathlib

import ml_collections
import numpy as np
import pytest
from PIL import Image

from retrieval_aug import main
from retrieval_aug.memory import neighbors
from retrieval_aug.memory.table import Table

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "own_data.py"
CLASSES, EACH = 2, 12

# See test_embeddings.py.
pytestmark = pytest.mark.filterwarnings(
  "ignore::DeprecationWarning", "ignore::ResourceWarning"
)


def _picture(seed):
  """Shapes of many colors, so that no two look alike."""
  rng = np.random.default_rng(seed)
  image = np.full((120, 120, 3), rng.integers(0, 256, 3), np.uint8)
  for _ in range(9):
    top, left = rng.integers(0, 96, 2)
    high, wide = rng.integers(15, 60, 2)
    image[top : top + high, left : left + wide] = rng.integers(0, 256, 3)
  return Image.fromarray(image)


@pytest.fixture
def config(tmp_path):
  rows, web = ["image,label,split"], ["image,text"]
  for i in range(CLASSES * EACH):
    name = f"{i}.png"
    picture = _picture(i)
    picture.save(tmp_path / name)
    split = ("train", "train", "val", "test")[i // CLASSES % 4]
    rows.append(f"{name},class {i % CLASSES},{split}")
    # Half of the examples are in the memory, as JPEG.
    if i % 8 < 4 or split == "test":
      picture.save(tmp_path / f"copy_{i}.jpg", quality=95)
      web.append(f"copy_{i}.jpg,a copy of {split}")
  for i in range(30):
    _picture(1000 + i).save(tmp_path / f"web_{i}.png")
    web.append(f"web_{i}.png,something else")
  (tmp_path / "photos.csv").write_text("\n".join(rows))
  (tmp_path / "memory.csv").write_text("\n".join(web))
  spec = importlib.util.spec_from_file_location("own_data", CONFIG)
  own_data = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(own_data)
  c = own_data.get_config("")
  c.dataset.manifest = str(tmp_path / "photos.csv")
  c.memory.manifest = str(tmp_path / "memory.csv")
  c.encoder = ml_collections.ConfigDict(
    {"name": "efficientnet_lite0", "size": 32}
  )
  c.value_encoders = ml_collections.ConfigDict(
    {"text": {"name": "minilm_l6", "max_length": 8}}
  )
  c.search.k = 6
  c.search.key_transform = "none"
  c.search.key_dims = 0
  c.model.name = "linear"
  c.train.k = 3
  c.train.seeds = 1
  c.train.epochs = 1.0
  return c


def _texts(workdir):
  """Texts of what each split finds, and of whose copies."""
  artifact = neighbors.found_in(workdir / "neighbors")
  table = Table(workdir / "memory")
  texts = np.array(table.column("text"))
  return {
    s: texts[neighbors.read_split(artifact, s).ids] for s in neighbors.SPLITS
  }


def test_leaks_are_told_and_drawn_and_left_out_if_asked(tmp_path, config):
  workdir = tmp_path / "work"
  text = main.run(config, workdir, list(main.STAGES))
  assert "Leaks: 6 of 6 test examples (100.0 %)" in text
  assert (workdir / "leaks.png").exists()
  with open(workdir / "leaks" / "leaks.csv") as f:
    found = list(csv.DictReader(f))
  tests = [row for row in found if row["split"] == "test"]
  assert len(tests) == 6
  for row in found:
    own = row["example"].removesuffix(".png")
    assert row["memory"] == f"copy_{own}.jpg"
  assert (_texts(workdir)["test"] == "a copy of test").any()

  # One example of each split alone is looked at.
  config.memory.leak_sample = 1
  main.run(config, workdir, ["embed", "search"])
  report = json.loads((workdir / "leaks" / "leaks.json").read_text())
  assert {s["examples"] for s in report["splits"].values()} == {1}
  assert not (workdir / "neighbors_all").exists()

  config.memory.exclude_leaks = True
  other = tmp_path / "without"
  main.run(config, other, ["embed", "search"])
  kept = _texts(other)
  for split in neighbors.SPLITS:
    assert not np.isin(kept[split], ["a copy of val", "a copy of test"]).any()
  # A training example does not find its own copy, and others may.
  artifact = neighbors.found_in(other / "neighbors")
  ids = np.array(Table(other / "memory").column("id"))
  queries = Table(other / "queries")
  rows = [i for i, s in enumerate(queries.column("split")) if s == "train"]
  names = [queries.column("id")[i] for i in rows]
  lists = ids[neighbors.read_split(artifact, "train").ids]
  for name, found in zip(names, lists):
    assert f"copy_{name.removesuffix('.png')}.jpg" not in found
  assert (kept["train"] == "a copy of train").any()
  assert (other / "neighbors_all").exists()
