"""docs/scale.md says what the formulas give: its tables, counts and code."""

import dataclasses
import math
import pathlib
import re

import pytest

from retrieval_aug import config
from retrieval_aug.encoders import t5
from retrieval_aug.memory import estimate as estimating
from retrieval_aug.memory import estimate_formulas, rates

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
FLOWING = " ".join(PAGE.split())
(CODE,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)

KEYS = (10**6, 10**7, 10**8, 10**9)
QUERIES, K, DIMS = 185_846, 100, 768
SMALL = dict(zip(KEYS, (1, 4, 16, 64)))
LARGE = dict(zip(KEYS, (1, 1, 4, 16)))
H100 = dict(zip(KEYS, (1, 1, 2, 8)))


def found(keys, workers, cores, gb, kind, accelerator=None):
  """An estimate with ViT-B/16 and T5-Base; index and keys have half the RAM."""
  return estimating.estimate(
    estimating.Job(keys, QUERIES, K, DIMS, DIMS, DIMS),
    estimating.Workers(workers, cores, gb / 2, 1 if accelerator else 0),
    kind,
    rates.Rates(
      rates.embed_seconds(["vit"], accelerator),
      rates.embed_seconds(["t5"], accelerator),
    ),
    accelerator=accelerator,
  )


def row(*cells):
  return f"| {' | '.join(cells)} |"


def head(*cells):
  return [row(*cells), "|---" * len(cells) + "|"]


def said(estimate, symbol, unit=None):
  """A value as the page has it; with a unit, hours without theirs."""
  (q,) = (q for q in estimate.needs if q.symbol == symbol)
  shown = estimate_formulas.human(q.value, q.unit)
  if unit is None:
    return shown
  return f"{float(f'{q.value / 3600:.3g}'):,.10g}"


def work_table():
  """What must be done, whoever does it."""
  lines = head(
    "keys",
    "table",
    "working set",
    "embed, core-h",
    "exact search, core-h",
    "ScaNN: build, core-h",
    "search, core-h",
    "embed, H100-h",
    "exact search, H100-h",
  )
  for keys in KEYS:
    exact = found(keys, 1, 4, 32, "exact")
    scann = found(keys, 1, 4, 32, "scann")
    device = found(keys, 1, 16, 128, "exact", rates.H100)
    lines.append(
      row(
        f"{keys:,}",
        said(exact, "tables"),
        said(exact, "working_set"),
        said(exact, "embed", "h"),
        said(exact, "query_all", "h"),
        said(scann, "build_all", "h"),
        said(scann, "query_all", "h"),
        said(device, "embed", "h"),
        said(device, "query_all", "h"),
      )
    )
  return lines


def workers_table(workers, cores, gb):
  """How long so many workers take."""
  lines = head(
    "keys",
    "workers",
    "index shards",
    "rows of each",
    "memory a worker",
    "embed",
    "search, exact",
    "search, ScaNN",
    "search, ivf",
    "running top-k",
    "moved by search",
  )
  for keys, number in workers.items():
    exact = found(keys, number, cores, gb, "exact")
    scann = found(keys, number, cores, gb, "scann")
    ivf = found(keys, number, cores, gb, "ivf")
    symbols = ("S", "r", "ram", "embed_wall", "search_wall")
    lines.append(
      row(
        f"{keys:,}",
        str(number),
        *(said(exact, s) for s in symbols),
        said(scann, "search_wall"),
        said(ivf, "search_wall"),
        said(exact, "partials"),
        said(exact, "search_moved"),
      )
    )
  return lines


def accelerator_table():
  """How long workers with an accelerator each take, by its data sheet."""
  lines = head(
    "keys",
    "workers",
    "index shards",
    "rows of each",
    "memory a worker",
    "embed",
    "or its reading",
    "search, exact",
    "of it storage",
  )
  symbols = (
    "S",
    "r",
    "ram",
    "embed_wall",
    "read_wall",
    "search_wall",
    "move_wall",
  )
  for keys, number in H100.items():
    device = found(keys, number, 16, 128, "exact", rates.H100)
    lines.append(
      row(f"{keys:,}", str(number), *(said(device, s) for s in symbols))
    )
  return lines


def formula_table():
  lines = head("symbol", "what", "formula")
  for symbol, name, unit, formula in estimate_formulas.FORMULAS:
    what = f"{name} ({unit})" if unit else name
    shown = formula or estimate_formulas.ON_CORES
    lines.append(row(f"`{symbol}`", what, f"`{shown}`"))
  return lines


def rate_table():
  lines = head(
    "searcher", "build, core-s a key", "grows", "query, core-s", "grows"
  )
  for name, engine in rates.ENGINES.items():
    build, query = f"{engine.build:g}", f"{engine.query:g}"
    growths = f"r^{engine.build_growth:g}", f"r^{engine.query_growth:g}"
    lines.append(row(name, build, growths[0], query, growths[1]))
  return lines


TABLES = {
  "work": work_table,
  "4 cores": lambda: workers_table(SMALL, 4, 32),
  "16 cores": lambda: workers_table(LARGE, 16, 64),
  "H100": accelerator_table,
  "formulas": formula_table,
  "rates": rate_table,
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_what_the_formulas_give(name):
  lines = TABLES[name]()
  assert "\n".join(lines) in PAGE, "\n" + "\n".join(lines)


def test_text_has_the_inputs_of_the_tables():
  r, w = rates.Rates(), estimating.Workers(1, 1, 1.0)
  for text in (
    f"N = {QUERIES:,}",
    f"k = {K}",
    f"d = {DIMS}",
    f"{rates.ENCODERS['vit'][0]} core-s an image",
    f"{rates.ENCODERS['t5'][0]} core-s a text",
    f"{rates.ENCODERS['vit'][1]} and {rates.ENCODERS['t5'][1]:.1f} GFLOP",
    f"{r.prepare:.0e} core-s a key",
    f"{r.score:.1e} core-s a query and index shard",
    f"{r.metadata:.0f} bytes of metadata",
    f"{w.disk_mb_s:g} MB/s of storage",
    f"{w.network_mb_s:,g} MB/s of network",
    f"{rates.H100.search_tflops:g} TFLOP/s in float32",
    f"{rates.H100.encode_tflops:g} in TF32",
    f"{rates.H100.gb:g} GB",
    f"{estimating.Job(1, 1, 1, 1, 1, 1).image_bytes / 1e3:g} kB an image",
  ):
    assert text.replace("e-0", "e-") in FLOWING, text


def test_text_names_what_drives_the_cost():
  cpu = found(10**9, 64, 4, 32, "scann")
  device = found(10**9, 8, 16, 128, "exact", rates.H100)
  for estimate in (cpu, device):
    (first, share), *_ = estimating.drivers(estimate)
    assert first == "embed"
    assert f"{share:.0%} of the time".replace("%", " %") in FLOWING, share
  beside = ("move_wall", "prepare_wall", "score_wall")
  assert sum(map(device.of, beside)) > device.of("query_wall")
  # Index shards cost what does not shrink with them: the scores of candidates.
  twice = found(10**9, 64, 4, 16, "exact")
  assert twice.of("score_all") > 1.9 * cpu.of("score_all")
  ratio = 4 * K * DIMS / (12 * K)
  assert f"{math.floor(ratio)} times" in FLOWING


def test_settings_of_the_page_are_those_of_the_config():
  named = re.findall(r"`config\.([a-z_.]+)`", PAGE)
  known = config.defaults()
  assert "search.groups" in named
  for name in named:
    section = known
    for part in name.split("."):
      assert part in section, name
      section = section[part]


def test_program_of_the_page_prints_the_rates_it_names(capsys, monkeypatch):
  base = t5.VARIANTS["1.0/base"]
  tiny = dataclasses.replace(base, depth=1, width=8, mlp_dim=8)
  monkeypatch.setitem(t5.VARIANTS, "1.0/base", tiny)
  small = CODE.replace('"B/16"', '"mu/16"').replace("100_000", "2_000")
  small = small.replace("(16, ", "(2, ")
  assert small.count("(2, ") == 2 and small.count("mu/16") == 1
  exec(compile(small, "docs/scale.md", "exec"), {})
  printed = capsys.readouterr().out.splitlines()
  assert [line.split(":")[0] for line in printed] == [
    "image",
    "text",
    "a key",
    "a query and index shard",
  ]
  for line in printed:
    value, unit = line.split(": ")[1].split()
    assert float(value) > 0 and unit == "core-s"
