"""An artifact is used only if it is whole and made from the same inputs."""

import json

import pytest

from retrieval_aug.common import files, manifest
from retrieval_aug.common.errors import UserError

INPUTS = {"encoder": {"name": "lite0", "sizes": (2, 3)}, "rows": 7}


def _artifact(tmp_path, kind="embedding table", **changes):
  return manifest.Artifact(tmp_path / "made", kind, INPUTS | changes)


def _shard(artifact, name, data, info=None):
  artifact.folder.mkdir(exist_ok=True)
  (artifact.folder / f"{name}.bin").write_bytes(data)
  artifact.record(name, [f"{name}.bin"], info)


@pytest.fixture
def made(tmp_path):
  """A finished artifact of two shards."""
  artifact = _artifact(tmp_path)
  artifact.start()
  _shard(artifact, "00000", b"first", {"rows": 5})
  _shard(artifact, "00001", b"second", {"rows": 2})
  artifact.finish(["00000", "00001"], {"key_dims": 3})
  return artifact


def _refusal(call):
  with pytest.raises(UserError) as caught:
    call()
  message = str(caught.value)
  assert "\n" not in message
  return message


def test_fingerprint_ignores_the_order_of_keys_and_kind_of_sequence():
  assert manifest.fingerprint({"a": (1, 2), "b": 3}) == manifest.fingerprint(
    {"b": 3, "a": [1, 2]}
  )


def test_fingerprint_is_kept():
  """Golden: another value would make every finished artifact unusable."""
  assert manifest.fingerprint({"a": [1, 2.5, None]}) == "d975df8927b51788"


def test_fingerprint_of_an_artifact_depends_on_kind_inputs_and_format(
  tmp_path, monkeypatch
):
  prints = {
    _artifact(tmp_path).fingerprint,
    _artifact(tmp_path, kind="working set").fingerprint,
    _artifact(tmp_path, rows=11).fingerprint,
  }
  monkeypatch.setattr(manifest, "FORMAT_VERSION", 99)
  prints.add(_artifact(tmp_path).fingerprint)
  assert len(prints) == 4


def test_differences_are_named_with_dots():
  old = {"a": {"b": 1, "c": "same"}, "gone": 2}
  new = {"a": {"b": 3, "c": "same"}, "come": [5]}
  assert manifest.differences(old, new) == [
    "a.b: 1 -> 3",
    "come: (absent) -> [5]",
    "gone: 2 -> (absent)",
  ]


def test_differences_of_equal_values_are_none():
  assert manifest.differences(INPUTS, dict(INPUTS)) == []


def test_a_long_difference_is_cut():
  (line,) = manifest.differences({"a": "x" * 500}, {"a": 1})
  assert len(line) < 80 and line.endswith("... -> 1")


def test_nothing_there_is_not_complete(tmp_path):
  assert not _artifact(tmp_path).is_complete()


def test_a_started_artifact_is_not_complete_but_has_an_owner(tmp_path):
  artifact = _artifact(tmp_path)
  artifact.start()
  (artifact.folder / "keys.npy").write_bytes(b"keys")
  assert not artifact.is_complete()
  message = _refusal(_artifact(tmp_path, rows=11).is_complete)
  assert "rows: 7 -> 11" in message


def test_a_stage_that_failed_before_it_wrote_anything_owns_nothing(tmp_path):
  artifact = _artifact(tmp_path)
  with files.lock(artifact.folder):
    artifact.start()
  other = _artifact(tmp_path, rows=11)
  assert not other.is_complete()
  other.start()
  (other.folder / "keys.npy").write_bytes(b"keys")
  assert not other.is_complete()
  assert "rows: 11 -> 7" in _refusal(artifact.is_complete)


def test_a_finished_artifact_is_complete_and_verifies(made):
  assert made.is_complete()
  made.verify()


def test_other_inputs_are_refused_and_named_with_the_remedy(tmp_path, made):
  other = _artifact(tmp_path, encoder={"name": "lite2", "sizes": (2, 3)})
  before = (made.folder / "manifest.json").read_bytes()
  message = _refusal(other.is_complete)
  assert str(made.folder / "manifest.json") in message
  assert "embedding table made from other inputs" in message
  assert "encoder.name: lite0 -> lite2" in message
  assert "sizes" not in message
  assert f"delete {made.folder} to have it made again" in message
  assert "--workdir" in message
  assert (made.folder / "manifest.json").read_bytes() == before


def test_more_than_four_differences_are_counted(tmp_path, made):
  other = _artifact(tmp_path, **{f"new_{i}": i for i in range(7)})
  message = _refusal(other.is_complete)
  assert message.count("(absent) ->") == 4 and "and 3 more" in message


def test_another_kind_is_refused(tmp_path, made):
  message = _refusal(_artifact(tmp_path, kind="working set").is_complete)
  assert "kind: embedding table -> working set" in message


def test_another_format_version_is_refused(made, monkeypatch):
  version = manifest.FORMAT_VERSION
  monkeypatch.setattr(manifest, "FORMAT_VERSION", version + 1)
  message = _refusal(made.is_complete)
  assert f"format_version: {version} -> {version + 1}" in message


@pytest.mark.parametrize("text", ["[1, 2]", '{"name": "of another program"}'])
def test_a_foreign_manifest_is_refused(made, text):
  (made.folder / "manifest.json").write_text(text)
  message = _refusal(made.is_complete)
  assert "not a manifest of ours" in message and "delete" in message


def test_a_cut_manifest_is_refused(made, truncate):
  truncate(made.folder / "manifest.json")
  assert "manifest.json: cannot be read as JSON" in _refusal(made.is_complete)


def test_a_truncated_file_is_named_with_its_sizes_and_the_remedy(
  made, truncate
):
  truncate(made.folder / "00001.bin", 2)
  message = _refusal(made.verify)
  assert message == (
    f"{made.folder / '00001.bin'}: holds 4 bytes where its manifest says 6: "
    f"cut short or overwritten; delete {made.folder} to have it made again."
  )


def test_a_flipped_bit_is_named_with_the_remedy(made, flip_bit):
  flip_bit(made.folder / "00000.bin")
  message = _refusal(made.verify)
  assert message == (
    f"{made.folder / '00000.bin'}: its bytes are not those that its manifest "
    f"records: damaged or overwritten; delete {made.folder} to have it made "
    "again."
  )


def test_a_missing_file_is_named_with_the_remedy(made):
  (made.folder / "00000.bin").unlink()
  assert _refusal(made.verify) == (
    f"{made.folder / '00000.bin'}: missing; delete {made.folder} to have it "
    "made again."
  )


def test_records_survive_a_killed_stage(tmp_path):
  first = _artifact(tmp_path)
  first.start()
  _shard(first, "00000", b"first", {"rows": 5})
  second = _artifact(tmp_path)
  second.start()
  assert second.recorded("00000")["info"] == {"rows": 5}
  assert second.recorded("00001") is None


def test_a_recorded_shard_that_was_damaged_since_is_refused(tmp_path, flip_bit):
  artifact = _artifact(tmp_path)
  artifact.start()
  _shard(artifact, "00000", b"first")
  flip_bit(artifact.folder / "00000.bin")
  message = _refusal(lambda: artifact.recorded("00000"))
  assert "00000.bin" in message and "damaged" in message


def test_finish_gathers_the_records_in_order(made):
  shards = made.shards()
  assert list(shards) == ["00000", "00001"]
  assert [s["info"]["rows"] for s in shards.values()] == [5, 2]
  assert shards["00001"]["files"]["00001.bin"]["bytes"] == 6
  assert made.info() == {"key_dims": 3}
  assert not (made.folder / ".shards").exists()


def test_what_a_kill_at_the_end_of_finish_left_behind_is_deleted(
  tmp_path, monkeypatch
):
  artifact = _artifact(tmp_path)
  artifact.start()
  _shard(artifact, "00000", b"first")
  (artifact.scratch / "part.npy").write_bytes(b"of a shard")
  with monkeypatch.context() as killed:
    killed.setattr(manifest.shutil, "rmtree", lambda *_, **__: None)
    artifact.finish(["00000"])
  assert artifact.scratch.exists()
  assert artifact.is_complete()
  inside = {path.name for path in artifact.folder.iterdir()}
  assert inside == {"00000.bin", "manifest.json"}
  artifact.verify()


def test_finish_without_a_record_is_refused_and_not_complete(tmp_path):
  artifact = _artifact(tmp_path)
  artifact.start()
  _shard(artifact, "00000", b"first")
  message = _refusal(lambda: artifact.finish(["00000", "00001"]))
  assert "00001.json" in message
  assert not artifact.is_complete()


def test_start_leaves_a_finished_manifest_alone(made):
  before = (made.folder / "manifest.json").read_bytes()
  made.start()
  assert (made.folder / "manifest.json").read_bytes() == before


def test_manifest_says_what_it_was_made_from(made):
  found = json.loads((made.folder / "manifest.json").read_text())
  assert found["inputs"] == {
    "encoder": {"name": "lite0", "sizes": [2, 3]},
    "rows": 7,
  }
  assert found["fingerprint"] == made.fingerprint
