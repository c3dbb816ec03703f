"""Two real processes with two devices each train as one process with one.

They start once, and do all at a go; see process_training.py.
"""

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
LAYOUTS = list(child.LAYOUTS)


class Stop(Exception):
  """Ends a run at a place of the test's choice."""


class Found:
  """What both processes left, and what one process found for itself."""

  def __init__(self, folder, one, expected):
    self.work, self.one, self.expected = folder / "work", one, expected
    load = lambda i: np.load(folder / f"process_{i}.npz", allow_pickle=False)
    self.arrays = [load(i) for i in range(2)]
    self.facts = [
      json.loads((folder / f"process_{i}.json").read_text()) for i in range(2)
    ]

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
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiling is most of the work
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
  with jax.numpy_rank_promotion("raise"):
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
  return Found(folder, one, seen.arrays)


def _rows(folder):
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def _assert_as_one(rows, expected):
  """Sums over the batch are added in another order."""
  assert [list(x) for x in rows] == [list(x) for x in expected]
  values = lambda rows: [list(x.values()) for x in rows if "val_top1" not in x]
  np.testing.assert_allclose(values(rows), values(expected), rtol=1e-4)
  looked = lambda rows: [list(x.values()) for x in rows if "val_top1" in x]
  np.testing.assert_allclose(looked(rows), looked(expected), rtol=1e-4)


def _assert_params_as_one(found, name):
  expected = found.params(found.expected, "whole")
  for arrays in found.arrays:
    own = found.params(arrays, name)
    assert set(own) == set(expected)
    for path, x in expected.items():
      np.testing.assert_allclose(own[path], x, atol=1e-4, err_msg=path)


def _assert_halves(found, name, whole):
  first, second = (arrays[name] for arrays in found.arrays)
  np.testing.assert_array_equal(first, whole[:, :4])
  np.testing.assert_array_equal(second, whole[:, 4:])


@pytest.mark.parametrize("name", LAYOUTS)
class TestALayout:
  def test_has_the_losses_and_metrics_of_one_process(self, found, name):
    rows = _rows(found.work / name)
    assert len(rows) == STEPS and "val_top1" in rows[-1]
    _assert_as_one(rows, _rows(found.one / "whole"))

  def test_has_the_parameters_of_one_process_in_both(self, found, name):
    _assert_params_as_one(found, name)

  def test_predicts_each_example_once_in_both(self, found, name):
    """29 examples in batches of 8: the last is filled up by three."""
    for what, shape in (
      ("logits", (29, tiny.CLASSES)),
      ("weights", (29, 1, tiny.K)),
    ):
      expected = found.expected[f"whole/{what}"]
      assert expected.shape == shape
      for arrays in found.arrays:
        own = arrays[f"{name}/{what}"]
        np.testing.assert_allclose(own, expected, atol=1e-3)

  @pytest.mark.parametrize("key", ["query", "rows", "label"])
  def test_each_process_prepares_its_half_of_each_batch(self, found, name, key):
    whole = found.expected[f"whole/fed/{key}"]
    assert whole.shape[:2] == (STEPS, 8)
    _assert_halves(found, f"{name}/fed/{key}", whole)

  def test_splits_parameters_over_devices(self, found, name):
    classes = {"sharded": tiny.CLASSES // 4, "host": tiny.CLASSES // 2}[name]
    for facts in found.facts:
      assert facts[f"{name}/head"] == [tiny.D, classes]


class TestTheWorkingSet:
  def test_sharded_is_in_each_process_only_as_the_rows_of_its_devices(
    self, found
  ):
    keys = tiny.memory().keys.astype(np.float16)
    seen = {}
    for arrays in found.arrays:
      own = [n for n in arrays.files if n.startswith("sharded/keys/")]
      assert len(own) == 2
      seen |= {n: arrays[n] for n in own}
    assert len(seen) == 4  # no device is of both
    parts = [np.zeros((6, tiny.D)) for _ in range(4)]  # 23 rows in four parts
    for i, part in enumerate(parts):
      part[: len(keys[i::4])] = keys[i::4]
    for part in seen.values():
      assert sum(np.array_equal(part, x) for x in parts) == 1
      parts = [x for x in parts if not np.array_equal(part, x)]
    assert parts == []

  def test_on_the_host_is_read_for_a_process_s_own_examples_alone(self, found):
    for facts in found.facts:
      shapes = facts["host/neighbors"]
      assert len(shapes) >= STEPS
      for shape in shapes:
        assert np.prod(shape[:-2]) == 4 and shape[-2:] == [tiny.K, tiny.D]


def test_along_model_over_both_processes_they_have_the_same_examples(found):
  assert [x["over_both"] for x in found.facts] == [list(range(8))] * 2


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

  def test_is_gone_on_from_by_one_process_on_one_device(
    self, found, trainer, tmp_path
  ):
    folder = tmp_path / "copy"
    shutil.copytree(found.work / "as_stopped", folder)
    trainer.run(0, folder)
    _assert_as_one(_rows(folder), _rows(found.one / "whole"))
    before = (found.work / "as_stopped" / "metrics.jsonl").read_bytes()
    assert (folder / "metrics.jsonl").read_bytes().startswith(before)

  def test_of_one_process_is_gone_on_from_by_two(self, found):
    _assert_params_as_one(found, "from_one")
    one, two = found.one / "whole", found.work / "from_one"
    _assert_as_one(_rows(two), _rows(one))
    lines = lambda x: (x / "metrics.jsonl").read_text().splitlines()
    assert lines(two)[:5] == lines(one)[:5]  # its last checkpoint


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
  def test_has_the_losses_of_one_process(self, found):
    rows = _rows(found.work / "finetuned")
    assert len(rows) == 5
    _assert_as_one(rows, _rows(found.one / "finetuned"))

  def test_each_process_decodes_and_augments_its_part_alone(self, found):
    numbers = input_pipeline.numbers(np.arange(40), tiny.N, 0).reshape(5, 8)
    whole = found.expected["finetuned/fed/images"]
    assert whole.shape[:2] == (5, 8)
    _assert_halves(found, "finetuned/fed/images", whole)
    for own, facts in zip((numbers[:, :4], numbers[:, 4:]), found.facts):
      assert facts["decoded"] == sorted(set(own.flat))
