"""The text branch of RAC (Long et al., CVPR 2022).

RAC joins the texts of the neighbors, best first, embeds the joined text once,
and sums the logits of an image branch and a text branch. The joining and the
embedding are done offline; what is left here is to hand the text embedding to
the text branch's head. `build("rac", ...)` makes the whole model.
"""

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from retrieval_aug.models.neighbors import Values, as_tuple
from retrieval_aug.models.scaling import SCALES, accumulator, scaled
from retrieval_aug.models.shapes import check_choice, check_inputs


class JoinedText(nn.Module):
  """Gives the embedding of an example's joined neighbor texts. No parameters.

  It is called like every fusion, with the joined text as the value of a single
  neighbor.

  Attributes:
    value_scale: "sqrt_d" or "none", as in `MAM`.
  """

  value_scale: str = "none"

  def __post_init__(self):
    check_choice("value_scale", self.value_scale, SCALES)
    super().__post_init__()

  @nn.compact
  def __call__(
    self,
    query: Array,
    keys: Array | None,
    values: Values,
    mask: Array | None = None,
    *,
    train: bool = False,
    return_attention: bool = False,
  ) -> Array | tuple[Array, Array]:
    """Returns the text embedding.

    Args:
      query: `[B, d]`; not used.
      keys: `[B, 1, d]`; not used, and may be None.
      values: embeddings of the joined texts, `[B, 1, d_t]`.
      mask: bool `[B, 1]`, False where no neighbor had a text.
      train: not used.
      return_attention: also return weights, of which there are none.

    Returns:
      `[B, d_t]` in float32, zero where masked. With `return_attention` also
      float32 `[B, 0, 1]`.
    """
    del train
    check_inputs(query, keys, values, mask)
    (texts,) = as_tuple(values)
    if texts.shape[1] != 1:
      raise ValueError(
        f"`values` has shape {tuple(texts.shape)}; expected [B, 1, d_t]: RAC "
        "takes one embedding an example, of the joined texts of its neighbors"
      )
    texts = jnp.asarray(texts)
    text = scaled(texts[:, 0], self.value_scale, accumulator(texts.dtype))
    if mask is not None:
      text = jnp.where(mask, text, jnp.zeros_like(text))
    if return_attention:
      return text, jnp.zeros((query.shape[0], 0, 1), jnp.float32)
    return text
