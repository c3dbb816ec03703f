"""Images of every mode, written by Pillow; pixels are compared."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, features

from retrieval_aug.common.errors import UserError
from retrieval_aug.encoders import decode as module
from retrieval_aug.encoders import preprocess
from retrieval_aug.encoders.decode import decode

_HEIGHT, _WIDTH = 5, 7


def _pixels(channels, high=256, dtype=np.uint8):
  rng = np.random.default_rng(channels)
  shape = (_HEIGHT, _WIDTH, channels) if channels > 1 else (_HEIGHT, _WIDTH)
  return rng.integers(0, high, shape).astype(dtype)


def _bytes(image, kind="PNG", **options):
  f = io.BytesIO()
  image.save(f, kind, **options)
  return f.getvalue()


def _gray(levels):
  return np.repeat(np.asarray(levels, np.uint8)[:, :, None], 3, 2)


def _on_white(rgba):
  """The exact value, to compare with within a level."""
  rgba = rgba.astype(np.float64)
  alpha = rgba[..., 3:] / 255
  return rgba[..., :3] * alpha + 255 * (1 - alpha)


def test_rgb_is_taken_as_it_is():
  pixels = _pixels(3)
  found = decode(_bytes(Image.fromarray(pixels)))
  assert found.dtype == np.uint8 and found.flags.writeable
  np.testing.assert_array_equal(found, pixels)


def test_gray_has_three_equal_channels():
  pixels = _pixels(1)
  found = decode(_bytes(Image.fromarray(pixels)))
  np.testing.assert_array_equal(found, _gray(pixels))


def test_one_bit_is_black_and_white():
  bits = _pixels(1, 2).astype(bool)
  found = decode(_bytes(Image.fromarray(bits)))
  np.testing.assert_array_equal(found, _gray(bits * 255))


def test_a_palette_is_looked_up():
  image = Image.fromarray(_pixels(1, 4)).convert("P")
  colors = [(9, 8, 7), (255, 0, 1), (0, 255, 2), (3, 4, 255)]
  image.putpalette(sum(colors, ()))
  image.putdata(_pixels(1, 4).reshape(-1).tolist())
  found = decode(_bytes(image))
  expected = np.array(colors, np.uint8)[_pixels(1, 4)]
  np.testing.assert_array_equal(found, expected)
  # One color of it transparent, and several partly so.
  found = decode(_bytes(image, transparency=1))
  colors[1] = (255, 255, 255)
  expected = np.array(colors, np.uint8)[_pixels(1, 4)]
  np.testing.assert_array_equal(found, expected)
  found = decode(_bytes(image, transparency=bytes([0, 255, 255, 255])))
  assert (found[_pixels(1, 4) == 0] == 255).all()


def test_transparency_lies_on_white():
  pixels = _pixels(4)
  pixels[0, 0] = (1, 2, 3, 0)
  pixels[0, 1] = (1, 2, 3, 255)
  found = decode(_bytes(Image.fromarray(pixels)))
  assert found[0, 0].tolist() == [255] * 3
  assert found[0, 1].tolist() == [1, 2, 3]
  np.testing.assert_allclose(found, _on_white(pixels), rtol=0, atol=1)


def test_gray_with_transparency_lies_on_white():
  pixels = _pixels(2)
  found = decode(_bytes(Image.fromarray(pixels, "LA")))
  rgba = np.concatenate([_gray(pixels[..., 0]), pixels[..., 1:]], -1)
  np.testing.assert_allclose(found, _on_white(rgba), rtol=0, atol=1)


@pytest.mark.parametrize("mode, color", [("RGB", (9, 8, 7)), ("L", 9)])
def test_a_color_that_stands_for_transparent_is_white(mode, color):
  image = Image.new(mode, (_WIDTH, _HEIGHT), color)
  image.putpixel((0, 0), (1, 2, 3) if mode == "RGB" else 3)
  found = decode(_bytes(image, transparency=color))
  assert found[0, 0].tolist() == ([1, 2, 3] if mode == "RGB" else [3] * 3)
  assert (found.reshape(-1, 3)[1:] == 255).all()


@pytest.mark.parametrize("mode", ["RGBa", "La"])
def test_premultiplied_transparency_lies_on_white(mode):
  # Pillow reads such files, and writes none.
  image = Image.fromarray(_pixels(4)).convert(mode.upper()).convert(mode)
  rgba = np.asarray(image.convert(mode.upper()).convert("RGBA"))
  found = np.asarray(module._rgb(image))
  np.testing.assert_allclose(found, _on_white(rgba), rtol=0, atol=1)


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_cmyk_becomes_rgb(kind):
  image = Image.new("CMYK", (_WIDTH, _HEIGHT), (0, 255, 51, 0))
  found = decode(_bytes(image, kind))
  assert found.shape == (_HEIGHT, _WIDTH, 3)
  assert np.abs(found.astype(int) - [255, 0, 204]).max() <= 3


@pytest.mark.parametrize("mode", ["YCbCr", "LAB"])
def test_other_color_spaces_become_rgb_or_are_named(mode):
  data = _bytes(Image.new(mode, (_WIDTH, _HEIGHT), (128, 128, 128)), "TIFF")
  try:
    found = decode(data, "photo.tif")
  except UserError as error:
    # Pillow 12.3 cannot read the YCbCr that it writes itself.
    assert str(error).startswith(
      (
        f"photo.tif: its mode {mode} has no way to RGB; save it as 8-bit RGB.",
        "photo.tif: broken or truncated (OSError: image file is truncated",
      )
    )
  else:
    assert found.std() == 0


@pytest.mark.parametrize("kind, order", [("PNG", "<"), ("TIFF", "<")])
def test_sixteen_bits_are_scaled_and_not_cut(kind, order):
  levels = _pixels(1, 65536, np.uint16)
  levels[0, :5] = [0, 128, 129, 256, 65535]
  data = _bytes(Image.fromarray(levels), kind)
  found = decode(data)
  np.testing.assert_array_equal(found, _gray(np.rint(levels / 257)))
  assert found[0, :5, 0].tolist() == [0, 0, 1, 1, 255]


def test_sixteen_bits_with_the_high_byte_first_are_scaled():
  levels = _pixels(1, 65536, np.uint16)
  image = Image.frombytes("I;16B", (_WIDTH, _HEIGHT), levels.tobytes("C"))
  expected = _gray(np.rint(levels.byteswap() / 257))
  np.testing.assert_array_equal(decode(_bytes(image, "TIFF")), expected)


def test_a_pgm_of_sixteen_bits_is_scaled():
  levels = _pixels(1, 65536, np.uint16)
  data = b"P5 7 5 65535\n" + levels.astype(">u2").tobytes()
  np.testing.assert_array_equal(decode(data), _gray(np.rint(levels / 257)))


def test_a_png_of_three_times_sixteen_bits_is_scaled():
  pixels = _pixels(3, 65536, ">u2")
  rows = b"".join(b"\0" + row.tobytes() for row in pixels)
  header = struct.pack(">IIBBBBB", _WIDTH, _HEIGHT, 16, 2, 0, 0, 0)
  data = b"\x89PNG\r\n\x1a\n" + b"".join(
    _chunk(*c)
    for c in (
      (b"IHDR", header),
      (b"IDAT", zlib.compress(rows)),
      (b"IEND", b""),
    )
  )
  np.testing.assert_allclose(decode(data), pixels / 257, rtol=0, atol=1)


def _chunk(kind, data):
  checksum = struct.pack(">I", zlib.crc32(kind + data))
  return struct.pack(">I", len(data)) + kind + data + checksum


def test_integers_of_32_bits_count_as_sixteen():
  levels = _pixels(1, 65536, np.int32)
  data = _bytes(Image.fromarray(levels), "TIFF")
  np.testing.assert_array_equal(decode(data), _gray(np.rint(levels / 257)))
  levels[2, 3] = 65536
  with pytest.raises(UserError, match=r"x: its levels are \d+\.\.65536, and n"):
    decode(_bytes(Image.fromarray(levels), "TIFF"), "x")


def test_floats_are_of_1_or_of_255():
  values = _pixels(1, 256, np.float32)
  expected = _gray(values)
  for scaled in (values, values / 255):
    data = _bytes(Image.fromarray(scaled.astype(np.float32)), "TIFF")
    np.testing.assert_array_equal(decode(data), expected)


@pytest.mark.parametrize("value", [-1, 256, np.nan, np.inf])
def test_floats_without_a_known_white_are_refused(value):
  values = np.full((_HEIGHT, _WIDTH), value, np.float32)
  with pytest.raises(UserError, match="image: its values are .* save it as 8"):
    decode(_bytes(Image.fromarray(values), "TIFF"))


# What a viewer does to pixels for each value of EXIF's orientation.
_TURNS = {
  1: lambda x: x,
  2: lambda x: x[:, ::-1],
  3: lambda x: x[::-1, ::-1],
  4: lambda x: x[::-1],
  5: lambda x: x.swapaxes(0, 1),
  6: lambda x: np.rot90(x, -1),
  7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
  8: lambda x: np.rot90(x, 1),
}


@pytest.mark.parametrize("orientation", _TURNS)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG", "WEBP"])
def test_exif_rotation_is_applied(orientation, kind):
  if kind == "WEBP" and not features.check("webp"):
    pytest.skip("this Pillow has no WebP")
  # Blocks of one color, which JPEG keeps.
  pixels = np.zeros((16, 32, 3), np.uint8)
  pixels[:8, :16], pixels[8:, 16:] = (250, 0, 0), (0, 0, 250)
  exif = Image.Exif()
  exif[0x0112] = orientation
  options = {"lossless": True} if kind == "WEBP" else {}
  if kind == "JPEG":
    options = {"quality": 95, "subsampling": 0}
  data = _bytes(Image.fromarray(pixels), kind, exif=exif, **options)
  found = decode(data).astype(int)
  expected = _TURNS[orientation](pixels).astype(int)
  assert found.shape == expected.shape
  tolerance = 5 if kind == "JPEG" else 0
  assert np.abs(found - expected).max() <= tolerance


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_data_do_no_harm():
  pixels = np.full((8, 8, 3), 100, np.uint8)
  data = _bytes(Image.fromarray(pixels), "JPEG", exif=b"Exif\0\0MM\0*broken")
  assert np.abs(decode(data).astype(int) - 100).max() <= 2


@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF", "WEBP"])
def test_of_an_animation_the_first_frame_is_taken(kind):
  if kind == "WEBP" and not features.check("webp"):
    pytest.skip("this Pillow has no WebP")
  first, second = (
    Image.new("RGB", (_WIDTH, _HEIGHT), color)
    for color in ((255, 0, 0), (0, 0, 255))
  )
  options = {"lossless": True} if kind == "WEBP" else {}
  data = _bytes(first, kind, save_all=True, append_images=[second], **options)
  expected = np.broadcast_to([255, 0, 0], (_HEIGHT, _WIDTH, 3))
  np.testing.assert_array_equal(decode(data), expected)


def test_a_phone_photo_with_a_preview_inside_is_read():
  pixels = np.full((16, 16, 3), 90, np.uint8)
  image = Image.fromarray(pixels)
  data = _bytes(image, "MPO", save_all=True, append_images=[image])
  assert np.abs(decode(data).astype(int) - 90).max() <= 2


def test_a_path_is_read_and_names_the_image(tmp_path):
  path = tmp_path / "a.png"
  Image.fromarray(_pixels(3)).save(path)
  np.testing.assert_array_equal(decode(path), _pixels(3))
  np.testing.assert_array_equal(decode(str(path)), _pixels(3))
  path.write_bytes(b"")
  with pytest.raises(UserError, match=f"^{path}: not an image"):
    decode(path)
  with pytest.raises(UserError, match="^row 7: not an image"):
    decode(path, "row 7")
  with pytest.raises(UserError, match="b.png: cannot be read .No such file"):
    decode(tmp_path / "b.png")


def test_a_huge_image_is_refused_before_it_is_unpacked(monkeypatch):
  data = _bytes(Image.new("1", (400, 300)))
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400 * 300)
  assert decode(data).shape == (300, 400, 3)
  # Above it Pillow warns, above twice of it it raises.
  for limit in (400 * 300 - 1, 400 * 300 // 2 - 1):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(UserError) as caught:
      decode(data, "huge.png")
    assert str(caught.value).startswith(f"huge.png: has more than {limit:,} pi")
    assert "raise PIL.Image.MAX_IMAGE_PIXELS" in str(caught.value)
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
  assert decode(data).shape == (300, 400, 3)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_huge_image_is_refused_where_warnings_are_not_errors(monkeypatch):
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400 * 300 - 1)
  with pytest.raises(UserError, match="has more than 119,999 pixels"):
    decode(_bytes(Image.new("1", (400, 300))))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "BMP"])
def test_a_truncated_image_is_named(kind):
  data = _bytes(Image.fromarray(_pixels(3)).resize((64, 64)), kind)
  for part in (20, len(data) // 3, len(data) // 2, len(data) * 3 // 4):
    with pytest.raises(UserError, match="^a photo: (broken|not an image)"):
      decode(data[:part], "a photo")


def test_a_damaged_image_gives_pixels_or_a_user_error():
  good = _bytes(Image.fromarray(_pixels(4)))
  for position in range(len(good)):
    data = bytearray(good)
    data[position] ^= 0xFF
    try:
      found = decode(bytes(data))
    except UserError as error:
      assert "\n" not in str(error)
    else:
      assert found.dtype == np.uint8 and found.shape[2] == 3


@pytest.mark.parametrize(
  "data", [b"", b"<!DOCTYPE html><title>Not found", bytes(99), b"%!PS-Adobe-3."]
)
def test_what_is_no_image_is_told_with_its_beginning(data):
  with pytest.raises(UserError) as caught:
    decode(data, "x.jpg")
  assert str(caught.value) == (
    f"x.jpg: not an image that can be read (it starts with {data[:16]!r}); "
    "leave it out or get it again."
  )


def test_formats_that_start_programs_are_not_opened():
  data = _bytes(Image.fromarray(_pixels(3)), "EPS")
  with pytest.raises(UserError, match="not an image that can be read"):
    decode(data)
  assert "EPS" not in module._FORMATS


def test_preprocess_offers_it():
  assert preprocess.decode is decode
