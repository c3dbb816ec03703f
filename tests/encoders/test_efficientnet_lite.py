import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retrieval_aug.encoders import efficientnet_lite


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("sides", [(7, 11), (8, 13), (2, 3)])
def test_depthwise_equals_a_grouped_convolution(kernel, stride, sides):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, *sides, 5)).astype(np.float32)
  weights = rng.normal(size=(kernel, kernel, 5)).astype(np.float32)
  bias = rng.normal(size=5).astype(np.float32)
  found = efficientnet_lite.Depthwise(kernel, stride).apply(
    {"params": {"kernel": weights, "bias": bias}}, jnp.asarray(x)
  )
  expected = jax.lax.conv_general_dilated(
    x,
    weights[:, :, None, :],
    (stride, stride),
    "SAME",
    feature_group_count=5,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  ) + bias.reshape(1, 1, 1, 5)
  np.testing.assert_allclose(found, expected, atol=1e-5)


# Millions of parameters, from the authors' table of the Lite variants.
@pytest.mark.parametrize(
  "name, millions",
  [
    ("efficientnet_lite0", 4.7),
    ("efficientnet_lite1", 5.4),
    ("efficientnet_lite2", 6.1),
    ("efficientnet_lite3", 8.2),
    ("efficientnet_lite4", 13.0),
  ],
)
def test_variant_has_the_published_number_of_parameters(name, millions):
  arrays = efficientnet_lite.expected_arrays(efficientnet_lite.VARIANTS[name])
  count = sum(
    np.prod(array.shape)
    for key, array in arrays.items()
    if key.endswith((".weight", ".bias"))
  )
  assert round(count / 1e6, 1) == millions


def test_convert_folds_batch_norm_into_kernel_and_bias():
  variant = efficientnet_lite.VARIANTS["efficientnet_lite0"]
  expected = efficientnet_lite.expected_arrays(variant)
  state = {k: np.zeros(v.shape, v.dtype) for k, v in expected.items()}
  state["_conv_stem.weight"][5, 2, 1, 0] = 7.0
  state["_bn0.weight"][5] = 3.0
  state["_bn0.bias"][5] = 0.5
  state["_bn0.running_mean"][5] = 2.0
  state["_bn0.running_var"][5] = 0.249  # and 0.001, the square of 0.5
  params = efficientnet_lite.convert(variant, state, logits=False)
  stem = params["conv_stem"]
  assert "fc" not in params
  assert stem["kernel"].shape == (3, 3, 3, 32)
  np.testing.assert_allclose(stem["kernel"][1, 0, 2, 5], 42.0, rtol=1e-6)
  np.testing.assert_allclose(stem["bias"][5], 0.5 - 12.0, rtol=1e-6)


def test_spec_is_the_authors_evaluation():
  variant = efficientnet_lite.VARIANTS["efficientnet_lite2"]
  spec = efficientnet_lite.image_spec(variant)
  assert (spec.size, spec.resize, spec.interpolation) == (260, 292, "bicubic")
  assert (spec.mean, spec.std) == ((127.0,) * 3, (128.0,) * 3)
