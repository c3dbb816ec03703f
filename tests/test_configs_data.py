"""Configs of data sets build in every form of their argument."""

import importlib.util
import inspect
import pathlib

import pytest

from retrieval_aug import config as configs
from retrieval_aug import datasets, presets
from retrieval_aug.common.errors import UserError
from retrieval_aug.datasets import filters, memories
from retrieval_aug.memory import captions

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"

# Of config files that take the argument of `presets`.
PRESETS = (
  "",
  "model=mam,memory=webli,values=t5_base,k=100",
  "model=mam+linear,k=32",
  "model=retformer,memory=train+datacomp,keys=clip_b16,values=clip_text",
  "keys=vit_b16,ft=True,model=mam",
  "memory=train+datacomp,keys=clip_b16,values=clip_text",
  "memory=yfcc15m,k=10",
  "ft=True,model=mam",
  *(f"memory={m}" for m in ("auto", "train", *presets.PAIRS, "all")),
  *(f"keys={k}" for k in presets.KEYS),
  *(f"keys={k},ft=True" for k in presets.KEYS),
  *(f"values={v}" for v in (*presets.TEXTS, *presets.IMAGES, "both")),
  *(f"model={m}" for m in configs.MODELS),
  "ft=False",
)

FORMS = {
  "own_data": ("", "values=text", "values=visual", "values=both"),
  "cifar100_lt": (
    *PRESETS,
    *(f"classes={c},ratio={r}" for c in (10, 100) for r in (10, 50, 100)),
    "classes=10,ratio=10,values=both",
  ),
  "emoji": ("", "values=text", "values=visual", "values=both", "ft=True"),
  "fashion_mnist_lt": ("", "ratio=10", "ratio=50"),
  "imagenet_lt": PRESETS,
  "inat18": PRESETS,
  "inat21": (*PRESETS, "subset=mini", "subset=full"),
  "own_embeddings": ("", "values=text", "values=stored"),
  "places_lt": PRESETS,
  "webvision": (
    *PRESETS,
    "subset=mini",
    "subset=full",
    "subset=full,memory=all,values=vit_l16",
  ),
}


def module(name):
  path = CONFIGS / f"{name}.py"
  spec = importlib.util.spec_from_file_location(f"config_{name}", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.parametrize(
  ("name", "form"), [(name, form) for name in FORMS for form in FORMS[name]]
)
def test_every_form_builds_with_all_options_of_its_dataset(name, form):
  config = module(name).get_config(form)
  assert config.is_locked
  options = config.dataset.to_dict()
  loader = importlib.import_module(datasets._MODULES[options.pop("name")]).load
  # All of them, so that each can be set on the command line.
  assert set(options) == set(inspect.signature(loader).parameters)


def test_the_defaults_of_the_memory_are_those_of_its_functions():
  memory = configs.defaults().memory.to_dict()
  filtered = memory.pop("filters")
  assert memory["clean"] == captions.CLEANING[0] == "none"
  for name in memories.OF_LATER_STAGES:
    del memory[name]
  for given, function in (
    (memory, datasets.load_memory),
    (filtered, filters.apply),
  ):
    known = inspect.signature(function).parameters.values()
    assert given == {
      p.name: p.default
      for p in known
      if p.kind is p.KEYWORD_ONLY and p.name not in ("filters", "allow_none")
    }


@pytest.mark.parametrize("name", FORMS)
def test_an_unknown_argument_is_refused(name):
  with pytest.raises(UserError, match="'nothing=1': this config file takes"):
    module(name).get_config("nothing=1")


def test_own_data_says_what_it_needs():
  config = module("own_data").get_config()
  with pytest.raises(UserError, match="give one of --config.dataset.manifest"):
    datasets.load(**config.dataset.to_dict())


def test_a_value_that_there_is_not_is_refused():
  with pytest.raises(UserError, match="values=web: not text, visual or both"):
    module("own_data").get_config("values=web")
