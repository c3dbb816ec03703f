"""Items that cannot be embedded are left out, listed, and never lost."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from retrieval_aug.common.errors import UserError
from retrieval_aug.datasets import stored
from retrieval_aug.datasets.types import Downstream
from retrieval_aug.memory import dead_letters, embed, jobs, stand_ins, table
from tests.datasets import embedding_folders as folders
from tests.encoders import pictures
from tests.encoders.pictures import N
from tests.memory.letters import letters

ROWS = 8
OPTIONS = {"batch_size": 4, "shard_rows": ROWS, "threads": 2}
SKIP = {"on_error": "skip", "max_errors": 0.5}


def _nan_for(index):
  """Keys that are NaN for one picture."""

  def apply(params, batch):
    x = pictures.project(params, batch)
    bad = (batch == pictures.pixels(index)[None]).all(axis=(1, 2, 3))
    return jnp.where(bad[:, None], jnp.nan, x)

  return dataclasses.replace(pictures.encoder(), apply=apply)


def _job(folder, items, encoder=None, values=None, **changes):
  options = OPTIONS | SKIP | changes
  encoder = encoder or pictures.encoder()
  values = [letters()] if values is None else values
  artifact = embed.table_artifact(
    folder, items, encoder, values, options["shard_rows"]
  )
  return embed.EmbedJob(artifact, items, encoder, values, **options)


def _embed(*args, **kwargs):
  job = _job(*args, **kwargs)
  jobs.run(job)
  return table.Table(job.artifact.folder)


def _bytes(folder):
  return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}


@pytest.fixture
def images():
  return pictures.Pictures()


@pytest.fixture
def memory(images):
  return pictures.source(images)


def _without(lost):
  return [i for i in range(N) if i not in lost]


def test_what_cannot_be_embedded_is_left_out_and_listed_with_why(
  tmp_path, memory, images, capsys
):
  whole = _embed(tmp_path / "whole", memory)
  images.broken[2] = OSError("file is\ntruncated at 0x7f3a")
  images.broken[20] = UserError("a.svg: install another renderer.")
  memory.texts[9] = "\0"
  found = _embed(tmp_path / "skip", memory, _nan_for(13))
  left = _without({2, 9, 13, 20})
  assert found.column("id") == [memory.ids[i] for i in left]
  np.testing.assert_array_equal(found.keys(), whole.keys()[left])
  np.testing.assert_array_equal(
    found.values("letters"), whole.values("letters")[left]
  )
  listed = list(dead_letters.read(found.folder))
  assert listed == [
    {
      "id": f"item/{i}",
      "place": f"tiny memory, item {i}",
      "reason": reason,
      "unit": unit,
    }
    for i, reason, unit in [
      (2, "OSError: file is truncated", "00000"),
      (
        9,
        "letters cannot take its text: ValueError: no token for this",
        "00001",
      ),
      (
        13,
        "its key is not finite in float16; check the encoder's weights",
        "00001",
      ),
      (20, "a.svg: install another renderer.", "00002"),
    ]
  ]
  assert found.rows + len(listed) == len(memory)
  assert found.info["failed"] == 4 and whole.info.get("failed", 0) == 0
  assert found.info["cut_texts"]["letters"]["total"] == N - 4
  assert "4 of 23 items cannot be embedded, and are left" in (
    capsys.readouterr().err
  )
  assert not (whole.folder / dead_letters.NAME).exists()


def test_processes_leave_out_the_same(tmp_path, memory, images):
  images.broken[2] = OSError("truncated")
  first = _embed(tmp_path / "a", memory)
  second = _embed(tmp_path / "b", memory, processes=1)
  assert sum(images.loads) == N  # none of the second in this process
  assert _bytes(first.folder) == _bytes(second.folder)


@pytest.mark.parametrize("what", ["image", "text", "key"])
def test_by_default_the_first_one_fails_and_names_the_option(
  tmp_path, memory, images, what
):
  encoder = _nan_for(13) if what == "key" else None
  if what == "image":
    images.broken[13] = OSError("truncated")
  if what == "text":
    memory.texts[13] = "\0"
  with pytest.raises(UserError) as caught:
    _embed(tmp_path, memory, encoder, on_error="fail")
  message = str(caught.value)
  assert "'item/13'" in message and "\n" not in message
  assert "--config.memory.on_error=skip" in message
  assert not (tmp_path / "keys_00001.npy").exists()
  # What is done stays done, and the option helps.
  images.loads = [0] * N
  assert _embed(tmp_path, memory, encoder).rows == N - 1
  assert images.loads[:ROWS] == [0] * ROWS


def test_queries_fail_whatever_the_option_says(tmp_path, images):
  examples = Downstream(
    name="tiny",
    ids=[f"query/{i}" for i in range(N)],
    image=images,
    fingerprint={},
    labels=np.arange(N) % 3,
    splits=["train"] * N,
    class_names=["a", "b", "c"],
  )
  images.broken[3] = OSError("truncated")
  with pytest.raises(UserError, match="'query/3' cannot be read.*remove it.$"):
    _embed(tmp_path, examples, values=[])


def test_too_many_are_refused_and_a_larger_share_redoes_nothing(
  tmp_path, memory, images
):
  for i in (1, 2, 12):
    images.broken[i] = OSError(f"bad {i}")
  with pytest.raises(UserError) as caught:
    _embed(tmp_path, memory, max_errors=0.1)
  message = str(caught.value)
  assert str(tmp_path / dead_letters.NAME) in message and "\n" not in message
  assert "3 of 23 items cannot be embedded, a share of 0.13" in message
  assert "item/1: OSError: bad 1; item/2: OSError: bad 2" in message
  assert len(list(dead_letters.read(tmp_path))) == 3
  images.loads = [0] * N
  with pytest.raises(UserError, match="an earlier run left them out .*=skip"):
    _embed(tmp_path, memory, on_error="fail")
  assert _embed(tmp_path, memory, max_errors=0.14).rows == N - 3
  assert sum(images.loads) == 0


def test_a_shard_that_loses_all_rows_is_none(tmp_path, memory, images):
  for i in range(ROWS, 2 * ROWS):
    images.broken[i] = OSError("bad")
  found = _embed(tmp_path / "a", memory, batch_size=0)
  left = _without(range(ROWS, 2 * ROWS))
  assert found.column("id") == [memory.ids[i] for i in left]
  assert found.keys().shape == (len(left), pictures.D)
  assert list(found.shards) == ["00000", "00002"]
  found.verify()
  # Such a table is a memory like any other.
  assert stored.load(str(found.folder)).ids == found.column("id")
  for i in range(N):
    images.broken[i] = OSError("bad")
  with pytest.raises(UserError, match="nothing to search in"):
    _embed(tmp_path / "b", memory, max_errors=1.0)


def test_units_in_any_order_and_after_a_kill_give_the_same_bytes(
  tmp_path, memory, images
):
  images.broken[2] = images.broken[9] = OSError("bad")
  first = _embed(tmp_path / "a", memory)
  job = _job(tmp_path / "b", memory)
  job.artifact.start()
  assert job.units("embed") == ["00000", "00001", "00002"]
  assert [job.size("embed", u) for u in job.units("embed")] == [8, 8, 7]
  done = []
  job.do("embed", "00002", done.append)
  job.do("embed", "00001", done.append)
  assert sum(done) == 15
  job.close()
  # A killed run has recorded letters of a shard, and not the shard.
  dead_letters.record(job.artifact, "00000", 7, [("item/5", "", "stale")])
  images.loads = [0] * N
  again = _job(tmp_path / "b", memory)
  assert again.units("embed") == ["00000"]
  jobs.run(again)
  assert images.loads == [1] * ROWS + [0] * (N - ROWS)
  assert _bytes(first.folder) == _bytes(tmp_path / "b")


def test_items_that_are_not_accounted_for_are_noticed(tmp_path, memory):
  job = _job(tmp_path, memory)
  job.artifact.start()
  for unit in job.units("embed"):
    job.do("embed", unit, lambda _: None)
  dead_letters.record(job.artifact, "00000", ROWS - 1, [])
  with pytest.raises(UserError, match="22 rows and 0 .* not all 23 items"):
    job.finish()
  job.close()


def test_a_wrong_option_is_refused(tmp_path, memory):
  with pytest.raises(UserError, match="on_error=ignore: not fail or skip"):
    _embed(tmp_path, memory, on_error="ignore")


class TestStored:
  """Of embeddings that exist already some are NaN."""

  def test_they_are_left_out(self, tmp_path):
    folder = folders.write(tmp_path / "laion", {0: 4, 1: 5})
    for name, row in (("img_emb/img_emb_1", 3), ("text_emb/text_emb_0", 0)):
      array = np.load(folder / f"{name}.npy")
      array[row] = np.nan
      np.save(folder / f"{name}.npy", array)
    laion = stored.load(str(folder))
    encoder = stand_ins.key_encoder([laion], None)
    values = [stand_ins.values("text", laion)]
    options = {"encoder": encoder, "values": values}
    with pytest.raises(UserError, match="img_emb_1.npy.*row 3|text_emb_0"):
      _embed(tmp_path / "fail", laion, on_error="fail", **options)
    found = _embed(tmp_path / "skip", laion, **options)
    left = [1, 2, 3, 4, 5, 6, 8]
    assert found.column("id") == [laion.ids[i] for i in left]
    keys = np.concatenate([folders.keys(0, 4), folders.keys(1, 5)])
    np.testing.assert_array_equal(found.keys(), keys[left])
    first, second = dead_letters.read(found.folder)
    assert first["reason"].startswith("its value of text, in ")
    assert second["id"] == laion.ids[7]


class TestRetry:
  @pytest.fixture
  def folder(self, tmp_path, memory, images):
    images.broken[9] = OSError("no such disk")
    return _embed(tmp_path / "memory", memory).folder

  def test_gives_what_there_would_be_without_faults(
    self, tmp_path, folder, memory, images
  ):
    images.broken.clear()
    images.loads = [0] * N
    assert dead_letters.retry(folder) == 1
    with pytest.raises(UserError, match="not finished"):
      table.Table(folder)
    _embed(folder, memory)
    assert [i for i in range(N) if images.loads[i]] == list(range(8, 16))
    whole = _embed(tmp_path / "whole", memory)
    assert _bytes(folder) == _bytes(whole.folder)
    assert dead_letters.retry(folder) == 0
    assert table.Table(folder).rows == N

  def test_what_fails_again_is_listed_again(self, folder, memory):
    before = _bytes(folder)
    dead_letters.retry(folder)
    _embed(folder, memory)
    assert _bytes(folder) == before

  def test_a_damaged_or_edited_table_is_not_reopened(self, folder, flip_bit):
    shutil.copy(folder / "keys_00000.npy", folder / "copy")
    flip_bit(folder / "keys_00000.npy")
    with pytest.raises(UserError, match="keys_00000.npy: its bytes are not"):
      dead_letters.retry(folder)
    (folder / "copy").rename(folder / "keys_00000.npy")
    (folder / "edits.json").write_text("{}")
    with pytest.raises(UserError, match="edits.json: the table was edited"):
      dead_letters.retry(folder)
    (folder / "edits.json").unlink()
    path = folder / dead_letters.NAME
    path.write_text(path.read_text() + "{")
    with pytest.raises(UserError, match="dead_letters.jsonl line 2: not JSON"):
      dead_letters.retry(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["complete"]
    with pytest.raises(UserError, match="missing; name the folder of a table"):
      dead_letters.retry(folder / "nothing")
