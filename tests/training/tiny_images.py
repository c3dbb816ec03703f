"""Images small enough to fine-tune on in a test: four colors, a tiny encoder.

The encoder is a projection of the pixels, a tanh, and another projection.
"""

import functools

import jax.numpy as jnp
import numpy as np

from retrieval_aug import config as configs
from retrieval_aug.datasets.types import Downstream, MemorySource
from retrieval_aug.encoders import Encoder, preprocess
from retrieval_aug.memory import embed, find, neighbors
from retrieval_aug.memory.table import Table

SIZE, DIM, HIDDEN, CLASSES = 8, 11, 17, 4
SPLITS = {"train": 37, "val": 5, "test": 7}
MEMORY = 29
SPEC = preprocess.ImageSpec(
  size=SIZE, resize=9, mean=(127.5,) * 3, std=(127.5,) * 3
)
# Square, as the encoder wants it; larger, smaller, wide and tall.
SIDES = ((24, 24), (SIZE, SIZE), (6, 7), (13, 31), (40, 12))

SEARCH = configs.defaults().search.to_dict() | {
  "searcher": "exact",
  "k": 5,
  "key_transform": "whiten",
  "key_dims": 7,
  "recall_sample": 9,
  "recall_target": 0.9,
  "shard_rows": 100,
}
EMBED = {"batch_size": 8, "shard_rows": 20, "threads": 2}


def image(index: int, salt: int = 0) -> np.ndarray:
  """uint8 [H, W, 3]: noise around the color of the class `index % CLASSES`."""
  rng = np.random.default_rng([index, salt])
  color = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200], [190] * 3])
  sides = SIDES[index % len(SIDES)]
  noise = rng.normal(scale=30, size=(*sides, 3))
  found = color[index % CLASSES].reshape(1, 1, 3) + noise
  return found.clip(0, 255).astype(np.uint8)


def dataset(**options) -> tuple[Downstream, MemorySource]:
  """Examples in turns of the splits' order, and a memory of other images."""
  rows = sum(SPLITS.values())
  splits = [s for s, n in SPLITS.items() for _ in range(n)]
  # Not in blocks: a cache must pick its own.
  order = np.random.default_rng(3).permutation(rows)
  labels = np.arange(rows, dtype=np.int64) % CLASSES
  downstream = Downstream(
    name="colors",
    ids=[f"item/{i}" for i in range(rows)],
    image=image,
    fingerprint={"dataset": "colors", **options},
    labels=labels,
    splits=[splits[i] for i in order],
    class_names=["red", "green", "blue", "gray"],
  )
  memory = MemorySource(
    name="memory",
    ids=[f"memory/{i}" for i in range(MEMORY)],
    image=functools.partial(image, salt=1),
    fingerprint={"dataset": "colors of the memory", **options},
    texts=[downstream.class_names[i % CLASSES] for i in range(MEMORY)],
    columns={"label": [downstream.class_names[i % 4] for i in range(MEMORY)]},
  )
  return downstream, memory


def apply(params, pixels):
  """uint8 [B, SIZE, SIZE, 3] to float32 [B, DIM]."""
  x = preprocess.scale(pixels, SPEC).reshape(pixels.shape[0], -1)
  stem, top = params["stem"], params["top"]
  hidden = jnp.tanh(x @ stem["kernel"] + stem["bias"][None, :])
  return hidden @ top["kernel"] + top["bias"][None, :]


def encoder(seed: int = 0) -> Encoder:
  """The encoder of queries and keys."""
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(
    rng.normal(scale=shape[0] ** -0.5, size=shape), jnp.float32
  )
  return Encoder(
    name="tiny",
    modality="image",
    dim=DIM,
    params={
      "stem": {"kernel": draw(3 * SIZE**2, HIDDEN), "bias": draw(HIDDEN)},
      "top": {"kernel": draw(HIDDEN, DIM), "bias": draw(DIM)},
    },
    prepare=functools.partial(preprocess.prepare_batch, spec=SPEC),
    apply=apply,
    # With a tuple, as a dataclass gives one.
    fingerprint={"name": "tiny", "seed": seed, "sides": (SIZE, SIZE)},
  )


def text_encoder() -> Encoder:
  """An encoder of values: the letters of a text, counted."""
  return Encoder(
    name="letters",
    modality="text",
    dim=5,
    params=jnp.ones(()),
    prepare=lambda texts: np.array(
      [[t.count(c) for c in "redgn"] for t in texts], np.float32
    ),
    apply=lambda params, counts: params * counts,
    fingerprint={"name": "letters"},
  )


def embedded(folder) -> tuple[Table, Table]:
  """Embeds what is missing: the query table and the memory table."""
  for name, items in zip(("queries", "memory"), dataset()):
    artifact = embed.table_artifact(
      folder / name, items, encoder(), [], EMBED["shard_rows"]
    )
    if not artifact.is_complete():
      embed.embed(artifact, items, encoder(), [], **EMBED)
  return tables(folder)


def tables(folder) -> tuple[Table, Table]:
  """What `embedded` left there."""
  return Table(folder / "queries"), Table(folder / "memory")


def _search(key_transform: str) -> dict:
  """The search section with another key transform."""
  dims = SEARCH["key_dims"] if key_transform in ("pca", "whiten") else 0
  return SEARCH | {"key_transform": key_transform, "key_dims": dims}


def neighbors_artifact(workdir, folder, key_transform: str = "whiten"):
  """The neighbour shards of the tables in `workdir`, in `folder`."""
  return neighbors.neighbors_artifact(
    folder, *tables(workdir), _search(key_transform)
  )


def searched(workdir, folder, key_transform: str = "whiten"):
  """Searches: the finished neighbour shards."""
  artifact = neighbors_artifact(workdir, folder, key_transform)
  find.find(artifact, *tables(workdir), _search(key_transform))
  return artifact
