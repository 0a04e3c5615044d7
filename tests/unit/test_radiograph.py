"""PNG, JPEG and TIFF, the resizing, and the way to 8 bits."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from radiograph_files import soft_image
from sklearn.datasets import load_sample_image

from selfray.data.radiograph import (
    MIN_SIDE,
    image_format,
    read_radiograph,
    resize_shorter_side,
    to_eight_bits,
)
from selfray.errors import BadImage, InputError


def png_chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def png(width: int, height: int, bits: int, colour: int, lines: bytes) -> bytes:
    """A PNG by the book (RFC 2083), so that no library's reading of 16 bits is trusted."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", zlib.compress(lines))
        + png_chunk(b"IEND", b"")
    )


def gray_png(pixels: np.ndarray) -> bytes:
    big_endian = pixels.astype(pixels.dtype.newbyteorder(">"))
    lines = b"".join(b"\0" + line.tobytes() for line in big_endian)
    return png(pixels.shape[1], pixels.shape[0], 8 * pixels.dtype.itemsize, 0, lines)


def test_16_bit_png_keeps_its_values_where_pillows_conversion_clips_at_255(tmp_path):
    pixels = soft_image(white=65535)
    path = tmp_path / "a.png"
    path.write_bytes(gray_png(pixels))
    np.testing.assert_array_equal(read_radiograph(path).pixels, pixels)
    with Image.open(path) as image:
        clipped = np.asarray(image.convert("L"))
    assert (clipped == 255).mean() > 0.98  # all but white: what others train on
    ours = to_eight_bits(read_radiograph(path).pixels)
    assert np.corrcoef(ours.ravel(), pixels.ravel())[0, 1] > 0.9999


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits"])
@pytest.mark.parametrize("white", [255, 65535])
def test_tiff_of_8_and_16_bits_keeps_its_values(tmp_path, compression, white):
    pixels = soft_image(white=white).astype(np.uint8 if white == 255 else np.uint16)
    Image.fromarray(pixels).save(tmp_path / "a.tif", compression=compression)
    np.testing.assert_array_equal(read_radiograph(tmp_path / "a.tif").pixels, pixels)


def white_is_zero_tiff(pixels: np.ndarray) -> bytes:
    """The smallest TIFF 6.0, big-endian, PhotometricInterpretation 0."""
    height, width = pixels.shape
    data = pixels.astype(pixels.dtype.newbyteorder(">")).tobytes()
    tags = [
        (256, 4, width),
        (257, 4, height),
        (258, 3, 8 * pixels.dtype.itemsize),
        (259, 3, 1),
        (262, 3, 0),
        (273, 4, 8),
        (277, 3, 1),
        (278, 4, height),
        (279, 4, len(data)),
    ]
    directory = struct.pack(">H", len(tags))
    for tag, kind, value in tags:
        field = struct.pack(">HH", value, 0) if kind == 3 else struct.pack(">I", value)
        directory += struct.pack(">HHI", tag, kind, 1) + field
    return b"MM\0*" + struct.pack(">I", 8 + len(data)) + data + directory + b"\0" * 4


def test_tiff_whose_white_is_zero_is_turned_to_higher_is_brighter_or_refused(tmp_path):
    pixels = soft_image(white=255).astype(np.uint8)
    (tmp_path / "a.tif").write_bytes(white_is_zero_tiff(pixels))
    np.testing.assert_array_equal(read_radiograph(tmp_path / "a.tif").pixels, 255 - pixels)
    (tmp_path / "a.tif").write_bytes(white_is_zero_tiff(soft_image()))
    with pytest.raises(BadImage, match="of a kind that is not read"):
        read_radiograph(tmp_path / "a.tif")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "CMYK"])
def test_a_gray_image_stored_in_colour_is_read_as_gray(tmp_path, mode):
    pixels = soft_image(white=255).astype(np.uint8)
    suffix = "tif" if mode == "CMYK" else "png"
    image = Image.fromarray(pixels).convert("RGB" if mode == "CMYK" else mode)
    image.convert(mode).save(tmp_path / f"a.{suffix}")
    ours = read_radiograph(tmp_path / f"a.{suffix}").pixels
    np.testing.assert_allclose(ours, pixels, atol=0.01)


@pytest.mark.parametrize(("colour", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_16_bits_in_colour_or_with_transparency_keep_their_values(tmp_path, colour, channels):
    pixels = soft_image(white=4000)
    layers = np.repeat(pixels[..., None], channels, axis=2)
    if channels != 3:
        layers[..., -1] = 65535
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in layers)
    (tmp_path / "a.png").write_bytes(png(80, 96, 16, colour, lines))
    ours = read_radiograph(tmp_path / "a.png")
    np.testing.assert_array_equal(ours.pixels, pixels)  # Pillow would leave 16 levels of 4000
    assert ours.record.bits == 16
    layers[..., 0] = 0
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in layers)
    (tmp_path / "a.png").write_bytes(png(80, 96, 16, colour, lines))
    with pytest.raises(BadImage, match="constant" if channels == 2 else "colour"):
        read_radiograph(tmp_path / "a.png")


def test_16_bits_in_colour_that_are_cut_off_are_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(png(80, 96, 16, 2, b"\0")[:60])
    with pytest.raises(BadImage, match="damaged or cut off"):
        read_radiograph(tmp_path / "a.png")


def test_a_gray_image_in_a_cmyk_jpeg_is_read_as_gray(tmp_path):
    pixels = soft_image(white=255).astype(np.uint8)
    Image.fromarray(pixels).convert("RGB").convert("CMYK").save(tmp_path / "a.jpg", quality=100)
    np.testing.assert_allclose(read_radiograph(tmp_path / "a.jpg").pixels, pixels, atol=3)


@pytest.mark.parametrize("quality", [30, 95])
def test_a_gray_image_in_a_colour_jpeg_is_read_as_gray(tmp_path, quality):
    pixels = soft_image(white=255).astype(np.uint8)
    Image.fromarray(pixels).convert("RGB").save(tmp_path / "a.jpg", quality=quality)
    Image.fromarray(pixels).save(tmp_path / "b.jpg", quality=quality)
    ours = [read_radiograph(tmp_path / name).pixels for name in ("a.jpg", "b.jpg")]
    np.testing.assert_allclose(ours[0], ours[1], atol=1.5)


@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_a_colour_photograph_is_refused(tmp_path, name, suffix):
    Image.fromarray(load_sample_image(name)).save(tmp_path / f"a.{suffix}")
    with pytest.raises(BadImage, match="colour"):
        read_radiograph(tmp_path / f"a.{suffix}")


def test_a_small_coloured_mark_on_a_radiograph_is_let_in(tmp_path):
    pixels = np.repeat(soft_image(white=255).astype(np.uint8)[..., None], 3, axis=2)
    pixels[:8, :8] = (255, 0, 0)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert read_radiograph(tmp_path / "a.png").pixels.shape == (96, 80)
    pixels[:16, :16] = (255, 0, 0)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    with pytest.raises(BadImage, match="colour"):
        read_radiograph(tmp_path / "a.png")


def test_what_is_transparent_is_black(tmp_path):
    pixels = soft_image(white=255).astype(np.uint8)
    alpha = np.full_like(pixels, 255)
    alpha[:, :30] = 0
    image = Image.merge("LA", (Image.fromarray(pixels), Image.fromarray(alpha)))
    image.save(tmp_path / "a.png")
    ours = read_radiograph(tmp_path / "a.png").pixels
    assert (ours[:, :30] == 0).all()
    np.testing.assert_array_equal(ours[:, 30:], pixels[:, 30:])


def test_exif_orientation_is_obeyed(tmp_path):
    pixels = soft_image(white=255).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90° clockwise
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_radiograph(tmp_path / "a.png").pixels, np.rot90(pixels, -1))


def test_several_pages_one_bit_and_thumbnails_are_refused(tmp_path):
    image = Image.fromarray(soft_image(white=255).astype(np.uint8))
    image.save(tmp_path / "pages.tif", save_all=True, append_images=[image])
    image.convert("1").save(tmp_path / "bit.png")
    image.resize((MIN_SIDE, MIN_SIDE)).save(tmp_path / "enough.png")
    image.resize((MIN_SIDE - 1, 300)).save(tmp_path / "small.png")
    for name, reason in (
        ("pages.tif", "several pages"),
        ("bit.png", "one bit"),
        ("small.png", "63 × 300 pixels"),
    ):
        with pytest.raises(BadImage, match=reason):
            read_radiograph(tmp_path / name)
    read_radiograph(tmp_path / "enough.png")


@pytest.mark.parametrize("value", [0, 7, 255])
@pytest.mark.parametrize("suffix", ["png", "tif", "jpg"])
def test_an_image_of_one_value_is_refused(tmp_path, value, suffix):
    Image.fromarray(np.full((80, 80), value, np.uint8)).save(tmp_path / f"a.{suffix}")
    with pytest.raises(BadImage, match="constant"):
        read_radiograph(tmp_path / f"a.{suffix}")


def test_an_absurd_declared_size_is_refused_before_anything_is_allocated(tmp_path):
    (tmp_path / "a.png").write_bytes(png(100_000, 100_000, 8, 0, b"\0"))
    (tmp_path / "b.png").write_bytes(png(11_000, 11_000, 8, 0, b"\0"))
    for name in ("a.png", "b.png"):
        with pytest.raises(BadImage, match="declares"):
            read_radiograph(tmp_path / name)


@pytest.mark.parametrize("shape", [(400, 70), (70, 400)])
def test_a_needle_whose_longer_side_would_fill_the_memory_is_refused(tmp_path, shape):
    Image.fromarray(soft_image(*shape).astype(np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(BadImage, match="over 5 times as long as wide"):
        read_radiograph(tmp_path / "a.png")


def test_floats_that_are_not_finite_are_refused(tmp_path):
    pixels = soft_image().astype(np.float32)
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(read_radiograph(tmp_path / "a.tif").pixels, pixels)
    pixels[3, 3] = np.nan
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    with pytest.raises(BadImage, match="not finite"):
        read_radiograph(tmp_path / "a.tif")


def test_the_format_is_judged_by_content_and_not_by_name(tmp_path):
    pixels = soft_image(white=255).astype(np.uint8)
    (tmp_path / "wrong.dcm").write_bytes(gray_png(pixels))
    np.testing.assert_array_equal(read_radiograph(tmp_path / "wrong.dcm").pixels, pixels)
    (tmp_path / "text.png").write_text("no image at all")
    (tmp_path / "empty.png").touch()
    for name in ("text.png", "empty.png"):
        assert image_format(tmp_path / name) is None
        with pytest.raises(BadImage, match="no DICOM, PNG, JPEG or TIFF"):
            read_radiograph(tmp_path / name)
    with pytest.raises(BadImage, match="No such file"):
        read_radiograph(Path(tmp_path / "missing.png"))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(64, 200), st.integers(64, 200), st.integers(20, 120))
def test_resizing_is_torchs_antialiased_bicubic(height, width, size):
    pixels = soft_image(height, width).astype(np.float32)
    ours = resize_shorter_side(pixels, size)
    assert min(ours.shape) == size
    assert abs(max(ours.shape) - max(height, width) * size / min(height, width)) <= 0.5
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(pixels)[None, None], ours.shape, mode="bicubic", antialias=True
    )
    # The aspect is rounded to whole pixels the same way; what is left is float32 rounding.
    np.testing.assert_allclose(ours, theirs[0, 0].numpy(), atol=0.05, rtol=1e-5)


def test_lines_finer_than_a_pixel_vanish_instead_of_folding_into_stripes():
    lines = np.tile(np.array([0, 1000], np.float32), (300, 150))
    small = resize_shorter_side(lines, 70)
    assert small[5:-5, 5:-5].std() < 30
    assert lines[::4, ::4][:, :].std() == 0  # without antialiasing they fold


def test_smaller_images_are_enlarged_and_equal_ones_left_alone():
    pixels = soft_image(96, 80).astype(np.float32)
    assert resize_shorter_side(pixels, 160).shape == (192, 160)
    np.testing.assert_array_equal(resize_shorter_side(pixels, 80), pixels)


@settings(max_examples=50, deadline=None)
@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(0, 10**6))
def test_minmax_spans_0_to_255_and_keeps_order(offset, span, seed):
    pixels = np.random.default_rng(seed).uniform(0, span, (20, 20)).astype(np.float32)
    pixels += np.float32(offset)
    if pixels.min() == pixels.max():
        return
    eight = to_eight_bits(pixels)
    assert eight.min() == 0 and eight.max() == 255
    assert (np.diff(eight.ravel()[np.argsort(pixels, axis=None)].astype(int)) >= 0).all()


def test_percentiles_do_not_let_one_marker_decide_the_contrast():
    pixels = soft_image(200, 200, white=1000).astype(np.float32)
    pixels[:5, :5] = 60000
    low, high = np.percentile(pixels, (0.5, 99.5))
    expected = np.clip((pixels.astype(float) - low) / (high - low), 0, 1) * 255
    np.testing.assert_allclose(to_eight_bits(pixels, "percentile"), expected, atol=0.5)
    assert to_eight_bits(pixels).std() < 10 < to_eight_bits(pixels, "percentile").std()


def test_an_image_all_but_constant_and_an_unknown_intensity_are_refused():
    pixels = np.zeros((100, 100), np.float32)
    pixels[0, 0] = 1
    assert to_eight_bits(pixels).max() == 255
    with pytest.raises(BadImage, match="all but constant"):
        to_eight_bits(pixels, "percentile")
    with pytest.raises(InputError, match="minmax, percentile"):
        to_eight_bits(pixels, "max")
