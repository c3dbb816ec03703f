"""The smallest experiment of all: embeddings of three classes, no image."""

import importlib.util
import pathlib

import ml_collections
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "own_embeddings.py"
CLASSES, D, DV = 3, 8, 5


def _near(centers, labels, rng):
  noise = rng.normal(scale=0.3, size=(len(labels), centers.shape[1]))
  return centers[labels] + noise


def write(folder: pathlib.Path) -> pathlib.Path:
  """Three classes that stand apart, in the queries and in the memory."""
  rng = np.random.default_rng(0)
  centers = rng.normal(size=(CLASSES, D))
  text_centers = rng.normal(size=(CLASSES, DV))
  labels = np.arange(90) % CLASSES
  queries = _near(centers, labels, rng).astype(np.float32)
  np.save(folder / "photos.npy", queries)
  lines = ["label", *(f"class {x}" for x in labels)]
  (folder / "labels.csv").write_text("\n".join(lines))
  laion = folder / "laion"
  for name in ("img_emb", "text_emb", "metadata"):
    (laion / name).mkdir(parents=True)
  for shard, rows in ((2, 30), (10, 60)):
    labels = np.arange(rows) % CLASSES
    for name, kind in (("img_emb", centers), ("text_emb", text_centers)):
      vectors = _near(kind, labels, rng).astype(np.float16)
      np.save(laion / name / f"{name}_{shard}.npy", vectors)
    facts = {
      "caption": [f"one of class {x}" for x in labels],
      "url": [f"https://example.org/{shard}/{row}" for row in range(rows)],
    }
    pq.write_table(
      pa.table(facts), laion / "metadata" / f"metadata_{shard}.parquet"
    )
  return folder


def config(data: pathlib.Path, **memory) -> ml_collections.ConfigDict:
  """configs/own_embeddings.py on what `write` wrote, trained for seconds."""
  spec = importlib.util.spec_from_file_location("own_embeddings", CONFIG)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  c = module.get_config("values=stored")
  c.dataset.manifest = str(data / "labels.csv")
  c.dataset.embeddings = str(data / "photos.npy")
  c.memory.update(memory)
  c.search.k = 11
  c.search.recall_sample = 20
  c.train.k = 7
  c.train.seeds = 1
  c.train.epochs = 8.0
  c.train.batch_size = 16
  c.train.learning_rate = 1e-2
  c.model.name = "mean_knn,mam"
  c.model.mam.train.epochs = 8.0
  c.model.mam.train.lr_factors = ()
  c.model.mam.dropout = 0.0
  c.model.mam.query_dropout = 0.0
  return c
