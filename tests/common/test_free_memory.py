"""Free memory as Linux tells it, and limits of containers and jobs."""

import pytest

from retrieval_aug.common import free_memory

_AVAILABLE = 64 * 10**9


@pytest.fixture
def machine(tmp_path):
  """Writes a file of a machine's /proc or /sys; returns the root."""

  def write(**files):
    for name, text in files.items():
      path = tmp_path / name.replace("__", "/")
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(text)
    return tmp_path

  write(
    proc__meminfo=(
      "MemTotal:       99999999 kB\nMemFree:        1 kB\n"
      f"MemAvailable:   {_AVAILABLE // 1024} kB\n"
    )
  )
  return write


def _group(folder, limit, used, cached, version=2):
  names = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    2: ("memory.max", "memory.current", ""),
  }
  most, now, prefix = names[version]
  folder.mkdir(parents=True, exist_ok=True)
  (folder / most).write_text(f"{limit}\n")
  (folder / now).write_text(f"{used}\n")
  (folder / "memory.stat").write_text(
    f"anon 5\n{prefix}active_file 6\n{prefix}inactive_file {cached}\n"
  )


def test_no_group_leaves_what_is_available(machine):
  assert free_memory.of_machine(machine()) == _AVAILABLE


def test_no_proc_gives_all_memory(tmp_path):
  assert free_memory.of_machine(tmp_path) > 0


def test_a_group_without_a_limit_leaves_what_is_available(machine):
  root = machine(proc__self__cgroup="0::/\n")
  _group(root / "sys/fs/cgroup", "max", 10**9, 0)
  assert free_memory.of_machine(root) == _AVAILABLE


def test_a_limit_counts_without_what_caches_files(machine):
  root = machine(proc__self__cgroup="0::/\n")
  _group(root / "sys/fs/cgroup", 8 * 10**9, 5 * 10**9, 10**9)
  assert free_memory.of_machine(root) == 4 * 10**9


def test_limits_of_groups_around_it_hold(machine):
  root = machine(proc__self__cgroup="0::/slurm/job_7/step_0\n")
  top = root / "sys/fs/cgroup"
  _group(top / "slurm/job_7/step_0", "max", 10**9, 0)
  _group(top / "slurm/job_7", 3 * 10**9, 10**9, 0)
  _group(top / "slurm", 9 * 10**9, 10**9, 0)
  assert free_memory.of_machine(root) == 2 * 10**9


def test_a_container_that_names_the_path_of_its_host(machine):
  root = machine(proc__self__cgroup="0::/kubepods/pod1/abc\n")
  _group(root / "sys/fs/cgroup", 3 * 10**9, 10**9, 0)
  assert free_memory.of_machine(root) == 2 * 10**9


def test_version_1(machine):
  root = machine(proc__self__cgroup="5:cpu,cpuacct:/x\n9:memory:/job_7\n")
  _group(root / "sys/fs/cgroup/memory/job_7", 3 * 10**9, 2 * 10**9, 7, 1)
  _group(root / "sys/fs/cgroup/memory", 2**63 - 4096, 10**9, 0, 1)
  assert free_memory.of_machine(root) == 10**9 + 7
