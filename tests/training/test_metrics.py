"""The log of a run: none of its rows is lost, and none doubled."""

import importlib.machinery
import json
import os
import shutil
import sys
import types

import pytest

from retrieval_aug.common.errors import UserError
from retrieval_aug.training import metrics

COLUMNS = ("loss", "grad_norm", "val_top1")


def _row(step):
  row = {"step": step, "grad_norm": 1 / step, "loss": 0.1 * step}
  return row | ({"val_top1": 12.5} if step % 3 == 0 else {})


def _rows(first, last):
  return [_row(step) for step in range(first, last + 1)]


def _log(folder, first=0, **options):
  return metrics.Log(folder, first, COLUMNS, name="mam seed 0", **options)


def _read(folder):
  return [(folder / n).read_bytes() for n in (metrics.METRICS, metrics.TABLE)]


@pytest.fixture
def whole(tmp_path):
  """Folder of a run of 7 steps that nothing stopped."""
  with _log(tmp_path / "whole") as log:
    log.write(_rows(1, 3))
    log.write(_rows(4, 7))
  return tmp_path / "whole"


def test_files_hold_columns_in_order_and_leave_absent_ones_out(tmp_path):
  with _log(tmp_path) as log:
    log.write([{"grad_norm": 2, "step": 1, "loss": 0.1}])
    log.write([{"step": 2, "val_top1": 50.0, "loss": 1e-7}])
  lines, table = _read(tmp_path)
  assert lines == (
    b'{"step": 1, "loss": 0.1, "grad_norm": 2.0}\n'
    b'{"step": 2, "loss": 1e-07, "val_top1": 50.0}\n'
  )
  assert table == (b"step,loss,grad_norm,val_top1\n1,0.1,2.0,\n2,1e-07,,50.0\n")


def test_bytes_are_the_same_wherever_a_run_was_killed(whole, tmp_path):
  lines, table = _read(whole)
  saved = len(b"".join(lines.splitlines(keepends=True)[:4]))  # by step 4
  folder = tmp_path / "killed"
  for end in range(saved, len(lines) + 1, 13):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / metrics.METRICS).write_bytes(lines[:end])
    # The table may lack more, or have more: it was written in another moment.
    (folder / metrics.TABLE).write_bytes(table[: end % len(table)])
    with _log(folder, 4) as log:
      log.write(_rows(5, 6))
    with _log(folder, 6) as log:
      log.write(_rows(7, 7))
    assert _read(folder) == [lines, table]


def test_a_run_that_begins_anew_keeps_nothing(whole):
  lines, table = _read(whole)
  (whole / metrics.METRICS).write_bytes(b"\xff{half")
  with _log(whole) as log:
    assert _read(whole) == [b"", table.splitlines(keepends=True)[0]]
    log.write(_rows(1, 7))
  assert _read(whole) == [lines, table]


def test_a_last_row_without_its_newline_is_kept(whole, truncate):
  lines, table = _read(whole)
  truncate(whole / metrics.METRICS, 1)
  _log(whole, 7).close()
  assert _read(whole) == [lines, table]


@pytest.mark.parametrize(
  "damage",
  [
    lambda lines: lines[:4],
    lambda lines: [*lines[:2], b'{"step": 3, "lo\n', *lines[3:]],
    lambda lines: [*lines[:2], *lines[3:]],
    lambda lines: [*lines[:2], b"3\n", *lines[3:]],
    lambda lines: [],
  ],
)
def test_rows_that_are_missing_before_the_checkpoint_are_an_error(
  damage, whole
):
  path = whole / metrics.METRICS
  left = damage(path.read_bytes().splitlines(keepends=True))
  path.write_bytes(b"".join(left))
  before = path.read_bytes()
  with pytest.raises(UserError) as caught:
    _log(whole, 5)
  row = 5 if len(left) == 4 else 3 if left else 1
  assert str(path) in str(caught.value)
  assert f"row {row} is missing or damaged" in str(caught.value)
  assert f"delete {whole} to train again" in str(caught.value)
  assert path.read_bytes() == before


def test_a_missing_file_is_an_error_only_after_a_checkpoint(tmp_path):
  _log(tmp_path / "new").close()
  assert _read(tmp_path / "new")[0] == b""
  with pytest.raises(UserError, match="row 1 is missing"):
    _log(tmp_path / "old", 2)


@pytest.mark.parametrize(
  "rows",
  [
    [_row(3), _row(5)],
    [_row(2)],
    [_row(3), _row(4) | {"lost": 1.0}],
    [_row(3), _row(4) | {"loss": float("nan")}],
    [_row(3) | {"grad_norm": float("inf")}],
  ],
)
def test_rows_that_cannot_be_right_are_refused_whole(rows, tmp_path):
  with _log(tmp_path) as log:
    log.write(_rows(1, 2))
    before = _read(tmp_path)
    with pytest.raises(ValueError):
      log.write(rows)
    assert _read(tmp_path) == before
    log.write(_rows(3, 4))


def test_rows_are_in_the_files_at_once_and_on_the_disk_after_sync(
  tmp_path, monkeypatch
):
  synced = []
  with _log(tmp_path) as log:
    log.write(_rows(1, 1))
    log.speed({"step": 1, "input_wait": 0.5})
    assert _read(tmp_path)[0].count(b"\n") == 1
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd)))
    log.sync()
    monkeypatch.undo()
  names = (metrics.METRICS, metrics.TABLE, metrics.SPEED)
  assert {s.st_ino for s in synced} == {
    (tmp_path / n).stat().st_ino for n in names
  }


def test_speed_is_appended_with_its_time_and_stays(tmp_path):
  path = tmp_path / metrics.SPEED
  with _log(tmp_path) as log:
    log.write(_rows(1, 2))
    log.speed({"step": 2, "input_wait": 0.25})
  with open(path, "ab") as file:
    file.write(b'{"time": 3.5, "st')
  with _log(tmp_path, 1) as log:
    log.write(_rows(2, 2))
    log.speed({"step": 2, "input_wait": 0.75})
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  assert [r["input_wait"] for r in rows] == [0.25, 0.75]
  assert 1e9 < rows[0]["time"] <= rows[1]["time"]
  assert b"time" not in b"".join(_read(tmp_path))


def _points(folder):
  """tag -> [(step, value)], as TensorBoard reads them."""
  from tensorboard.backend.event_processing import event_accumulator
  from tensorboard.util import tensor_util

  found = event_accumulator.EventAccumulator(
    os.fspath(folder / metrics.TENSORBOARD), size_guidance={"tensors": 0}
  ).Reload()
  return {
    tag: [
      (e.step, float(tensor_util.make_ndarray(e.tensor_proto)))
      for e in found.Tensors(tag)
    ]
    for tag in found.Tags()["tensors"]
  }


def test_tensorboard_has_each_point_once_after_a_kill(tmp_path):
  with _log(tmp_path, tensorboard=True) as log:
    log.write(_rows(1, 6))
    log.speed({"step": 3, "input_wait": 0.5})
    log.speed({"step": 6, "input_wait": 0.25})
    log.sync()
    assert len(_points(tmp_path)["loss"]) == 6
  with _log(tmp_path, 4, tensorboard=True) as log:
    log.write(_rows(5, 7))
    log.speed({"step": 7, "input_wait": 0.75})
  points = _points(tmp_path)
  assert points.pop("speed/input_wait") == [(3, 0.5), (7, 0.75)]
  assert points.keys() == set(COLUMNS)
  for name, found in points.items():
    expected = [(r["step"], r[name]) for r in _rows(1, 7) if name in r]
    assert [s for s, _ in found] == [s for s, _ in expected]
    assert [v for _, v in found] == pytest.approx([v for _, v in expected])


def test_tensorboard_gets_fewer_points_of_a_long_curve(tmp_path, monkeypatch):
  monkeypatch.setattr(metrics, "_POINTS", 4)
  with _log(tmp_path, tensorboard=True) as log:
    log.write(_rows(1, 12))
  with _log(tmp_path, 12, tensorboard=True) as log:
    log.write(_rows(13, 25))
  points = _points(tmp_path)
  assert [s for s, _ in points["loss"]] == [1, 2, 3, 4, 6, 8, 12, 16, 24]
  # A curve of few points is not thinned for the length of the others.
  assert [s for s, _ in points["val_top1"]] == [3, 6, 9, 12, 18, 24]


@pytest.mark.parametrize(
  "options, package, remedy",
  [
    ({"tensorboard": True}, "clu", "pip install 'retrieval_aug[run]'"),
    ({"wandb": "birds"}, "wandb", "pip install wandb"),
  ],
)
def test_what_is_not_installed_is_named(
  options, package, remedy, tmp_path, monkeypatch
):
  monkeypatch.setitem(sys.modules, package, None)
  with pytest.raises(UserError) as caught:
    _log(tmp_path / "run", **options)
  assert f"{package} is not installed; {remedy}" in str(caught.value)
  assert f"config.log.{next(iter(options))}" in str(caught.value)
  assert not (tmp_path / "run").exists()


class _FakeRun:
  def __init__(self, step):
    self.step, self.rows, self.exit_code = step, [], None

  def log(self, values, step):
    self.step = step
    self.rows.append((step, values))

  def finish(self, exit_code):
    self.exit_code = exit_code


@pytest.fixture
def wandb(monkeypatch):
  """A package of that name, whose runs go on where they were."""
  fake = types.ModuleType("wandb")
  fake.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
  fake.Error = type("Error", (Exception,), {})
  fake.made, fake.reached = [], {}

  def init(**options):
    run = _FakeRun(fake.reached.get(options["id"], 0))
    fake.made.append((options, run))
    return run

  fake.init = init
  monkeypatch.setitem(sys.modules, "wandb", fake)
  return fake


def test_wandb_goes_on_with_its_run_and_gets_no_step_twice(wandb, tmp_path):
  with _log(tmp_path / "a", wandb="birds") as log:
    log.write(_rows(1, 4))
    log.speed({"step": 4, "input_wait": 0.5})
  (options, run), *_ = wandb.made
  assert options["project"] == "birds"
  assert options["name"] == "mam seed 0"
  assert options["resume"] == "allow"
  assert options["dir"] == tmp_path / "a"
  assert [step for step, _ in run.rows] == [1, 2, 3, 4, 4]
  assert run.rows[2][1] == {n: v for n, v in _row(3).items() if n != "step"}
  assert run.rows[4][1] == {"speed/input_wait": 0.5}
  assert run.exit_code == 0
  # The server counts from the step after the last that it has.
  wandb.reached[options["id"]] = 5
  with pytest.raises(KeyError), _log(tmp_path / "a", 2, wandb="birds") as log:
    log.write(_rows(3, 6))
    raise KeyError
  again, run = wandb.made[1]
  assert again["id"] == options["id"]
  assert [step for step, _ in run.rows] == [5, 6]
  assert run.exit_code == 1


def test_wandb_gets_all_rows_if_it_has_none(wandb, tmp_path):
  with _log(tmp_path) as log:
    log.write(_rows(1, 3))
  with _log(tmp_path, 2, wandb="birds") as log:
    log.write(_rows(3, 3))
  assert [step for step, _ in wandb.made[0][1].rows] == [1, 2, 3]


def test_wandb_has_a_run_for_each_folder_and_for_one_made_again(
  wandb, tmp_path
):
  for name in ("a", "b", "a"):
    shutil.rmtree(tmp_path / name, ignore_errors=True)
    _log(tmp_path / name, wandb="birds").close()
  assert len({options["id"] for options, _ in wandb.made}) == 3


def test_what_wandb_says_is_passed_on(wandb, tmp_path):
  def init(**options):
    raise wandb.Error("No API key configured")

  wandb.init = init
  with pytest.raises(UserError, match="No API key.*wandb login.*offline"):
    _log(tmp_path, wandb="birds")
