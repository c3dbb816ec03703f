"""Emoji subgroups, with other vendors' drawings and texts as memory.

Run: python -m retrieval_aug.main --config=configs/emoji.py --workdir=DIR
"""

import ml_collections

from retrieval_aug import config


def get_config() -> ml_collections.ConfigDict:
  c = config.defaults()
  c.dataset = ml_collections.ConfigDict(
    {
      "name": "emoji",
      "size": 224,
      "seed": 0,
      "min_class_size": 6,
      "skin_tones": False,
      "memory_skin_tones": True,
    }
  )
  c.search.k = 100
  c.search.key_transform = "pca"
  c.search.key_dims = 256

  c.train.k = 32
  c.train.epochs = 40.0
  c.train.batch_size = 64
  c.train.checkpoint_epochs = 20.0
  c.model.mam.num_layers = 1
  return c
