"""The main job on a memory that is edited, and by workers of a cluster.

Nothing is trained again: the same weights predict from what the memory says.
"""

import functools
import json
import subprocess

import numpy as np
import pytest

from retrieval_aug import main
from retrieval_aug.common.errors import UserError
from retrieval_aug.memory import __main__ as command
from retrieval_aug.memory import edits, pipeline
from tests.end_to_end import embeddings

# See test_embeddings.py.
pytestmark = pytest.mark.filterwarnings(
  "ignore::DeprecationWarning", "ignore::ResourceWarning"
)


@pytest.fixture
def data(tmp_path):
  return embeddings.write(tmp_path)


@pytest.fixture
def config(data):
  return embeddings.config(data, embeddings=str(data / "laion"))


def _bytes(workdir, pattern):
  return {p.name: p.read_bytes() for p in sorted(workdir.glob(pattern))}


def _ids(workdir):
  table = embeddings_table(workdir)
  return table.column("id"), np.array(table.column("text"))


def embeddings_table(workdir):
  return edits.memory(workdir / "memory")


def _run(config, workdir):
  return main.run(config, workdir, list(main.STAGES))


class TestAnEdit:
  def test_is_followed_by_the_same_weights(self, data, config, capsys):
    workdir = data / "work"
    _run(config, workdir)
    before = (workdir / "results.csv").read_bytes()
    weights = _bytes(workdir, "runs/*/*/params.npz")
    lists = _bytes(workdir, "neighbors/*.tfrecord")
    ids, texts = _ids(workdir)
    assert len(weights) and len(lists)

    # Whatever tells of one class goes.
    gone = [i for i, t in zip(ids, texts) if t == "one of class 1"]
    file = data / "gone.txt"
    file.write_text("\n".join(gone))
    assert command.main(["remove", str(workdir), f"--ids={file}"]) == 0
    capsys.readouterr()
    text = _run(config, workdir)
    said = capsys.readouterr().err
    assert "the memory was edited; only queries that this concerns" in said
    assert "embed: nothing to do" in said and "train: nothing to do" in said
    assert _bytes(workdir, "runs/*/*/params.npz") == weights
    assert _bytes(workdir, "neighbors/*.tfrecord") != lists
    assert (workdir / "results.csv").read_bytes() != before
    assert "recall@11 1.0000" in text
    _run(config, workdir)
    assert "search: nothing to do" in capsys.readouterr().err

    # And comes back, and with it every result.
    assert command.main(["restore", str(workdir), f"--ids={file}"]) == 0
    _run(config, workdir)
    assert "train: nothing to do" in capsys.readouterr().err
    assert _bytes(workdir, "runs/*/*/params.npz") == weights
    assert _bytes(workdir, "neighbors/*.tfrecord") == lists
    assert (workdir / "results.csv").read_bytes() == before
    assert not (workdir / "neighbors_before").exists()

  def test_of_an_edit_goes_on_where_it_was_killed(
    self, data, config, monkeypatch
  ):
    workdir = data / "work"
    stages = ["embed", "search"]
    main.run(config, workdir, stages)
    ids, _ = _ids(workdir)
    edits.remove(workdir / "memory", ids=ids[:9])

    def dies(*_):
      raise KeyboardInterrupt

    with monkeypatch.context() as patch:
      patch.setattr("retrieval_aug.memory.neighbors.write_shard", dies)
      with pytest.raises(KeyboardInterrupt):
        main.run(config, workdir, stages)
    assert (workdir / "neighbors_before").exists()
    # Edited once more, before it could be finished.
    edits.remove(workdir / "memory", ids=ids[20:25])
    main.run(config, workdir, stages)
    found = _bytes(workdir, "neighbors/*.tfrecord")
    other = data / "other"
    main.run(config, other, ["embed"])
    edits.remove(other / "memory", ids=[*ids[:9], *ids[20:25]])
    main.run(config, other, ["search"])
    assert _bytes(other, "neighbors/*.tfrecord") == found
    for name in ("rows", "keys", "labels"):
      one, two = (w / "working_set" / f"{name}.npy" for w in (workdir, other))
      assert one.read_bytes() == two.read_bytes()

  def test_of_a_run_that_is_not_finished_is_refused(
    self, data, config, monkeypatch
  ):
    workdir = data / "work"

    def dies(*_):
      raise KeyboardInterrupt

    with monkeypatch.context() as patch:
      patch.setattr("retrieval_aug.training.runs.save_params", dies)
      with pytest.raises(KeyboardInterrupt):
        _run(config, workdir)
    ids, _ = _ids(workdir)
    edits.remove(workdir / "memory", ids=ids[:9])
    with pytest.raises(UserError, match="began before the memory was edited"):
      _run(config, workdir)
    edits.restore(workdir / "memory", ids=ids[:9])
    _run(config, workdir)


class TestBeam:
  @pytest.mark.parametrize(
    "options",
    [
      ["--runner=FnApiRunner"],
      ["--direct_running_mode=multi_processing", "--direct_num_workers=2"],
      ["--runner=DaskRunner", "--dask_workers=2"],
    ],
    ids=["in_memory", "multi_processing", "dask"],
  )
  def test_finds_what_the_plain_loop_finds(self, data, config, options):
    pytest.importorskip("apache_beam", reason="of the extra [scale]")
    if "DaskRunner" in options[0]:
      pytest.importorskip("distributed", reason="of the extra [scale]")
    stages = ["embed", "search"]
    with config.unlocked():
      config.search.update({"index_rows": 20, "groups": 3})
      config.search.shard_rows = 13
    main.run(config, data / "plain", stages)
    runner = lambda job, recipe: pipeline.run(recipe, options, job)
    main.run(config, data / "beam", stages, runner)
    for pattern in ("neighbors/*.tfrecord", "memory/*.parquet"):
      found = _bytes(data / "beam", pattern)
      assert found and found == _bytes(data / "plain", pattern)
    rows = functools.partial(_bytes, pattern="working_set/*.npy")
    assert rows(data / "beam") == rows(data / "plain")
    info = json.loads((data / "beam/neighbors/manifest.json").read_text())
    assert info["info"]["index_shards"] == 5


@pytest.fixture
def small_disk(tmp_path):
  """A file system of 48 kB, and a function that gives it more."""
  folder = tmp_path / "disk"
  folder.mkdir()
  mount = lambda *options: subprocess.run(
    ["mount", "-t", "tmpfs", "-o", *options, "tmpfs", folder],
    capture_output=True,
  )
  try:
    done = mount("size=48k")
  except OSError:
    pytest.skip("there is no mount command")
  if done.returncode:
    pytest.skip("mounting a file system is not permitted here")
  yield folder, lambda: mount("remount,size=20m")
  subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_told_and_nothing_is_lost(data, config, small_disk):
  workdir, enlarge = small_disk
  stages = ["embed", "search"]
  with pytest.raises(UserError) as caught:
    main.run(config, workdir, stages)
  assert "no space left (No space left on device); nothing that was" in str(
    caught.value
  )
  assert "give the same command again" in str(caught.value)
  enlarge()
  main.run(config, workdir, stages)
  main.run(config, data / "other", stages)
  pattern = "neighbors/*.tfrecord"
  assert _bytes(workdir, pattern) == _bytes(data / "other", pattern)
