"""Stops a run at a step that was not done, and says what was wrong in it."""

import contextlib
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from retrieval_aug.common import distributed, files
from retrieval_aug.common.errors import UserError
from retrieval_aug.training import diagnose
from retrieval_aug.training.step import Memory, State, inputs


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

  Raises:
    UserError: always.
  """
  if int(state.step) != step - 1:
    raise UserError(
      f"{what}: step {step} finds a state of {int(state.step)} steps; start "
      "again to go on from the last checkpoint."
    )
  key = jax.random.wrap_key_data(jnp.asarray(state.rng))
  rng = jax.random.fold_in(key, state.step)

  def call(params, batch):
    batch = jax.tree.map(jnp.asarray, batch)
    given = inputs(Memory(None, None), batch)
    keep = lambda fixed, x: jax.lax.stop_gradient(x) if fixed else x
    params = jax.tree.map(keep, frozen(params), params)
    return loss_of(params, given, batch, rng, jnp.asarray(state.step))

  bad = diagnose.first_bad(call, state.params, batch)
  ids, saved = [str(i) for i in np.asarray(ids)], None
  if folder is not None:
    # Of each process its own part of the batch.
    path = folder / f"nan_step_{step}_process_{jax.process_index()}.json"
    files.write_json(path, diagnose.report(bad, step, ids))
    saved = str(path)
  # The first to end would cut the others short.
  with contextlib.suppress(UserError):
    distributed.barrier(f"what was wrong in step {step}")
  raise UserError(
    diagnose.message(
      bad,
      what=what,
      step=step,
      ids=ids,
      saved=saved,
      processes=jax.process_count(),
    )
  )
