"""The training loop, from top to bottom: state, restore, steps, save."""

import contextlib
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from retrieval_aug.common import distributed, files, manifest, progress
from retrieval_aug.common.errors import UserError
from retrieval_aug.training import (
  feed,
  guard,
  metrics,
  profiler,
  sharding,
  speed,
  start,
)
from retrieval_aug.training import predict as predictions
from retrieval_aug.training import step as steps
from retrieval_aug.training.books import Books
from retrieval_aug.training.checkpoint import Checkpoints
from retrieval_aug.training.compiled import Compiled, of_seed
from retrieval_aug.training.finetune import FineTuning
from retrieval_aug.training.settings import Layout, Telling, TrainSettings

# Losses are fetched from the device in groups: fetching each would make the
# host wait for every step.
_FETCH_EVERY = 50
# Batches of images, or with neighbours from the host, are large, and as many
# are on the device as are not yet fetched.
_FETCH_EVERY_OF_LARGE = 4

COLUMNS = ("loss", "grad_norm", "learning_rate", "val_top1")


class Trainer:
  """A model with its compiled steps, trained once a seed.

  Several seeds may train together: every array of the state, of a batch and of
  the metrics then has an axis of seeds in front, and one step does them all.
  """

  def __init__(
    self,
    model: nn.Module,
    settings: TrainSettings,
    memory: steps.Memory,
    train: dict[str, np.ndarray],
    class_counts: np.ndarray,
    finetuning: FineTuning | None = None,
    *,
    val: dict[str, np.ndarray] | None = None,
    ids: Sequence[str] | None = None,
    layout: Layout = Layout(),
    telling: Telling = Telling(),
  ):
    """Prepares training; only the working set is moved to where it belongs.

    Args:
      model: called with (query, keys, values, mask).
      settings: how to train.
      memory: the working set, as arrays of any kind.
      train: query [N, d], rows int32 [N, k], label int32 [N].
      class_counts: training examples a class, [C].
      finetuning: the encoder and its images, if `settings.finetune`.
      val: as `train`, for `settings.eval_epochs`.
      ids: [N] names of the training examples, for messages.
      layout: where arrays lie.
      telling: what is told beside the metrics files.

    Raises:
      UserError: settings that make no sense.
    """
    if settings.finetune and finetuning is None:
      raise UserError(
        "train.finetune=True, but there are no images here, only stored "
        "queries; set it to False."
      )
    self.mesh = sharding.mesh(layout.model)
    size = settings.batch_size
    sharding.check_batch_size(
      "train.batch_size", size, self.mesh, settings.accumulate
    )
    self.settings = settings
    self._model, self._telling, self._val = model, telling, val
    self._class_counts = class_counts
    n = len(train["label"])
    self.total_steps = settings.steps(settings.epochs, n)
    self.checkpoint_steps = settings.steps(settings.checkpoint_epochs, n)
    self._eval_steps = 0
    if settings.eval_epochs > 0:
      self._eval_steps = settings.steps(settings.eval_epochs, n)
    self.placed = predictions.place(model, memory, train, self.mesh, layout)
    self._rules = sharding.parse_rules(layout.sharding)
    tuned = finetuning if settings.finetune else None
    self._finetunes = tuned is not None
    self._query = tuned.query(settings.encoder_batch) if tuned else None
    self._feed = feed.Feed(
      train,
      np.arange(n) if ids is None else ids,
      self.placed,
      self.mesh,
      size,
      settings.augment,
      tuned,
    )
    self.compiled = Compiled(
      model,
      settings,
      settings.make_loss(class_counts),
      memory,
      (train["query"].shape[1], train["rows"].shape[1]),
      self.placed,
      self.mesh,
      self._rules,
      (self.total_steps, settings.steps(settings.warmup_epochs, n)),
      self._query,
      tuned.encoder.params if tuned else None,
    )

  def traced(self, together: int = 1) -> jax.stages.Traced:
    """The step, to look at; compiled, it is not compiled again to train."""
    return self.compiled.traced(
      self.placed.memory, self._feed.example(), together
    )

  def run(
    self,
    seed: int,
    folder: pathlib.Path | None = None,
    what: str = "train",
    begin: manifest.Artifact | None = None,
  ) -> Any:
    """Trains, from the latest checkpoint in `folder` if there is one.

    Args:
      seed: of parameters, order and dropout.
      folder: for checkpoints and metrics; None keeps nothing.
      what: label of the progress bar.
      begin: the run whose parameters are those of the first step.

    Returns:
      The parameters to keep, as arrays of the host: those after the last step
      or of the best evaluation, of the moving average if there is one; between
      them and the first, if `settings.keep_start`.

    Raises:
      UserError: the loss stops being finite; a checkpoint is unreadable; the
        parameters to begin with are of another model.
      distributed.Preempted: SIGTERM came, and all was saved.
    """
    state = self.compiled.init(seed)
    kept, first = self.settings.keep_start, None
    if begin is not None or kept:
      first = sharding.fetch(state.params)
    if begin is not None:
      first = start.params(begin, first)
      state = self.compiled.begin_with(state, first)
    state = self._run(state, [seed], [what], [folder], folder)
    params = sharding.fetch(_to_keep(state))
    return start.between(params, first, kept) if kept else params

  def run_together(
    self,
    seeds: Sequence[int],
    folders: Sequence[pathlib.Path | None],
    shared: pathlib.Path | None = None,
    what: str = "train",
  ) -> list[Any]:
    """Trains several seeds in one compiled step, on one device.

    Args:
      seeds: as of `run`, whose results these are but for rounding.
      folders: of the metrics of each.
      shared: for checkpoints of them all; None keeps nothing.
      what: label of the progress bar, without a seed.

    Returns:
      The parameters of each seed, as `run` returns them.
    """
    state = self.compiled.init_together(seeds)
    names = [f"{what} seed {seed}" for seed in seeds]
    state = self._run(state, seeds, names, folders, shared)
    params = sharding.fetch(_to_keep(state))
    return [of_seed(params, i) for i in range(len(seeds))]

  def can_train_together(self) -> bool:
    """Whether `run_together` can do what the settings ask for."""
    s = self.settings
    return (
      self.mesh.size == 1
      and not self._finetunes
      and self.placed.kind == "replicated"
      and s.keep == "last"
      and not s.keep_start
    )

  def _run(self, state, seeds, names, folders, shared) -> steps.State:
    """All steps of some seeds, from the latest checkpoint in `shared`."""
    with contextlib.ExitStack() as stack:
      checkpoints, first, logs = None, 0, []
      if shared is not None:
        checkpoints = stack.enter_context(
          Checkpoints(shared / "checkpoints", best=self._eval_steps > 0)
        )
        first, state = checkpoints.restore(state)
        if distributed.is_first():
          logs = [
            stack.enter_context(self._log(folder, first, name))
            for name, folder in zip(names, folders)
          ]
      books = Books(seeds, names, folders, shared, checkpoints, logs)
      state = self._steps(state, first, books)
      if checkpoints is not None and self.settings.keep == "best":
        _, state = checkpoints.restore(state, best=True)
    return state

  def _log(self, folder: pathlib.Path, first: int, name: str) -> metrics.Log:
    return metrics.Log(
      folder,
      first,
      COLUMNS,
      name=name,
      tensorboard=self._telling.tensorboard,
      wandb=self._telling.wandb,
    )

  def _steps(self, state: steps.State, first: int, books: Books) -> steps.State:
    total, together = self.total_steps, len(books.seeds)
    step = self.compiled.step
    if together > 1:
      step = self.compiled.steps_together
    rates = self._rates  # compiled here, while nothing is timed
    # At most so many steps are under way that nobody has looked at.
    large = self._finetunes or self.placed.kind == "host"
    every = _FETCH_EVERY_OF_LARGE if large else _FETCH_EVERY
    meter = speed.Meter(self.settings.batch_size * together)
    pending, told = [], None
    with contextlib.ExitStack() as stack:
      batches = self._feed.ahead(books.seeds, first, total)
      stack.enter_context(contextlib.closing(batches))
      bar = stack.enter_context(self._bar(first, books.what))
      preemption = stack.enter_context(distributed.Preemption())
      trace = stack.enter_context(contextlib.closing(self._trace(books)))
      for number in range(first + 1, total + 1):
        with meter.waiting(told and told.loss):
          chunk, place = next(batches)
        trace.step(number, state)
        state, told = step(
          state,
          self.placed.memory,
          chunk,
          np.int32(place),
          np.int32(number - 1),
        )
        if number == first + 1:
          jax.block_until_ready(told)  # what it took to compile is not speed
        meter.step()
        pending.append((number, told))
        last, stop = number == total, preemption.reached(number)
        look = self._eval_steps and (last or number % self._eval_steps == 0)
        save = last or stop or look or number % self.checkpoint_steps == 0
        if save or len(pending) == every:
          rows = self._rows(pending, state, books, rates)
          pending = []
          books.show(bar, rows[0], meter.rates())
          with meter.paused():
            top = self._look(state, rows) if look else None
            books.write(rows)
            if save:
              books.save(number, state, top)
        if stop:
          raise books.preempted(number, total)
    if books.logs and total > first:
      self._summarize(meter, books)
    return state

  def _bar(self, first: int, what: str) -> Any:
    bar = progress.bar(
      total=self.total_steps,
      what=what,
      unit="step",
      shown=distributed.is_first(),
    )
    bar.update(first)
    return bar

  def _trace(self, books: Books) -> profiler.Profiler:
    window = self._telling.profile if books.logs else ""
    return profiler.Profiler(
      window, (books.folders[0] or pathlib.Path()) / "profile"
    )

  def _rows(self, pending, state, books: Books, rates) -> list[list[dict]]:
    """Rows of the metrics of each seed; raises if a step was not done."""
    numbers, told = zip(*pending)
    told = jax.device_get(told)
    rows = []
    for i in range(len(books.seeds)):
      own = told if len(books.seeds) == 1 else [of_seed(x, i) for x in told]
      rows.append([])
      for number, x in zip(numbers, own):
        if not x.ok:
          kept = state if len(books.seeds) == 1 else of_seed(state, i)
          self._explain(number, kept, i, books)
        rows[-1].append(
          {
            "step": number,
            "loss": float(x.loss),
            "grad_norm": float(x.grad_norm),
            "learning_rate": float(rates[number - 1]),
          }
        )
    return rows

  @functools.cached_property
  def _rates(self) -> np.ndarray:
    """The learning rate of every step."""
    done = jnp.arange(self.total_steps)
    # As one program: each operation alone would be compiled, too.
    return np.asarray(jax.jit(jax.vmap(self.compiled.schedule))(done))

  def _explain(self, number: int, state, i: int, books: Books) -> None:
    """Raises the `UserError` of the i-th seed's step that was not done."""
    batch, ids = self._feed.looked_up(books.seeds[i], number - 1)
    guard.stop(
      self.compiled.loss(),
      self.compiled.frozen,
      sharding.fetch(state),
      batch,
      step=number,
      ids=ids,
      what=books.names[i],
      folder=books.folders[i],
      accumulate=self.settings.accumulate,
    )

  def _look(self, state: steps.State, rows: list[list[dict]]) -> float:
    """Adds the accuracy on val to the last row of each seed.

    Returns:
      The mean over seeds, in percent.
    """
    tops = []
    for i, own in enumerate(rows):
      params = _to_keep(state)
      if len(rows) > 1:
        params = of_seed(params, i)
      logits, _ = self._predictor(params, self._val, self.settings.batch_size)
      logits = predictions.corrected(
        logits, self._class_counts, self.settings.post_hoc_tau
      )
      right = logits.argmax(axis=1) == self._val["label"]
      own[-1]["val_top1"] = 100 * float(right.mean())
      tops.append(own[-1]["val_top1"])
    return sum(tops) / len(tops)

  @functools.cached_property
  def _predictor(self) -> predictions.Predictor:
    return predictions.Predictor(
      self._model, self.placed, self.mesh, self._rules, self._query
    )

  def _summarize(self, meter: speed.Meter, books: Books) -> None:
    together = len(books.seeds)
    traced = self.traced(together)
    size = self.settings.batch_size * together
    compiled = traced.lower().compile()  # which is there already
    costs = speed.costs(compiled, size, self.mesh.size, traced)
    devices = list(self.mesh.devices.flat)
    found = speed.summary(costs, meter.total(), devices)
    found["placement"] = self.placed.why
    found["seeds_at_once"] = together  # whose examples these are
    for folder in books.folders:
      files.write_json(folder / "summary.json", found)
    progress.note(f"{books.what}: {speed.describe(found)}")


def _to_keep(state: steps.State) -> Any:
  return state.params if state.ema is None else state.ema
