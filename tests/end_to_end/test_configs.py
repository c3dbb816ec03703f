"""No config file rots: each runs on data in the layout of its source.

Every config file has its row in `RUNS`, and runs the stages embed, search and
train, two steps of each model, as it is and with another argument. That every
argument builds says `tests/test_configs_data.py`.
"""

import json
import pathlib
from typing import NamedTuple

import numpy as np
import pytest

from retrieval_aug import config as configs
from retrieval_aug import datasets, main
from retrieval_aug.memory.table import Table
from retrieval_aug.settings import Settings, chosen_models
from tests import test_configs_data
from tests.end_to_end import miniatures

# TensorFlow and Orbax warn of their own dependencies, and an Orbax manager that
# is closed late is a ResourceWarning.
pytestmark = pytest.mark.filterwarnings(
  "ignore::DeprecationWarning", "ignore::ResourceWarning"
)


class Run(NamedTuple):
  """A run of a config file, and what it has to be.

  Attributes:
    argument: of the config file.
    values: names of the encoders of values.
    sources: of the memory.
    models: that are trained; of those that the argument chooses, as all are
      many.
    keys: name of the encoder of keys.
  """

  argument: str
  values: tuple[str, ...] = ("minilm_l6",)
  sources: tuple[str, ...] = ("train",)
  models: tuple[str, ...] = ("mam",)
  keys: str = "efficientnet_lite0"


VENDORS = ("fluent-emoji-flat", "openmoji", "twemoji")
RUNS = {
  "cifar100_lt": (
    Run(""),
    Run("classes=10,ratio=10,values=both", ("t5", "vit")),
  ),
  "emoji": (
    Run("", sources=VENDORS),
    Run("ft=True", sources=VENDORS),
  ),
  "fashion_mnist_lt": (Run(""), Run("ratio=10")),
  "imagenet_lt": (
    Run("", models=("linear", "retformer", "mam")),
    Run("model=mam,memory=webli,values=t5_base,k=100", ("t5",), ("webli",)),
  ),
  "inat18": (Run(""), Run("memory=yfcc15m,k=10", sources=("yfcc15m",))),
  "inat21": (Run(""), Run("ft=True,model=mam")),
  "own_data": (
    Run(""),
    Run("values=both", ("minilm_l6", "efficientnet_lite2")),
  ),
  "own_embeddings": (
    Run("", sources=("laion",), keys="stored"),
    Run("values=stored", ("text",), ("laion",), keys="stored"),
  ),
  "places_lt": (
    Run(""),
    Run(
      "memory=train+datacomp,keys=clip_b16,values=clip_text",
      ("clip_text",),
      ("train", "datacomp-1b"),
      keys="clip",
    ),
  ),
  "webvision": (
    Run(""),
    Run(
      "subset=full,memory=all,values=vit_l16",
      ("vit",),
      ("train", "yfcc15m", "laion400m", "webli"),
    ),
  ),
}
CASES = [(name, run) for name, runs in RUNS.items() for run in runs]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
  return miniatures.write_checkpoints(tmp_path_factory.mktemp("checkpoints"))


def test_every_config_file_runs():
  files = {path.stem for path in test_configs_data.CONFIGS.glob("*.py")}
  assert set(RUNS) == set(miniatures.DATA) == files
  for name, runs in RUNS.items():
    assert {run.argument for run in runs} <= set(test_configs_data.FORMS[name])
    assert runs[0].argument == ""


def _config(name, run, patch, checkpoints, folder):
  """The config as a command line makes it, on data that are written here."""
  c = test_configs_data.module(name).get_config(run.argument)
  c.lock()  # with all its sections, as the main job has it
  given = miniatures.DATA[name](folder, patch, c.dataset)
  for section in (
    "encoder",
    *(f"value_encoders.{n}" for n in c.value_encoders),
  ):
    found = _at(c, section).name
    if found in checkpoints:
      given |= {
        f"{section}.checkpoint": str(checkpoints[found]),
        f"{section}.variant": None,
      }
  for i, pattern in enumerate(filter(None, c.memory.pairs.split(","))):
    miniatures.write_pairs(pathlib.Path(pattern), 1000 * i)
  for setting, value in given.items():
    _set(c, setting, value)
  return c


def _at(c, section):
  for part in section.split("."):
    c = c[part]
  return c


def _set(c, setting, value):
  section, _, key = setting.rpartition(".")
  _at(c, section)[key] = value


def _two_steps(c, models):
  """Makes everything but the data small."""
  train = datasets.load(**c.dataset.to_dict())[0].splits.count("train")
  c.model.name = ",".join(models)
  c.model.retformer.num_layers = 1
  c.embed.batch_size = 8
  c.embed.threads = 2
  c.search.k = 3
  c.search.recall_sample = 5
  if c.search.key_dims:
    c.search.key_dims = 2
  for model in configs.MODELS:
    # There is no run here to start from.
    for setting in ("k", "epochs", "batch_size", "seeds", "keep_start"):
      c.model[model].train[setting] = None
  c.train.k = 3
  c.train.seeds = 1
  c.train.batch_size = 4
  c.train.epochs = 2 * 4 / train


@pytest.mark.parametrize(
  ("name", "run"), CASES, ids=[f"{n}:{r.argument}" for n, r in CASES]
)
def test_two_steps_of_training(name, run, checkpoints, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)  # where memories of the web are looked for
  if name != "emoji":  # which is downloaded
    monkeypatch.setenv("RETRIEVAL_AUG_CACHE", str(tmp_path / "cache"))
  miniatures.replace_downloads(monkeypatch)
  data, workdir = tmp_path / "data", tmp_path / "workdir"
  data.mkdir()
  c = _config(name, run, monkeypatch, checkpoints, data)
  asked = chosen_models(Settings(c))
  assert set(run.models) <= set(asked)
  _two_steps(c, run.models)
  main.run(c, workdir, ["embed", "search", "train"])

  manifest = json.loads((workdir / "memory" / "manifest.json").read_text())
  assert set(manifest["inputs"]["values"]) == set(run.values)
  assert manifest["inputs"]["encoder"]["name"] == run.keys
  sources = Table(workdir / "memory").column("source")
  assert set(sources) == set(run.sources)
  for model in run.models:
    folder = workdir / "runs" / model / "seed_0"
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    assert [step["step"] for step in steps] == [1, 2]
    assert np.isfinite([step["loss"] for step in steps]).all()
    with np.load(folder / "params.npz", allow_pickle=False) as params:
      tuned = any(n.startswith("encoder/") for n in params)
    assert tuned == c.train.finetune
