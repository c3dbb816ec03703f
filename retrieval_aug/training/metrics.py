"""What a run records: metrics, one row a step, and how fast they came."""

import importlib.util
import json
import os
import pathlib
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from retrieval_aug.common import files, tf
from retrieval_aug.common.errors import UserError

METRICS = "metrics.jsonl"
TABLE = "metrics.csv"
SPEED = "speed.jsonl"
TENSORBOARD = "tensorboard"
WANDB_ID = "wandb_id.json"

# TensorBoard draws at most 1,000 points of a curve, and a point costs 0.2 ms
# to write, which small models take for a step.
_POINTS = 1024


def check_installed(*, tensorboard: bool, wandb: bool) -> None:
  """Raises a `UserError` if what is to be written to is not installed."""
  wanted = (
    ("tensorboard", tensorboard, "clu", "'retrieval_aug[run]'"),
    ("wandb", wandb, "wandb", "wandb"),
  )
  for setting, on, package, install in wanted:
    if on and importlib.util.find_spec(package) is None:
      raise UserError(
        f"config.log.{setting}: {package} is not installed; pip install "
        f"{install}, or leave config.log.{setting} out."
      )


class Log:
  """The metrics of one run, none lost and none doubled by a kill.

  `metrics.jsonl` holds an object a step, and `metrics.csv` the same as a
  table. Their bytes are a function of the rows alone, however often the run
  was stopped. Times, which never come again, go to `speed.jsonl`.

  A run's first process alone has one; a context manager.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    first: int,
    columns: Sequence[str],
    *,
    name: str,
    tensorboard: bool = False,
    wandb: str = "",
  ):
    """Drops the rows of steps that will come again.

    Args:
      folder: of the run.
      first: the step that it goes on from, 0 for a new one.
      columns: what rows may hold beside `step`, in this order.
      name: of the run, for Weights & Biases.
      tensorboard: whether to write to `tensorboard` in the folder, too.
      wandb: project of Weights & Biases to write to, too; "" for none.

    Raises:
      UserError: rows up to `first` are missing; what is to be written to is
        not installed, or not to be had.
    """
    check_installed(tensorboard=tensorboard, wandb=bool(wandb))
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    self._columns = tuple(columns)
    self._last = first
    lines, rows = _kept(folder / METRICS, first)
    self._boards = []
    if tensorboard:
      self._boards.append(_TensorBoard(folder / TENSORBOARD))
    if wandb:
      self._boards.append(_Wandb(folder, wandb, name))
    # The table is made anew: what it lacks or has too much, the other knows.
    header = ",".join(("step", *self._columns))
    table = [header, *map(self._cells, rows)]
    self._metrics = _rewritten(folder / METRICS, lines)
    self._table = _rewritten(folder / TABLE, table)
    self._speed = _mended(folder / SPEED)
    self._show(rows, _speeds(folder / SPEED, first))

  def write(self, rows: Sequence[Mapping[str, float]]) -> None:
    """Appends one row a step.

    Args:
      rows: `step` and any of the columns, finite numbers. Steps go on from
        the last.

    Raises:
      ValueError: steps are left out or come again; a column is unknown; a
        number is not finite.
    """
    ordered = [
      self._ordered(row, step)
      for step, row in enumerate(rows, start=self._last + 1)
    ]
    lines = [json.dumps(row, allow_nan=False) for row in ordered]
    _append(self._metrics, lines)
    _append(self._table, [self._cells(row) for row in ordered])
    self._last += len(ordered)
    self._show(ordered, ())

  def speed(self, row: Mapping[str, float]) -> None:
    """Appends times, of which another run of the same steps has others.

    Args:
      row: `step`, and numbers by name.
    """
    timed = {"time": time.time(), **row}
    _append(self._speed, [json.dumps(timed, allow_nan=False)])
    self._show((), (row,))

  def sync(self) -> None:
    """Brings all rows to the disk: before the checkpoint that needs them."""
    for file in (self._metrics, self._table, self._speed):
      os.fsync(file.fileno())
    for board in self._boards:
      board.flush()

  def close(self, failed: bool = False) -> None:
    """Brings all rows to the disk and ends the log.

    Args:
      failed: whether the run ends by an error.
    """
    self.sync()
    for file in (self._metrics, self._table, self._speed):
      file.close()
    for board in self._boards:
      board.close(failed)

  def __enter__(self) -> "Log":
    return self

  def __exit__(self, kind, error, traceback) -> None:
    self.close(failed=kind is not None)

  def _ordered(self, row: Mapping[str, float], step: int) -> dict[str, float]:
    unknown = set(row) - {"step", *self._columns}
    if unknown or row["step"] != step:
      raise ValueError(
        f"expected a row of step {step} with some of {self._columns}, got {row}"
      )
    present = [n for n in self._columns if n in row]
    return {"step": step, **{n: float(row[n]) for n in present}}

  def _cells(self, row: Mapping[str, float]) -> str:
    values = (row.get(n) for n in self._columns)
    cells = ("" if v is None else repr(v) for v in values)
    return ",".join((str(row["step"]), *cells))

  def _show(self, rows, speeds) -> None:
    for board in self._boards:
      for row in rows:
        board.write(row["step"], {n: row[n] for n in row if n != "step"})
      for row in speeds:
        names = [n for n in row if n not in ("step", "time")]
        board.write(row["step"], {f"speed/{n}": row[n] for n in names})


def _kept(path: pathlib.Path, first: int) -> tuple[list[str], list[dict]]:
  """Lines, and what they hold, of the steps up to `first`."""
  lines, rows = [], []
  if path.exists():
    for line in path.read_text(errors="replace").splitlines()[:first]:
      row = _parsed(line)
      if row is None or row["step"] != len(rows) + 1:
        break
      lines.append(line)
      rows.append(row)
  if len(rows) < first:
    raise UserError(
      f"{path}: must have a row for each of the {first} steps of the "
      f"checkpoint, and its row {len(rows) + 1} is missing or damaged; delete "
      f"{path.parent} to train again."
    )
  return lines, rows


def _parsed(line: str) -> dict[str, Any] | None:
  """The row in a line; None if it is none."""
  try:
    row = json.loads(line)
  except ValueError:
    return None
  return row if isinstance(row, dict) and "step" in row else None


def _speeds(path: pathlib.Path, first: int) -> list[dict]:
  """Rows of the steps up to `first`, the last of those that came twice."""
  rows = map(_parsed, path.read_text(errors="replace").splitlines())
  by_step = {r["step"]: r for r in rows if r and r["step"] <= first}
  return [by_step[step] for step in sorted(by_step)]


def _rewritten(path: pathlib.Path, lines: Sequence[str]):
  files.write_bytes(path, "".join(f"{x}\n" for x in lines).encode())
  return open(path, "ab")


def _mended(path: pathlib.Path):
  """Opens a file to append to, less the half line of a killed writer."""
  with open(path, "a+b") as file:
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)
  return open(path, "ab")


def _append(file, lines: Sequence[str]) -> None:
  file.write("".join(f"{x}\n" for x in lines).encode())
  file.flush()  # for those who look on


class _TensorBoard:
  """Event files for TensorBoard, thinned to what it draws."""

  def __init__(self, folder: pathlib.Path):
    tf.import_tensorflow()  # which hides accelerators from it: clu does not
    from clu import metric_writers

    # The points of steps that come again are in these; the kept ones follow.
    for path in folder.glob("events.out.tfevents.*"):
      path.unlink()
    self._writer = metric_writers.SummaryWriter(os.fspath(folder))
    self._counts: dict[str, int] = {}

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    shown = {}
    for name, value in scalars.items():
      count = self._counts[name] = self._counts.get(name, 0) + 1
      if _is_shown(count):
        shown[name] = value
    if shown:
      self._writer.write_scalars(step, shown)

  def flush(self) -> None:
    self._writer.flush()

  def close(self, failed: bool) -> None:
    self._writer.close()


def _is_shown(count: int) -> bool:
  """Whether the `count`-th point of a curve is one to draw, from 1.

  All up to `_POINTS`; each second up to twice that, each fourth up to four
  times, and so on, so that it depends on no length of the run.
  """
  stride = 1
  while count > _POINTS * stride:
    stride *= 2
  return count % stride == 0


class _Wandb:
  """A run of Weights & Biases, gone on with where there is one."""

  def __init__(self, folder: pathlib.Path, project: str, name: str):
    import wandb

    # Kept with the run: one that is deleted and made again is another.
    path = folder / WANDB_ID
    if not path.exists():
      files.write_json(path, {"id": secrets.token_hex(8)})
    try:
      self._run = wandb.init(
        project=project,
        name=name,
        id=files.read_json(path)["id"],
        resume="allow",
        reinit="create_new",  # seeds that train together have one each
        dir=folder,
      )
    except wandb.Error as error:
      raise UserError(
        f"config.log.wandb={project}: Weights & Biases cannot be written to "
        f"({error}); log in with `wandb login`, set WANDB_MODE=offline, or "
        "leave config.log.wandb out."
      ) from error

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    # What it has of steps that come again is the same, and it takes no step
    # that lies before its last.
    if step >= self._run.step:
      self._run.log(dict(scalars), step=step)

  def flush(self) -> None:
    pass  # it sends from a process of its own

  def close(self, failed: bool) -> None:
    self._run.finish(exit_code=int(failed))
