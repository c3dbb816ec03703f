"""Programs that tell what they were called with, in place of real ones."""

import dataclasses
import os
import pathlib
import subprocess

from tests.launch_commands import COMMANDS, ROOT

# Tells its name and words, each ended by a NUL, in a line of the record. Then
# it does what the case of its name says.
FAKE = r"""#!/bin/bash
{ printf '%s\0' "${0##*/}" "$@"; echo; } >>"$RECORD"
case ${0##*/} in
  sbatch | kubectl) cat >"$RECORD.stdin" ;;
  srun) exit "$CODE" ;;
  mountpoint) exit 1 ;;
  python)  # main: each run ends with the next code, the last when told to
    code=$(head -n 1 "$RECORD.codes")
    sed -i 1d "$RECORD.codes"
    echo "this is main"
    if [ "$code" = wait ]; then
      trap 'kill "$sleep"; exit 75' TERM
      sleep 20 &
      sleep=$!
      touch "$RECORD.waits"
      wait
    fi
    exit "$code" ;;
  python3)  # uv, of which only what comes out matters
    [ "$3" != venv ] || { mkdir -p .venv/bin && cp "$0" .venv/bin/python; } ;;
  gcloud)
    case "$4" in
      describe) [ -e "$RECORD.vm" ] && cat "$RECORD.vm" ;;
      create) echo READY >"$RECORD.vm" ;;
      delete) rm "$RECORD.vm" ;;
      ssh)
        if [ -e "$RECORD.lost" ] && [[ "${*: -1}" == *train.sh* ]]; then
          rm "$RECORD.lost"
          echo PREEMPTED >"$RECORD.vm"
          exit 255
        fi
        command=${*: -1}
        command=${command#--command=}
        cd "$HOME" && bash -c "${command//\/dev\/shm/$HOME}" ;;
    esac ;;
esac
"""

_NAMES = ("gcloud", "kubectl", "sbatch", "srun", "scontrol", "python")
_NAMES += ("python3", "sudo", "mountpoint", "mount.nfs")


@dataclasses.dataclass
class Fakes:
  """A folder of replaced programs, and what they were called with."""

  folder: pathlib.Path
  env: dict[str, str]

  def run(self, command, codes=("0",), **env):
    """Starts a command afresh; `codes` are what runs of main end with."""
    (self.folder / "record").unlink(missing_ok=True)
    (self.folder / "record.codes").write_text("\n".join(codes) + "\n")
    return subprocess.run(
      command,
      capture_output=True,
      text=True,
      cwd=ROOT,
      env=self.env | env,
      stdin=subprocess.DEVNULL,
      timeout=60,
    )

  def launch(self, name, **kwargs):
    script, *arguments = COMMANDS[name]
    return self.run([ROOT / "launch" / f"{script}.sh", *arguments], **kwargs)

  def calls(self) -> list[list[str]]:
    lines = (self.folder / "record").read_text().split("\0\n")
    return [line.split("\0") for line in lines[:-1]]

  def calls_of(self, name) -> list[list[str]]:
    return [call[1:] for call in self.calls() if call[0] == name]

  def stdin(self) -> str:
    return (self.folder / "record.stdin").read_text()

  def is_there(self, file) -> bool:
    return (self.folder / file).exists()

  def write(self, file, text=""):
    (self.folder / file).write_text(text)


def make(tmp_path: pathlib.Path) -> Fakes:
  """Replaces the programs for what is started with `env`."""
  home = tmp_path / "home"
  home.mkdir()
  # Names with spaces and quotes are no trouble either.
  bins = tmp_path / "it's a folder"
  bins.mkdir()
  for name in _NAMES:
    (bins / name).write_text(FAKE)
    (bins / name).chmod(0o755)
  env = {
    "PATH": f"{bins}:/usr/bin:/bin",
    "HOME": os.fspath(home),
    "RECORD": os.fspath(tmp_path / "record"),
  }
  return Fakes(tmp_path, env)
