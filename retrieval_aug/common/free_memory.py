"""How much memory this machine, or the job's share of it, has free."""

import math
import os
import pathlib
import re

# Of a group's limit and use, in version 1 and 2 of Linux's control groups.
_FILES = {
  "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes"),
  "": ("memory.max", "memory.current"),
}


def of_machine(root: pathlib.Path = pathlib.Path("/")) -> float:
  """Bytes that a process may still take.

  Args:
    root: of the file system, where `proc` and `sys` are.

  Returns:
    What Linux calls available, or less where a container or a job has a limit;
    all memory where the system does not say.
  """
  try:
    text = (root / "proc/meminfo").read_text()
    free = 1024 * int(re.search(r"MemAvailable: +(\d+) kB", text)[1])
  except (OSError, TypeError):
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  return min(free, _of_groups(root))


def _of_groups(root: pathlib.Path) -> float:
  """What the limits of this process's control groups leave; inf without."""
  free = math.inf
  try:
    groups = (root / "proc/self/cgroup").read_text().splitlines()
  except OSError:
    return free
  for group in groups:
    _, controllers, path = group.split(":", 2)
    if controllers not in _FILES:
      continue
    top = root / "sys/fs/cgroup" / controllers
    folder = top / path.lstrip("/")
    # Limits of the groups around it hold, too. In a container the path may be
    # that of the host, and the top is all there is.
    for at in (folder, *folder.parents):
      free = min(free, _of_group(at, *_FILES[controllers]))
      if at == top:
        break
  return free


def _of_group(folder: pathlib.Path, limit: str, used: str) -> float:
  try:
    most = (folder / limit).read_text().strip()
    now = int((folder / used).read_text())
    stat = (folder / "memory.stat").read_text()
  except OSError:
    return math.inf
  if most == "max":
    return math.inf
  # What only caches files is given back when it is wanted.
  cached = re.search(r"^(?:total_)?inactive_file (\d+)$", stat, re.MULTILINE)
  return int(most) - now + (int(cached[1]) if cached else 0)
