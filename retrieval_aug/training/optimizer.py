"""AdamW with warm-up and cosine decay, per step (DESIGN decision 1)."""

from collections.abc import Callable

import jax
import optax


def schedule(
  learning_rate: float, total_steps: int, warmup_steps: int
) -> Callable[[jax.Array], jax.Array]:
  """Linear from 0 over the warm-up, then half a cosine to 0.

  Args:
    learning_rate: the peak.
    total_steps: warm-up and decay together.
    warmup_steps: at most total_steps.
  """
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=learning_rate,
    warmup_steps=min(warmup_steps, total_steps - 1),
    decay_steps=total_steps,
  )


def make(
  *,
  learning_rate: float,
  weight_decay: float,
  total_steps: int,
  warmup_steps: int,
  gradient_clip: float,
) -> optax.GradientTransformation:
  """The papers' "Adam with weight decay": decoupled, on matrices only.

  Args:
    learning_rate: peak of the schedule.
    weight_decay: of every parameter with two or more axes; biases and scales
      have nothing to gain from being small.
    total_steps: length of training.
    warmup_steps: of them, linear.
    gradient_clip: bound on the global gradient norm; 0 is off.
  """
  chain = []
  if gradient_clip > 0:
    chain.append(optax.clip_by_global_norm(gradient_clip))
  chain.append(
    optax.adamw(
      schedule(learning_rate, total_steps, warmup_steps),
      weight_decay=weight_decay,
      mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
    )
  )
  return optax.chain(*chain)
