"""What a memory of any size needs: machines, hours, memory, disk, network.

Every number is a formula of inputs (`estimate_formulas.py`), and is printed
with it. The rates are those of `rates.py`: measured, or of a data sheet.
docs/scale.md explains the job that the formulas describe.
"""

from collections.abc import Sequence
from typing import NamedTuple

from retrieval_aug.common.errors import UserError
from retrieval_aug.memory import index_shards
from retrieval_aug.memory.estimate_formulas import (
  FORMULAS,
  MONEY,
  ON_ACCELERATORS,
  ON_CORES,
  Quantity,
  compute,
  human,
)
from retrieval_aug.memory.rates import (
  ENGINES,
  H100,
  Accelerator,
  Engine,
  Rates,
  embed_seconds,
)


class Job(NamedTuple):
  """What is searched.

  Attributes:
    keys: rows of the memory.
    queries: examples of all splits.
    k: neighbors of each.
    dims: of keys after the key transform.
    raw_dims: of keys as stored.
    value_dims: of the values, all encoders together.
    embed_rows: rows of an embed shard.
    recall_sample: queries whose true neighbors are found too.
    image_bytes: of an image to be embedded; 0 if embeddings exist.
  """

  keys: int
  queries: int
  k: int
  dims: int
  raw_dims: int
  value_dims: int
  embed_rows: int = 1024
  recall_sample: int = 500
  image_bytes: float = 29.9e3


class Workers(NamedTuple):
  """Who does it.

  Attributes:
    number: of machines, each with one group of index shards.
    cores: of each.
    index_gb: of each, for keys and an index, 10^9 bytes; 0 is half of what is
      free on this machine.
    accelerators: of each.
    disk_mb_s: what the common storage gives to all together, 10^6 bytes/s.
    network_mb_s: of each, 10^6 bytes/s.
  """

  number: int
  cores: int
  index_gb: float
  accelerators: int = 0
  # A local disk read in order (reference: 883 MB/s); 10 Gbit/s.
  disk_mb_s: float = 883.0
  network_mb_s: float = 1250.0


class Prices(NamedTuple):
  """What the user pays; 0 is not shown.

  Attributes:
    core_hour: of a core, also while it waits.
    accelerator_hour: of an accelerator, also while it waits.
    gb_month: of 10^9 bytes of storage.
  """

  core_hour: float = 0.0
  accelerator_hour: float = 0.0
  gb_month: float = 0.0


class Estimate(NamedTuple):
  """What a job needs.

  Attributes:
    title: one line: which searcher, which workers.
    inputs: what was given or measured.
    needs: what follows from it, in order.
    notes: sentences on what is not in it.
  """

  title: str
  inputs: tuple[Quantity, ...]
  needs: tuple[Quantity, ...]
  notes: tuple[str, ...] = ()

  def of(self, symbol: str) -> float:
    """The value of a symbol, in its unit."""
    return {q.symbol: q.value for q in self.inputs + self.needs}[symbol]


# The parts of `wall`, of which the largest drive the cost.
_PARTS = {
  "embed": ("embed_wall", "read_wall"),
  "reading and transforming keys": ("prepare_wall",),
  "building indexes": ("build_wall",),
  "searching": ("query_wall",),
  "scoring candidates": ("score_wall",),
  "measuring the recall": ("check_wall",),
  "moving bytes for the search": ("move_wall",),
  "gathering the working set": ("gather_wall",),
}


def rows_that_fit(
  job: Job, workers: Workers, accelerator: Accelerator | None = None
) -> int:
  """Rows of an index shard that a worker's memory holds.

  On an accelerator the keys are float32, and take four fifths of it at most.
  """
  rows = index_shards.rows_that_fit(
    workers.index_gb, job.raw_dims, job.dims, job.queries
  )
  if accelerator is not None:
    rows = min(rows, int(0.8 * accelerator.gb * 1e9 / (4 * job.dims)))
  return min(rows, job.keys)


def estimate(
  job: Job,
  workers: Workers,
  kind: str,
  rates: Rates | None = None,
  *,
  index_rows: int = 0,
  accelerator: Accelerator | None = None,
  prices: Prices | None = None,
  notes: Sequence[str] = (),
) -> Estimate:
  """What a job needs.

  Args:
    job: what is searched.
    workers: who does it.
    kind: of searcher, one of `ENGINES`.
    rates: of what is not an index; None for those measured, without embedding.
    index_rows: of an index shard; 0 for what fits.
    accelerator: of which each worker has `workers.accelerators`; exact search.
    prices: what the user pays.
    notes: for the reader.

  Raises:
    UserError: an unknown kind, or a number that is not positive.
  """
  rates, prices = rates or Rates(), prices or Prices()
  if kind not in ENGINES:
    raise UserError(
      f"estimate: no rates of searcher {kind!r}; known: {', '.join(ENGINES)}."
    )
  for name, value in {
    "keys": job.keys,
    "queries": job.queries,
    "k": job.k,
    "dims": job.dims,
    "raw_dims": job.raw_dims,
    "workers": workers.number,
    "cores": workers.cores,
  }.items():
    if value < 1:
      raise UserError(f"estimate: {name}={value}: must be at least 1.")
  if accelerator is not None and (kind != "exact" or not workers.accelerators):
    raise UserError(
      "estimate: an accelerator is for exact search, by workers that have one."
    )
  rows = min(index_rows or rows_that_fit(job, workers, accelerator), job.keys)
  inputs = _inputs(job, workers, ENGINES[kind], rates, rows, accelerator)
  query = ON_CORES if accelerator is None else ON_ACCELERATORS
  formulas = [(s, name, unit, f or query) for s, name, unit, f in FORMULAS]
  for price, (symbol, *money) in zip(prices, MONEY):
    if price:
      inputs.append(Quantity(symbol, f"price of {money[1]}", "", price))
      formulas.append(tuple(money))
  device = ""
  if accelerator is not None:
    device = (
      f", {workers.accelerators} {accelerator.name} each (computed from its "
      "data sheet, not run)"
    )
  title = (
    f"{kind} search by {workers.number:,} "
    f"{'worker' if workers.number == 1 else 'workers'} of {workers.cores} "
    f"cores{device}"
  )
  if accelerator is None:
    notes = (f"Rates of {kind}: {ENGINES[kind].source}.", *notes)
  needs = compute(formulas, inputs)
  return Estimate(title, tuple(inputs), needs, tuple(notes))


def _inputs(
  job: Job,
  workers: Workers,
  engine: Engine,
  rates: Rates,
  rows: int,
  accelerator: Accelerator | None,
) -> list[Quantity]:
  devices, building = workers.cores, workers.cores
  if engine.build_cores:
    building = min(engine.build_cores, building)
  if accelerator is None:
    searching = [
      ("query", "a query, of 10^6 keys", "core-s", engine.query),
      ("g_q", "its growth with rows, a power", "", engine.query_growth),
    ]
  else:
    devices, peak = workers.accelerators, accelerator.search_tflops
    searching = [
      ("tflops", "peak in float32, 10^12 FLOP/s", "", peak),
      ("share", "of the peak that is reached", "", accelerator.share),
    ]
  sample = min(job.recall_sample, job.queries)
  out = [
    ("M", "keys", "", job.keys),
    ("N", "queries", "", job.queries),
    ("k", "neighbors a query", "", job.k),
    ("d", "dims of keys in the search", "", job.dims),
    ("d_raw", "dims of keys as stored", "", job.raw_dims),
    ("d_v", "dims of all values", "", job.value_dims),
    ("b", "bytes a number as stored", "", 2),
    ("m", "metadata a row", "B", rates.metadata),
    ("image", "an image to embed", "B", job.image_bytes),
    ("E", "rows an embed shard", "", job.embed_rows),
    ("R", "rows an index shard, at most", "", rows),
    ("n", "queries of the recall sample", "", sample),
    ("W", "workers", "", workers.number),
    ("c", "cores a worker", "", workers.cores),
    ("a", "accelerators a worker", "", workers.accelerators),
    ("e", "devices that encode and search", "", devices),
    ("c_b", "cores that build", "", building),
    ("disk_speed", "storage, all workers", "MB/s", workers.disk_mb_s),
    ("net_speed", "network, a worker", "MB/s", workers.network_mb_s),
    ("t_image", "embed an image", "device-s", rates.image),
    ("t_values", "embed the values of an item", "device-s", rates.values),
    ("prepare", "a key, of 768 dims", "core-s", rates.prepare),
    ("score", "a query, of 768 dims, k = 100", "core-s", rates.score),
    ("check", "a key and query, of 768 dims", "core-s", rates.check),
    ("build", "build a key, of 10^6", "core-s", engine.build),
    ("g_b", "its growth with rows, a power", "", engine.build_growth),
    *searching,
  ]
  return [Quantity(*x) for x in out]


def drivers(found: Estimate) -> list[tuple[str, float]]:
  """Parts of the time by the clock, and their shares of it, largest first."""
  total = found.of("wall")
  parts = [
    (name, max(found.of(s) for s in symbols) / total)
    for name, symbols in _PARTS.items()
  ]
  return sorted(parts, key=lambda part: -part[1])


def text(found: Estimate) -> str:
  """A table: each quantity, its value, its formula, and that with numbers."""
  lines = [found.title, "", "Inputs"]
  width = max(len(q.name) for q in found.inputs + found.needs)
  for q in found.inputs:
    value = human(q.value, q.unit)
    lines.append(f"  {q.name:<{width}}  {value:>14}  {q.symbol}")
  lines += ["", "Needs"]
  for q in found.needs:
    value, unit = human(q.value, q.unit), f" {q.unit}" if q.unit else ""
    lines.append(f"  {q.name:<{width}}  {value:>14}  {q.symbol} = {q.formula}")
    lines.append(f"  {'':<{width}}  {'':>14}  = {q.filled}{unit}")
  shares = [f"{n} {s:.0%}" for n, s in drivers(found) if s >= 0.01]
  lines += ["", f"Cost drivers, of the time by the clock: {', '.join(shares)}."]
  return "\n".join([*lines, *found.notes])


def for_config(
  *,
  keys: int,
  queries: int,
  k: int,
  dims: int,
  raw_dims: int,
  encoder: str,
  value_encoders: Sequence[tuple[str, int]],
  searcher: str,
  index_rows: int,
  memory_gb: float,
  workers: int,
  cores: int,
  embed_rows: int,
  recall_sample: int,
  embedded: bool = False,
  accelerators: int = 0,
  accelerator: Accelerator = H100,
  prices: Prices | None = None,
) -> str:
  """The text of an estimate, from what a config and a machine say.

  Args:
    keys: rows of the memory.
    queries: examples of all splits.
    k: `search.k`.
    dims: of keys after the key transform.
    raw_dims: of keys as the encoder gives them.
    encoder: its name in the config.
    value_encoders: name and dims of each.
    searcher: `search.searcher`; "auto" is what is done first by this estimate.
    index_rows: `search.index_rows`; 0 for what `memory_gb` holds.
    memory_gb: `search.memory_gb`, of a worker; 0 for half of what is free on
      this machine.
    workers: `search.groups`.
    cores: of a worker.
    embed_rows: rows of an embed shard.
    recall_sample: `search.recall_sample`.
    embedded: whether all embeddings exist already.
    accelerators: of a worker.
    accelerator: which, if there are any.
    prices: what the user pays; not shown without.

  Raises:
    UserError: an unknown searcher, or a number that is not positive.
  """
  device = accelerator if accelerators else None
  image = values = 0.0
  notes = ["Tuning of an index, and what is tried again, are not in it."]
  if not embedded:
    names = [encoder, *(name for name, _ in value_encoders)]
    for name in dict.fromkeys(names):
      if embed_seconds([name], device) is None:
        notes.append(
          f"Not in it: embedding with {name}, which was not measured. Rows "
          "divided by the rate of the progress bar of --stages=embed tell."
        )
    image = embed_seconds([encoder], device) or 0.0
    values = sum(
      embed_seconds([name], device) or 0.0 for name, _ in value_encoders
    )
  job = Job(
    keys,
    queries,
    k,
    dims,
    raw_dims,
    sum(d for _, d in value_encoders),
    embed_rows,
    recall_sample,
    **({"image_bytes": 0.0} if embedded else {}),
  )
  staff = Workers(workers, cores, memory_gb, accelerators)
  kinds = [searcher]
  if searcher == "auto":
    kinds = ["exact"] if device else ["exact", "scann", "ivf"]
    notes.append(
      "The search stage measures the searchers before it chooses one; here "
      "rates choose."
    )
  found = [
    estimate(
      job,
      staff,
      kind,
      Rates(image, values),
      index_rows=index_rows,
      accelerator=device if kind == "exact" else None,
      prices=prices,
      notes=notes,
    )
    for kind in kinds
  ]
  return text(min(found, key=lambda x: x.of("search_wall")))
