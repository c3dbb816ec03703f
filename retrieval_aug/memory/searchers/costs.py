"""What exact search and an inverted file take, before either is run.

In core-seconds, from the rate of one matrix product on this machine. The
factors beside it were fitted to measured times of 1e4 to 1e6 keys of 256 dims
on two cores; they decide which engine is tried, never what it returns.
"""

import time
from typing import NamedTuple

import numpy as np

from retrieval_aug.memory.searchers import running

# Selection and bookkeeping a query, in seconds.
_EXACT, _LISTS = 7.5e-5, 3e-5
# What a trial takes at the least.
_TRIAL = 0.03
# A key that is read from RAM and packed for a product, in products.
_READ = 20
# Of a key that is put into its list: copied, checked and sorted.
_COPY = 100
# Queries of a block, each of which reads the lists anew.
_BLOCK = 16384


class Costs(NamedTuple):
  """Of a job in one index.

  Attributes:
    product: seconds a product of two vectors.
    keys: in the index.
    queries: of the whole job.
  """

  product: float
  keys: int
  queries: int

  def exact(self) -> float:
    """Core-seconds of exact search."""
    a_query = 1.15 * self.keys * self.product + _EXACT
    return self.queries * a_query

  def lists(self, lists: int, probes: int) -> float:
    """Core-seconds to build lists and search some of them."""
    build = self.keys * (1.3 * lists + _COPY)
    seen = self.keys * min(probes / lists, 1)
    blocks = max(1, self.queries / _BLOCK)
    search = self.queries * (2 * seen + 2.5 * lists)
    search += blocks * self.keys * _READ
    return (build + search) * self.product + self.queries * _LISTS

  def trial(self, keys: int, queries: int, lists: int) -> float:
    """Core-seconds of a trial of lists on some keys and queries."""
    brute = 1.15 * keys * queries
    train = 4 * 48 * lists * lists
    return (brute + train + keys * lists) * self.product + _TRIAL


def seconds_a_product(dims: int) -> float:
  """Core-seconds a product of two vectors, in a large product of matrices."""
  a = np.ones((256, dims), np.float32)
  b = np.ones((1024, dims), np.float32)
  seconds = []
  with running.one_blas_thread():
    for _ in range(4):
      start = time.thread_time()
      np.matmul(a, b.T)
      seconds.append(time.thread_time() - start)
  # The least: what came in between is none of its cost.
  return max(min(seconds), 1e-9) / (len(a) * len(b))
