"""Sweeps: lists to points, points to runs, runs to a choice by val alone."""

import json
import os
import shlex
import shutil
import signal

import jax
import numpy as np
import pytest

from retrieval_aug import config as configs
from retrieval_aug import main, sweep
from retrieval_aug.common import distributed
from retrieval_aug.common.errors import UserError
from retrieval_aug.evaluation import sweep_table
from retrieval_aug.settings import Settings, check_overrides, train_settings
from retrieval_aug.training import books, loop, runs
from tests.end_to_end import embeddings

# TensorFlow and Orbax warn of their own dependencies, and an Orbax manager that
# is closed late is a ResourceWarning.
pytestmark = pytest.mark.filterwarnings(
  "ignore::DeprecationWarning", "ignore::ResourceWarning"
)


@pytest.fixture(autouse=True)
def strict_promotion():
  """As in tests/training: optax raises floats to integer powers."""
  with jax.numpy_rank_promotion("raise"):
    yield


def _settings(**lists):
  config = configs.defaults()
  for name, text in lists.items():
    section, _, key = name.partition("_")
    config.sweep[section][key] = text
  return Settings(config)


def _points(models, **lists):
  found = sweep.trials(_settings(**lists), models)
  return {model: [t.point for t in found[model]] for model in found}


def _refusal(models=("mam",), **lists):
  with pytest.raises(UserError) as caught:
    sweep.trials(_settings(**lists), models)
  return str(caught.value)


class TestGrid:
  def test_is_every_combination_in_the_order_of_the_lists(self):
    found = _points(
      ["mam"], model_num_layers="2,1", train_learning_rate="1e-3, 3e-5"
    )
    assert found == {
      "mam": [
        "learning_rate=0.001,num_layers=2",
        "learning_rate=0.001,num_layers=1",
        "learning_rate=3e-05,num_layers=2",
        "learning_rate=3e-05,num_layers=1",
      ]
    }

  def test_an_option_multiplies_the_models_that_have_it(self):
    found = _points(
      ["linear", "mlp", "vote"],
      model_activation="relu,gelu",
      model_input_scale="none,sqrt_d",
    )
    assert {m: len(points) for m, points in found.items()} == {
      "linear": 2,
      "mlp": 4,
      "vote": 1,
    }
    assert found["vote"] == ["as_set"]

  def test_training_multiplies_all_but_the_vote_which_trains_nothing(self):
    found = _points(["vote", "linear"], train_epochs="1,2", train_k="3,5")
    assert found["vote"] == ["k=3", "k=5"] and len(found["linear"]) == 4

  def test_nothing_asked_for_is_no_sweep(self):
    assert sweep.trials(_settings(), ["mam"]) == {}

  def test_a_point_is_the_config_with_its_values(self):
    settings = _settings(train_tau="0.5", model_tau="3", train_finetune="True")
    (trial,) = sweep.trials(settings, ["rac"])["rac"]
    train = train_settings(trial.settings, "rac")
    assert (train["tau"], train["finetune"]) == (0.5, True)
    assert trial.settings.model.rac.tau == 3.0
    assert trial.point == "finetune=True,model.tau=3.0,tau=0.5"
    # That of the sweep itself stays as it was.
    assert settings.model.rac.tau == 2.0 and settings.train.tau == 1.0
    assert settings.model.rac.train.tau is None

  def test_what_a_point_reads_is_read(self):
    settings = _settings(model_num_layers="1,2")
    assert "sweep.model.num_layers" in settings.unread()
    trial = sweep.trials(settings, ["mam"])["mam"][1]
    assert "sweep.model.num_layers" not in settings.unread()
    assert "model.mam.num_layers" in settings.unread()
    assert trial.settings.model.mam.num_layers == 2
    assert "model.mam.num_layers" not in settings.unread()


class TestValues:
  @pytest.mark.parametrize(
    ("lists", "model", "expected"),
    [
      ({"train_batch_size": "8,16"}, "mam", [8, 16]),
      ({"train_weight_decay": "0,1e-2"}, "mam", [0.0, 0.01]),
      ({"train_remat": "True,False"}, "mam", [True, False]),
      ({"train_loss": "lace, focal"}, "mam", ["lace", "focal"]),
      ({"model_norm": "None,qk"}, "mam", [None, "qk"]),
      ({"model_hidden_dim": "None,7"}, "mlp", [None, 7]),
      ({"model_attention_temperature": "0.5,learned"}, "mam", [0.5, "learned"]),
      (
        {"train_augment": "none;flip, crop(2)"},
        "mam",
        ["none", "flip, crop(2)"],
      ),
    ],
  )
  def test_have_the_type_of_the_default(self, lists, model, expected):
    trials = sweep.trials(_settings(**lists), [model])[model]
    found = [value for trial in trials for value in trial.values.values()]
    assert found == expected
    assert [type(x) for x in found] == [type(x) for x in expected]

  @pytest.mark.parametrize(
    ("lists", "message"),
    [
      (
        {"train_learning_rate": "1e-3,fast"},
        "train.learning_rate=1e-3,fast: 'fast' is no float; the default is "
        "0.001.",
      ),
      ({"train_epochs": "nan"}, "train.epochs=nan: 'nan' is no float"),
      ({"train_batch_size": "8.5"}, "train.batch_size=8.5: '8.5' is no int"),
      ({"train_remat": "yes"}, "train.remat=yes: 'yes' is no bool"),
      ({"model_num_layers": "None"}, "model.num_layers=None: 'None' is no int"),
      ({"train_tau": "1e-1,2,0.1"}, "train.tau=1e-1,2,0.1: 0.1 is there twice"),
      ({"train_tau": ""}, "train.tau=: a value is missing"),
      ({"train_tau": "1,,2"}, "train.tau=1,,2: a value is missing"),
      (
        {"model_hidden_dim": "1,2"},
        "model.hidden_dim: config.model.name=mam has no use for it; these "
        "have: mlp.",
      ),
    ],
  )
  def test_that_are_wrong_are_named(self, lists, message):
    assert _refusal(**lists).startswith(f"config.sweep.{message}")

  def test_a_vote_alone_has_no_learning_rate(self):
    message = _refusal(["vote"], train_learning_rate="1,2")
    assert "config.model.name=vote has no use for it" in message


class TestNames:
  @pytest.mark.parametrize(
    ("name", "near"),
    [
      ("sweep.train.learning_rat", "sweep.train.learning_rate"),
      ("sweep.model.num_layer", "sweep.model.num_layers"),
      ("sweep.model.mam.num_layers", "sweep.model.num_layers"),
      # These cannot be swept.
      ("sweep.train.lr_factors", "train.lr_factors"),
      ("sweep.train.seeds", "train.seeds"),
      # Not meant for a sweep.
      ("num_layers", "model.mam.num_layers"),
    ],
  )
  def test_that_are_unknown_get_the_nearest(self, name, near):
    with pytest.raises(UserError) as caught:
      check_overrides([f"--config.{name}=1,2"], configs.defaults())
    assert str(caught.value).endswith(f"; did you mean config.{near}?")

  def test_of_folders_are_safe_and_differ(self):
    names = [
      sweep.folder_name({"train.start_from": text})
      for text in ("../a b", "../a/b", "x" * 300, "x" * 301)
    ]
    assert len({name.lower() for name in names}) == 4
    assert names[0].startswith("start_from=.._a_b-")
    for name in names:
      assert len(name) < 255 and not set(name) & set("/\\: \"'")


def _metrics(val, class_mean, test):
  top1 = lambda x, mean: {"top1": {"all": x, "class_mean": mean}}
  return {"val": top1(val, class_mean), "test": top1(test, test)}


class TestChoice:
  POINTS = {
    "k=1": [_metrics(50.0, 70.0, 99.0), _metrics(60.0, 70.0, 99.0)],
    "k=2": [_metrics(60.0, 10.0, 30.0), _metrics(70.0, 20.0, 40.0)],
    "k=3": [_metrics(65.0, 11.0, 98.0), _metrics(65.0, 21.0, 98.0)],
    "k=4": [_metrics(65.0, 16.0, 97.0), _metrics(65.0, 16.0, 97.0)],
  }

  def test_is_by_val_then_class_mean_then_order(self):
    rows = sweep_table.rows("mam", self.POINTS)
    order = list(dict.fromkeys(row["point"] for row in rows))
    assert order == ["k=3", "k=4", "k=2", "k=1"]

  def test_only_the_chosen_has_figures_of_test(self):
    rows = sweep_table.rows("mam", self.POINTS)
    assert {r["point"] for r in rows if r["split"] == "test"} == {"k=3"}
    assert {r["mean"] for r in rows if r["split"] == "test"} == {98.0}
    assert len([r for r in rows if r["split"] == "val"]) == 8

  def test_table_and_flags(self):
    settings = _settings(train_k="1,2", model_norm="None,qk")
    trials = sweep.trials(settings, ["linear", "mam"])
    mam = {t.point: t for t in trials["mam"]}
    assert list(mam) == [
      "k=1,norm=None",
      "k=1,norm=qk",
      "k=2,norm=None",
      "k=2,norm=qk",
    ]
    found = {
      trials["linear"][0]: self.POINTS["k=1"][:1],
      mam["k=1,norm=None"]: self.POINTS["k=1"],
      mam["k=2,norm=qk"]: self.POINTS["k=2"],
    }
    left_out = {mam["k=1,norm=qk"]: "step 3 is not finite."}
    text = sweep.to_text(sweep.rows(found), settings, left_out)
    assert text.splitlines() == [
      "Accuracy in percent, mean ± standard deviation over seeds; of each "
      "model the best on val first:",
      "| model  | k | norm | val all    | val class mean | test all   | test "
      "class mean |",
      "|--------|---|------|------------|----------------|------------|------"
      "-----------|",
      "| linear | 1 |      | 50.0       | 70.0           | 99.0       | 99.0  "
      "          |",
      "| mam    | 2 | qk   | 65.0 ± 7.1 | 15.0 ± 7.1     | 35.0 ± 7.1 | 35.0 ±"
      " 7.1      |",
      "| mam    | 1 | None | 55.0 ± 7.1 | 70.0 ± 0.0     |            |       "
      "          |",
      "Val alone chose (all, then class mean); test is shown of its choice.",
      "Best of linear: --config.model.linear.train.k=1",
      "Best of mam: --config.model.mam.train.k=2 --config.model.mam.norm=qk",
      "Left out, as it diverged: mam with k=1,norm=qk: step 3 is not finite.",
    ]

  def test_flags_say_what_no_flag_can(self):
    config = configs.defaults()
    config.model.mam.norm = "qk"
    own = {"train.augment": "flip, crop(2)", "norm": None}
    assert sweep.flags("mam", own, Settings(config)) == (
      "'--config.model.mam.train.augment=flip, crop(2)' and c.model.mam.norm = "
      "None in the config file"
    )
    # Nor needs to, where it is None already.
    unset = Settings(configs.defaults())
    assert sweep.flags("mam", {"norm": None}, unset) == ""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """Data of a real experiment of seconds, embedded and searched in `work`."""
  folder = embeddings.write(tmp_path_factory.mktemp("sweep"))
  main.run(_config(folder), folder / "work", ["embed", "search"])
  return folder


def _config(data, **lists):
  c = embeddings.config(data, embeddings=str(data / "laion"))
  c.model.name = "linear"
  c.memory.dtype = "bfloat16"
  c.log.tensorboard = False
  c.train.epochs = 4.0
  c.train.checkpoint_epochs = 2.0
  for name, text in lists.items():
    section, _, key = name.partition("_")
    c.sweep[section][key] = text
  return c


@pytest.fixture
def trained(monkeypatch):
  """Names of the points whose training was begun or gone on with."""
  found = []
  run = loop.Trainer.run

  def noted(self, seed, folder, *args):
    found.append(folder.parent.name)
    return run(self, seed, folder, *args)

  monkeypatch.setattr(loop.Trainer, "run", noted)
  return found


def _stop_at_the_first_save(monkeypatch):
  save, stops = books.Books.save, [signal.SIGTERM]  # a second one kills

  def saved(self, *args):
    save(self, *args)
    if stops:
      os.kill(os.getpid(), stops.pop())

  monkeypatch.setattr(books.Books, "save", saved)


def _set(config, line):
  """Does what a line of flags does."""
  for flag in shlex.split(line):
    name, value = flag.removeprefix("--config.").split("=")
    value = {"True": True}.get(value) or float(value)
    config.update_from_flattened_dict({name: value})


def _params(folder):
  with np.load(folder / "params.npz", allow_pickle=False) as found:
    return {name: found[name] for name in found.files}


def test_stopped_resumed_and_extended_it_trains_each_point_once(
  data, trained, monkeypatch, capfd
):
  workdir = data / "work"
  fast, slow = (
    "cosine=True,learning_rate=0.01",
    "cosine=True,learning_rate=1e-05",
  )
  lists = {"model_cosine": "True", "train_learning_rate": "1e-2"}
  with monkeypatch.context() as patched:
    _stop_at_the_first_save(patched)
    with pytest.raises(distributed.Preempted):
      main.run(_config(data, **lists), workdir, ["train"])
  main.run(_config(data, **lists), workdir, ["train"])
  assert trained == [fast, fast]
  metrics = workdir / "sweep" / "linear" / fast / "seed_0" / "metrics.jsonl"
  assert len(metrics.read_text().splitlines()) == 16

  # A value more: what is there is left alone.
  lists["train_learning_rate"] = "1e-5,1e-2"
  capfd.readouterr()
  text = main.run(_config(data, **lists), workdir, list(main.STAGES))
  assert trained == [fast, fast, slow]
  said = capfd.readouterr().err
  assert "sweep: points to train: 1 of linear\n" in said
  assert "neighbors.png shows a run of runs/" in said
  unread = said.split("read by nothing")[1]
  assert "sweep" not in unread and "model.linear" not in unread
  rows = json.loads((workdir / "sweep.json").read_text())
  assert rows[0]["point"] == fast and rows[0]["n_seeds"] == 1
  assert rows[0]["settings"] == {"cosine": True, "train.learning_rate": 0.01}
  kinds = [(r["point"], r["split"]) for r in rows]
  assert set(kinds) == {(fast, "val"), (fast, "test"), (slow, "val")}
  lines = (workdir / "sweep.csv").read_text().splitlines()
  assert lines[0] == "model,point,split,metric,group,mean,std,n_seeds"
  assert len(lines) == 1 + len(rows) == 1 + 3 * 2 * 5
  assert lines[1].startswith(f'linear,"{fast}",val,top1,all,')

  # Once more, it does nothing and says the same.
  again = main.run(_config(data, **lists), workdir, ["train", "evaluate"])
  assert again == text and len(trained) == 3
  assert not (workdir / "runs").exists()
  assert not (workdir / "results.csv").exists()

  # What the flags make without a sweep is the same to the last bit.
  line = text.split("Best of linear: ")[1].splitlines()[0]
  assert line == (
    "--config.model.linear.cosine=True "
    "--config.model.linear.train.learning_rate=0.01"
  )
  plain = _config(data)
  _set(plain, line)
  main.run(plain, workdir, ["train"])
  swept = _params(workdir / "sweep" / "linear" / fast / "seed_0")
  alone = _params(workdir / "runs" / "linear" / "seed_0")
  assert swept.keys() == alone.keys() and "head/kernel" in swept
  for name in swept:
    np.testing.assert_array_equal(swept[name], alone[name])

  # The same points of other settings are refused.
  changed = _config(data, **lists)
  changed.train.weight_decay = 0.3
  with pytest.raises(UserError, match=r"weight_decay: 0\.\d+ -> 0.3"):
    main.run(changed, workdir, ["train"])


def test_a_point_that_diverges_is_left_out_and_the_others_go_on(
  data, trained, capfd
):
  workdir = data / "work"
  config = _config(data, train_learning_rate="1e38,3e-2", train_tau="0.5")
  good, bad = (f"learning_rate={x},tau=0.5" for x in ("0.03", "1e+38"))
  text = main.run(config, workdir, ["train", "evaluate"])
  assert trained == [bad, good]
  said = capfd.readouterr().err
  assert f"sweep: linear with {bad} is left out; delete" in said
  last = text.splitlines()
  (last,) = (x for x in last if x.startswith("Left out, as it diverged: "))
  assert f"linear with {bad}: train linear {bad} seed 0: step" in last
  assert "lower train.learning_rate" in last
  rows = json.loads((workdir / "sweep.json").read_text())
  assert {row["point"] for row in rows} == {good}

  # It would diverge once more: it is not tried, and nothing else is said.
  assert main.run(config, workdir, ["train", "evaluate"]) == text
  assert trained == [bad, good]

  # Unless it is asked for, by deleting what there is of it.
  shutil.rmtree(workdir / "sweep" / "linear" / bad)
  main.run(config, workdir, ["train"])
  assert trained == [bad, good, bad]

  # Where nothing is left to choose from, it is an error.
  config = _config(data, train_learning_rate="1e38", train_tau="0.5")
  with pytest.raises(UserError, match="all points of linear diverged: train"):
    main.run(config, workdir, ["train"])


@pytest.mark.parametrize(
  ("lists", "message"),
  [
    ({"train_loss": "lace,lase"}, "lase"),
    ({"train_keep": "last,best"}, "config.train.keep=best: nothing says"),
    ({"model_residual": "query,querry"}, "did you mean 'query'"),
  ],
)
def test_what_would_fail_late_is_refused_first(data, trained, lists, message):
  config = _config(data, **lists)
  config.model.name = "mam"
  with pytest.raises(UserError, match=message):
    main.run(config, data / "work", ["train"])
  assert not trained and not (data / "work" / "sweep" / "mam").exists()


def test_points_that_differ_in_nothing_are_told(tmp_path):
  settings = _settings(train_augment="none,flip", train_k="1,2")
  made = {}
  for trial in sweep.trials(settings, ["mam"])["mam"]:
    train = train_settings(trial.settings, "mam")
    folder = trial.folder(tmp_path, 0)
    made[trial] = runs.Run("mam", {}, train, 0, folder, "data")
  # Without fine-tuning there is nothing to augment.
  assert sweep.same(made) == [
    f"mam with augment=flip,k={k} is the same as with augment=none,k={k}: it "
    "has no use for what differs"
    for k in (1, 2)
  ]
