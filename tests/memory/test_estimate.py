"""What a job needs: formulas that hold, and print what they compute."""

import math
import re

import numpy as np
import pytest

from retrieval_aug.common.errors import UserError
from retrieval_aug.memory import estimate, partial, rates, search
from retrieval_aug.memory import estimate_formulas as formulas

JOB = estimate.Job(
  keys=1_000_003,
  queries=1_009,
  k=10,
  dims=64,
  raw_dims=128,
  value_dims=96,
  embed_rows=1000,
  recall_sample=50,
)
ITEM = rates.Rates(image=0.1, values=0.03)
BILLION = estimate.Job(10**9, 185_846, 100, 768, 768, 768)


def workers(number=1, cores=4, index_gb=1.0, **options):
  return estimate.Workers(number, cores, index_gb, **options)


def found(kind="exact", job=JOB, staff=None, **options):
  return estimate.estimate(job, staff or workers(), kind, ITEM, **options)


def on_h100(job=BILLION, number=8):
  staff = workers(number, 16, 64.0, accelerators=1)
  return estimate.estimate(job, staff, "exact", ITEM, accelerator=rates.H100)


@pytest.mark.parametrize(
  "result",
  [
    *(found(kind) for kind in rates.ENGINES),
    found("scann", BILLION, workers(64, 4, 16.0)),
    found("ivf", staff=workers(3), index_rows=1000),
    on_h100(),
    found(prices=estimate.Prices(0.05, 0.0, 0.02)),
  ],
  ids=lambda result: result.title,
)
def test_printed_formula_gives_the_printed_value(result):
  shown = estimate.text(result).splitlines()
  for q in result.needs:
    (i,) = [i for i, x in enumerate(shown) if f"  {q.symbol} = " in x]
    assert formulas.human(q.value, q.unit) in shown[i]
    # The line after it: numbers alone, and the unit.
    filled = shown[i + 1].strip().removeprefix("= ").removesuffix(f" {q.unit}")
    assert not set(re.findall(r"[a-z_]{2,}", filled)) - {"ceil", "min", "max"}
    again = eval(
      re.sub(r"(?<=\d),(?=\d)", "", filled),
      {"ceil": math.ceil, "min": min, "max": max},
    )
    assert again == pytest.approx(q.value, rel=2e-3), (q.symbol, filled)


def test_small_job_by_hand():
  x = found(staff=workers(number=2), index_rows=300_000)
  expected = {
    "key": 2 * 128 + 12 * 64,
    "S": 4,
    "r": 250_001,
    "G": 2,
    "turns": 2,
    "ram": 250_001 * 1024 + 1_009 * (4 * 64 + 12 * 10),
    "partials": 2 * 1_009 * 120,
    "tables": 1_000_003 * (2 * 128 + 2 * 96 + 250),
    "lists": 1_009 * (120 + 128 + 100),
    "U": 10_090,
    "working_set": 10_090 * (128 + 192 + 16),
    "embed": 1_001_012 * 0.1 + 1_000_003 * 0.03,
    "build_all": 0,
    # 4 shards of a quarter of a million, 64 of 768 dims.
    "query_all": 1_009 * 4 * 0.027 * 164 / 868 * 0.250001,
    "score_all": 1_009 * 4 * 2.4e-4 * 64 / 768 * 26 / 116,
    # 1,001 shards of 1,000 rows by two workers, and two of queries.
    "embed_wall": (501 * 1000 * 0.13 + 1 * 1000 * 0.1) / 4,
  }
  for symbol, value in expected.items():
    assert x.of(symbol) == pytest.approx(value), symbol


def test_parts_of_the_time_add_up_to_the_whole():
  for x in (found(), found("scann", BILLION, workers(64)), on_h100()):
    parts = estimate.drivers(x)
    assert sum(share for _, share in parts) == pytest.approx(1)
    assert [s for _, s in parts] == sorted((s for _, s in parts), reverse=True)


def test_workers_beyond_the_index_shards_are_idle():
  four, five = (
    found(staff=workers(n), index_rows=250_001).of("query_wall") for n in (4, 9)
  )
  assert four == five
  # Five shards by four workers take the turns of eight.
  turns = [
    found(staff=workers(4), index_rows=n).of("turns")
    for n in (250_001, 200_001)
  ]
  assert turns == [1, 2]


def test_rows_that_fit_fill_the_memory_given():
  job = JOB._replace(keys=10**8)
  for gb in (0.01, 1.0, 64.0):  # which `ram` exceeds by the running top-k
    rows = estimate.rows_that_fit(job, workers(index_gb=gb))
    used = rows * 1024 + 4 * 64 * job.queries
    assert used <= gb * 1e9 < used + 1024
    x = found(job=job, staff=workers(index_gb=gb))
    assert x.of("ram") <= gb * 1e9 + 120 * job.queries
  assert estimate.rows_that_fit(JOB, workers(index_gb=64.0)) == JOB.keys


def test_no_more_rows_than_an_accelerator_holds():
  small = rates.H100._replace(gb=0.1)
  rows = estimate.rows_that_fit(JOB, workers(index_gb=64.0), small)
  assert rows == int(0.08e9 / 256)


def test_index_that_is_built_in_one_thread_gains_nothing_by_cores():
  few, many = (
    found("scann", staff=workers(cores=c)).of("build_wall") for c in (4, 16)
  )
  assert few == many > 0
  few, many = (
    found("ivf", staff=workers(cores=c)).of("build_wall") for c in (4, 16)
  )
  assert few == pytest.approx(4 * many)


def test_growth_makes_larger_indexes_dearer():
  one, four = (
    found("faiss_ivf", index_rows=r, job=JOB._replace(keys=4 * r)).of("t_query")
    for r in (10_000, 40_000)
  )
  assert four == pytest.approx(2 * one)  # the root of four


def test_accelerator_multiplies_at_its_share_of_the_peak():
  x = on_h100()
  flop = 2 * 768 * x.of("r") * x.of("S") * 185_846
  assert x.of("query_all") == pytest.approx(flop / 33.5e12)
  assert "not run" in x.title
  assert rates.embed_seconds(["vit"], rates.H100) == pytest.approx(
    35.1e9 / 247e12
  )
  with pytest.raises(UserError, match="exact"):
    found("scann", accelerator=rates.H100)
  with pytest.raises(UserError, match="workers that have one"):
    found("exact", accelerator=rates.H100)


def test_storage_is_shared_and_the_network_is_not():
  slow = workers(number=2, disk_mb_s=1000.0, network_mb_s=100.0)
  assert found(staff=slow).of("speed") == 200
  assert found(staff=slow._replace(number=20)).of("speed") == 1000


def test_running_top_k_takes_the_bytes_of_its_formula(tmp_path):
  n, k = 503, 10
  result = search.SearchResult(
    np.zeros((n, k), np.int64), np.zeros((n, k), np.float32)
  )
  running = partial.Partial(
    0, result, np.zeros((0, k), np.float32), np.zeros(n, bool)
  )
  partial.save(tmp_path / "p.npz", running)
  size = (tmp_path / "p.npz").stat().st_size
  formula = found(job=JOB._replace(queries=n)).of("partials")
  # Beside it: a byte a query, and names of arrays.
  assert formula < size < formula + n + 2000
  stored = np.load(tmp_path / "p.npz", allow_pickle=False)
  assert stored["ids"].nbytes + stored["scores"].nbytes == formula


def test_money_is_shown_only_where_there_is_a_price():
  assert "price" not in estimate.text(found())
  x = found(prices=estimate.Prices(core_hour=0.05))
  assert x.of("core_money") == pytest.approx(4 * x.of("wall") / 3600 * 0.05)
  shown = estimate.text(x)
  assert "price of cores" in shown and "storage a month" not in shown


@pytest.mark.parametrize(
  ("value", "unit", "expected"),
  [
    (7, "", "7"),
    (1_234_567, "", "1,234,567"),
    (999, "B", "999 B"),
    (10_752, "B", "10.8 kB"),
    (1_544_000_000_000, "B", "1.54 TB"),
    (59, "s", "59 s"),
    (90, "s", "1.5 min"),
    (47 * 3600, "s", "47 h"),
    (72 * 3600, "s", "3 days"),
    (36_000, "core-s", "10 core-h"),
    (0.00024, "core-s", "0.00024 core-s"),
    (0, "s", "0 s"),
  ],
)
def test_values_are_shown_in_units_to_be_read(value, unit, expected):
  assert formulas.human(value, unit) == expected


@pytest.mark.parametrize("name", ["keys", "queries", "k", "dims"])
def test_number_that_is_not_positive_is_refused(name):
  with pytest.raises(UserError, match=f"{name}=0: must be at least 1"):
    found(job=JOB._replace(**{name: 0}))


def test_unknown_searcher_is_refused():
  with pytest.raises(UserError, match="'flann'; known: exact, scann"):
    found("flann")


CONFIG = {
  "keys": 10**6,
  "queries": 2_000,
  "k": 100,
  "dims": 384,
  "raw_dims": 1280,
  "encoder": "efficientnet_lite0",
  "value_encoders": [("minilm_l6", 384)],
  "searcher": "exact",
  "index_rows": 0,
  "memory_gb": 8.0,
  "workers": 1,
  "cores": 2,
  "embed_rows": 1024,
  "recall_sample": 500,
}


def test_estimate_of_a_config_has_its_numbers():
  shown = estimate.for_config(**CONFIG)
  assert shown.startswith("exact search by 1 worker of 2 cores\n")
  # 1,002,000 images of 0.043 core-s and a million texts of 0.011.
  assert re.search(r"embed +15 device-h +embed = ", shown)
  assert "Cost drivers, of the time by the clock: embed 100%" in shown
  assert "Rates of exact: python -m benchmarks.searchers" in shown


def test_estimate_says_what_it_does_not_know():
  shown = estimate.for_config(**CONFIG | {"encoder": "siglip"})
  assert "Not in it: embedding with siglip, which was not measured" in shown
  assert "minilm_l6, which" not in shown


def test_embeddings_that_exist_cost_nothing():
  shown = estimate.for_config(**CONFIG, embedded=True)
  assert re.search(r"embed +0 device-s +embed = ", shown)
  assert re.search(r"an image to embed +0 B", shown)


def test_auto_takes_what_is_done_first():
  few = estimate.for_config(**CONFIG | {"searcher": "auto", "queries": 100})
  assert few.startswith("exact search") and "before it chooses" in few
  many = estimate.for_config(
    **CONFIG | {"searcher": "auto", "queries": 10**6, "memory_gb": 64.0}
  )
  assert not many.startswith("exact search")
  device = estimate.for_config(
    **CONFIG | {"searcher": "auto", "queries": 10**6}, accelerators=1
  )
  assert device.startswith("exact search by 1 worker of 2 cores, 1 H100 SXM")
