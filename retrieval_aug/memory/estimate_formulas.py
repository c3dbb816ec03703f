"""The formulas of `estimate.py`, how they are computed and how printed.

A formula is written once: what is printed is what was computed.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Quantity(NamedTuple):
  """A number, and where it comes from.

  Attributes:
    symbol: by which other formulas name it.
    name: what it is.
    unit: "", "B", "s", "core-s", "device-s", "MB/s" or "money".
    value: in that unit.
    formula: of symbols; empty for an input.
    filled: the formula with numbers.
  """

  symbol: str
  name: str
  unit: str
  value: float
  formula: str = ""
  filled: str = ""


# Each may use the symbols above it, and the inputs of `estimate.py`.
FORMULAS = (
  ("key", "memory a key while indexing", "B", "b*d_raw + 12*d"),
  ("S", "index shards", "", "ceil(M / R)"),
  ("r", "rows an index shard", "", "ceil(M / S)"),
  ("G", "groups at work at a time", "", "min(W, S)"),
  ("turns", "index shards a group", "", "ceil(S / G)"),
  ("ram", "memory a worker", "B", "r*key + N*(4*d + 12*k)"),
  ("t_build", "build, a key", "core-s", "build * (d + 100)/868 * (r/1e6)**g_b"),
  ("t_query", "a query, an index shard", "device-s", ""),  # see below
  ("t_key", "read and transform a key", "core-s", "prepare * d_raw/768"),
  (
    "t_score",
    "score a query, an index shard",
    "core-s",
    "score * d/768 * (k + 16)/116",
  ),
  ("t_check", "recall, a key and query", "core-s", "check * d/768"),
  ("embed", "embed", "device-s", "(M + N)*t_image + M*t_values"),
  ("build_all", "build indexes", "core-s", "M * t_build"),
  ("query_all", "search", "device-s", "N * S * t_query"),
  ("score_all", "score candidates", "core-s", "N * S * t_score"),
  ("prepare_all", "read and transform keys", "core-s", "M * t_key"),
  ("check_all", "measure the recall", "core-s", "M * n * t_check"),
  ("tables", "table of the memory", "B", "M*(b*d_raw + b*d_v + m)"),
  ("query_table", "table of the queries", "B", "N*(b*d_raw + m)"),
  ("partials", "running top-k, all groups", "B", "G * N * 12*k"),
  ("lists", "neighbor shards", "B", "N*(12*k + 2*d + 100)"),
  ("U", "rows of the working set, at most", "", "min(M, N*k)"),
  ("working_set", "working set, at most", "B", "U*(2*d + 2*d_v + 16)"),
  (
    "disk",
    "disk in all",
    "B",
    "tables + query_table + partials + lists + working_set",
  ),
  ("speed", "storage and network", "MB/s", "min(disk_speed, W*net_speed)"),
  (
    "embed_moved",
    "moved by embed",
    "B",
    "(M + N)*image + tables + query_table",
  ),
  (
    "search_moved",
    "moved by search",
    "B",
    "M*b*d_raw + G*N*b*d_raw + 2*S*N*12*k + lists",
  ),
  (
    "gather_moved",
    "moved by gather, at most",
    "B",
    "lists + U*(b*d_raw + b*d_v) + working_set",
  ),
  (
    "embed_wall",
    "embed, by the clock",
    "s",
    "ceil(ceil(M / E) / W) * min(E, M) * (t_image + t_values) / e"
    " + ceil(ceil(N / E) / W) * min(E, N) * t_image / e",
  ),
  ("read_wall", "embed: storage, if longer", "s", "embed_moved / (speed*1e6)"),
  ("prepare_wall", "search: keys", "s", "turns * r * t_key"),
  ("build_wall", "search: indexes", "s", "turns * r * t_build / c_b"),
  ("query_wall", "search: queries", "s", "turns * N * t_query / e"),
  ("score_wall", "search: scores", "s", "turns * N * t_score / c"),
  ("check_wall", "search: recall", "s", "turns * r * n * t_check / c"),
  ("move_wall", "search: storage", "s", "search_moved / (speed*1e6)"),
  ("gather_wall", "gather, at most", "s", "gather_moved / (speed*1e6)"),
  (
    "search_wall",
    "search, by the clock",
    "s",
    "prepare_wall + build_wall + query_wall + score_wall + check_wall"
    " + move_wall",
  ),
  (
    "wall",
    "all, by the clock",
    "s",
    "max(embed_wall, read_wall) + search_wall + gather_wall",
  ),
)
# Of `t_query`.
ON_CORES = "query * (d + 100)/868 * (r/1e6)**g_q"
ON_ACCELERATORS = "2 * d * r / (tflops*1e12 * share)"
# Only where there is a price, the first symbol.
MONEY = (
  ("p_core", "core_money", "cores", "money", "W * c * wall/3600 * p_core"),
  (
    "p_device",
    "device_money",
    "accelerators",
    "money",
    "W * a * wall/3600 * p_device",
  ),
  ("p_gb", "disk_money", "storage a month", "money", "disk/1e9 * p_gb"),
)
# From which value on, and divided by what, a unit is another.
_SIZES = {
  "B": (
    (1e12, 1e12, "TB"),
    (1e9, 1e9, "GB"),
    (1e6, 1e6, "MB"),
    (1e3, 1e3, "kB"),
  ),
  "s": (
    (48 * 3600, 24 * 3600, "days"),
    (3600, 3600, "h"),
    (60, 60, "min"),
  ),
}
_NAMES = {"ceil": math.ceil, "min": min, "max": max}


def compute(
  formulas: Sequence[tuple[str, str, str, str]], inputs: Sequence[Quantity]
) -> tuple[Quantity, ...]:
  """The quantities that formulas give.

  Args:
    formulas: symbol, name, unit and formula of each, in order.
    inputs: what they begin with.
  """
  values = {q.symbol: q.value for q in inputs}
  out = []
  for symbol, name, unit, formula in formulas:
    # Constants of this file over numbers, nothing that a user wrote.
    value = eval(formula, {"__builtins__": {}}, _NAMES | values)
    values[symbol] = value
    filled = _filled(formula, values)
    out.append(Quantity(symbol, name, unit, value, formula, filled))
  return tuple(out)


def _filled(formula: str, values: Mapping[str, float]) -> str:
  """A formula with numbers in place of symbols."""

  def number(match: re.Match) -> str:
    name = match[0]
    return name if name in _NAMES else _number(values[name])

  return re.sub(r"(?<![\w.])[a-zA-Z_]\w*", number, formula)


def _number(x: float) -> str:
  """A number as people write it: all digits of a count, four of others."""
  if float(x).is_integer() and abs(x) < 1e15:
    return f"{int(x):,}"
  return f"{x:.4g}"


def human(value: float, unit: str) -> str:
  """A value in a unit of a size to be read, of three digits.

  Args:
    value: in `unit`.
    unit: see `Quantity`.
  """
  for least, size, name in _SIZES.get(unit, ()):
    if value >= least:
      return f"{_digits(value / size)} {name}"
  if unit.endswith("-s") and value >= 360:
    return f"{_digits(value / 3600)} {unit.removesuffix('s')}h"
  if unit == "" and float(value).is_integer():
    return f"{int(value):,}"
  return f"{_digits(value)} {unit}".strip()


def _digits(x: float) -> str:
  if x and not 1e-3 <= abs(x) < 1e6:
    return f"{x:.3g}"
  return f"{float(f'{x:.3g}'):,.10g}"
