"""Package description; tool settings are in pyproject.toml."""

import pathlib

from setuptools import find_packages, setup

# The core: enough for `retrieval_aug.models` and `retrieval_aug.encoders` in
# anyone's Flax code. Lower bounds are the versions that are tested.
CORE = [
  "jax>=0.10.2,<0.13",
  "flax>=0.12.8,<0.13",
  "optax>=0.2.8",
  "numpy>=2.0",
  "ml_dtypes>=0.5",
  "absl-py>=2.1",
  "ml_collections>=1.1",
  "safetensors>=0.5",
  "tokenizers>=0.21",
  "Pillow>=11.0",
  "tqdm>=4.66",
  "threadpoolctl>=3.5",
]

# The main job. scann fails to import beside TensorFlow 2.21, and has wheels
# for Linux only: elsewhere the exact searcher serves.
RUN = [
  "tensorflow-cpu~=2.20.0",
  "scann~=1.4.2; sys_platform == 'linux'",
  "orbax-checkpoint>=0.12.8,<0.13",
  "pyarrow>=17.0",
  "tensorstore>=0.1.74",
  "sentencepiece>=0.2.1",
  "tensorflow-datasets>=4.9.10,<4.10",
  "importlib_resources>=6.4",  # which some of its builders import unasked
  "py3langid>=0.4",
  "clu>=0.0.12",
  "matplotlib>=3.9",
  "resvg-py>=0.5.0,<0.6",
]

# Memories past one machine: Apache Beam, with Dask as a cluster of one's own,
# and the engines of faiss.
SCALE = [
  "apache-beam[tfrecord,dask]>=2.77,<2.78",
  "google-crc32c>=1.6",
  "faiss-cpu>=1.15",
]

TEST = [
  "pytest>=8.3",
  "pytest-xdist>=3.8",
  "hypothesis>=6.100",
  "ruff>=0.6",
]

setup(
  name="retrieval_aug",
  version="0.1.0",
  description="Retrieval-augmented image recognition in JAX and Flax.",
  long_description=pathlib.Path("README.md").read_text()
  if pathlib.Path("README.md").exists()
  else "",
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=find_packages(include=["retrieval_aug", "retrieval_aug.*"]),
  install_requires=CORE,
  extras_require={
    "run": RUN,
    "scale": RUN + SCALE,
    "test": RUN + SCALE + TEST,
  },
)
