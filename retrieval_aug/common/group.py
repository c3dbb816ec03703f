"""The processes of a run, by JAX's coordination service.

All that is private of JAX is taken here (jax 0.10): no public name gives its
key-value store, the list of living processes or what a cluster's environment
says.
"""

import contextlib
import dataclasses
import json
import math
import os
import sys
import threading
import time
from typing import NoReturn

from retrieval_aug.common import rendezvous
from retrieval_aug.common.errors import UserError
from retrieval_aug.common.rendezvous import names

POLL = 0.05  # seconds between two looks at what lies in this process or near
LOOK = 1.0  # seconds between two looks at what lies in process 0
# Seconds that the main thread has to end by itself when a process died. It may
# wait for that process in a computation that nothing can stop.
GRACE = 10.0
# Hosts that gRPC, on which JAX talks, does not send through a proxy.
_DIRECT = "no_grpc_proxy"
_FAILED = "retrieval_aug/failed"  # process 0 is to lie there
_REMEDY = (
  "look at the log there, and give all processes the same command again, which "
  "goes on where this one stopped"
)


@dataclasses.dataclass
class Group:
  """The processes that this one belongs to.

  Attributes:
    index: which of them this is.
    count: how many there are.
    timeout: seconds that they wait for each other.
    heartbeat: seconds without a sign of life after which one is dead.
    gone: those that died.
  """

  index: int
  count: int
  timeout: float
  heartbeat: float
  gone: set[int] = dataclasses.field(default_factory=set)

  def connect(self, address: str, local_devices: list[int] | None) -> None:
    """Starts JAX's own part; all processes are known to be there."""
    import jax
    from jax._src import distributed

    # JAX's messages do not pass through a proxy, but would be sent to one.
    near = os.environ.get(_DIRECT) or os.environ.get("no_proxy", "")
    host, _ = rendezvous.parse(address)
    os.environ[_DIRECT] = f"{near},{host}".strip(",")
    jax.config.update("jax_check_proxy_envs", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Otherwise a process that fails waits minutes for the others to fail too,
    # and all end in a C++ stack trace. `_watch` ends them instead.
    jax.config.update("jax_enable_recoverability", True)
    # It takes SIGTERM over for good; see `stopping`.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
      address,
      self.count,
      self.index,
      local_device_ids=local_devices,
      cluster_detection_method="deactivate",
      initialization_timeout=60,
      heartbeat_timeout_seconds=math.ceil(self.heartbeat),
    )
    self._client = distributed.global_state.client
    self._exchanges = 0
    # The end has begun: a process that leaves is no fault any more.
    self._ending = threading.Event()
    self._watcher = threading.Thread(target=self._watch, daemon=True)
    self._watcher.start()

  def put(self, folder: str, value: str) -> None:
    """Lays `value` of this process into a folder that all see; once."""
    # Where process 0 is gone, `_watch` says so.
    with contextlib.suppress(RuntimeError):
      self._client.key_value_set(f"{folder}/{self.index}", value)

  def entries(self, folder: str) -> dict[int, str]:
    """What each process has laid there by now."""
    try:
      found = self._client.key_value_dir_get(folder)
    except RuntimeError:  # process 0 is gone
      return {}
    return {int(key.rpartition("/")[2]): value for key, value in found}

  def exchange(
    self, name: str, value: str = "", timeout: float | None = None
  ) -> list[str]:
    """Waits until all processes are here, and returns the value of each.

    Args:
      name: of the place; the same in all.
      value: what this process tells the others.
      timeout: seconds; by default those of the group.

    Raises:
      UserError: a process did not come in time or has ended, or they came to
        different places.
    """
    timeout = self.timeout if timeout is None else timeout
    deadline = time.monotonic() + timeout
    self._exchanges += 1
    folder = f"retrieval_aug/{self._exchanges}"
    self.put(f"{folder}/each", json.dumps([name, value]))
    look = self._collect if self.index == 0 else self._receive
    while not (told := look(folder, deadline)):
      late = time.monotonic() >= deadline
      if not late and not self.gone:
        continue
      missing = set(range(self.count)) - set(self.entries(f"{folder}/each"))
      # Process 0 may have come and ended before it passed on what it was told.
      if self.gone & (missing | {0}):
        raise UserError(self.ended())
      if late:
        raise UserError(
          f"waited {timeout:g} s for {names(missing or {0})} (of {self.count}) "
          f"at {name!r}; {_REMEDY}; --barrier_timeout=SECONDS waits longer."
        )
    places = [told[i][0] for i in range(self.count)]
    if len(set(places)) > 1:
      other = next(i for i, place in enumerate(places) if place != places[0])
      raise UserError(
        f"process {other} is at {places[other]!r}, but process 0 at "
        f"{places[0]!r}; start all with the same command and files."
      )
    return [told[i][1] for i in range(self.count)]

  def _collect(self, folder: str, _: float) -> dict[int, list[str]]:
    """Of process 0: what all told, passed on to all; empty before they did."""
    told = {i: json.loads(x) for i, x in self.entries(f"{folder}/each").items()}
    if len(told) < self.count:
      time.sleep(POLL)
      return {}
    self._client.key_value_set(f"{folder}/all", json.dumps(told))
    # All have come here, so nobody reads what was told before.
    self._client.key_value_delete(f"retrieval_aug/{self._exchanges - 1}")
    return told

  def _receive(self, folder: str, deadline: float) -> dict[int, list[str]]:
    """Of the others: what process 0 passed on; empty if it did not yet."""
    wait = min(LOOK, max(deadline - time.monotonic(), POLL))
    try:
      told = self._client.blocking_key_value_get(
        f"{folder}/all", math.ceil(1000 * wait)
      )
    except RuntimeError:  # too early, or process 0 is gone
      time.sleep(POLL)
      return {}
    return {int(i): x for i, x in json.loads(told).items()}

  def ended(self) -> str:
    """The message that names those that died."""
    return f"{names(self.gone)} (of {self.count}) ended too early; {_REMEDY}."

  def _watch(self) -> None:
    """A thread that ends this process when another has died."""
    everyone = set(range(self.count))
    while True:
      alive = self._alive()
      ending = self._ending.is_set()
      # Process 0 has the store, which the others need to leave.
      if ending and (self.index != 0 or alive <= {0}):
        return
      if alive != everyone and not ending:
        self.gone |= everyone - alive
        if not self._ending.wait(GRACE):
          print(f"error: {self.ended()}", file=sys.stderr)
          with contextlib.suppress(RuntimeError):
            self._client.shutdown()  # so that the others need not wait for it
          _exit()
      elif not ending:
        self._ending.wait(LOOK)

  def _alive(self) -> set[int]:
    """Returns when all that live have asked this, and the others are dead."""
    everyone = range(self.count)
    try:
      alive = set(self._client.get_live_nodes(list(everyone)))
    except RuntimeError:  # the store is gone, or this process has left it
      return {0} if self.index == 0 else set(everyone) - {0}
    return alive - set(self.entries(_FAILED))

  def finish(self) -> None:
    """Leaves when all processes have come to the end."""
    if not self._ending.is_set():
      self.exchange("the end of the program")
      self._leave()

  def fail(self) -> None:
    """Leaves at once, if that was not done; the others then end too."""
    if not self._ending.is_set():
      if self.index == 0:
        self.put(_FAILED, "")
      self._leave()

  def _leave(self) -> None:
    import jax

    self._ending.set()
    if self.index == 0:
      self._watcher.join(GRACE + 2 * LOOK)
    jax.distributed.shutdown()
    self._watcher.join(2 * LOOK)
    if self._watcher.is_alive():
      # It waits for a process that is dead but not yet known to be, and would
      # wake up while the interpreter is taken down, which is a crash.
      _exit()


def _exit() -> NoReturn:
  """Ends the process, whatever its threads wait for."""
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(1)


def by_environment(
  timeout: float,
) -> tuple[str, int, int, list[int] | None]:
  """What the launcher's environment says of the processes.

  Returns:
    (HOST:PORT of process 0, number of processes, which this is, the devices of
    this machine that it may use or None for all).

  Raises:
    UserError: it says nothing, or too little.
  """
  from jax._src import clusters

  try:
    found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
      os.environ.get("JAX_COORDINATOR_ADDRESS"),
      None,
      None,
      None,
      None,
      math.ceil(timeout),
    )
  except Exception as error:  # whatever a cluster's answer lacks
    text = " ".join(str(error).split())
    raise UserError(
      "--distributed: the environment of the processes cannot be read "
      f"({type(error).__name__}: {text[:300]}); mend it, or give "
      "--coordinator, --num_processes and --process_id instead."
    ) from error
  if None in found[:3]:
    raise UserError(
      "--distributed: no TPU pod, Slurm step, Open MPI job or (with the "
      "package kubernetes) Kubernetes job was found in the environment; give "
      "--coordinator, --num_processes and --process_id instead."
    )
  return found
