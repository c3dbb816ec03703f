"""docs/memories.md says what is so: its settings, tables, counts and code."""

import gzip
import importlib.util
import json
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks import searchers
from retrieval_aug import config
from retrieval_aug.encoders import efficientnet_lite, t5, vit
from retrieval_aug.memory import table
from retrieval_aug.settings import check_overrides

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "memories.md").read_text(encoding="utf-8")
FLOWING = " ".join(PAGE.split())
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)

PAIRS = {
  "1 million": 10**6,
  "15 million": 15 * 10**6,
  "400 million": 400 * 10**6,
  "1 billion": 10**9,
  "1.4 billion": 1_400 * 10**6,
}
# What the text says, and the tables follow from.
QUERIES = 185_846
METADATA = 250  # bytes a pair
IMAGES = 29.9e9 / 1e6  # bytes an image
DIMS = {  # of keys and values
  "Lite0 + MiniLM": (1280, 384),
  "B/16 + T5": (768, 768),
  "B/16 + T5 + L/16": (768, 768, 1024),
  "CLIP B/32": (512, 512),
}
EMBED = 47  # images/s
GFLOP = {"Lite0": 0.78, "ViT-B/16": 35.1, "ViT-L/16": 122.8, "T5-Base": 11.0}
EXACT = 2.7e-8  # core-s a key and query
BUILD = 5e-4  # core-s a key
SCANN = 4e-9  # core-s a key and query


def three_digits(x):
  return f"{float(f'{x:.3g}'):,.10g}"


def size(num_bytes):
  unit = 1e12 if num_bytes >= 1e12 else 1e9
  return f"{three_digits(num_bytes / unit)} {'TB' if unit == 1e12 else 'GB'}"


def duration(seconds):
  hours = seconds / 3600
  if hours < 48:
    return f"{three_digits(hours)} h"
  return f"{three_digits(hours / 24)} days"


def core_hours(seconds):
  return three_digits(seconds / 3600)


def row(*cells):
  return f"| {' | '.join(cells)} |"


def head(*cells):
  return [row(*cells), "|---" * len(cells) + "|"]


def disk_table():
  lines = head("pairs", "images, 256 px", *DIMS, "RAM of the search")
  for name, pairs in PAIRS.items():
    tables = (2 * sum(dims) + METADATA for dims in DIMS.values())
    lines.append(
      row(
        name,
        size(pairs * IMAGES),
        *(size(pairs * bytes_a_row) for bytes_a_row in tables),
        size(pairs * 14 * 768),
      )
    )
  return lines


def time_table():
  lines = head(
    "pairs",
    "embed, Lite0, 2 cores",
    "embed, B/16 + T5, PFLOP",
    "with L/16, PFLOP",
    "exact search, core-h",
    "ScaNN, core-h",
    "exact search, PFLOP",
  )
  two = GFLOP["ViT-B/16"] + GFLOP["T5-Base"]
  three = two + GFLOP["ViT-L/16"]
  for name, pairs in PAIRS.items():
    lines.append(
      row(
        name,
        duration(pairs / EMBED),
        three_digits(pairs * two / 1e6),
        three_digits(pairs * three / 1e6),
        core_hours(pairs * QUERIES * EXACT),
        core_hours(pairs * (BUILD + QUERIES * SCANN)),
        three_digits(2 * 768 * pairs * QUERIES / 1e15),
      )
    )
  return lines


def settings(text):
  return re.findall(r"--config\.[a-z]\w*(?:\.\w+)*", text)


def test_every_setting_of_the_page_is_one_of_the_config():
  spec = importlib.util.spec_from_file_location(
    "own_data", ROOT / "configs" / "own_data.py"
  )
  own_data = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(own_data)
  found = [s for s in settings(PAGE) if s != "--config.memory"]
  named = {s for s in found if s.startswith("--config.memory.")}
  for source in ("pairs", "embeddings", "manifest", "captions"):
    assert f"--config.memory.{source}" in named
  # Raises for one that is not there.
  check_overrides(sorted(named), config.defaults())
  check_overrides(found, own_data.get_config(""))


def test_a_setting_that_does_not_exist_would_be_found():
  wrong = settings("`--config.memory.pears='cc12m/*.tar'`")
  with pytest.raises(config.UserError, match="memory.pairs"):
    check_overrides(wrong, config.defaults())


@pytest.mark.parametrize("lines", [disk_table(), time_table()])
def test_tables_are_what_the_formulas_give(lines):
  assert "\n".join(lines) in PAGE, "\n" + "\n".join(lines)


def test_text_has_the_rates_of_the_tables():
  for said in (
    f"N queries, here {QUERIES:,}",
    f"{METADATA} of metadata a pair",
    f"{IMAGES * 1e6 / 1e9:.1f} GB a million",
    f"{EMBED} images/s",
    f"exact {EXACT:.1e} core-s a key and query",
    f"core-s a key to build, in the table {BUILD:.0e}",
    f"a key and query, in the table {SCANN:.0e}",
    f"counts {GFLOP['Lite0']} GFLOP an image",
    f"{GFLOP['ViT-B/16']} for ViT-B/16",
    f"{GFLOP['ViT-L/16']} for ViT-L/16",
    f"{GFLOP['T5-Base']:.1f} for T5-Base at 64 tokens",
  ):
    assert said.replace("e-0", "e-") in FLOWING, said


IMAGE = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
LITE0 = efficientnet_lite.VARIANTS["efficientnet_lite0"]


@pytest.mark.parametrize(
  ("name", "model", "x"),
  [
    ("Lite0", efficientnet_lite.EfficientNetLite(LITE0), IMAGE),
    ("ViT-B/16", vit.Vit(vit.variant("B/16")), IMAGE),
    ("ViT-L/16", vit.Vit(vit.variant("L/16")), IMAGE),
    (
      "T5-Base",
      t5.T5(t5.VARIANTS["1.0/base"]),
      jax.ShapeDtypeStruct((1, 64), jnp.int32),
    ),
  ],
)
def test_flops_are_those_that_xla_counts(name, model, x):
  zeros = jnp.zeros(x.shape, x.dtype)
  variables = jax.eval_shape(model.init, jax.random.key(0), zeros)
  counted = jax.jit(model.apply).lower(variables, x).cost_analysis()["flops"]
  assert counted / 1e9 == pytest.approx(GFLOP[name], rel=1e-2)


def test_a_row_of_a_table_takes_the_bytes_of_the_formula(tmp_path):
  class Artifact:
    folder = tmp_path

    def record(self, *_):
      pass

  rows, key_dims, value_dims = 11, 7, 5
  table.write_shard(
    Artifact(),
    0,
    keys=np.ones((rows, key_dims)),
    values={"text": np.ones((rows, value_dims))},
    metadata={"id": list(map(str, range(rows)))},
  )
  stored = [np.load(p, allow_pickle=False) for p in tmp_path.glob("*.npy")]
  assert sum(x.nbytes for x in stored) == rows * (2 * key_dims + 2 * value_dims)


def test_yfcc_list_of_the_page_has_captions_and_licenses(tmp_path):
  (code,) = (block for block in BLOCKS if "yfcc15m" in block)
  folder = tmp_path / "yfcc15m-meta" / "metadata"
  folder.mkdir(parents=True)
  rows = [
    {"title": "A+crane%2C", "description": "at%20dawn", "n": 1},
    {"title": "Two", "description": None, "n": 2},
  ]
  with gzip.open(folder / "metadata_001.jsonl.gz", "wt") as file:
    for found in rows:
      found |= {"downloadurl": f"http://x/{found['n']}.jpg"}
      file.write(json.dumps(found | {"licensename": "CC-BY"}) + "\n")
  subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
  written = pq.read_table(tmp_path / "yfcc15m-list" / "metadata_001.parquet")
  assert written.to_pydict() == {
    "url": ["http://x/1.jpg", "http://x/2.jpg"],
    "caption": ["A crane,. at dawn", "Two"],
    "license": ["CC-BY", "CC-BY"],
  }


def test_program_that_measured_the_search_runs():
  # What the page cites: how it is run, and its sizes.
  assert "`python -m benchmarks.searchers`" in PAGE
  assert "(100,000 keys, 1,000 queries, d = 768)" in FLOWING
  (rates,) = searchers.measure(500, 20, 16, 10, ["exact"]).values()
  assert rates.build > 0 and rates.search > 0 and rates.recall == 1.0
