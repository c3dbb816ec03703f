"""Processes agree on the step to stop after, or end without an agreement."""

import concurrent.futures
import random
import threading
import time

import pytest

from retrieval_aug.common import stopping

COUNT = 4


class Group:
  """Processes that are threads, with a dictionary for a store."""

  def __init__(self, index, store):
    self.index, self.count, self._store = index, COUNT, store

  def put(self, folder, value):
    self._store.setdefault((folder, self.index), value)

  def entries(self, folder):
    found = list(self._store.items())
    return {index: x for (at, index), x in found if at == folder}


@pytest.fixture(autouse=True)
def fast(monkeypatch):
  monkeypatch.setattr(stopping, "LOOK", 0.01)
  monkeypatch.setattr(stopping, "POLL", 0.002)


def _groups():
  store = {}
  return [Group(i, store) for i in range(COUNT)]


@pytest.mark.parametrize("first", [0, 70])
@pytest.mark.parametrize("asked", [{2}, {0, 1, 2, 3}])
def test_all_stop_after_the_same_step_wherever_each_was(asked, first):
  # A process may be some steps ahead of the others, as with computations that
  # are dispatched before they are done.
  ahead = [threading.Semaphore(3) for _ in range(COUNT)]

  def train(group):
    wait = random.Random(group.index)
    together = stopping.StopTogether(group, "train")
    for step in range(first + 1, first + 10_000):
      ahead[group.index].acquire()
      ahead[(group.index + 1) % COUNT].release()
      time.sleep(0.004 * wait.random())
      if group.index in asked and step == first + 5:
        together.ask()
      if together.reached(step):
        break
    together.end()
    for _ in range(10):  # lets a neighbour that is one round behind go on
      ahead[(group.index + 1) % COUNT].release()
    return step

  with concurrent.futures.ThreadPoolExecutor(COUNT) as pool:
    (step,) = set(pool.map(train, _groups()))
  assert first + 5 < step < first + 2000


def test_a_process_that_ended_before_does_not_hold_up_the_others():
  groups = _groups()
  together = [stopping.StopTogether(group, "train") for group in groups]
  for one in together[1:]:
    assert not one.reached(8)
    one.end()
  together[0].ask()
  time.sleep(0.1)
  # The others are at their last step, which is before the one to stop after.
  assert not together[0].reached(8)
  together[0].end()


def test_nobody_stops_who_is_not_asked():
  together = [stopping.StopTogether(group, "train") for group in _groups()]
  time.sleep(0.1)
  assert not any(one.reached(8) for one in together)
  for one in together:
    one.end()


def test_an_end_does_not_wait_for_an_agreement():
  one = stopping.StopTogether(_groups()[0], "train")
  one.ask()
  time.sleep(0.1)  # the others will never tell where they are
  start = time.monotonic()
  one.end()
  assert time.monotonic() - start < 5
