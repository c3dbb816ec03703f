"""Where the processes of a run meet before JAX starts: one TCP port.

JAX has a meeting of its own, but a process that waits too long there, or finds
its port taken, ends in a C++ stack trace that names nobody (jax 0.10). So they
meet here first, at the same address: process 0 listens, the others tell who
they are, and all know who is missing. Every message is one line of JSON.
"""

import contextlib
import json
import socket
import time

from retrieval_aug.common.errors import UserError

_HELLO = 5.0  # seconds that a process may take to say who it is
_PAUSE = 0.2  # seconds between two tries to reach process 0
_OPEN = 30.0  # seconds that JAX may take to open the port again
_LONGEST = 1 << 16  # bytes of a line


def parse(coordinator: str) -> tuple[str, int]:
  """(host, port) of "HOST:PORT"; a `UserError` if it is not that."""
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
    raise UserError(
      f"--coordinator={coordinator}: not HOST:PORT, for example 10.0.0.2:8476."
    )
  return host.strip("[]"), int(port)


def names(processes) -> str:
  """For messages: "process 1", "processes 1, 2"; of many the first ten."""
  processes = sorted(processes)
  shown = ", ".join(map(str, processes[:10]))
  if len(processes) > 10:
    shown += f" and {len(processes) - 10} more"
  return f"process{'es' if len(processes) > 1 else ''} {shown}"


def meet(coordinator: str, count: int, index: int, timeout: float) -> None:
  """Returns when all processes are there; the port is then free for JAX.

  Args:
    coordinator: HOST:PORT of process 0.
    count: number of processes.
    index: which of them this is.
    timeout: seconds to wait.

  Raises:
    UserError: process 0 cannot be reached or cannot listen, a process is
      missing, or two do not agree about who they are.
  """
  host, port = parse(coordinator)
  if index == 0:
    _host(coordinator, port, count, timeout)
  else:
    _join(coordinator, (host, port), count, index, timeout)


def _listen(coordinator: str, port: int) -> socket.socket:
  """A socket at `port` of every address of this machine, as JAX has it."""
  try:
    if socket.has_dualstack_ipv6():
      return socket.create_server(
        ("", port), family=socket.AF_INET6, dualstack_ipv6=True
      )
    return socket.create_server(("", port))
  except OSError as error:
    raise UserError(
      f"--coordinator={coordinator}: process 0 cannot listen at port {port} "
      f"({error.strerror}); choose another port, or end what holds it."
    ) from error


def _host(coordinator: str, port: int, count: int, timeout: float) -> None:
  deadline = time.monotonic() + timeout
  here: dict[int, socket.socket] = {}
  with contextlib.ExitStack() as stack:
    listener = stack.enter_context(_listen(coordinator, port))
    listener.settimeout(_PAUSE)
    while True:
      here = {i: c for i, c in here.items() if _is_open(c)}
      missing = sorted(set(range(1, count)) - set(here))
      if not missing:
        break
      if time.monotonic() > deadline:
        _refuse(
          here.values(),
          f"waited {timeout:g} s for {names(missing)} (of {count}) at "
          f"{coordinator}; look at the log there, and start all again.",
        )
      with contextlib.suppress(TimeoutError):
        connection = stack.enter_context(listener.accept()[0])
        _admit(connection, here, count)
        # Who is told that nobody is missing goes on, and hangs up.
        if missing := sorted(set(range(1, count)) - set(here)):
          _tell(here.values(), missing)
    listener.close()
    _tell(here.values(), [])


def _admit(
  connection: socket.socket, here: dict[int, socket.socket], count: int
) -> None:
  """Adds who is at the other end to `here`, if it is one of the run."""
  try:
    connection.settimeout(_HELLO)
    with connection.makefile("rb") as lines:
      hello = json.loads(lines.readline(_LONGEST))
    index, its_count = int(hello["process"]), int(hello["processes"])
  except (OSError, ValueError, TypeError, KeyError):
    connection.close()  # not one of ours, for example a check of the port
    return
  everyone = [*here.values(), connection]
  if its_count != count or not 0 < index < count:
    _refuse(
      everyone,
      f"a process was started with --num_processes={its_count} "
      f"--process_id={index}, process 0 with --num_processes={count}; give "
      "all the same number, and each an own id from 0.",
    )
  if index in here and _is_open(here[index]):
    _refuse(
      everyone,
      f"two processes were started with --process_id={index}; give each its "
      f"own, from 0 to {count - 1}.",
    )
  here[index] = connection


def _is_open(connection: socket.socket) -> bool:
  """Whether the other end, which has nothing more to say, is still there."""
  connection.setblocking(False)
  try:
    return connection.recv(1, socket.MSG_PEEK) != b""
  except BlockingIOError:
    return True
  except OSError:
    return False
  finally:
    connection.settimeout(_HELLO)


def _tell(connections, message: list[int] | str) -> None:
  """Tells all who is missing (nobody: go on), or why the run ends."""
  for connection in connections:
    with contextlib.suppress(OSError):
      connection.sendall(json.dumps(message).encode() + b"\n")


def _refuse(connections, message: str) -> None:
  _tell(connections, message)
  raise UserError(message)


def _join(
  coordinator: str,
  address: tuple[str, int],
  count: int,
  index: int,
  timeout: float,
) -> None:
  deadline = time.monotonic() + timeout
  missing: list[int] = []
  reason: object = "no answer"
  while (left := deadline - time.monotonic()) > 0:
    try:
      with socket.create_connection(address, timeout=left) as connection:
        hello = {"process": index, "processes": count}
        connection.sendall(json.dumps(hello).encode() + b"\n")
        with connection.makefile("rb") as lines:
          for line in lines:
            missing = json.loads(line)
            if isinstance(missing, str):
              raise UserError(missing)
            if not isinstance(missing, list):
              raise ValueError(line)
            if not missing:
              _await_port(address)
              return
            # Process 0 gives up first, and says why.
            left = max(deadline - time.monotonic(), 0) + _HELLO
            connection.settimeout(left)
      reason = "process 0 ended while this one waited"
    except ValueError:
      reason = "what answers is not a process 0 that starts"
    except OSError as error:
      reason = error.strerror or error
    time.sleep(_PAUSE)
  if missing:
    raise UserError(
      f"waited {timeout:g} s at {coordinator} for {names(missing)} (of "
      f"{count}); look at the log there, and start all again."
    )
  raise UserError(
    f"process {index} (of {count}) waited {timeout:g} s for process 0 at "
    f"--coordinator={coordinator} ({reason}); start process 0 with the same "
    "address, and look whether its machine lets that port through."
  )


def _await_port(address: tuple[str, int]) -> None:
  """Waits until JAX listens where process 0 did; it tries but once a second."""
  deadline = time.monotonic() + _OPEN
  while time.monotonic() < deadline:
    try:
      socket.create_connection(address, timeout=1).close()
      return
    except OSError:
      time.sleep(0.05)
