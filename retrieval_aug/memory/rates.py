"""Rates with which `estimate.py` reckons: measured, or of a data sheet.

Seconds of a core are core-seconds. Where a worker has accelerators they encode
and multiply instead of its cores, and "device" is either.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Engine(NamedTuple):
  """Measured rates of a searcher, of an index of 10^6 keys of 768 dims.

  Of another width they are (d + 100) / 868 times as much: 256 dims took 0.44
  of the time for exact search and 0.39 for ScaNN, to build and to search.

  Attributes:
    build: core-seconds a key.
    build_growth: the power of the index's rows with which `build` grows.
    query: core-seconds a query.
    query_growth: the power of the index's rows with which `query` grows.
    build_cores: that building can use; 0 for all.
    source: how that is known.
  """

  build: float
  build_growth: float
  query: float
  query_growth: float
  build_cores: int
  source: str


# Measured on 2 shared cores with 100,000 and 300,000 keys, which vary: exact
# search 2.3e-8 to 3.2e-8 core-s a key and query, ScaNN 2.5e-4 to 4.9e-4 core-s
# a key to build and 2.8e-9 to 3.6e-9 a key and query. What stands here is what
# docs/memories.md reckons with. ScaNN builds in one thread.
_MEASURED = (
  "python -m benchmarks.searchers, with 100,000 and 300,000 keys; a larger "
  "index is extrapolated"
)
# 300,000 x 768 keys in clusters, recall@100 0.999 (IVF1024, 10 probes) and 0.98
# (HNSW32, ef 400). Lists and probes that grow with the root of the rows make
# the growth of IVF 0.5; that of HNSW is a guess.
_FAISS = (
  "faiss 1.15.1 with 300,000 keys; the growth is assumed, a larger index "
  "extrapolated"
)
# Core-s a key to build: 2.0e-5, 2.0e-5 and 4.0e-5 with 100,000, 400,000 and
# 1,000,000 keys; a query: 7.6e-5, 8e-5 and 1.4e-4. Tuned to recall@100 0.95 for
# 185,846 queries, of which 16,384 were asked, on easy data. The growth is taken
# to be more than was seen.
_IVF = (
  "python -m benchmarks.searchers --kinds=ivf --queries=16384, with 100,000 to "
  "1,000,000 keys"
)
ENGINES = {
  "exact": Engine(0.0, 0.0, 2.7e-2, 1.0, 0, _MEASURED),
  "scann": Engine(5e-4, 0.0, 4e-3, 1.0, 1, _MEASURED),
  "ivf": Engine(4e-5, 0.45, 1.4e-4, 0.5, 0, _IVF),
  "faiss_ivf": Engine(6.5e-4, 0.5, 2e-3, 0.5, 0, _FAISS),
  "faiss_hnsw": Engine(5.2e-4, 0.0, 2e-3, 0.2, 0, _FAISS),
}

# Core-seconds an item of an encoder, by its name in a config, and its GFLOP.
# The first: 47 images/s on 2 cores, --stages=embed, by its progress bar.
# ViT-B/16 at 224 px and T5-Base at 64 tokens: the program in docs/scale.md.
# MiniLM: `embed_texts` of 1,024 texts of 82 letters, from the emoji
# memory. GFLOP are XLA's count; MiniLM's was not asked for.
ENCODERS = {
  "efficientnet_lite0": (0.043, 0.78),
  "vit": (0.49, 35.1),
  "t5": (0.13, 11.0),
  "minilm_l6": (0.011, None),
}


class Accelerator(NamedTuple):
  """What a data sheet says; nothing of it was run.

  Attributes:
    name: for the reader.
    encode_tflops: peak at the precision of encoders, 10^12 FLOP/s.
    search_tflops: peak in float32, in which exact search multiplies.
    gb: its memory, 10^9 bytes.
    share: of either peak that is reached; an assumption.
  """

  name: str
  encode_tflops: float
  search_tflops: float
  gb: float
  share: float


# NVIDIA's data sheet, by docs/scale.md: TF32 without sparsity, and float32
# outside of the tensor cores.
H100 = Accelerator("H100 SXM", 494.0, 67.0, 80.0, 0.5)


class Rates(NamedTuple):
  """What is not an index, for 768 dims and k = 100.

  Attributes:
    image: device-seconds to embed an image as a key or query.
    values: device-seconds of all values of an item.
    prepare: core-seconds a key to read, check, transform and normalize it;
      grows with the dims as stored.
    score: core-seconds a query and index shard to score its candidates anew,
      order them and merge them with the running top-k; grows with the dims and
      with k + 16.
    check: core-seconds a key and query of the recall sample; grows with the
      dims.
    metadata: bytes of a row.
  """

  image: float = 0.0
  values: float = 0.0
  # The program in docs/scale.md, and of `prepare` 3e-6 by Table.keys; up to
  # 2.4e-5 where the machine hands out memory for the first time. Recall is a
  # product of matrices, and taken to cost what exact search does.
  prepare: float = 8e-6
  score: float = 2.4e-4
  check: float = 2.7e-8
  # DataComp's lists, with addresses; the emoji memory's 11,027 rows take 39.
  metadata: float = 250.0


def embed_seconds(
  names: Sequence[str], accelerator: Accelerator | None = None
) -> float | None:
  """Device-seconds an item of some encoders together; None: one is not known.

  Args:
    names: of encoders, as in a config.
    accelerator: that encodes; None for a core.
  """
  total = 0.0
  for name in names:
    seconds, gflop = ENCODERS.get(name, (None, None))
    if accelerator is not None and gflop is not None:
      rate = accelerator.encode_tflops * accelerator.share * 1e12
      seconds = gflop * 1e9 / rate
    elif accelerator is not None:
      seconds = None
    if seconds is None:
      return None
    total += seconds
  return total
