"""Two real processes with two devices each train as one process with one.

They start once, and do all at a go; see process_training.py.
"""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from retrieval_aug.training import input_pipeline
from tests.training import process_training as child
from tests.training import tiny

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 14  # 3 epochs of 37 examples in batches of 8


class Stop(Exception):
  """Ends a run at a place of the test's choice."""


@dataclasses.dataclass(frozen=True)
class Found:
  """What the two processes left, and what one found for itself.

  Attributes:
    work: folder of the runs of the two.
    arrays: what each of them saw, by name.
    facts: likewise.
    one: folder of the runs of one process.
    expected: what that saw.
  """

  work: pathlib.Path
  arrays: list
  facts: list
  one: pathlib.Path
  expected: dict

  def params(self, arrays, name):
    """Parameters of a run, by their path."""
    prefix = f"{name}/params/"
    return {n.removeprefix(prefix): arrays[n] for n in arrays if prefix in n}


def _start(folder):
  with socket.create_server(("127.0.0.1", 0)) as server:
    address = f"127.0.0.1:{server.getsockname()[1]}"
  env = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    "PYTHONPATH": str(ROOT),
  }
  return subprocess.Popen(
    [sys.executable, child.__file__, address, str(folder)],
    env=env,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  )


def _stop_after(trainer, steps, folder):
  """A run that ends early, as by a kill."""
  step, done = trainer.compiled.step, []

  def counted(*arguments):
    if len(done) == steps:
      raise Stop
    done.append(1)
    return step(*arguments)

  trainer.compiled.step = counted
  with pytest.raises(Stop):
    trainer.run(0, folder)
  trainer.compiled.step = step


@pytest.fixture(scope="module")
def trainer():
  """Of one process, on one device."""
  with jax.numpy_rank_promotion("raise"):
    return tiny.trainer(ids=child.IDS, **child.SETTINGS)


@pytest.fixture(scope="module")
def found(tmp_path_factory, trainer):
  folder = tmp_path_factory.mktemp("processes")
  one = tmp_path_factory.mktemp("one")
  with jax.numpy_rank_promotion("raise"), child.compiled_quickly():
    _stop_after(trainer, 7, folder / "work" / "from_one")
    with _start(folder) as processes:
      with pytest.MonkeyPatch.context() as patch:
        seen = child.Seen()
        seen.watch(patch.setattr)
        seen.run("whole", trainer, one / "whole")
        tuned = child.finetuning_trainer(child.Pictures())
        seen.run("finetuned", tuned, one / "finetuned")
      _, said = processes.communicate()
    assert processes.returncode == 0, said
  paths = [folder / f"process_{i}" for i in range(2)]
  load = lambda path: dict(np.load(path, allow_pickle=False))
  return Found(
    folder / "work",
    [load(path.with_suffix(".npz")) for path in paths],
    [json.loads(path.with_suffix(".json").read_text()) for path in paths],
    one,
    seen.arrays,
  )


def _rows(folder):
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def _assert_as_one(found, name, whole="whole"):
  """Losses, metrics and parameters; sums are added in another order."""
  rows, expected = _rows(found.work / name), _rows(found.one / whole)
  assert [list(x) for x in rows] == [list(x) for x in expected]
  for row, one in zip(rows, expected):
    np.testing.assert_allclose(
      list(row.values()), list(one.values()), rtol=1e-4
    )
  expected = found.params(found.expected, whole)
  for arrays in found.arrays:
    own = found.params(arrays, name)
    assert set(own) == set(expected)
    for path, x in expected.items():
      np.testing.assert_allclose(own[path], x, atol=1e-4, err_msg=path)


def _assert_halves(found, name, whole):
  first, second = (arrays[name] for arrays in found.arrays)
  np.testing.assert_array_equal(first, whole[:, :4])
  np.testing.assert_array_equal(second, whole[:, 4:])


def _assert_predicts_each_once(found, name, whole="whole"):
  """29 examples in batches of 8: the last is filled up by three."""
  for what, shape in (
    ("logits", (29, tiny.CLASSES)),
    ("weights", (29, 1, tiny.K)),
  ):
    expected = found.expected[f"{whole}/{what}"]
    assert expected.shape == shape
    for arrays in found.arrays:
      own = arrays[f"{name}/{what}"]
      np.testing.assert_allclose(own, expected, atol=1e-3)


class TestTwoProcesses:
  def test_train_as_one(self, found):
    rows = _rows(found.work / "sharded")
    assert len(rows) == STEPS and "val_top1" in rows[-1]
    _assert_as_one(found, "sharded")

  def test_predict_each_example_once(self, found):
    _assert_predicts_each_once(found, "sharded")

  @pytest.mark.parametrize("key", ["query", "rows", "label"])
  def test_prepare_a_half_of_each_batch_each(self, found, key):
    whole = found.expected[f"whole/fed/{key}"]
    assert whole.shape[:2] == (STEPS, 8)
    _assert_halves(found, f"sharded/fed/{key}", whole)

  def test_have_the_same_examples_where_model_is_along_both(self, found):
    assert [x["over_both"] for x in found.facts] == [list(range(8))] * 2

  def test_split_parameters_over_the_devices_of_both(self, found):
    for facts in found.facts:
      assert facts["head"] == [tiny.D, tiny.CLASSES // 4]


class TestTheWorkingSet:
  def test_sharded_is_in_a_process_as_the_rows_of_its_devices_alone(
    self, found
  ):
    keys = tiny.memory().keys.astype(np.float16)
    seen = {}
    for arrays in found.arrays:
      own = {n: arrays[n] for n in arrays if n.startswith("keys/")}
      assert len(own) == 2
      seen |= own
    assert len(seen) == 4  # no device is of both
    parts = [np.zeros((6, tiny.D)) for _ in range(4)]  # 23 rows in four parts
    for i, part in enumerate(parts):
      part[: len(keys[i::4])] = keys[i::4]
    as_set = lambda parts: {tuple(x.ravel()) for x in parts}
    assert as_set(seen.values()) == as_set(parts)

  def test_on_the_host_is_read_for_a_process_s_own_examples_alone(self, found):
    rows = found.expected["whole/fed/rows"][:3]
    _assert_halves(found, "host/fed/rows", rows)
    for name, x in (("keys", tiny.memory().keys), ("values", tiny.memory()[1])):
      x = x.astype(np.float16)[np.maximum(rows, 0)]
      _assert_halves(found, f"host/fed/{name}", x)


def test_only_process_0_writes_but_for_its_part_of_checkpoints(found):
  first, second = (x["writes"] for x in found.facts)
  assert "sharded/metrics.jsonl" in first
  others = [x for x in second if "/checkpoints/" not in x]
  # What was wrong with a step, each says of its own part.
  assert len(others) == 2 and others[0] == "nan"
  assert re.fullmatch("nan/.tmp-nan_step_1_process_1-.*", others[1])


class TestAStop:
  def _step(self, found):
    (said,) = {facts["stopped"] for facts in found.facts}
    return int(
      re.fullmatch(r"train: stopped and saved after step (\d+) of 14", said)[1]
    )

  def test_of_one_process_is_one_of_both_after_the_same_step(self, found):
    step = self._step(found)
    assert 2 <= step < STEPS
    left = found.work / "as_stopped"
    assert (left / "checkpoints" / str(step)).is_dir()
    assert [x["step"] for x in _rows(left)] == list(range(1, step + 1))

  def test_is_gone_on_from_to_the_same_bits(self, found):
    for name in ("metrics.jsonl", "metrics.csv"):
      assert (found.work / "stopped" / name).read_bytes() == (
        found.work / "sharded" / name
      ).read_bytes()
    for arrays in found.arrays:
      whole = found.params(arrays, "sharded")
      for path, x in found.params(arrays, "stopped").items():
        np.testing.assert_array_equal(x, whole[path])

  def test_is_gone_on_from_by_one_process_on_one_device(self, found, trainer):
    shutil.copytree(found.work / "as_stopped", found.work / "by_one")
    seen = child.Seen()
    with pytest.MonkeyPatch.context() as patch:
      seen.watch(patch.setattr)
      seen.run("by_one", trainer, found.work / "by_one")
    found = dataclasses.replace(found, arrays=[seen.arrays])
    _assert_as_one(found, "by_one")
    before, after = (
      (found.work / name / "metrics.jsonl").read_bytes()
      for name in ("as_stopped", "by_one")
    )
    assert after.startswith(before)

  def test_of_one_process_is_gone_on_from_by_two(self, found):
    _assert_as_one(found, "from_one")
    one, two = (
      (folder / "metrics.jsonl").read_text().splitlines()
      for folder in (found.one / "whole", found.work / "from_one")
    )
    assert two[:5] == one[:5]  # up to its last checkpoint


def test_a_step_that_is_not_finite_is_named_by_each_with_its_own_examples(
  found,
):
  first = input_pipeline.numbers(np.arange(8), tiny.N, 0)
  for i, facts in enumerate(found.facts):
    own = [child.IDS[n] for n in first[4 * i : 4 * i + 4]]
    assert facts["nan"].startswith(
      "train mam seed 0: step 1 is not finite, first in the input batch/query, "
      f"float32 [4, 11]: 1 number (nan) of {own[-1]!r}; "
    )
    path = found.work / "nan" / f"nan_step_1_process_{i}.json"
    assert json.loads(path.read_text())["batch"] == own
  assert not list((found.work / "nan" / "checkpoints").glob("[0-9]*"))


class TestFineTuning:
  def test_has_the_losses_and_predictions_of_one_process(self, found):
    rows = _rows(found.work / "finetuned")
    assert len(rows) == 5 and "val_top1" in rows[-1]
    _assert_as_one(found, "finetuned", "finetuned")
    _assert_predicts_each_once(found, "finetuned", "finetuned")

  def test_each_process_decodes_and_augments_its_part_alone(self, found):
    whole = found.expected["finetuned/fed/images"]
    assert whole.shape[:2] == (5, 8)
    _assert_halves(found, "finetuned/fed/images", whole)
    numbers = input_pipeline.numbers(np.arange(40), tiny.N, 0).reshape(5, 8)
    for own, facts in zip((numbers[:, :4], numbers[:, 4:]), found.facts):
      assert facts["decoded"] == sorted(set(own.ravel().tolist()))
