"""The main job on a memory of which each file is listed by who embeds it."""

import importlib.util
import pathlib

import ml_collections
import numpy as np
import pytest
from PIL import Image

from retrieval_aug import main
from retrieval_aug.common.errors import UserError
from retrieval_aug.memory.table import Table
from tests.datasets import pair_tars

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "own_data.py"

# See test_embeddings.py.
pytestmark = pytest.mark.filterwarnings(
  "ignore::DeprecationWarning", "ignore::ResourceWarning"
)


@pytest.fixture
def config(tmp_path):
  """Two classes of flat colors, and three tars of noise."""
  for label, color in enumerate(((200, 40, 40), (40, 40, 200))):
    folder = tmp_path / "photos" / f"class_{label}"
    folder.mkdir(parents=True)
    for i in range(14):
      noise = np.random.default_rng([label, i]).integers(0, 40, (9, 9, 3))
      image = np.clip(np.array(color) + noise, 0, 255).astype(np.uint8)
      Image.fromarray(image).save(folder / f"{i}.png")
  for i, numbers in enumerate((range(5), range(5, 8), range(8, 21))):
    pair_tars.write(tmp_path / "web" / f"{i:05d}.tar", numbers)
  spec = importlib.util.spec_from_file_location("own_data", CONFIG)
  own_data = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(own_data)
  c = own_data.get_config("")
  c.dataset.folder = str(tmp_path / "photos")
  c.memory.pairs = str(tmp_path / "web" / "*.tar")
  c.encoder = ml_collections.ConfigDict(
    {"name": "efficientnet_lite0", "size": 32}
  )
  c.value_encoders = ml_collections.ConfigDict(
    {"text": {"name": "minilm_l6", "max_length": 8}}
  )
  c.search.k = 5
  c.search.key_transform = "none"
  c.search.key_dims = 0
  c.embed.batch_size = 4
  c.embed.shard_rows = 4
  return c


def _sorted(workdir):
  table = Table(workdir / "memory")
  order = np.argsort(table.column("id"))
  name = table.value_names[0]
  ids = [table.column("id")[i] for i in order]
  return ids, table.keys()[order], table.values(name)[order]


def test_holds_what_listing_all_would_hold(tmp_path, config, capsys):
  stages = ["embed", "search"]
  main.run(config, tmp_path / "all", stages)
  config.embed.by_file = True
  main.run(config, tmp_path / "by_file", stages)
  assert "3 files of" in capsys.readouterr().err
  one, other = _sorted(tmp_path / "all"), _sorted(tmp_path / "by_file")
  assert one[0] == other[0] and len(one[0]) == 21
  for a, b in zip(one[1:], other[1:]):
    np.testing.assert_allclose(
      a.astype(np.float32), b.astype(np.float32), rtol=2e-2, atol=2e-2
    )
  main.run(config, tmp_path / "by_file", stages)
  said = capsys.readouterr().err
  assert "embed: nothing to do" in said and "search: nothing to do" in said


def test_what_cannot_be_embedded_is_written_down(tmp_path, config):
  pair_tars.write(tmp_path / "web" / "00007.tar", range(30, 40), broken=(33,))
  config.embed.by_file = True
  with pytest.raises(UserError, match="on_error=skip"):
    main.run(config, tmp_path / "work", ["embed"])
  config.memory.on_error = "skip"
  config.memory.max_errors = 0.1
  main.run(config, tmp_path / "work", ["embed"])
  letters = (tmp_path / "work" / "memory" / "dead_letters.jsonl").read_text()
  assert len(letters.splitlines()) == 1 and "33" in letters
  assert Table(tmp_path / "work" / "memory").rows == 30


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("memory.sources", "pairs,train"),
    ("memory.exclude_leaks", True),
    ("memory.filters.near_duplicates", 4),
    ("memory.pairs", ""),
  ],
)
def test_what_needs_all_of_the_memory_is_refused(tmp_path, config, name, value):
  config.embed.by_file = True
  section = config
  *parts, last = name.split(".")
  for part in parts:
    section = section[part]
  section[last] = value
  with pytest.raises(UserError, match=f"config.{name}: with config.embed.by"):
    main.run(config, tmp_path / "work", ["embed"])
