"""Batches of images that are loaded and prepared before they are asked for.

By threads, which suffices where decoding gives up Python's lock; or by
processes, where it does not, as with images that are rendered.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import jax
import numpy as np

from retrieval_aug.common.errors import UserError

_WINDOW = 4  # batches under way

# Where an object lies in memory, as Python tells it.
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


@dataclasses.dataclass(frozen=True)
class Loader:
  """Loads a batch and prepares it for each encoder; failures name the item.

  Attributes:
    name: of the items, for messages.
    ids: of the items, likewise.
    image: index -> uint8 `[H, W, 3]`.
    prepares: `prepare` of each encoder.
    hint: follows a message: what else than to mend the item can be done.
  """

  name: str
  ids: Sequence[str]
  image: Callable[[int], np.ndarray]
  prepares: tuple[Callable[[list[np.ndarray]], np.ndarray], ...]
  hint: str = ""

  def __call__(self, indices: Iterable[int]) -> list[np.ndarray]:
    """What each encoder sees of the images with these indices.

    Raises:
      UserError: an image cannot be read.
    """
    images = []
    for i in indices:
      try:
        images.append(self.image(i))
      except UserError as error:
        if not self.hint:
          raise
        raise UserError(f"{error} {self.hint}") from error
      except Exception as error:
        raise UserError(
          f"{self.name}: the image of item {self.ids[i]!r} cannot be read "
          f"({reason(error)}); mend or remove it."
          f"{' ' if self.hint else ''}{self.hint}"
        ) from error
    return [prepare(images) for prepare in self.prepares]


class Sifted(NamedTuple):
  """What can be read of a batch.

  Attributes:
    indices: of the images that can be read.
    prepared: of those, for each encoder; empty if there are none.
    faults: reasons, by index, of the others.
  """

  indices: list[int]
  prepared: list[np.ndarray]
  faults: dict[int, str]


@dataclasses.dataclass(frozen=True)
class Sifter:
  """Loads a batch, and leaves out what cannot be read, if it is to.

  Attributes:
    loader: of all images.
    skip: whether images that cannot be read are left out; else the first one
      raises as it does in `loader`.
  """

  loader: Loader
  skip: bool

  @property
  def name(self) -> str:
    """Of the items, for messages."""
    return self.loader.name

  def __call__(self, indices: Iterable[int]) -> Sifted:
    """The images with these indices.

    Raises:
      UserError: an image cannot be read, without `skip`.
    """
    indices = list(indices)
    if not self.skip:
      return Sifted(indices, self.loader(indices), {})
    images, faults = {}, {}
    for i in indices:
      try:
        images[i] = self.loader.image(i)
      except MemoryError:  # no fault of the image's
        raise
      except Exception as error:
        faults[i] = reason(error)
    try:
      prepared = self._prepared(images)
    except MemoryError:
      raise
    # It does not say which: they are tried one by one.
    except Exception:
      for i in list(images):
        try:
          self._prepared({i: images[i]})
        except Exception as error:
          faults[i] = reason(error)
          del images[i]
      prepared = self._prepared(images)
    return Sifted(list(images), prepared, faults)

  def _prepared(self, images: dict[int, np.ndarray]) -> list[np.ndarray]:
    if not images:
      return []
    return [prepare(list(images.values())) for prepare in self.loader.prepares]


def reason(error: Exception) -> str:
  """What an error says, in one line that is the same in every process."""
  text = " ".join(_ADDRESS.sub("", str(error)).split())
  if isinstance(error, UserError):
    return text
  return f"{type(error).__name__}: {text}" if text else type(error).__name__


class Pool:
  """Workers that load batches; made by `pool`."""

  def __init__(
    self,
    executor: concurrent.futures.Executor,
    load: Callable[[Sequence[int]], Any],
    window: int,
  ):
    self._executor, self._load, self._window = executor, load, window

  def ahead(
    self, batches: Iterable[Sequence[int]]
  ) -> Iterator[tuple[Sequence[int], Any]]:
    """Yields loaded batches in order, with some more under way.

    Each is a batch, and what the loader makes of it.

    Raises:
      UserError: an image cannot be read, or a process ended.
    """
    pending: collections.deque[tuple[Sequence[int], Any]] = collections.deque()
    todo = iter(batches)
    try:
      while True:
        while len(pending) < self._window:
          batch = next(todo, None)
          if batch is None:
            break
          pending.append((batch, self._executor.submit(self._load, batch)))
        if not pending:
          return
        batch, future = pending.popleft()
        yield batch, future.result()
    except BrokenProcessPool as error:
      raise UserError(
        "A process that loads images ended before its work (no memory, or a "
        'program without `if __name__ == "__main__":`); give fewer processes, '
        "or 0 for threads."
      ) from error
    finally:
      for _, future in pending:
        future.cancel()


@contextlib.contextmanager
def pool(
  loader: Loader | Sifter, *, threads: int, processes: int
) -> Iterator[Pool]:
  """Workers for as long as the context lasts.

  Args:
    loader: what they run.
    threads: how many, without processes.
    processes: how many; 0 for threads. They are spawned, so that they share
      nothing with this one, and take a few seconds to start.

  Raises:
    UserError: `loader` cannot be sent to a process.
  """
  if not processes:
    with concurrent.futures.ThreadPoolExecutor(threads) as executor:
      yield Pool(executor, loader, _WINDOW)
    return
  try:
    sent = pickle.dumps(loader)
  except Exception as error:  # It depends on what is pickled.
    raise UserError(
      f"{loader.name}: its images cannot be loaded by other processes "
      f"({type(error).__name__}: {error}); give 0 processes, for threads."
    ) from error
  with concurrent.futures.ProcessPoolExecutor(
    processes,
    mp_context=multiprocessing.get_context("spawn"),
    initializer=_start,
    initargs=(sent,),
  ) as executor:
    yield Pool(executor, _load, max(_WINDOW, 2 * processes))


# Of a spawned process.
_loader: Loader | Sifter | None = None


def _start(sent: bytes) -> None:
  global _loader
  # The accelerators are the other process's.
  jax.config.update("jax_platforms", "cpu")
  _loader = pickle.loads(sent)


def _load(indices: Sequence[int]) -> Any:
  return _loader(indices)
