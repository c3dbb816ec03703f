"""The order of examples is a pure function of (seed, step).

How shards are joined with examples is tested in tests/memory/test_neighbors.
"""

import threading

import numpy as np
import pytest

from retrieval_aug.training import input_pipeline

N, BATCH = 13, 5

# A run's results depend on the order: another one after an upgrade would make
# old and new runs differ without a word.
GOLDEN = [
  [11, 7, 9, 3, 6],
  [4, 10, 12, 1, 8],
  [0, 2, 5, 11, 0],
  [2, 4, 9, 3, 7],
]


def _order(seed=0, first=0, last=13, batch_size=BATCH, n=N):
  """Example numbers of each step: [steps, batch]."""
  batches = input_pipeline.train_batches(
    {"number": np.arange(n), "twice": 2 * np.arange(n)},
    batch_size=batch_size,
    seed=seed,
    first_step=first,
    last_step=last,
  )
  out = []
  for batch in batches:
    np.testing.assert_array_equal(batch["twice"], 2 * batch["number"])
    out.append(batch["number"])
  return np.array(out).reshape(-1, batch_size)


def test_the_order_is_kept():
  assert _order(seed=3, last=4).tolist() == GOLDEN


def test_starting_at_any_step_gives_the_same_batches():
  whole = _order()
  for first in range(13):
    np.testing.assert_array_equal(_order(first=first), whole[first:])


def test_each_epoch_is_a_permutation_whatever_the_batch():
  # 13 batches of 5 are 5 epochs of 13: batches span the ends of epochs.
  epochs = _order().reshape(5, N)
  np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(N), (5, 1)))


def test_epochs_differ():
  epochs = _order().reshape(5, N)
  assert len({tuple(e) for e in epochs}) == 5


def test_a_batch_that_spans_epochs_goes_on_with_the_next_permutation():
  """The order does not depend on how it is cut into batches."""
  flat = _order(last=13).ravel()
  for batch_size, steps in ((1, 65), (13, 5), (65, 1), (7, 9)):
    other = _order(batch_size=batch_size, last=steps).ravel()
    np.testing.assert_array_equal(other, flat[: len(other)])


def test_a_batch_may_be_larger_than_the_set():
  (batch,) = _order(batch_size=3 * N, last=1)
  assert np.bincount(batch).tolist() == [3] * N


def test_seeds_differ_and_repeat():
  np.testing.assert_array_equal(_order(seed=1), _order(seed=1))
  assert (_order(seed=1) != _order(seed=2)).any()


def test_one_example_is_every_batch():
  assert (_order(n=1, last=2) == 0).all()


def test_no_steps_give_no_batches():
  assert len(_order(first=7, last=7)) == 0


def test_positions_late_in_training_are_as_good():
  """Beyond 2**31 examples, where an int32 position would wrap around."""
  first = 2**33 // BATCH
  first += (-first) % N  # at the start of an epoch
  late = _order(first=first, last=first + N)
  np.testing.assert_array_equal(
    np.sort(late.reshape(5, N)), np.tile(np.arange(N), (5, 1))
  )


def test_rows_keep_their_type_and_shape():
  arrays = {
    "query": np.ones((N, 3), np.float32),
    "rows": np.full((N, 2), -1, np.int32),
  }
  (batch,) = input_pipeline.train_batches(
    arrays, batch_size=BATCH, seed=0, first_step=0, last_step=1
  )
  assert batch["query"].shape == (BATCH, 3)
  assert batch["query"].dtype == np.float32
  assert batch["rows"].shape == (BATCH, 2)
  assert batch["rows"].dtype == np.int32


@pytest.mark.parametrize("batch_size", [1, 5, 13, 17])
def test_evaluation_sees_every_example_once_and_in_order(batch_size):
  seen = []
  arrays = {"number": np.arange(N), "query": np.ones((N, 3))}
  for count, batch in input_pipeline.eval_batches(arrays, batch_size):
    assert len(batch["number"]) == len(batch["query"]) == batch_size
    seen += batch["number"][:count].tolist()
  assert seen == list(range(N))


def _batches(local=None, first=0, last=7):
  return list(
    input_pipeline.train_batches(
      {"number": np.arange(N)},
      batch_size=BATCH,
      seed=3,
      first_step=first,
      last_step=last,
      local=local,
    )
  )


def test_processes_prepare_their_parts_of_the_same_batches():
  parts = np.array([0, 3]), np.array([1, 2, 4])
  one, two = (_batches(local) for local in parts)
  for number, whole in enumerate(_batches()):
    joined = np.empty(BATCH, int)
    for local, part in zip(parts, (one, two)):
      joined[local] = part[number]["number"]
    np.testing.assert_array_equal(joined, whole["number"])


@pytest.mark.parametrize("at_once", [1, 2, 3, 7, 8])
def test_chunks_are_the_batches_however_many_make_one(at_once):
  chunks = list(
    input_pipeline.train_chunks(
      {"number": np.arange(N)}, BATCH, 3, 2, 9, np.arange(BATCH), at_once
    )
  )
  assert {c["number"].shape for c in chunks} == {(at_once, BATCH)}
  found = np.concatenate([c["number"] for c in chunks])
  expected = [b["number"] for b in _batches(first=2, last=9)]
  np.testing.assert_array_equal(found[:7], expected)


def test_half_precision_comes_as_it_is():
  queries = np.linspace(-1, 1, 3 * N).reshape(N, 3).astype(np.float16)
  (batch,) = input_pipeline.train_batches(
    {"number": np.arange(N), "query": queries},
    batch_size=BATCH,
    seed=0,
    first_step=0,
    last_step=1,
  )
  np.testing.assert_array_equal(batch["query"], queries[batch["number"]])
  assert batch["query"].dtype == np.float16


def test_numbers_are_those_of_the_batches():
  found = input_pipeline.numbers(np.arange(4 * BATCH), N, seed=3)
  assert found.reshape(4, BATCH).tolist() == GOLDEN


class TestAhead:
  def test_gives_what_was_prepared_in_order(self):
    found = input_pipeline.ahead(range(7), lambda x: 2 * x)
    assert list(found) == [0, 2, 4, 6, 8, 10, 12]

  def test_prepares_so_many_before_they_are_taken(self):
    begun, enough = [], threading.Event()

    def prepare(x):
      begun.append(x)
      if x == 3:
        enough.set()
      return x

    found = input_pipeline.ahead(range(100), prepare, depth=3)
    assert next(found) == 0
    assert enough.wait(60)  # 1 to 3 while nobody takes them
    found.close()
    assert max(begun) <= 4

  def test_an_error_comes_where_its_item_would_have(self):
    def prepare(x):
      if x == 2:
        raise ValueError("item 2")
      return x

    found = input_pipeline.ahead(range(5), prepare)
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(ValueError, match="item 2"):
      next(found)

  def test_of_nothing_is_nothing(self):
    assert list(input_pipeline.ahead([], lambda x: x)) == []
