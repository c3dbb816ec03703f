"""Stops a run at a step that was not done, and says what was wrong in it."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from retrieval_aug.common import distributed, files
from retrieval_aug.common.errors import UserError
from retrieval_aug.training import diagnose
from retrieval_aug.training.step import Memory, State, cut, inputs


class Diverged(UserError):
  """A step was not finite, though what it began with and its batch were."""


def stop(
  loss_of: Callable[..., tuple[jax.Array, jax.Array]],
  frozen: Callable[[Any], Any],
  state: State,
  batch: dict[str, Any],
  *,
  step: int,
  ids: Sequence[str],
  what: str,
  folder: pathlib.Path | None,
  accumulate: int = 1,
) -> NoReturn:
  """Looks for the first tensor of a step that is not finite, and raises.

  Args:
    loss_of: from `step.make_loss`.
    frozen: from parameters to which of them are not trained.
    state: before the step, on the host.
    batch: of this process, on the host, with its neighbors.
    step: counted from 1, as in `metrics.jsonl`.
    ids: of the examples of the batch.
    what: which run.
    folder: of the run, for a report; None keeps none.
    accumulate: parts that the step cut the batch into.

  Raises:
    Diverged: a tensor that was computed, or none alone, is the first.
    UserError: one that was given is, a parameter or an input.
  """
  if int(state.step) != step - 1:
    raise UserError(
      f"{what}: step {step} finds a state of {int(state.step)} steps; start "
      "again to go on from the last checkpoint."
    )
  key = jax.random.wrap_key_data(jnp.asarray(state.rng))
  rng = jax.random.fold_in(key, state.step)

  def first_bad_of(batch, rng):
    def call(params, batch):
      given = inputs(Memory(None, None), batch)
      keep = lambda fixed, x: jax.lax.stop_gradient(x) if fixed else x
      params = jax.tree.map(keep, frozen(params), params)
      return loss_of(params, given, batch, rng, jnp.asarray(state.step))

    return diagnose.first_bad(call, state.params, batch)

  parts, rngs = cut(jax.tree.map(jnp.asarray, batch), rng, accumulate)
  for i in range(accumulate):
    part = jax.tree.map(lambda x, i=i: x[i], parts)
    bad = first_bad_of(part, rngs[i])
    if bad is not None:
      if bad.examples is not None:
        whole = bad.examples * accumulate + i
        bad = dataclasses.replace(bad, examples=whole)
      break
  ids, saved = [str(i) for i in np.asarray(ids)], None
  if folder is not None:
    # Of each process its own part of the batch.
    path = folder / f"nan_step_{step}_process_{jax.process_index()}.json"
    files.write_json(path, diagnose.report(bad, step, ids))
    saved = str(path)
  # The first to end would cut the others short.
  with contextlib.suppress(UserError):
    distributed.barrier(f"what was wrong in step {step}")
  given = bad is not None and bad.kind in ("parameter", "input")
  raise (UserError if given else Diverged)(
    diagnose.message(
      bad,
      what=what,
      step=step,
      ids=ids,
      saved=saved,
      processes=jax.process_count(),
    )
  )
