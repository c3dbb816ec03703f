"""The main command in two processes at a time, for test_processes.py: FOLDER.

This process imports everything and starts nothing of JAX; those that give the
commands are forks of it, and begin with the work at once. What each said is
left in `FOLDER/<command>_<process>.out` and `.err`, the exit codes in
`FOLDER/codes.json`.

It is also their config file: --config=THIS:FOLDER.
"""

import gc
import json
import os
import pathlib
import runpy
import signal
import socket
import sys
import time

import ml_collections

from retrieval_aug import experiment  # noqa: F401 - what the commands need
from retrieval_aug.common import distributed, stopping, tf
from tests.end_to_end import embeddings
from tests.training.process_training import compiled_quickly

MODELS = "linear,mam"


def get_config(folder: str) -> ml_collections.ConfigDict:
  """Four epochs of 63 examples in batches of 16: 16 steps."""
  laion = pathlib.Path(folder) / "laion"
  c = embeddings.config(pathlib.Path(folder), embeddings=str(laion))
  c.train.epochs = 4.0
  c.model.mam.train.epochs = 4.0
  c.model.name = MODELS
  c.model.mam.num_layers = 1
  c.log.tensorboard = False  # slow to import
  return c


def command(folder: pathlib.Path, *flags: str) -> list[str]:
  return [
    f"--config={__file__}:{folder}",
    f"--workdir={folder / 'two'}",
    *flags,
  ]


def give(folder: pathlib.Path, name: str, *commands: list[str]) -> list[int]:
  """Forks a process for each command, of those that belong together.

  Returns:
    Their exit codes.
  """
  with socket.create_server(("127.0.0.1", 0)) as server:
    address = f"127.0.0.1:{server.getsockname()[1]}"
  children = []
  for index, flags in enumerate(commands):
    children.append(os.fork())
    if children[-1]:
      continue
    signal.alarm(1800)  # one that hangs would outlive the test
    for stream, suffix in ((1, "out"), (2, "err")):
      path = folder / f"{name}_{index}.{suffix}"
      os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY), stream)
    if name == "stopped":
      _stop_after_two_steps(index)
    sys.argv = [
      "main",
      *command(folder, *flags),
      *(f"--coordinator={address}", "--num_processes=2"),
      f"--process_id={index}",
    ]
    with compiled_quickly():
      runpy.run_module("retrieval_aug.main", run_name="__main__")
    raise AssertionError("the main program exits")
  status = [os.waitpid(child, 0)[1] for child in children]
  return [os.waitstatus_to_exitcode(x) for x in status]


def _stop_after_two_steps(index: int) -> None:
  """Process 1 alone gets SIGTERM."""
  reached = distributed.Preemption.reached
  stopping.LOOK = 0.05  # seconds until the other knows

  def slow(self, step):
    if (index, step) == (1, 2):
      signal.raise_signal(signal.SIGTERM)
    time.sleep(0.1)  # so that there are steps left to stop at
    return reached(self, step)

  distributed.Preemption.reached = slow


def main() -> None:
  folder = pathlib.Path(sys.argv[1])
  tf.import_tensorflow()
  gc.freeze()  # what is imported stays shared, and is not looked through again
  train, other = "--stages=train", "--config.train.learning_rate=1"
  # mam in a layout that is not the default; linear has no neighbours.
  layout = (
    "--config.memory.placement=host",
    "--config.mesh.model=2",
    "--config.mesh.sharding=tensor",
  )
  codes = {
    "differs": give(folder, "differs", [train], [train, other]),
    "missing": give(folder, "missing", ["--start_timeout=1"]),
    "stopped": give(
      folder, "stopped", *[["--config.model.name=linear", train]] * 2
    ),
    "finished": give(folder, "finished", layout, layout),
    "again": give(folder, "again", [], []),
  }
  (folder / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
  main()
