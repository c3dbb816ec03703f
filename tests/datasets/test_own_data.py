"""One's own images, from generated files, as a new user would list them."""

import collections
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from retrieval_aug import datasets
from retrieval_aug.common import manifest
from retrieval_aug.common.errors import UserError
from retrieval_aug.memory import exclusion, table

COLORS = {"red": (250, 0, 0), "dark_blue": (0, 0, 90), "green": (0, 250, 0)}
SPLITS = ("train", "train", "val", "test")


def _save(path, color):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new("RGB", (6, 4), color).save(path)


@pytest.fixture
def photos(tmp_path):
  """A manifest of four images in each of three classes, and a memory's."""
  folder = tmp_path / "photos"
  lines, memory = ["image,label,split"], ["image,text"]
  for name, color in COLORS.items():
    for i, split in enumerate(SPLITS):
      _save(folder / "images" / f"{name}{i}.png", color)
      lines.append(f"images/{name}{i}.png,{name},{split}")
    _save(folder / "web" / f"{name}.png", color)
    memory.append(f'web/{name}.png,"{name}, as it is"')
  (folder / "data.csv").write_text("\n".join(lines) + "\n")
  (folder / "memory.csv").write_text("\n".join(memory) + "\n")
  return folder


@pytest.fixture
def classes(tmp_path):
  """A folder of class folders, ten images each, with what lies about."""
  folder = tmp_path / "classes"
  for name, color in COLORS.items():
    for i in range(10):
      _save(folder / name / f"{i}.png", color)
  (folder / "red" / "inner").mkdir()
  shutil.move(folder / "red" / "9.png", folder / "red" / "inner" / "9.PNG")
  (folder / ".cache").mkdir()
  (folder / "red" / ".DS_Store").touch()
  return folder


def _load(folder, /, memory=None, **options):
  """Examples, and the memory; `memory` are options of that one."""
  given = _texts({"manifest": folder / "data.csv"} | options)
  downstream, own = datasets.load("own_data", **given)
  assert own is None
  if memory is None and (folder / "memory.csv").exists():
    memory = {"manifest": folder / "memory.csv"}
  return downstream, datasets.load_memory(
    downstream, own, **_texts(memory or {})
  )


def _texts(options):
  return {
    n: str(v) if isinstance(v, os.PathLike) else v for n, v in options.items()
  }


def _edit(path, before, after):
  text = path.read_text()
  assert before in text
  path.write_text(text.replace(before, after, 1))


class TestManifests:
  def test_give_examples_and_memory(self, photos):
    downstream, memory = _load(photos)
    assert downstream.class_names == ["dark_blue", "green", "red"]
    assert downstream.ids[:2] == ["images/red0.png", "images/red1.png"]
    assert downstream.labels.tolist() == [2] * 4 + [0] * 4 + [1] * 4
    assert tuple(downstream.splits) == SPLITS * 3
    assert memory.ids == [f"web/{name}.png" for name in COLORS]
    assert memory.texts[0] == "red, as it is"
    assert memory.columns["source"] == ["memory"] * 3
    for items, index in ((downstream, 4), (memory, 1)):
      image = items.image(index)
      assert image.shape == (4, 6, 3) and image.dtype == np.uint8
      assert (image == COLORS["dark_blue"]).all()

  def test_optional_columns_are_kept(self, photos):
    rows = [
      {
        "image": f"web/{name}.png",
        "text": name,
        "id": f"m{i}",
        "source": "web",
        "license": "MIT",
        "label": name,
        "group": "one",
      }
      for i, name in enumerate(COLORS)
    ]
    path = photos / "memory.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    _, memory = _load(photos, {"manifest": path})
    assert memory.ids == ["m0", "m1", "m2"]
    assert memory.columns == {
      "source": ["web"] * 3,
      "license": ["MIT"] * 3,
      "label": list(COLORS),
      "group": ["one"] * 3,
    }

  def test_numbers_are_classes_in_their_order(self, photos):
    text = (photos / "data.csv").read_text()
    for name, number in (("red", "10"), ("dark_blue", "9"), ("green", "0")):
      text = text.replace(f",{name},", f",{number},")
    (photos / "data.csv").write_text(text)
    assert _load(photos)[0].class_names == ["0", "9", "10"]

  def test_several_files_have_one_naming(self, photos):
    (photos / "more").mkdir()
    shutil.copytree(photos / "images", photos / "more" / "images")
    shutil.copy(photos / "data.csv", photos / "more")
    downstream, _ = _load(photos, manifest=f"{photos}/**/data.csv")
    assert len(downstream) == 24
    assert "more/images/red0.png" in downstream.ids

  def test_other_names_of_splits_are_known(self, photos):
    for _ in COLORS:
      _edit(photos / "data.csv", ",val\n", ",Validation\n")
    assert tuple(_load(photos)[0].splits) == SPLITS * 3

  @pytest.mark.parametrize(
    "before, after, message",
    [
      ("red1.png,red,", "red1.png,,", "line 3: the label is empty"),
      ("images/red1.png", "", "line 3: the image is empty"),
      ("red1", "red0", "line 3: .*red0.png' stands in .*line 2 already"),
      ("/red1", "/rod1", "line 3: there is no file .*did you mean red1.png"),
      ("images/red1", "x/red1", "no file .*begins at the folder of its"),
      ("images/red1", "https://x.org/red1", "line 3: .*is an address"),
      (
        ",train\n",
        ",trian\n",
        "line 2: unknown split 'trian'; did you mean tr",
      ),
      (",train\n", ",\n", "line 2: unknown split ''; use train, val or test"),
      ("image,", "picture,", "no column 'image'"),
      ("green3.png,green", "green3.png,grn", "'grn' has no training example"),
    ],
  )
  def test_a_wrong_row_is_named(self, photos, before, after, message):
    _edit(photos / "data.csv", before, after)
    with pytest.raises(UserError, match=message) as caught:
      _load(photos)
    assert "\n" not in str(caught.value)

  @pytest.mark.parametrize(
    "before, after, message",
    [
      ('"red, as it is"', "", "memory.csv line 2: the text is empty"),
      ('"red, as it is"', '" "', "memory.csv line 2: the text is empty"),
      ("image,text", "image,caption", "rename 'caption' to 'text'"),
      ("web/red", "web/rad", "memory.csv line 2: there is no file"),
      ("web/green", "web/red", "line 4: .*an image has several texts, give"),
    ],
  )
  def test_a_wrong_row_of_the_memory_is_named(
    self, photos, before, after, message
  ):
    _edit(photos / "memory.csv", before, after)
    with pytest.raises(UserError, match=message):
      _load(photos)

  def test_an_unreadable_image_is_named_with_its_line(self, photos):
    (photos / "images" / "red1.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"data.csv line 3: .*red1.png: cannot"):
      _load(photos)[0].image(1)


class TestIdentity:
  def test_moves_with_the_folder(self, photos, tmp_path):
    before = [items.fingerprint for items in _load(photos)]
    moved = shutil.move(photos, tmp_path / "moved")
    assert [x.fingerprint for x in _load(moved)] == before

  def test_is_another_for_a_changed_image_row_or_text(self, photos):
    downstream, memory = (x.fingerprint for x in _load(photos))
    _edit(photos / "memory.csv", "green,", "Green,")
    assert _load(photos)[0].fingerprint == downstream
    assert _load(photos)[1].fingerprint != memory
    os.utime(photos / "images" / "red0.png", (5, 5))
    changed = _load(photos)[0].fingerprint
    assert changed != downstream
    _edit(photos / "data.csv", "red3.png,red", "red3.png,green")
    assert _load(photos)[0].fingerprint != changed

  def test_by_content_survives_a_copy(self, photos, tmp_path):
    load = lambda folder: _load(
      folder,
      {"manifest": folder / "memory.csv", "digest": "content"},
      digest="content",
    )
    before = [x.fingerprint for x in load(photos)]
    shutil.copytree(photos, tmp_path / "copy", copy_function=shutil.copyfile)
    after = load(tmp_path / "copy")
    assert [x.fingerprint for x in after] == before

  def test_an_example_in_the_memory_has_its_group_there(self, photos, capsys):
    memory = photos / "memory.csv"
    memory.write_text(
      "image,text,id\nweb/red.png,a,m0\nimages/red0.png,b,m1\n"
      "images/red3.png,c,m2\n"
    )
    _, source = _load(photos)
    assert source.columns["group"] == [
      "m0",
      "images/red0.png",
      "images/red3.png",
    ]
    assert (
      "1 images of val and test are in the memory" in capsys.readouterr().err
    )
    # Without ids it is called as there, so that a union has it once.
    named = "image,text\nweb/red.png,a\nimages/red1.png,b\n"
    (photos / "named.csv").write_text(named)
    text = (photos / "data.csv").read_text().split()
    lines = [f"{line},{i}" for i, line in enumerate(text[1:])]
    (photos / "ids.csv").write_text("\n".join([f"{text[0]},id", *lines]))
    _, numbered = _load(
      photos, {"manifest": photos / "named.csv"}, manifest=photos / "ids.csv"
    )
    assert numbered.ids == ["web/red.png", "1"]
    _edit(memory, "m1", "images/red1.png")
    with pytest.raises(UserError, match="line 3: the id .* an id means one im"):
      _load(photos)

  def test_groups_that_disagree_are_refused(self, photos):
    (photos / "memory.csv").write_text(
      "image,text,group\nimages/red0.png,a,mine\n"
    )
    with pytest.raises(UserError, match="the group 'mine' here, and 'images/r"):
      _load(photos)

  def test_the_search_hides_what_is_an_example(self, photos, tmp_path):
    """By way of the tables: the groups are those that `near_copies` reads."""
    (photos / "memory.csv").write_text(
      "image,text,id\nweb/red.png,a,m0\nimages/red1.png,b,m1\n"
      "images/red3.png,c,m2\n"
    )
    downstream, memory = _load(photos)
    columns = {"id": downstream.ids, "split": downstream.splits}
    tables = []
    for name, metadata in (
      ("queries", columns | {"group": downstream.groups}),
      ("memory", {"id": memory.ids, **memory.columns}),
    ):
      artifact = manifest.Artifact(tmp_path / name, table.KIND, {})
      artifact.start()
      keys = np.ones((len(metadata["id"]), 2))
      table.write_shard(artifact, 0, keys=keys, values={}, metadata=metadata)
      artifact.finish(["00000"], {"key_dims": 2, "value_dims": {}})
      tables.append(table.Table(tmp_path / name))
    near_copies = exclusion.Exclusion(*tables)
    hidden = near_copies.groups(range(tables[1].rows)).forbidden()
    # The second training image, and not the test image: that is a leak.
    assert np.argwhere(hidden).tolist() == [[1, 1]]


class TestFolders:
  def test_are_dealt_class_by_class(self, classes, capsys):
    downstream, memory = _load(
      classes, manifest="", folder=classes, val_fraction=0.1, test_fraction=0.2
    )
    assert downstream.class_names == ["dark_blue", "green", "red"]
    assert "red/inner/9.PNG" in downstream.ids
    assert collections.Counter(zip(downstream.labels, downstream.splits)) == {
      (label, split): n
      for label in range(3)
      for split, n in (("train", 7), ("val", 1), ("test", 2))
    }
    assert "of 30 images, 6 become it" in capsys.readouterr().err
    kept = [
      i for i, s in zip(downstream.ids, downstream.splits) if s == "train"
    ]
    assert memory.ids == memory.columns["group"] == kept
    assert memory.texts[0] == "a photo of dark blue"
    assert memory.columns["label"][0] == "dark_blue"
    assert (memory.image(0) == COLORS["dark_blue"]).all()
    other, _ = _load(
      classes,
      **{"manifest": "", "folder": classes, "seed": 1},
      **{"val_fraction": 0.1, "test_fraction": 0.2},
    )
    assert other.ids == downstream.ids and other.splits != downstream.splits

  def test_of_splits_are_taken_as_they_are(self, classes, tmp_path):
    folder = tmp_path / "split"
    for split in ("train", "valid", "test"):
      shutil.copytree(classes, folder / split)
    downstream, memory = _load(folder, manifest="", folder=folder)
    assert collections.Counter(downstream.splits) == dict.fromkeys(
      ("train", "val", "test"), 30
    )
    assert downstream.ids[0] == "test/dark_blue/0.png"
    assert len(memory) == 30
    (folder / "extra").mkdir()
    with pytest.raises(UserError, match="and also 'extra', which is none"):
      _load(folder, manifest="", folder=folder)

  def test_a_validation_split_can_be_dealt_alone(self, classes, tmp_path):
    folder = tmp_path / "split"
    for split in ("train", "test"):
      shutil.copytree(classes, folder / split)
    given = {"manifest": "", "folder": folder}
    with pytest.raises(UserError, match="no split 'val'; .*val_fraction=0.2"):
      _load(folder, **given)
    downstream, _ = _load(folder, **given, val_fraction=0.1, test_fraction=0.5)
    assert collections.Counter(downstream.splits) == {
      "train": 27,
      "val": 3,
      "test": 30,
    }

  def test_what_is_no_such_folder_is_told(self, classes, tmp_path, capsys):
    load = lambda folder: _load(
      tmp_path, manifest="", folder=folder, val_fraction=0.1, test_fraction=0.1
    )
    with pytest.raises(UserError, match="no such folder"):
      load(tmp_path / "none")
    with pytest.raises(UserError, match="one class, 'classes'; .*two or more"):
      load(tmp_path)
    with pytest.raises(UserError, match="no images in folders of classes"):
      load(classes / "red" / "inner")
    (classes / "red" / "notes.txt").touch()
    load(classes)
    assert "1 files that are no images by their name" in capsys.readouterr().err

  def test_a_link_to_a_folder_above_ends(self, classes):
    (classes / "red" / "up").symlink_to(classes / "red")
    downstream, _ = _load(
      classes, manifest="", folder=classes, val_fraction=0.1, test_fraction=0.2
    )
    assert len(downstream) == 30


class TestMemories:
  def test_both_are_the_manifest_and_the_training_images(self, photos):
    path = photos / "memory.csv"
    path.write_text("image,text,license\nimages/red0.png,a cherry,MIT\n")
    options = {"sources": "manifest,train", "text": "{label}"}
    _, memory = _load(photos, {"manifest": path, **options})
    assert memory.ids[:2] == ["images/red0.png", "images/red1.png"]
    assert len(memory) == 6
    assert memory.texts[:3] == ["a cherry", "red", "dark blue"]
    assert memory.columns["source"] == ["memory"] + ["train"] * 5
    assert memory.columns["license"] == ["MIT"] + [""] * 5
    assert memory.columns["label"][:2] == ["", "red"]
    assert (memory.image(2) == COLORS["dark_blue"]).all()

  @pytest.mark.parametrize(
    "options, message",
    [
      ({"manifest": ""}, "give one of --config.dataset.manifest=FILE and"),
      ({"folder": "x"}, "give one of"),
      ({"val_fraction": 1.0}, "val_fraction=1.0: not from 0 to below 1"),
      ({"digest": "md5"}, "config.dataset.digest=md5: not one of"),
      ({"manifests": "x"}, "no option 'manifests'; did you mean 'manifest'"),
    ],
  )
  def test_options_without_sense_are_refused(self, photos, options, message):
    with pytest.raises(UserError, match=message):
      _load(photos, **options)

  def test_fractions_that_leave_nothing_are_refused(self, classes):
    with pytest.raises(UserError, match="0.5 and 0.5: nothing is left"):
      _load(
        classes,
        **{"manifest": "", "folder": classes},
        **{"val_fraction": 0.5, "test_fraction": 0.5},
      )
