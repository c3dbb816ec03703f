"""The main command in two processes of two devices each.

One process gives the commands one after the other, in process_commands.py; what
one process makes of the same is compared.
"""

import csv
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from retrieval_aug import main
from tests.end_to_end import embeddings
from tests.end_to_end import process_commands as child
from tests.training.process_training import compiled_quickly

ROOT = pathlib.Path(__file__).parents[2]
MODELS = child.MODELS.split(",")
STEPS = 16  # 4 epochs of 63 examples in batches of 16

# TensorFlow and Orbax warn of their own dependencies, and an Orbax manager that
# is closed late is a ResourceWarning.
pytestmark = pytest.mark.filterwarnings(
  "ignore::DeprecationWarning", "ignore::ResourceWarning"
)


class Said:
  """What each of two processes said, and what they made in `two`."""

  def __init__(self, folder, text):
    self.folder, self.text = folder, text
    self.codes = json.loads((folder / "codes.json").read_text())

  def out(self, name, index):
    text = (self.folder / f"{name}_{index}.out").read_text()
    # Which the network of CPUs says.
    return re.sub(r".*\[Gloo\].*\n", "", text)

  def err(self, name, index):
    return (self.folder / f"{name}_{index}.err").read_text()

  def error(self, name, index):
    err = self.err(name, index)
    assert "Traceback" not in err
    (line,) = re.findall("^error: (.*)", err, re.MULTILINE)
    return line


@pytest.fixture(scope="module")
def said(tmp_path_factory):
  folder = embeddings.write(tmp_path_factory.mktemp("processes"))
  with jax.numpy_rank_promotion("raise"), compiled_quickly():
    config = child.get_config(str(folder))
    main.run(config, folder / "two", ["embed", "search"])
    shutil.copytree(folder / "two", folder / "one")
    env = os.environ | {
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
      "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, child.__file__, str(folder)]
    with subprocess.Popen(command, env=env) as commands:
      text = main.run(config, folder / "one", ["train", "evaluate", "report"])
      commands.wait()
  assert commands.returncode == 0
  return Said(folder, text)


def _rows(path):
  with open(path) as file:
    return list(csv.DictReader(file))


def _metrics(workdir, model):
  path = workdir / "runs" / model / "seed_0" / "metrics.jsonl"
  return [json.loads(line) for line in path.read_text().splitlines()]


def _without_seconds(text):
  return re.sub("^Seconds a stage took: .*$", "", text, flags=re.MULTILINE)


class TestAFinishedJob:
  def test_ends_well_in_both(self, said):
    assert said.codes["finished"] == [0, 0]

  def test_has_the_results_of_one_process(self, said):
    one, two = (
      _rows(said.folder / name / "results.csv") for name in ("one", "two")
    )
    assert len(one) == len(MODELS) * 2 * 2 * 5 == len(two)
    numbers = ("mean", "std")
    rest = lambda rows: [
      {n: x for n, x in row.items() if n not in numbers} for row in rows
    ]
    assert rest(two) == rest(one)
    for name in numbers:
      assert [r[name] == "" for r in two] == [r[name] == "" for r in one]
      found, expected = (
        [float(r[name]) for r in rows if r[name]] for rows in (two, one)
      )
      np.testing.assert_allclose(found, expected, atol=1e-3)

  @pytest.mark.parametrize("model", MODELS)
  def test_has_the_losses_of_one_process(self, said, model):
    one, two = (_metrics(said.folder / name, model) for name in ("one", "two"))
    assert [x["step"] for x in two] == list(range(1, STEPS + 1))
    for found, expected in zip(two, one, strict=True):
      assert list(found) == list(expected)
      np.testing.assert_allclose(
        list(found.values()), list(expected.values()), rtol=1e-3
      )

  @pytest.mark.parametrize("split, count", [("val", 9), ("test", 18)])
  @pytest.mark.parametrize("model", MODELS)
  def test_has_the_predictions_of_one_process_each_once(
    self, said, model, split, count
  ):
    name = f"runs/{model}/seed_0/evaluation/predictions-{split}.npz"
    one, two = (
      np.load(said.folder / workdir / name, allow_pickle=False)
      for workdir in ("one", "two")
    )
    assert len(set(two["ids"].tolist())) == count
    np.testing.assert_array_equal(two["ids"], one["ids"])
    np.testing.assert_allclose(two["logits"], one["logits"], atol=1e-3)
    np.testing.assert_allclose(two["attention"], one["attention"], atol=2e-3)

  def test_prints_the_table_once(self, said):
    found = _without_seconds(said.out("finished", 0))
    assert found == _without_seconds(said.text) + "\n"
    assert said.out("finished", 1) == ""

  def test_leaves_the_offline_stages_to_one_process_and_says_so(self, said):
    for stage in ("embed", "search"):
      line = f"{stage}: left to a run of one process\n"
      assert line in said.err("finished", 0)
      assert line not in said.err("finished", 1)

  def test_is_not_done_again(self, said):
    assert said.codes["again"] == [0, 0]
    assert said.out("again", 0) == said.out("finished", 0)
    assert said.out("again", 1) == ""
    for stage in ("train", "evaluate"):
      assert f"{stage}: nothing to do" in said.err("again", 0)


def test_sigterm_to_one_stops_both_with_the_code_for_try_again(said):
  assert said.codes["stopped"] == [os.EX_TEMPFAIL] * 2
  lines = [said.err("stopped", i).splitlines()[-1] for i in range(2)]
  step = re.fullmatch(
    r"train linear seed 0: stopped and saved after step (\d+) of 16; the same "
    "command goes on.",
    lines[0],
  )
  assert lines[1] == lines[0] and 2 <= int(step[1]) < STEPS


def test_other_settings_in_one_are_refused_by_both_by_name(said):
  assert said.codes["differs"] == [1, 1]
  for i in range(2):
    assert said.error("differs", i) == (
      "--config.train.learning_rate: 1.0 in process 1, but 0.01 in process 0; "
      "start all with the same command and files."
    )


def test_a_process_that_does_not_start_is_named_in_time(said):
  assert said.codes["missing"] == [1]
  assert re.fullmatch(
    r"waited 1 s for process 1 \(of 2\) at 127.0.0.1:\d+; look at the log "
    "there, and start all again.",
    said.error("missing", 0),
  )
