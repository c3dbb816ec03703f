"""Arguments of config files mean what the papers and the documents say."""

import dataclasses
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

from retrieval_aug import config as configs
from retrieval_aug import presets
from retrieval_aug.common.errors import UserError
from retrieval_aug.encoders import efficientnet_lite, transformer, vit
from retrieval_aug.settings import Settings, chosen_models, train_settings

DOCS = pathlib.Path(__file__).parents[1] / "docs"


def _apply(text="", **options):
  c = configs.defaults()
  presets.apply(c, presets.arguments(text), **options)
  return c


def _train(c, model):
  return train_settings(Settings(c), model)


def test_the_form_of_the_documentation_sets_all_that_it_names():
  c = _apply("model=mam,memory=webli,values=t5_base,k=100")
  assert c.model.name == "mam"
  assert (c.memory.sources, c.memory.pairs) == ("pairs", "webli/*.tar")
  assert list(c.value_encoders) == ["text"]
  assert c.value_encoders.text.name == "t5"
  assert c.value_encoders.text.variant == "1.0/base"
  assert (_train(c, "mam")["k"], c.search.k) == (100, 100)


def test_without_an_argument_nothing_is_needed_but_the_dataset():
  c = _apply()
  assert c.model.name == "all"
  assert (c.memory.sources, c.memory.pairs) == ("auto", "")
  encoders = [c.encoder, *c.value_encoders.values()]
  assert [e.name for e in encoders] == ["efficientnet_lite0", "minilm_l6"]
  assert all(e.checkpoint is None for e in encoders)
  assert (c.search.key_transform, c.search.key_dims) == ("pca", 256)
  assert not c.train.finetune and c.train.augment == "none"


def test_models_train_as_in_their_papers():
  c = _apply("keys=clip_b16,values=clip_text")
  names = ("k", "epochs", "batch_size", "learning_rate", "weight_decay")
  names += ("warmup_epochs", "label_smoothing")
  settings = lambda model: tuple(_train(c, model)[n] for n in names)
  assert settings("mam_paper") == (100, 10.0, 512, 1e-3, 0.2, 1.0, 0.1)
  assert settings("retformer") == (32, 25.0, 256, 5e-4, 0.1, 1.0, 0.1)
  assert c.model.mam_paper.num_layers == 8
  assert c.model.retformer.num_layers == 4
  assert _train(c, "retformer")["mixup"] > 0
  # Neither compares transformed embeddings.
  assert (c.search.key_transform, c.search.key_dims) == ("none", 0)
  assert (c.encoder.name, c.encoder.variant) == ("clip", "B/16")


@pytest.mark.parametrize(
  ("memory", "sources", "pairs"),
  [
    ("train", "train", ""),
    ("datacomp", "pairs", "datacomp-1b/shards/*.tar"),
    ("datacomp+train", "train,pairs", "datacomp-1b/shards/*.tar"),
    ("yfcc15m+laion400m", "pairs", "yfcc15m/*.tar,laion400m/*.tar"),
    (
      "all",
      "train,pairs",
      "yfcc15m/*.tar,laion400m/*.tar,webli/*.tar",
    ),
    (
      "all+datacomp+train",
      "train,pairs",
      "yfcc15m/*.tar,laion400m/*.tar,webli/*.tar,datacomp-1b/shards/*.tar",
    ),
  ],
)
def test_memories_are_united(memory, sources, pairs):
  c = _apply(f"memory={memory}")
  assert (c.memory.sources, c.memory.pairs) == (sources, pairs)


@pytest.mark.parametrize(
  ("values", "names"),
  [
    ("vit_l16", {"visual": "vit"}),
    ("both", {"text": "t5", "visual": "vit"}),
    ("vit_l16+minilm", {"text": "minilm_l6", "visual": "vit"}),
  ],
)
def test_values_are_of_texts_of_images_or_of_both(values, names):
  sections = _apply(f"values={values}").value_encoders
  assert {n: s.name for n, s in sections.items()} == names


@pytest.mark.parametrize(
  ("text", "without"),
  [
    ("values=t5_base", set()),
    ("values=vit_l16", {"rac"}),
    ("values=both", {"retformer"}),
    ("values=both,memory=webli", {"retformer", "vote"}),
    ("values=both,memory=all", {"retformer"}),
  ],
)
def test_all_models_are_those_that_can_see_the_values(text, without):
  names = chosen_models(Settings(_apply(text)))
  assert set(configs.MODELS) - set(names) == without


def test_k_is_of_every_model_but_no_more_texts_than_are_read():
  c = _apply("k=128")
  found = {m: _train(c, m)["k"] for m in configs.MODELS}
  assert found.pop("rac") == 8
  assert set(found.values()) == {128} and c.search.k == 128
  c = _apply("k=5")
  assert {_train(c, m)["k"] for m in configs.MODELS} == {5}
  assert c.search.k == 100


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("memory=web", "memory=web: there is no 'web'; did you mean webli?"),
    ("memory=train,keys=vit", "keys=vit: there is no 'vit'; did you mean vit_"),
    ("values=", "values=: there is no ''; one of"),
    ("values=t5_base+minilm", "t5_base and minilm are of one kind; name one"),
    ("memory=auto+webli", "memory=auto.webli: auto stands alone"),
    ("model=mam+all", "model=mam.all: all stands alone"),
    ("model=mamm", "model=mamm: there is no 'mamm'; did you mean mam?"),
    ("keys=lite0+vit_b16", "keys=lite0.vit_b16: name one"),
    ("ft=yes", "ft=yes: there is no 'yes'"),
    ("k=-1", "k=-1: must be a number of neighbors, or 0"),
    ("web=webli", "'web=webli': this config file takes NAME=VALUE of model=a"),
  ],
)
def test_what_there_is_not_is_refused(text, message):
  with pytest.raises(UserError, match=message):
    _apply(text)


def _parameters(keys):
  """Names of the parameters of the published encoder; nothing is loaded."""
  if keys == "lite0":
    size = efficientnet_lite.VARIANTS["efficientnet_lite0"]
    images = jax.ShapeDtypeStruct((1, size.size, size.size, 3), jnp.float32)
    model = efficientnet_lite.EfficientNetLite(size)
    return list(transformer.flat_arrays(model, images))
  clip = {
    "num_classes": 512,
    "head_bias": False,
    "patch_bias": False,
    "pre_norm": True,
  }
  options = clip if keys == "clip_b16" else {}
  variant = vit.variant(presets.KEYS[keys]["variant"], pool_type="tok")
  variant = dataclasses.replace(variant, **options)
  return list(vit.expected_arrays(variant, (224, 224)))


@pytest.mark.parametrize("keys", presets.KEYS)
def test_fine_tuning_changes_lower_layers_less(keys):
  c = _apply(f"keys={keys},ft=True", augment="flip")
  mam = _train(c, "mam")
  assert mam["finetune"] and mam["augment"] == "flip"
  assert not _train(c, "vote")["finetune"]
  factors = mam["lr_factors"]
  found = {pattern: 0 for pattern, _ in factors}
  for name in _parameters(keys):
    (pattern,) = [p for p, _ in factors if re.fullmatch(p, f"encoder/{name}")]
    found[pattern] += 1
  # One that matches nothing is an error in training.
  assert min(found.values()) > 0
  sizes = [factor for _, factor in factors]
  assert sizes == sorted(sizes) and sizes[-1] == pytest.approx(0.1)


def test_checkpoints_and_memories_lie_where_the_documents_put_them():
  page = (DOCS / "checkpoints.md").read_text(encoding="utf-8")
  for options in (presets.KEYS | presets.TEXTS | presets.IMAGES).values():
    for name, value in options.items():
      assert f'"{name}": "{value}"' in page
  page = (DOCS / "memories.md").read_text(encoding="utf-8")
  for name, pattern in presets.PAIRS.items():
    assert (f"--config.memory.pairs='{pattern}'" in page) == (name != "webli")
