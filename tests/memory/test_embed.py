"""The embed stage on a tiny source and a tiny real encoder."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from retrieval_aug.common.errors import UserError
from retrieval_aug.datasets import stored, vectors
from retrieval_aug.datasets.types import Downstream
from retrieval_aug.encoders import Encoder, prefetch
from retrieval_aug.memory import embed, jobs, stand_ins, table
from retrieval_aug.memory.embed_texts import embed_texts
from tests.datasets import embedding_folders as folders
from tests.encoders import pictures
from tests.encoders.pictures import SIZE, D, N

DV, SHARD_ROWS = 7, 11
OPTIONS = {"batch_size": 4, "shard_rows": SHARD_ROWS, "threads": 2}


@pytest.fixture
def images():
  return pictures.Pictures()


@pytest.fixture
def memory(images):
  return pictures.source(images)


@pytest.fixture
def encoder():
  return pictures.encoder()


def _count_letters(params, batch):
  return batch["lengths"][:, None].astype(jnp.float32) * params


@pytest.fixture
def text_encoder():
  return Encoder(
    name="letters",
    modality="text",
    dim=DV,
    params=jnp.arange(1, DV + 1, dtype=jnp.float32)[None],
    prepare=lambda texts: {"lengths": np.array([len(t) for t in texts])},
    apply=_count_letters,
    fingerprint={"name": "letters"},
  )


def _embed(folder, items, encoder, value_encoders, **changes):
  options = OPTIONS | changes
  artifact = embed.table_artifact(
    folder, items, encoder, value_encoders, options["shard_rows"]
  )
  embed.embed(artifact, items, encoder, value_encoders, **options)
  return table.Table(folder)


def test_a_table_holds_each_items_embedding_text_and_facts(
  tmp_path, memory, encoder, text_encoder
):
  found = _embed(tmp_path, memory, encoder, [text_encoder])
  pixels = np.stack([pictures.pixels(i) for i in range(N)])
  keys = np.asarray(encoder.apply(encoder.params, pixels))
  np.testing.assert_allclose(found.keys(), keys, atol=1e-3)
  values = np.outer([i % 6 + 1 for i in range(N)], np.arange(1, DV + 1))
  np.testing.assert_array_equal(found.values("letters"), values)
  assert found.column("id") == memory.ids
  assert found.column("text") == memory.texts
  assert found.column("license") == ["MIT"] * N
  assert (found.rows, found.dims) == (N, D)


def test_values_may_be_of_the_images_and_of_several_encoders(
  tmp_path, memory, images, encoder, text_encoder
):
  wide = dataclasses.replace(
    encoder,
    name="wide",
    dim=2 * D,
    apply=lambda p, x: jnp.tile(pictures.project(p, x), 2),
  )
  found = _embed(tmp_path, memory, encoder, [wide, text_encoder])
  assert found.value_names == ["letters", "wide"]
  np.testing.assert_array_equal(found.values("wide"), np.tile(found.keys(), 2))
  assert found.values("letters").shape == (N, DV)
  assert images.loads == [1] * N  # for both encoders


def test_keys_of_texts_and_two_encoders_of_one_name_are_refused(
  tmp_path, memory, encoder, text_encoder
):
  with pytest.raises(UserError, match="keys and queries are images"):
    _embed(tmp_path, memory, text_encoder, [])
  with pytest.raises(UserError, match="two have one name"):
    _embed(tmp_path, memory, encoder, [text_encoder, text_encoder])


def test_a_query_table_holds_labels_and_splits_and_no_values(
  tmp_path, images, encoder
):
  items = Downstream(
    name="tiny",
    ids=[f"query/{i}" for i in range(N)],
    image=images,
    fingerprint={"dataset": "tiny"},
    labels=np.arange(N) % 3,
    splits=["train", "val", "test"] * 7 + ["train"] * 2,
    class_names=["a", "b", "c"],
  )
  found = _embed(tmp_path, items, encoder, [])
  assert found.column("label") == [i % 3 for i in range(N)]
  assert found.column("split") == items.splits
  assert found.value_names == []


@pytest.mark.parametrize("changes", [{"batch_size": 1}, {"batch_size": 13}])
def test_batches_and_their_padding_change_no_row(
  tmp_path, memory, encoder, changes
):
  first = _embed(tmp_path / "a", memory, encoder, []).keys()
  second = _embed(tmp_path / "b", memory, encoder, [], **changes).keys()
  # Another shape of matrix product may round another way: one float16 step.
  np.testing.assert_allclose(first, second, atol=2**-11)


def test_shards_and_threads_change_no_bit(tmp_path, memory, encoder):
  first = _embed(tmp_path / "a", memory, encoder, []).keys()
  changes = {"shard_rows": 8, "threads": 1}
  second = _embed(tmp_path / "b", memory, encoder, [], **changes).keys()
  np.testing.assert_array_equal(first, second)


def test_processes_change_no_bit_and_load_each_image_once(
  tmp_path, memory, images, encoder
):
  first = _embed(tmp_path / "a", memory, encoder, []).keys()
  images.loads = [0] * N
  second = _embed(tmp_path / "b", memory, encoder, [], processes=2).keys()
  np.testing.assert_array_equal(first, second)
  assert images.loads == [0] * N  # not in this process


_TWO_DEVICES = """
import pathlib, sys
import jax
from retrieval_aug.memory import embed
from tests.encoders import pictures
assert len(jax.local_devices()) == 2
encoder = pictures.encoder()
items = pictures.source(pictures.Pictures())
artifact = embed.table_artifact(sys.argv[1], items, encoder, [], 11)
# An odd batch is filled up to a multiple of the devices.
embed.embed(
  artifact, items, encoder, [], batch_size=int(sys.argv[2]), shard_rows=11,
  threads=2,
)
"""


@pytest.mark.parametrize("batch_size", [5, 0])
def test_two_devices_make_the_same_table(tmp_path, memory, encoder, batch_size):
  expected = _embed(tmp_path / "a", memory, encoder, [])
  done = subprocess.run(
    [sys.executable, "-c", _TWO_DEVICES, tmp_path / "b", str(batch_size)],
    capture_output=True,
    text=True,
    cwd=pathlib.Path(__file__).parents[2],
    env={
      **os.environ,
      "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
      "PYTHONPATH": ".",
    },
  )
  assert done.returncode == 0, done.stderr
  found = table.Table(tmp_path / "b")
  assert found.fingerprint == expected.fingerprint
  # Another shape of matrix product may round another way: one float16 step.
  np.testing.assert_allclose(found.keys(), expected.keys(), atol=2**-11)
  assert found.column("id") == expected.column("id")


def test_a_batch_size_of_zero_is_found(tmp_path, memory, encoder, capsys):
  first = _embed(tmp_path / "a", memory, encoder, []).keys()
  second = _embed(tmp_path / "b", memory, encoder, [], batch_size=0).keys()
  np.testing.assert_allclose(first, second, atol=2**-11)
  said = capsys.readouterr().err
  assert "embed tiny memory: 8 images at once" in said  # of 11 in a shard
  assert "image/s" in said  # what the progress bar counts
  options = {"batch_size": 0, "memory_gb": 1e-9}
  with pytest.raises(UserError, match="encoder tiny: one image needs .* GB"):
    _embed(tmp_path / "c", memory, encoder, [], **options)


def test_the_last_batch_compiles_nothing_new(tmp_path, memory, encoder):
  traces = []

  def apply(params, batch):
    traces.append(batch.shape)
    return pictures.project(params, batch)

  counting = dataclasses.replace(encoder, apply=apply)
  _embed(tmp_path, memory, counting, [])
  assert traces == [(4, SIZE, SIZE, 3)]


def test_a_distinct_text_is_embedded_once(text_encoder):
  seen = []

  def prepare(texts):
    seen.extend(t for t in texts if t)
    return text_encoder.prepare(texts)

  counting = dataclasses.replace(text_encoder, prepare=prepare)
  out = embed_texts(counting, ["bb", "a", "bb", "ccc", "a"], batch_size=2)
  assert sorted(seen) == ["a", "bb", "ccc"]
  np.testing.assert_array_equal(out[:, 0], [2, 1, 2, 3, 1])


def test_going_on_after_a_fault_redoes_no_finished_shard(
  tmp_path, memory, images, encoder, text_encoder
):
  images.broken[SHARD_ROWS + 3] = OSError("no such disk")
  with pytest.raises(UserError):
    _embed(tmp_path / "a", memory, encoder, [text_encoder])
  assert images.loads[:SHARD_ROWS] == [1] * SHARD_ROWS
  images.broken.clear()
  images.loads = [0] * N
  found = _embed(tmp_path / "a", memory, encoder, [text_encoder])
  assert images.loads == [0] * SHARD_ROWS + [1] * (N - SHARD_ROWS)
  whole = _embed(tmp_path / "b", memory, encoder, [text_encoder])
  np.testing.assert_array_equal(found.keys(), whole.keys())
  assert (tmp_path / "a" / "manifest.json").read_bytes() == (
    tmp_path / "b" / "manifest.json"
  ).read_bytes()


def test_a_finished_table_is_complete_for_the_same_inputs_only(
  tmp_path, memory, encoder
):
  _embed(tmp_path, memory, encoder, [])
  assert embed.table_artifact(
    tmp_path, memory, encoder, [], SHARD_ROWS
  ).is_complete()
  other = dataclasses.replace(
    encoder, fingerprint={"name": "tiny", "weights_sha256": "ff"}
  )
  with pytest.raises(UserError, match="encoder.weights_sha256: 00 -> ff"):
    embed.table_artifact(tmp_path, memory, other, [], SHARD_ROWS).is_complete()


def test_a_damaged_finished_shard_is_refused_when_going_on(
  tmp_path, memory, images, encoder, flip_bit
):
  images.broken[N - 1] = OSError("no such disk")
  with pytest.raises(UserError):
    _embed(tmp_path, memory, encoder, [])
  images.broken.clear()
  flip_bit(tmp_path / "keys_00000.npy")
  before = (tmp_path / "keys_00000.npy").read_bytes()
  with pytest.raises(UserError, match="keys_00000.npy: its bytes are not"):
    _embed(tmp_path, memory, encoder, [])
  assert (tmp_path / "keys_00000.npy").read_bytes() == before


def test_an_unreadable_image_names_its_item_and_what_to_do(
  tmp_path, memory, images, encoder
):
  images.broken[17] = OSError("image file is truncated")
  with pytest.raises(UserError) as caught:
    _embed(tmp_path, memory, encoder, [])
  assert str(caught.value) == (
    "tiny memory: the image of item 'item/17' cannot be read (OSError: image "
    "file is truncated); mend or remove it. Such items are left out with "
    "--config.memory.on_error=skip."
  )


def test_a_sources_own_error_is_kept(tmp_path, memory, images, encoder):
  images.broken[2] = UserError("a.svg: install another renderer.")
  with pytest.raises(UserError, match="^a.svg: install another renderer. Su"):
    _embed(tmp_path, memory, encoder, [])


@pytest.mark.parametrize("which", ["keys", "values"])
def test_a_nan_embedding_is_refused_and_nothing_of_its_shard_written(
  tmp_path, memory, encoder, text_encoder, which
):
  """Row 13, in the second shard; the values of its text are those of row 1."""

  def nan_keys(params, batch):
    x = pictures.project(params, batch)
    bad = (batch == pictures.pixels(13)[None]).all(axis=(1, 2, 3))
    return jnp.where(bad[:, None], jnp.nan, x)

  def nan_values(params, batch):
    x = _count_letters(params, batch)
    return jnp.where(batch["lengths"][:, None] == 13, jnp.nan, x)

  if which == "keys":
    encoder = dataclasses.replace(encoder, apply=nan_keys)
  else:
    memory.texts[13] = "x" * 13
    text_encoder = dataclasses.replace(text_encoder, apply=nan_values)
  with pytest.raises(UserError) as caught:
    _embed(tmp_path, memory, encoder, [text_encoder])
  message = str(caught.value)
  assert "item 'item/13' (tiny memory, item 13) cannot be embedded" in message
  what = {"keys": "its key", "values": "its value of letters"}[which]
  assert f"{what} is not finite" in message and "\n" not in message
  assert [p.name for p in tmp_path.glob("*_00001.*")] == []
  assert (tmp_path / "keys_00000.npy").exists()
  with pytest.raises(UserError, match="this table is not finished"):
    table.Table(tmp_path)


def test_estimate_counts_rows_dims_and_weights(memory):
  class Fake:
    def __init__(self, dim):
      self.dim, self.params = dim, {"w": np.zeros(250_000, np.float32)}

  line = embed.estimate(memory, Fake(100_000), [Fake(200_000)], 10)
  # 23 * 2 * 300,000 bytes; 2 * 10^6 bytes of weights and ten float32 rows.
  assert "23 items, about 14 MB on disk, 14 MB of memory" in line


def _no_encoder():
  raise AssertionError("nothing needs an encoder of images")


def test_units_in_any_order_give_the_same_bytes(
  tmp_path, images, memory, encoder, text_encoder
):
  expected = _embed(tmp_path / "a", memory, encoder, [text_encoder]).folder
  artifact = embed.table_artifact(
    tmp_path / "b", memory, encoder, [text_encoder], SHARD_ROWS
  )
  job = embed.EmbedJob(artifact, memory, encoder, [text_encoder], **OPTIONS)
  artifact.start()
  assert job.phases() == ["embed"]
  assert job.units("embed") == ["00000", "00001", "00002"]
  images.loads = [0] * N
  for unit in ("00002", "00000", "00001"):
    job.do("embed", unit, lambda _: None)
    # Who closes a job may use it again.
    job.close()
  assert job.units("embed") == []
  job.finish()
  assert images.loads == [1] * N
  assert _bytes(tmp_path / "b") == _bytes(expected)


def test_encoders_are_compiled_and_workers_started_once(
  tmp_path, memory, encoder, monkeypatch
):
  pools, traces = [], []

  def apply(params, batch):
    traces.append(batch.shape)
    return pictures.project(params, batch)

  def pool(*args, **kwargs):
    pools.append(args)
    return make(*args, **kwargs)

  make = prefetch.pool
  monkeypatch.setattr(prefetch, "pool", pool)
  counting = dataclasses.replace(encoder, apply=apply)
  artifact = embed.table_artifact(tmp_path, memory, counting, [], 4)
  options = OPTIONS | {"shard_rows": 4}
  job = embed.EmbedJob(artifact, memory, counting, [], **options)
  assert not pools  # a process that lists units starts none
  jobs.run(job)
  assert len(pools) == 1 and traces == [(4, SIZE, SIZE, 3)]


def _bytes(folder):
  return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}


class TestStored:
  """Items whose embeddings exist already: 4 and 13 rows in two files."""

  @pytest.fixture
  def folder(self, tmp_path):
    return folders.write(tmp_path / "laion", {0: 4, 1: 13})

  @pytest.fixture
  def laion(self, folder):
    return stored.load(str(folder))

  @pytest.fixture
  def keys(self):
    return np.concatenate([folders.keys(0, 4), folders.keys(1, 13)])

  def test_nothing_is_encoded_or_copied(self, tmp_path, laion, keys):
    encoder = stand_ins.key_encoder([laion], _no_encoder)
    values = [stand_ins.values("text", laion)]
    found = _embed(tmp_path / "table", laion, encoder, values)
    np.testing.assert_array_equal(found.keys(), keys)
    np.testing.assert_array_equal(
      found.values("text"),
      np.concatenate([folders.values(0, 4), folders.values(1, 13)]),
    )
    assert found.column("id") == laion.ids
    assert found.column("text") == laion.texts
    assert found.column("url") == laion.columns["url"]
    assert found.inputs["encoder"] == found.inputs["values"]["text"]
    assert {p.name for p in found.folder.iterdir()} == {
      *("manifest.json", ".lock"),
      *(f"metadata_0000{i}.parquet" for i in range(2)),
    }

  def test_texts_are_embedded_where_there_are_no_values_of_them(
    self, tmp_path, laion, keys, text_encoder, capsys
  ):
    encoder = stand_ins.key_encoder([laion], _no_encoder)
    seen = []

    def prepare(texts):
      seen.extend(filter(None, texts))
      if "a photo 1-12" in texts and fail:
        raise UserError("no such disk")
      return text_encoder.prepare(texts)

    fail = True
    broken = dataclasses.replace(text_encoder, prepare=prepare)
    with pytest.raises(UserError, match="no such disk"):
      _embed(tmp_path / "table", laion, encoder, [broken])
    assert "laion has values 'text' too; they are used" in (
      capsys.readouterr().err
    )
    fail = False
    seen.clear()
    found = _embed(tmp_path / "table", laion, encoder, [broken])
    # Finished shards, of 4 and 11 rows, are kept.
    assert seen == ["a photo 1-11", "a photo 1-12"]
    np.testing.assert_array_equal(found.keys(), keys)
    lengths = [len(text) for text in laion.texts]
    np.testing.assert_array_equal(found.values("letters")[:, 0], lengths)
    assert not list(found.folder.glob("keys*"))

  def test_lists_of_a_parquet_file_are_converted_once(
    self, tmp_path, text_encoder
  ):
    path = tmp_path / "all.parquet"
    folders.write(tmp_path / "flat", {3: 13}, "flat", texts=False)
    (tmp_path / "flat" / "metadata_3.parquet").rename(path)
    folders.edit(path, vector=folders.keys(3, 13).astype(np.float32).tolist())
    items = stored.load(str(path))
    encoder = stand_ins.key_encoder([items], _no_encoder)
    found = _embed(tmp_path / "table", items, encoder, [text_encoder])
    path.unlink()
    np.testing.assert_array_equal(found.keys(), folders.keys(3, 13))
    assert len(list(found.folder.glob("keys*.npy"))) == 2
    found.verify()

  def test_a_table_of_ours_gives_its_values_to_the_same_encoder_alone(
    self, tmp_path, memory, encoder, text_encoder
  ):
    wide = dataclasses.replace(
      encoder, name="wide", fingerprint={"name": "wide"}
    )
    made = _embed(tmp_path / "made", memory, encoder, [wide, text_encoder])
    items = stored.load(str(made.folder))

    def reads_nothing(texts):
      raise AssertionError(texts)

    same = dataclasses.replace(text_encoder, prepare=reads_nothing)
    stand_in = stand_ins.key_encoder([items], _no_encoder)
    found = _embed(tmp_path / "same", items, stand_in, [wide, same])
    for name in ("letters", "wide"):
      np.testing.assert_array_equal(found.values(name), made.values(name))
    assert found.inputs["encoder"] == made.inputs["encoder"]
    other = dataclasses.replace(
      text_encoder,
      fingerprint={"name": "letters", "of": "another"},
      apply=lambda params, batch: 2 * _count_letters(params, batch),
    )
    found = _embed(tmp_path / "other", items, stand_in, [other])
    np.testing.assert_array_equal(
      found.values("letters"), 2 * made.values("letters")
    )
    images_again = dataclasses.replace(wide, fingerprint={"name": "wider"})
    with pytest.raises(UserError, match="wide is an encoder of images, and"):
      _embed(tmp_path / "refused", items, stand_in, [images_again])

  def test_a_table_of_stored_embeddings_is_a_memory_too(
    self, tmp_path, laion, keys, text_encoder
  ):
    rows = [0, 2, 3, 4, 16]
    some = dataclasses.replace(
      laion,
      ids=[laion.ids[i] for i in rows],
      texts=[laion.texts[i] for i in rows],
      columns={},
      stored=vectors.take(laion.stored, rows),
    )
    encoder = stand_ins.key_encoder([some], _no_encoder)
    first = _embed(tmp_path / "first", some, encoder, [text_encoder])
    again = stored.load(str(first.folder))
    assert "" not in again.stored[0].encoders  # nobody knows it
    assert again.ids == some.ids
    second = _embed(tmp_path / "second", again, encoder, [text_encoder])
    np.testing.assert_array_equal(second.keys(), keys[rows])
    np.testing.assert_array_equal(
      second.values("letters"), first.values("letters")
    )
    (first.folder / "values_letters_00000.npy").unlink()
    with pytest.raises(UserError, match="first/values_letters_00000.npy: miss"):
      second.verify()


class TestStandIns:
  @pytest.fixture
  def laion(self, tmp_path):
    return stored.load(str(folders.write(tmp_path / "laion", {0: 4, 1: 5})))

  @pytest.fixture
  def narrow(self, tmp_path):
    folder = folders.write(tmp_path / "narrow", {0: 4}, texts=False)
    np.save(folder / "img_emb" / "img_emb_0.npy", np.ones((4, 7), np.float16))
    return stored.load(str(folder))

  def test_of_images_to_embed_the_encoder_is_the_one_asked_for(
    self, laion, memory, encoder, capsys
  ):
    assert stand_ins.key_encoder([memory], lambda: encoder) is encoder
    assert capsys.readouterr().err == ""
    assert stand_ins.key_encoder([memory, laion], lambda: encoder) is encoder
    said = capsys.readouterr().err
    assert "nothing tells which encoder made" in said
    assert "only the 5 dims can be checked" in said

  def test_other_dims_are_refused_before_any_search(
    self, laion, narrow, memory, encoder
  ):
    message = "img_emb_0.npy: 7 dims, and .*laion.*img_emb_0.npy has 5"
    with pytest.raises(UserError, match=message):
      stand_ins.key_encoder([laion, narrow], _no_encoder)
    message = "img_emb_0.npy: 7 dims, and config.encoder.name=tiny has 5"
    with pytest.raises(UserError, match=message):
      stand_ins.key_encoder([memory, narrow], lambda: encoder)

  def test_a_known_other_encoder_is_refused(
    self, tmp_path, memory, encoder, laion
  ):
    made = stored.load(
      str(_embed(tmp_path / "made", memory, encoder, []).folder)
    )
    assert stand_ins.key_encoder([memory, made], lambda: encoder) is encoder
    # One that is known stands for one that is not.
    found = stand_ins.key_encoder([laion, made], _no_encoder)
    assert found.fingerprint == encoder.fingerprint
    other = dataclasses.replace(
      encoder, fingerprint=encoder.fingerprint | {"weights_sha256": "ff"}
    )
    with pytest.raises(
      UserError, match="of another encoder than config.encoder.name=tiny"
    ):
      stand_ins.key_encoder([memory, made], lambda: other)
    another = _embed(tmp_path / "another", memory, other, [])
    another = stored.load(str(another.folder))
    with pytest.raises(UserError, match="weights_sha256: 00 -> ff"):
      stand_ins.key_encoder([made, another], _no_encoder)

  def test_stored_values_must_be_there_for_every_item(
    self, laion, narrow, memory
  ):
    assert stand_ins.values("text", laion).dim == folders.DV
    with pytest.raises(UserError, match="'t5': there are none .*there: 'text'"):
      stand_ins.values("t5", laion)
    with pytest.raises(UserError, match="there: none"):
      stand_ins.values("text", narrow)
    with pytest.raises(UserError, match="tiny memory has images, and no embed"):
      stand_ins.values("text", memory)

  def test_names_of_values(self):
    assert stand_ins.value_name("text", {"name": "minilm_l6"}) == "minilm_l6"
    assert stand_ins.value_name("text", {"name": "stored"}) == "text"
    named = {"name": "stored:t5", "checkpoint": None}
    assert stand_ins.value_name("text", named) == "t5"
    with pytest.raises(UserError, match="text.size=3: stored values are what"):
      stand_ins.value_name("text", {"name": "stored", "size": 3})

  def test_a_stand_in_encodes_nothing(self, laion):
    stand_in = stand_ins.key_encoder([laion], _no_encoder)
    with pytest.raises(UserError, match="encodes nothing"):
      stand_in.apply(None, None)
