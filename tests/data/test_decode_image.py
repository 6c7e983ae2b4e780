import io
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import encoded, noise
from PIL import Image

from meshuffle.data.image import EXTENSIONS, decode_image
from meshuffle.errors import ImageError

LOSSLESS = [("PNG", {}), ("BMP", {}), ("WEBP", {"lossless": True}), ("TIFF", {})]


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize(("format_name", "options"), LOSSLESS)
def test_lossless_formats_give_the_exact_pixels(format_name, options):
    image = noise(1)
    decoded = decode_image(encoded(image, format_name, **options))
    np.testing.assert_array_equal(pixels(decoded), pixels(image))


@pytest.mark.parametrize("format_name", ["JPEG", "MPO"])
def test_jpeg_is_close(format_name):
    image = Image.linear_gradient("L").convert("RGB")
    decoded = decode_image(encoded(image, format_name, quality=95))
    assert np.abs(pixels(decoded).astype(int) - pixels(image)).max() <= 6


def test_gif_gives_its_first_frame():
    red, blue = Image.new("RGB", (5, 4), "red"), Image.new("RGB", (5, 4), "blue")
    data = encoded(red, "GIF", save_all=True, append_images=[blue], duration=100)
    assert decode_image(data).getpixel((0, 0)) == (255, 0, 0)


def test_animated_webp_gives_its_first_frame():
    red, blue = Image.new("RGB", (5, 4), "red"), Image.new("RGB", (5, 4), "blue")
    data = encoded(red, "WEBP", save_all=True, append_images=[blue], lossless=True)
    assert decode_image(data).getpixel((0, 0)) == (255, 0, 0)


def test_grey_becomes_three_equal_channels():
    grey = Image.linear_gradient("L")
    array = pixels(decode_image(encoded(grey, "PNG")))
    np.testing.assert_array_equal(array, np.asarray(grey)[:, :, None].repeat(3, axis=2))


def test_bilevel_becomes_black_and_white():
    image = Image.new("1", (4, 4), 1)
    assert decode_image(encoded(image, "PNG")).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_are_scaled_and_not_clipped():
    values = np.array([[0, 257, 1000, 32768, 65535]], dtype=np.uint16)
    array = pixels(decode_image(encoded(Image.fromarray(values), "PNG")))
    assert array[0, :, 0].tolist() == [0, 1, 4, 128, 255]


def test_cmyk_jpeg_becomes_rgb():
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red, green, blue = decode_image(encoded(image, "JPEG")).getpixel((0, 0))
    assert red > 240 and green < 20 and blue < 20


def test_transparency_is_composited_on_white():
    image = Image.new("RGBA", (3, 1))
    image.putdata([(255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 128)])
    opaque, clear, half = pixels(decode_image(encoded(image, "PNG")))[0].tolist()
    assert opaque == [255, 0, 0]
    assert clear == [255, 255, 255]
    assert half == [127, 127, 127]


def test_grey_with_alpha():
    image = Image.new("LA", (1, 1), (0, 0))
    assert decode_image(encoded(image, "PNG")).getpixel((0, 0)) == (255, 255, 255)


def test_palette():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    array = pixels(decode_image(encoded(image, "PNG")))
    assert array[0].tolist() == [[10, 20, 30], [40, 50, 60]]


@pytest.mark.parametrize("transparency", [0, b"\x00\xff"])
def test_palette_with_transparency(transparency):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    array = pixels(decode_image(encoded(image, "PNG", transparency=transparency)))
    assert array[0].tolist() == [[255, 255, 255], [40, 50, 60]]


def test_rgb_with_a_transparent_colour():
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (9, 9, 9))
    array = pixels(decode_image(encoded(image, "PNG", transparency=(1, 2, 3))))
    assert array[0].tolist() == [[255, 255, 255], [9, 9, 9]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    image = noise(2, (7, 5))
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode_image(encoded(image, "PNG", exif=exif))
    stored = pixels(image)
    expected = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: np.rot90(stored, -1),
        7: stored[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(stored),
    }[orientation]
    np.testing.assert_array_equal(pixels(decoded), expected)


def test_broken_exif_does_not_cost_the_picture():
    data = encoded(noise(3), "JPEG", exif=b"Exif\x00\x00MM\x00*garbage that is no directory")
    assert decode_image(data).size == noise(3).size


def test_one_pixel(tmp_path):
    Image.new("RGB", (1, 1), (7, 8, 9)).save(tmp_path / "dot.png")
    assert decode_image(tmp_path / "dot.png").getpixel((0, 0)) == (7, 8, 9)
    assert decode_image(str(tmp_path / "dot.png")).size == (1, 1)


def error_of(path_or_bytes: Path | bytes, **options: object) -> str:
    with pytest.raises(ImageError) as caught:
        decode_image(path_or_bytes, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 2
    return message


@pytest.mark.parametrize("format_name", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("kept", [0.3, 0.9])
def test_truncated_files_are_named(tmp_path, format_name, kept):
    data = encoded(noise(4, (64, 64)), format_name)
    path = tmp_path / "cut.jpg"
    path.write_bytes(data[: int(len(data) * kept)])
    assert error_of(path).startswith(f"{path}: ")


def test_empty_file(tmp_path):
    (tmp_path / "none.jpg").touch()
    assert error_of(tmp_path / "none.jpg") == f"{tmp_path / 'none.jpg'}: empty file (0 bytes)"
    assert "empty file" in error_of(b"")


def test_text_that_calls_itself_a_jpeg(tmp_path):
    (tmp_path / "fake.jpg").write_text("<html>404 not found</html>")
    message = error_of(tmp_path / "fake.jpg")
    assert "not a JPEG, PNG, WebP, BMP, GIF or TIFF image" in message
    assert "<html>404 no" in message


@pytest.mark.parametrize("format_name", ["PPM", "ICO"])
def test_other_formats_are_refused(format_name):
    assert "not a JPEG" in error_of(encoded(noise(5), format_name))


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes whose header claims any size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("side", [9_500, 13_000, 60_000])
def test_bombs_are_refused_from_their_header(side):
    message = error_of(bomb(side, side), name="bomb.png")
    assert message.startswith("bomb.png: ")
    assert "pixels" in message


def test_pixel_limit_is_the_callers():
    assert "12×10 = 120 pixels, more than the limit of 119" in error_of(
        encoded(noise(), "PNG"), max_pixels=119
    )
    assert decode_image(encoded(noise(), "PNG"), max_pixels=120).size == (12, 10)


def test_missing_file_and_folder(tmp_path):
    assert "No such file" in error_of(tmp_path / "gone.jpg")
    assert "directory" in error_of(tmp_path)


def test_threads_leave_the_warning_filters_alone():
    before = list(warnings.filters)
    data = encoded(noise(6), "PNG")
    with ThreadPoolExecutor(8) as pool:
        assert all(image.size == (12, 10) for image in pool.map(decode_image, [data] * 200))
    assert warnings.filters == before


def test_extensions_are_lower_case_with_a_dot():
    assert all(name.startswith(".") and name == name.lower() for name in EXTENSIONS)


SEEDS = [
    encoded(noise(7, (20, 20)), "PNG"),
    encoded(noise(7, (20, 20)).convert("P"), "PNG", transparency=3),
    encoded(noise(7, (20, 20)), "JPEG", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x01"),
    encoded(noise(7, (20, 20)), "JPEG", progressive=True),
    encoded(noise(7, (20, 20)), "WEBP"),
    encoded(noise(7, (20, 20)), "BMP"),
    encoded(noise(7, (20, 20)).convert("P"), "BMP"),
    encoded(noise(7, (20, 20)), "GIF"),
    encoded(noise(7, (20, 20)), "TIFF"),
    encoded(Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20)), "PNG"),
]


@settings(max_examples=400, deadline=None)
@given(
    which=st.integers(0, len(SEEDS) - 1),
    changes=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=8),
    kept=st.floats(0, 1),
)
def test_damaged_files_give_an_image_or_an_image_error(which, changes, kept):
    data = bytearray(SEEDS[which])
    for place, value in changes:
        data[int(place * min(len(data), 200))] = value
    damaged = bytes(data[: max(1, int(len(data) * kept))])
    try:
        assert decode_image(damaged, max_pixels=1_000_000).mode == "RGB"
    except ImageError as error:
        assert "\n" not in str(error)


def test_png_with_a_broken_checksum():
    data = bytearray(encoded(noise(8), "PNG"))
    data[16] ^= 1
    error_of(bytes(data))


def test_file_object_is_not_left_open(tmp_path):
    noise().save(tmp_path / "a.png")
    image = decode_image(tmp_path / "a.png")
    (tmp_path / "a.png").unlink()
    assert image.copy().size == (12, 10)  # all pixels are in memory
    assert io.BytesIO(encoded(image, "PNG")).read(4) == b"\x89PNG"


def test_tiff_of_16_bits():
    levels = np.array([[0, 257, 65535]], dtype=np.uint16)
    for order in ("<", ">"):
        image = Image.fromarray(levels.astype(f"{order}u2"))
        assert pixels(decode_image(encoded(image, "TIFF")))[0, :, 0].tolist() == [0, 1, 255]


def test_tiffs_that_eight_bits_do_not_show():
    pages = [noise(1), noise(2), noise(3)]
    several = encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    fractions = encoded(Image.fromarray(np.full((2, 2), 0.5, np.float32)), "TIFF")
    large = encoded(Image.fromarray(np.full((2, 2), 70_000, np.int32)), "TIFF")
    for content, expected in (
        (several, "x: a TIFF of 3 pages; save each"),
        (fractions, "x: a TIFF of mode F; save it with 8 or 16 bits"),
        (large, "x: a TIFF of mode I; save it"),
    ):
        with pytest.raises(ImageError, match=expected):
            decode_image(content, name="x")
