"""The main job without any image: embeddings of a folder, and one's own."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retrieval_aug import main
from retrieval_aug.common.errors import UserError
from tests.end_to_end import embeddings
from tests.end_to_end.embeddings import CLASSES, DV, D

# TensorFlow and Orbax warn of their own dependencies, and an Orbax manager that
# is closed late is a ResourceWarning.
pytestmark = pytest.mark.filterwarnings(
  "ignore::DeprecationWarning", "ignore::ResourceWarning"
)


@pytest.fixture
def data(tmp_path):
  return embeddings.write(tmp_path)


def _accuracies(workdir):
  rows = json.loads((workdir / "results.json").read_text())
  return {
    r["model"]: r["mean"]
    for r in rows
    if (r["split"], r["metric"], r["group"]) == ("test", "top1", "all")
  }


def test_the_whole_job_runs_on_embeddings_alone(data, capsys):
  workdir = data / "work"
  config = embeddings.config(data, embeddings=str(data / "laion"))
  text = main.run(config, workdir, list(main.STAGES))
  assert "recall@11 1.0000" in text
  accuracies = _accuracies(workdir)
  assert set(accuracies) == {"mean_knn", "mam"}
  assert min(accuracies.values()) > 90  # of three classes
  said = capsys.readouterr().err
  assert "neighbors.png cannot be drawn: own_embeddings: has embeddings" in said
  assert "nothing tells which encoder made" in said
  # Nothing is copied.
  assert not list(workdir.glob("*/keys_*.npy"))
  assert not list(workdir.glob("memory/values_*.npy"))

  main.run(config, workdir, list(main.STAGES))
  said = capsys.readouterr().err
  assert "embed: nothing to do" in said and "search: nothing to do" in said

  # Another file under its name is noticed, by whatever stage reads it.
  path = data / "laion" / "img_emb" / "img_emb_10.npy"
  np.save(path, np.load(path).astype(np.float32))
  with pytest.raises(UserError, match="made from other inputs"):
    main.run(config, workdir, ["embed"])
  (workdir / "neighbors" / "manifest.json").unlink()
  with pytest.raises(UserError, match="img_emb_10.npy: changed since it was"):
    main.run(config, workdir, ["search"])


def test_an_example_whose_id_is_in_the_memory_never_finds_itself(data):
  """The memory is a Parquet file of the examples themselves."""
  rows = np.arange(90)
  pq.write_table(
    pa.table(
      {
        "id": [f"labels.csv#{row + 2}" for row in rows],
        "text": [f"one of class {row % CLASSES}" for row in rows],
        "img_emb": list(np.load(data / "photos.npy")),
        "text_emb": list(np.eye(CLASSES, DV, dtype=np.float32)[rows % CLASSES]),
      }
    ),
    data / "own.parquet",
  )
  config = embeddings.config(data, embeddings=str(data / "own.parquet"))
  workdir = data / "work"
  main.run(config, workdir, ["embed", "search"])
  info = json.loads((workdir / "neighbors" / "manifest.json").read_text())
  assert info["info"]["examples_in_memory"] == 63


def test_training_embeddings_can_be_retrieved_beside_a_folder(data):
  config = embeddings.config(
    data, embeddings=str(data / "laion"), sources="train,embeddings"
  )
  # Nothing is stored of the label's text.
  with pytest.raises(UserError, match="'text': there are none beside .*photos"):
    main.run(config, data / "work", ["embed"])
  config.value_encoders.text.name = "minilm_l6"
  config.value_encoders.text.update({"max_length": 8})
  main.run(config, data / "work", ["embed", "search"])
  info = json.loads((data / "work" / "neighbors" / "manifest.json").read_text())
  assert info["info"]["examples_in_memory"] == 63


def test_embeddings_of_another_width_are_refused_before_any_work(data):
  np.save(data / "photos.npy", np.ones((90, D + 1), np.float32))
  config = embeddings.config(data, embeddings=str(data / "laion"))
  with pytest.raises(UserError, match="8 dims, and .*photos.npy has 9"):
    main.run(config, data / "work", ["embed"])
  assert not list((data / "work").glob("*/manifest.json"))
