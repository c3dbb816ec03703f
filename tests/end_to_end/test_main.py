"""The whole main job on a small form of the real experiment.

One uninterrupted run is shared; tests that damage something have a copy.
"""

import hashlib
import importlib.util
import json
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from retrieval_aug import main
from retrieval_aug.common import manifest
from retrieval_aug.common.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = pathlib.Path(__file__).parent / "small.py"
ALL = list(main.STAGES)
MODELS = ("vote", "mean_knn", "rac", "retformer", "mam")

# In-process runs: TensorFlow and Orbax warn of their own dependencies, and an
# Orbax manager that is closed late is a ResourceWarning.
pytestmark = pytest.mark.filterwarnings(
  "ignore::DeprecationWarning", "ignore::ResourceWarning"
)


def _command(workdir, *flags):
  return [
    *(sys.executable, "-m", "retrieval_aug.main"),
    *(f"--config={CONFIG}", f"--workdir={workdir}", *flags),
  ]


def _start(workdir, *flags):
  return subprocess.run(
    _command(workdir, *flags), cwd=ROOT, capture_output=True, text=True
  )


def _config():
  spec = importlib.util.spec_from_file_location("small", CONFIG)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config()


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
  """An uninterrupted run: (its folder, the ended process)."""
  workdir = tmp_path_factory.mktemp("main") / "finished"
  done = _start(workdir)
  assert done.returncode == 0, done.stderr
  return workdir, done


@pytest.fixture
def copied(finished, tmp_path):
  """A copy of the finished workdir, to damage."""
  return pathlib.Path(shutil.copytree(finished[0], tmp_path / "copied"))


def _content(path):
  """Bytes of a file; of the search's manifest, without times."""
  if path.parts[-2:] != ("neighbors", "manifest.json"):
    return path.read_bytes()
  found = json.loads(path.read_text())
  found["info"] |= {"measured": None, "why": None}
  found["shards"]["engine"] = None
  return json.dumps(found).encode()


def _digests(workdir):
  """Content of every file, but for locks."""
  return {
    path.relative_to(workdir).as_posix(): hashlib.sha256(
      _content(path)
    ).hexdigest()
    for path in workdir.rglob("*")
    if path.is_file() and path.name != ".lock"
  }


class TestAFullRun:
  def test_ends_with_the_table_and_what_to_know_about_it(self, finished):
    lines = finished[1].stdout.splitlines()
    assert lines[0].startswith("Accuracy on test in percent")
    assert [x.split()[1] for x in lines if x.startswith("| ")] == [
      "model",
      *MODELS,
    ]
    assert lines[-5].startswith("Groups: many (> 100 training images): ")
    assert lines[-4].startswith("Neighbors: exact search, recall@23 1.0000")
    assert re.fullmatch(r"Leaks: \d+ of \d+ test examples \(.*", lines[-3])
    assert re.fullmatch(
      r"Joined texts of rac: [\d,]+ of [\d,]+ are longer than the text "
      r"encoder's 8 tokens and lose their end, mean length \d+ tokens\.",
      lines[-2],
    )
    assert re.fullmatch(
      r"Seconds a stage took: embed [\d.]+, search [\d.]+, train [\d.]+, "
      r"evaluate [\d.]+, report [\d.]+\.",
      lines[-1],
    )

  def test_writes_one_row_a_figure_as_csv_and_json(self, finished):
    workdir = finished[0]
    header, *lines = (workdir / "results.csv").read_text().splitlines()
    assert header == "model,split,metric,group,mean,std,n_seeds"
    # models, val and test, top1 and top5, 5 groups
    assert len(lines) == len(MODELS) * 2 * 2 * 5
    rows = json.loads((workdir / "results.json").read_text())
    as_text = lambda x: "" if x is None else str(x)
    assert lines == [
      ",".join(as_text(row[c]) for c in header.split(",")) for row in rows
    ]
    seeds = {row["model"]: row["n_seeds"] for row in rows}
    assert seeds == dict.fromkeys(MODELS, 2) | {"vote": 1}

  def test_is_better_than_chance(self, finished):
    """Of some 30 classes: a broken join of queries and labels shows here."""
    rows = json.loads((finished[0] / "results.json").read_text())
    top5 = [
      r["mean"]
      for r in rows
      if (r["model"], r["split"], r["metric"], r["group"])
      == ("mam", "test", "top5", "all")
    ]
    assert top5[0] > 25

  def test_draws_the_picture(self, finished):
    data = (finished[0] / "neighbors.png").read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 10_000

  def test_reports_a_setting_that_nobody_read(self, finished):
    notes = [
      x for x in finished[1].stderr.splitlines() if x.startswith("note:")
    ]
    assert notes == [
      "note: set, but read by nothing: config.model.mam_paper.dropout, "
      "config.model.mam_paper.neighbor_dropout, config.model.mlp.dropout, "
      "config.model.mlp.hidden_dim"
    ]

  def test_asking_for_one_model_keeps_the_rows_of_the_other(
    self, finished, copied
  ):
    config = _config()
    config.model.name = "mam"
    main.run(config, copied, ["evaluate"])
    name = "results.csv"
    assert (copied / name).read_bytes() == (finished[0] / name).read_bytes()

  def test_results_of_other_settings_are_left_out(self, copied):
    config = _config()
    config.model.name = "mam"
    config.model.mean_knn.dropout = 0.25
    main.run(config, copied, ["evaluate"])
    rows = json.loads((copied / "results.json").read_text())
    assert {row["model"] for row in rows} == set(MODELS) - {"mean_knn"}

  def test_leaves_no_temporary_files(self, finished):
    names = [p.name for p in finished[0].rglob("*")]
    assert not [n for n in names if n.startswith(".tmp-")]
    assert ".shards" not in names

  def test_a_second_run_does_nothing_again_and_prints_the_same(
    self, finished, copied, capfd
  ):
    before = _digests(copied)
    text = main.run(_config(), copied, ALL)
    assert text + "\n" == finished[1].stdout
    assert _digests(copied) == before
    err = capfd.readouterr().err
    for stage in ALL:
      expected = 0 if stage == "evaluate" else 1
      assert err.count(f"{stage}: nothing to do") >= expected


def _kill_when(workdir, pattern):
  """Starts the job and kills it when a file or folder appears."""
  with open(workdir / "log", "w") as log:
    with subprocess.Popen(
      _command(workdir), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
    ) as process:
      try:
        while not any(workdir.glob(pattern)):
          if process.poll() is not None:
            pytest.fail((workdir / "log").read_text())
          time.sleep(0.002)
      finally:
        process.kill()
      assert process.wait() == -signal.SIGKILL


def _complete(workdir, folder):
  path = workdir / folder / "manifest.json"
  return path.exists() and json.loads(path.read_text())["complete"]


def test_killed_in_every_stage_it_ends_with_the_same_results(
  finished, tmp_path
):
  """One job is killed in each stage in turn and started again."""
  workdir = tmp_path / "killed"
  workdir.mkdir()
  # The queries were embedded before the first kill.
  shutil.copytree(finished[0] / "queries", workdir / "queries")

  _kill_when(workdir, "memory/.shards/00000.json")
  assert not _complete(workdir, "memory")
  first_shard = (workdir / "memory" / "keys_00000.npy").stat()

  _kill_when(workdir, "neighbors/.shards/neighbors-train-*")
  assert _complete(workdir, "memory") and not _complete(workdir, "neighbors")

  _kill_when(workdir, "runs/mam/seed_0/checkpoints/[0-9]*")
  assert _complete(workdir, "working_set")
  assert not _complete(workdir, "runs/mam/seed_1")

  _kill_when(workdir, "runs/mam/seed_0/evaluation/predictions-val.npz")
  assert _complete(workdir, "runs/mam/seed_1")
  assert not _complete(workdir, "runs/mam/seed_1/evaluation")

  done = _start(workdir)
  assert done.returncode == 0, done.stderr
  # A finished shard was not written again.
  assert (workdir / "memory" / "keys_00000.npy").stat() == first_shard
  found, expected = _digests(workdir), _digests(finished[0])
  assert found["results.csv"] == expected["results.csv"]
  # Not only what was computed from them in the end: every artifact is equal.
  timed = ("/checkpoints/", "/tensorboard/", "summary.json", "speed.jsonl")
  for name, digest in expected.items():
    if not any(x in name for x in (*timed, "stages.json")):
      assert found[name] == digest, name
  seconds = re.compile("^Seconds .*$", re.MULTILINE)
  assert seconds.sub("", done.stdout) == seconds.sub("", finished[1].stdout)


def _refusal(workdir, stages=ALL, config=None):
  """The message of a refused run, which changed nothing."""
  before = _digests(workdir)
  with pytest.raises(UserError) as caught:
    main.run(config or _config(), workdir, stages)
  assert _digests(workdir) == before
  message = str(caught.value)
  assert "\n" not in message
  return message


def _replace(workdir, folder, name, change):
  """Changes an array as its own stage would have written it."""
  path = workdir / folder / name
  np.save(path, change(np.load(path)))
  found = json.loads((workdir / folder / "manifest.json").read_text())
  for shard in found["shards"].values():
    if name in shard["files"]:
      shard["files"][name] = manifest.digest(path)
  (workdir / folder / "manifest.json").write_text(json.dumps(found))


class TestFaults:
  @pytest.mark.parametrize(
    "name",
    [
      "queries/keys_00000.npy",
      "memory/metadata_00001.parquet",
      "neighbors/neighbors-test-00000-of-*.tfrecord",
      "working_set/values_minilm_l6.npy",
      "runs/mam/seed_1/params.npz",
      "runs/mean_knn/seed_0/evaluation/predictions-val.npz",
    ],
  )
  @pytest.mark.parametrize("damage", ["truncate", "flip_bit", "delete"])
  def test_a_damaged_file_is_named_with_the_remedy(
    self, finished, copied, name, damage, truncate, flip_bit
  ):
    (path,) = copied.glob(name)
    act = {"truncate": truncate, "flip_bit": flip_bit}
    act.get(damage, lambda p: p.unlink())(path)
    # The embed stage looks at the first two, later stages at the others.
    table = name.startswith(("queries", "memory"))
    message = _refusal(
      copied, ALL if table else ["search", "train", "evaluate"]
    )
    assert str(path) in message
    assert f"delete {path.parent} to have it made again" in message

  def test_tables_of_another_encoder_are_refused_and_what_differs_named(
    self, copied
  ):
    config = _config()
    config.encoder.size = 40
    message = _refusal(copied, config=config)
    assert str(copied / "queries" / "manifest.json") in message
    assert "encoder.preprocess" in message and "32 -> 40" in message
    assert f"delete {copied / 'queries'} to have it made again" in message

  def test_queries_and_memory_of_two_encoders_are_refused(self, copied):
    path = copied / "memory" / "manifest.json"
    found = json.loads(path.read_text())
    found["inputs"]["encoder"]["weights_sha256"] = "of another one"
    path.write_text(json.dumps(found))
    message = _refusal(copied, ["search"])
    assert "were embedded by different encoders" in message
    assert "weights_sha256: of another one -> " in message
    assert str(copied / "memory") in message

  @pytest.mark.parametrize(
    ("change", "reason"),
    [
      (
        lambda x: x[:, :13],
        "holds float16 [1024, 13] where floats [1024, 1280]",
      ),
      (
        lambda x: np.where(np.arange(len(x))[:, None] == 7, np.nan, x).astype(
          np.float16
        ),
        "row 7 holds NaN or infinity (1 such rows)",
      ),
    ],
    ids=["other_dims", "nan"],
  )
  def test_keys_that_cannot_be_searched_are_refused(
    self, copied, change, reason
  ):
    """Their digests are right, as if an encoder had written them so."""
    shutil.rmtree(copied / "neighbors")
    _replace(copied, "memory", "keys_00000.npy", change)
    before = _digests(copied)
    with pytest.raises(UserError) as caught:
      main.run(_config(), copied, ["search"])
    message = str(caught.value)
    assert str(copied / "memory" / "keys_00000.npy") in message
    assert reason in message and "delete" in message
    after = _digests(copied)
    assert {n: after[n] for n in before} == before
    assert set(after) - set(before) == {"neighbors/manifest.json"}

  def test_other_training_settings_do_not_overwrite_a_run(self, copied):
    config = _config()
    config.model.mam.train.learning_rate = 0.5
    message = _refusal(copied, ["train"], config)
    assert "train.learning_rate: 0.001 -> 0.5" in message
    assert str(copied / "runs" / "mam" / "seed_0") in message

  def test_an_unknown_stage_is_refused_before_anything_is_made(self, tmp_path):
    with pytest.raises(UserError) as caught:
      main.run(_config(), tmp_path / "new", ["embed", "serch"])
    assert str(caught.value) == (
      "--stages=serch: not one of embed, search, train, evaluate, report."
    )
    assert not (tmp_path / "new").exists()

  @pytest.mark.parametrize(
    ("stage", "before"), [("search", "embed"), ("train", "embed")]
  )
  def test_a_stage_before_its_time_says_what_to_run(
    self, tmp_path, stage, before
  ):
    with pytest.raises(UserError, match=f"run --stages={before}"):
      main.run(_config(), tmp_path / "new", [stage])


class TestTheCommand:
  """Exit code 1 and one line on standard error, no traceback."""

  def _error(self, done):
    assert done.returncode == 1
    assert "Traceback" not in done.stderr and done.stdout == ""
    *_, last = done.stderr.splitlines()
    assert last.startswith("error: ") and done.stderr.count("error: ") == 1
    return last.removeprefix("error: ")

  def test_a_damaged_shard(self, copied, truncate):
    (path,) = copied.glob("neighbors/neighbors-test-00000-*.tfrecord")
    truncate(path)
    message = self._error(_start(copied, "--stages=search"))
    assert str(path) in message and f"delete {path.parent}" in message

  def test_an_unknown_setting_beside_a_known_one(self, tmp_path):
    flags = ("--config.dataset.size=40", "--config.train.learning_rat=1")
    message = self._error(_start(tmp_path / "new", *flags))
    assert message == (
      "config.train.learning_rat: no such setting; did you mean "
      "config.train.learning_rate?"
    )
    assert not (tmp_path / "new").exists()

  def test_an_unknown_model(self, tmp_path):
    message = self._error(_start(tmp_path, "--config.model.name=mamm"))
    assert "no model 'mamm'; did you mean mam?" in message

  def test_a_config_file_that_is_not_there(self, tmp_path):
    done = subprocess.run(
      [
        *(sys.executable, "-m", "retrieval_aug.main"),
        *("--config=configs/emojy.py", f"--workdir={tmp_path}"),
      ],
      cwd=ROOT,
      capture_output=True,
      text=True,
    )
    assert self._error(done) == (
      "--config=configs/emojy.py: no such file; see configs/."
    )
