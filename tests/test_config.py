"""Every setting is known, read, and misspelt only once."""

import importlib.util
import pathlib
import re

import jax.numpy as jnp
import ml_collections
import pytest

from retrieval_aug import config as configs
from retrieval_aug import datasets, encoders, models
from retrieval_aug.common.errors import UserError
from retrieval_aug.settings import (
  Settings,
  changed,
  check_overrides,
  chosen_models,
  train_settings,
)

FILES = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))


def _load(path):
  spec = importlib.util.spec_from_file_location("a_config", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture
def config():
  return configs.defaults()


class TestUnknownKeys:
  @pytest.mark.parametrize(
    ("argument", "hint"),
    [
      ("--config.train.learning_rat=1", "did you mean config.train.learning_"),
      ("-config.search.searchr=exact", "did you mean config.search.searcher?"),
      ("--config.model.mam.num_layer=2", "config.model.mam.num_layers?"),
      ("--config.learning_rate=1", "did you mean config."),
      ("--config.qqqqqqqq=1", "see --help"),
    ],
  )
  def test_on_the_command_line_name_the_nearest(self, config, argument, hint):
    with pytest.raises(UserError) as caught:
      check_overrides(["main", argument], config)
    message = str(caught.value)
    name = re.match(r"-+(config[^=]+)", argument)[1]
    assert message.startswith(f"{name}: no such setting; ")
    assert hint in message

  def test_known_keys_and_other_flags_pass(self, config):
    check_overrides(
      ["main", "--config=configs/a.py", "--config.train.k=3", "--workdir=x"],
      config,
    )

  def test_in_a_config_file_name_the_nearest(self, tmp_path):
    path = tmp_path / "wrong.py"
    path.write_text(
      "from retrieval_aug import config\n"
      "def get_config():\n"
      "  c = config.defaults()\n"
      "  c.train.learning_rat = 1.0\n"
      "  return c\n"
    )
    with pytest.raises(AttributeError, match="learning_rate"):
      _load(path).get_config()

  def test_a_value_of_another_type_is_refused(self, config):
    with pytest.raises(TypeError):
      config.train.epochs = "many"


class TestArguments:
  def test_are_read_by_name_with_their_defaults_type(self):
    found = configs.arguments("k=5,values=visual", values="text", k=3, tau=1.0)
    assert found == {"values": "visual", "k": 5, "tau": 1.0}
    assert (
      configs.arguments(None, k=3) == configs.arguments("", k=3) == {"k": 3}
    )

  def test_false_is_false(self):
    found = configs.arguments("a=False,b=True", a=True, b=False)
    assert found == {"a": False, "b": True}

  @pytest.mark.parametrize("text", ["valus=x", "values", "k=five", "ft=yes"])
  def test_wrong_ones_are_named(self, text):
    with pytest.raises(UserError) as caught:
      configs.arguments(text, values="text", k=3, ft=False)
    assert str(caught.value).startswith(f"{text!r}: ")


class TestSettings:
  def test_sections_are_seen_by_name(self, config):
    settings = Settings(config)
    assert settings.train.batch_size == 512
    assert settings.model.mam_paper.num_layers == 8

  def test_a_name_that_is_not_there_says_where(self, config):
    with pytest.raises(AttributeError, match="config has no train.k2"):
      _ = Settings(config).train.k2

  def test_only_what_was_read_counts_as_read(self, config):
    settings = Settings(config)
    _ = settings.train.batch_size, settings.search.options("k")
    unread = settings.unread()
    assert "train.batch_size" not in unread
    assert "train.epochs" in unread
    assert "search.searcher" not in unread and "search.k" in unread

  def test_options_may_be_called_as_a_method_is(self, config):
    config.dataset = ml_collections.ConfigDict({"name": "x", "names": "common"})
    settings = Settings(config)
    assert settings.dataset.options() == {"name": "x", "names": "common"}

  def test_a_dict_for_a_fingerprint_counts_nothing_as_read(self, config):
    settings = Settings(config)
    assert settings.search.as_dict()["k"] == 100
    assert "search.k" in settings.unread()

  def test_a_marked_section_is_read_as_a_whole(self, config):
    settings = Settings(config)
    settings.model.mam.mark_read()
    unread = settings.unread()
    assert not [n for n in unread if n.startswith("model.mam.")]
    assert "model.mlp.hidden_dim" in unread

  def test_changed_names_what_is_not_the_default(self, config):
    assert changed(config) == {}
    config.train.epochs = 3.0
    config.model.mam.train.tau = 0.5
    assert changed(config) == {"train.epochs": 3.0, "model.mam.train.tau": 0.5}


class TestModels:
  def _models(self, config, text):
    config.model.name = text
    return chosen_models(Settings(config))

  @pytest.mark.parametrize(
    ("text", "expected"),
    [
      ("all", list(configs.MODELS)),
      ("mam", ["mam"]),
      # In the order of the table, whatever the order asked for.
      ("mam,linear", ["linear", "mam"]),
      ("mam, mean_knn", ["mean_knn", "mam"]),
    ],
  )
  def test_names_are_read_in_table_order(self, config, text, expected):
    assert self._models(config, text) == expected

  def test_an_unknown_one_names_the_nearest(self, config):
    with pytest.raises(UserError) as caught:
      self._models(config, "linear,meanknn")
    assert str(caught.value) == (
      "config.model.name=linear,meanknn: no model 'meanknn'; did you mean "
      "mean_knn?"
    )

  def test_one_that_is_like_none_lists_them(self, config):
    with pytest.raises(UserError, match="one of .*'linear'"):
      self._models(config, "zzzz")


@pytest.mark.parametrize("name", configs.MODELS)
def test_a_models_section_is_all_its_options_with_their_defaults(config, name):
  section = getattr(Settings(config).model, name).options("train")
  known = models.options(name)
  # Filled in from the data, and parameters that are never trained.
  known.pop("max_neighbors", None)
  known.pop("folded", None)
  for kind in ("dtype", "param_dtype"):
    if kind in known:
      assert jnp.dtype(section.pop(kind)) == known.pop(kind)
  assert section == known


def test_every_model_has_a_section():
  assert set(configs.MODELS) == set(models.names())


def test_a_temperature_may_be_a_number_or_learned(config):
  config.model.mam.attention_temperature = 0.5
  config.model.mam.attention_temperature = "learned"
  options = Settings(config).model.mam.options("train")
  assert models.build("mam", 3, **options).fusion is not None


class TestTrainSettings:
  def test_a_models_own_values_come_first(self, config):
    config.train.epochs = 7.0
    config.train.tau = 2.0
    config.model.mam.train.epochs = 3.0
    settings = Settings(config)
    mam = train_settings(settings, "mam")
    linear = train_settings(settings, "linear")
    assert (mam["epochs"], mam["tau"]) == (3.0, 2.0)
    assert (linear["epochs"], linear["tau"]) == (7.0, 2.0)

  def test_zero_is_a_value_of_its_own(self, config):
    config.model.mlp.train.weight_decay = 0.0
    settings = Settings(config)
    assert train_settings(settings, "mlp")["weight_decay"] == 0.0


class TestFineTuning:
  def test_is_asked_for_of_all_models_or_of_one(self, config):
    config.model.mam.train.finetune = True
    config.model.mam.train.augment = "flip"
    settings = Settings(config)
    own = {n: train_settings(settings, n) for n in configs.MODELS}
    assert [n for n in own if own[n]["finetune"]] == ["mam"]
    assert own["mam"]["augment"] == "flip" and own["rac"]["augment"] == "none"

  def test_of_all_models_leaves_out_the_vote_which_trains_nothing(self, config):
    config.train.finetune = True
    settings = Settings(config)
    own = {n: train_settings(settings, n) for n in configs.MODELS}
    assert [n for n in own if not own[n]["finetune"]] == ["vote"]

  def test_layers_learn_the_less_the_lower_they_are(self):
    layers = ["encoder/stem/.*", "encoder/blocks_0/.*", "encoder/head/.*"]
    found = configs.layer_decay(layers, factor=0.4, decay=0.5)
    assert [name for name, _ in found] == layers
    assert [f for _, f in found] == pytest.approx([0.1, 0.2, 0.4])

  def test_layer_decay_is_a_value_of_the_setting(self, config):
    pairs = configs.layer_decay(["a", "b"], factor=1.0, decay=0.8)
    config.model.mam.train.lr_factors = pairs
    settings = Settings(config)
    assert train_settings(settings, "mam")["lr_factors"] == pairs


def test_there_are_config_files():
  assert "emoji.py" in [p.name for p in FILES]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
class TestConfigFiles:
  def test_builds_and_is_locked(self, path):
    assert _load(path).get_config().is_locked

  def test_begins_with_what_it_is_and_how_to_run_it(self, path):
    doc = _load(path).__doc__
    assert f"--config=configs/{path.name}" in doc

  def test_its_models_can_be_built_with_its_options(self, path):
    settings = Settings(_load(path).get_config())
    for name in chosen_models(settings):
      options = getattr(settings.model, name).options("train")
      assert models.build(name, 7, **options) is not None

  def test_its_dataset_and_encoders_are_known(self, path):
    config = _load(path).get_config()
    assert config.dataset.name in datasets._MODULES
    assert config.encoder.name in encoders.names()
    for section in config.value_encoders.values():
      assert section.name in encoders.names()

  def test_it_trains_on_no_more_neighbors_than_it_finds(self, path):
    config = _load(path).get_config()
    assert 1 <= config.train.k <= config.search.k
