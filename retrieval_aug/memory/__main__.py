"""Edits the memory of an experiment; nothing is trained or embedded again.

python -m retrieval_aug.memory COMMAND DIR ...

Commands: add, remove, restore, compact, retry, stat, verify.
"""

import argparse
import os
import pathlib
import sys
from collections.abc import Sequence

from retrieval_aug.common import manifest
from retrieval_aug.common.errors import UserError
from retrieval_aug.memory import dead_letters, edits, table_report

_EXAMPLES = """\
DIR is the folder of a table, or a workdir with one: workdir/memory, or workdir.

  python -m retrieval_aug.memory stat workdir
  python -m retrieval_aug.memory remove workdir web/17 web/23
  python -m retrieval_aug.memory remove workdir --ids=bad.txt --dry_run
  python -m retrieval_aug.memory remove workdir --where source=web \\
    --where label=crane
  python -m retrieval_aug.memory restore workdir --where source=web
  python -m retrieval_aug.memory add workdir other_workdir/memory
  python -m retrieval_aug.memory compact workdir
  python -m retrieval_aug.memory verify workdir

After an edit, run the main job again: only affected queries are searched anew,
and nothing is retrained. Compact while no search runs: it would end, and say
that a file is missing.
"""

_NEXT = (
  "run the main job again: only affected queries are searched anew, nothing "
  "is retrained"
)


def main(arguments: Sequence[str] | None = None) -> int:
  """The command; returns its exit status."""
  parser = _parser()
  given, rest = parser.parse_known_args(arguments)
  # Ids that follow an option; argparse takes those before it only.
  if "item" not in given or any(x.startswith("-") for x in rest):
    if rest:
      parser.error(f"unrecognized arguments: {' '.join(rest)}")
  else:
    given.item += rest
  try:
    folder = _table_folder(given.folder)
    return _COMMANDS[given.command](folder, given)
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
  except KeyboardInterrupt:
    print(
      "error: interrupted: the edit was made whole or not at all, see `stat`.",
      file=sys.stderr,
    )
  except BrokenPipeError:  # of `stat DIR | head`
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
  return 1


def _parser() -> argparse.ArgumentParser:
  style = {
    "formatter_class": argparse.RawDescriptionHelpFormatter,
    "epilog": _EXAMPLES,
  }
  parser = argparse.ArgumentParser(
    prog="python -m retrieval_aug.memory",
    description="Edits the memory of an experiment, or tells about it.",
    **style,
  )
  commands = parser.add_subparsers(dest="command", required=True)
  for name, what in (
    ("remove", "no search finds these rows any more"),
    ("restore", "removed rows are found again"),
    ("add", "appends the rows of another finished table"),
    ("compact", "frees the space of removed rows, for good"),
    ("retry", "items that could not be embedded are tried again"),
    ("stat", "says what there is"),
    ("verify", "reads everything and names all faults"),
  ):
    command = commands.add_parser(name, help=what, description=what, **style)
    command.add_argument(
      "folder", metavar="DIR", help="of a table, or a workdir"
    )
    if name in ("remove", "restore"):
      command.add_argument(
        "item", metavar="ID", nargs="*", help="id of a row; or use"
      )
      command.add_argument(
        "--ids", metavar="FILE", help="a file of ids, one a line; or"
      )
      command.add_argument(
        "--where",
        metavar="COLUMN=VALUE",
        action="append",
        help="rows with this value in a column of the metadata; several must "
        "all be true",
      )
    if name == "add":
      command.add_argument(
        "other", metavar="OTHER", help="the other table, or its workdir"
      )
    if name not in ("retry", "stat", "verify"):
      command.add_argument(
        "--dry_run", action="store_true", help="only tell what would happen"
      )
  return parser


def _table_folder(name: str) -> pathlib.Path:
  """A table's folder, or that of a workdir's memory."""
  folder = pathlib.Path(name)
  inner = folder / "memory"
  if (inner / manifest.NAME).exists():
    return inner
  if not (folder / manifest.NAME).exists():
    raise UserError(
      f"{folder}: neither a table (it has no {manifest.NAME}) nor a workdir "
      "with one in memory/; name the --workdir of a main job that embedded."
    )
  return folder


def _chosen(given: argparse.Namespace) -> dict:
  """Arguments of an edit: ids, or conditions."""
  if given.item and given.ids:
    raise UserError("--ids: there are ids on the command line too; give one.")
  ids = list(given.item)
  if given.ids:
    try:
      lines = pathlib.Path(given.ids).read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
      reason = getattr(error, "strerror", None) or error
      raise UserError(
        f"--ids={given.ids}: cannot be read ({reason}); give a text file with "
        "one id a line."
      ) from error
    ids = [line for line in lines if line]
    if not ids:
      raise UserError(f"--ids={given.ids}: holds no ids; give one a line.")
  where = {}
  for condition in given.where or ():
    column, sign, value = condition.partition("=")
    if not column or not sign:
      raise UserError(f"--where {condition}: must be COLUMN=VALUE.")
    if where.setdefault(column, value) != value:
      raise UserError(
        f"--where {condition}: {column} is {where[column]!r} already, and no "
        "row has both; edit twice."
      )
  return {"ids": ids or None, "where": where or None}


def _tell(
  folder: pathlib.Path, given: argparse.Namespace, what: str, done: edits.Edited
) -> None:
  would = "would be " if given.dry_run else ""
  print(f"{folder}: {len(done.rows):,} rows {would}{what}, {done.live:,} live.")
  print("Nothing was changed." if given.dry_run else f"Next: {_NEXT}.")


def _remove(folder: pathlib.Path, given: argparse.Namespace) -> int:
  done = edits.remove(folder, **_chosen(given), dry_run=given.dry_run)
  _tell(folder, given, "removed", done)
  return 0


def _restore(folder: pathlib.Path, given: argparse.Namespace) -> int:
  done = edits.restore(folder, **_chosen(given), dry_run=given.dry_run)
  _tell(folder, given, "restored", done)
  return 0


def _add(folder: pathlib.Path, given: argparse.Namespace) -> int:
  other = _table_folder(given.other)
  done = edits.add(folder, other, dry_run=given.dry_run)
  _tell(folder, given, f"added from {other}", done)
  return 0


def _compact(folder: pathlib.Path, given: argparse.Namespace) -> int:
  done = edits.compact(folder, dry_run=given.dry_run)
  _tell(folder, given, "dropped for good", done)
  return 0


def _retry(folder: pathlib.Path, given: argparse.Namespace) -> int:
  del given
  count = dead_letters.retry(folder)
  print(f"{folder}: {count:,} items will be tried again.")
  if count:
    print("Next: run the embed stage again; neighbours are then found anew.")
  return 0


def _stat(folder: pathlib.Path, given: argparse.Namespace) -> int:
  found = table_report.stat(folder)
  join = lambda pairs: ", ".join(f"{n} {x}" for n, x in pairs) or "none"
  sources = [(n, f"{x:,}") for n, x in found["sources"].items()]
  lines = {
    "table": f"{folder}, {found['fingerprint']}",
    "rows": f"{found['rows']:,} in {found['shards']:,} shards",
    "removed": f"{found['removed']:,}",
    "live": f"{found['live']:,}",
    "keys": f"{found['key_dims']} dims",
    "values": join((n, f"{x} dims") for n, x in found["values"].items()),
    "columns": join(found["columns"].items()),
    "sources": join(sources),
    "files": f"{found['bytes']:,} bytes",
    "edits": join((e["edit"], f"{e['count']:,}") for e in found["history"]),
  }
  for name, text in lines.items():
    print(f"{name:<8} {text}")
  return 0


def _verify(folder: pathlib.Path, given: argparse.Namespace) -> int:
  faults = table_report.verify(folder)
  for fault in faults:
    print(f"error: {fault}", file=sys.stderr)
  if not faults:
    print(f"{folder}: every file and every row is sound.")
  return int(bool(faults))


_COMMANDS = {
  "remove": _remove,
  "restore": _restore,
  "add": _add,
  "compact": _compact,
  "retry": _retry,
  "stat": _stat,
  "verify": _verify,
}


if __name__ == "__main__":
  sys.exit(main())
