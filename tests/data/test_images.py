"""Pictures in and out: known pixels of every kind of file, hostile files, and what is written."""

import errno
import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageFile

from gendiff.data import images
from gendiff.data.framing import Framing
from gendiff.data.images import Unreadable, header, load, read_image, save_images, tile

RGB = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3) * 3


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def levels(source: Any) -> np.ndarray:
    """[H, W, 3] of 0 … 255."""
    return (load(source, Framing())[0] * 255).permute(1, 2, 0).numpy()


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def palette() -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    return image


def half_clear() -> Image.Image:
    return Image.fromarray(np.array([[[100, 0, 200, 255], [100, 0, 200, 51], [9, 9, 9, 0]]], dtype=np.uint8))


ON_WHITE = [[[100, 0, 200], [224, 204, 244], [255, 255, 255]]]  # a·colour + (1 - a)·255, a = 1, 1/5, 0
GREY16 = np.array([[0, 128, 129, 257 * 77, 40000, 65535]], dtype=np.uint16)  # 128/257 < 1/2 < 129/257

FILES: dict[str, tuple[Callable[[], bytes], Any]] = {
    "RGB": (lambda: encoded(Image.fromarray(RGB)), RGB),
    "WebP": (lambda: encoded(Image.fromarray(RGB), "WEBP", lossless=True), RGB),
    "grey": (lambda: encoded(Image.fromarray(RGB[..., 0])), RGB[..., :1].repeat(3, 2)),
    "black and white": (lambda: encoded(Image.new("1", (1, 1), 1)), [[[255] * 3]]),
    "palette": (lambda: encoded(palette()), [[[10, 20, 30], [200, 100, 50]]]),
    "alpha": (lambda: encoded(half_clear()), ON_WHITE),
    "WebP alpha": (lambda: encoded(half_clear(), "WEBP", lossless=True, exact=True), ON_WHITE),
    "grey alpha": (lambda: encoded(Image.new("LA", (1, 1), (100, 51))), [[[224] * 3]]),
    "palette alpha": (
        lambda: encoded(palette(), transparency=bytes([255, 51])),
        [[[10, 20, 30], [244, 224, 214]]],
    ),
    "transparent colour": (lambda: encoded(Image.new("RGB", (1, 1), (1, 2, 3)), transparency=(1, 2, 3)), 255),
    "16 bits of grey": (
        lambda: encoded(Image.fromarray(GREY16)),
        np.round(GREY16 / 257)[..., None].repeat(3, 2),
    ),
    "16 bits, transparent": (
        lambda: encoded(Image.fromarray(GREY16[:, :2]), transparency=128),
        [[[0] * 3, [255] * 3]],
    ),
    "16 bits of RGB": (lambda: png(1, 1, 16, 2, bytes([0, 7, 0, 200, 128, 255, 255])), [[[7, 200, 255]]]),
    "animated": (
        lambda: encoded(
            Image.fromarray(RGB),
            "WEBP",
            lossless=True,
            save_all=True,
            append_images=[Image.new("RGB", (4, 6))],
        ),
        RGB,
    ),
    "animated PNG": (
        lambda: encoded(Image.fromarray(RGB), save_all=True, append_images=[Image.new("RGB", (4, 6))]),
        RGB,
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_every_kind_of_file_has_the_pixels_that_it_shows(kind: str) -> None:
    make, expected = FILES[kind]
    np.testing.assert_allclose(levels(make()), np.broadcast_to(expected, levels(make()).shape), atol=1e-4)


@pytest.mark.parametrize(
    ("mode", "colour", "shown"), [("CMYK", (0, 255, 255, 0), (255, 0, 0)), ("L", 90, (90,) * 3)]
)
def test_jpegs_of_other_colours(mode: str, colour: Any, shown: Any) -> None:
    seen = levels(encoded(Image.new(mode, (16, 16), colour), "JPEG", quality=100))
    np.testing.assert_allclose(seen, np.broadcast_to(shown, seen.shape), atol=3)


UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [*UPRIGHT, 9])
def test_exif_orientation_is_applied_and_the_header_says_so(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    file = encoded(Image.fromarray(RGB), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    upright = UPRIGHT.get(orientation, UPRIGHT[1])(RGB)
    np.testing.assert_allclose(levels(file), upright, atol=1e-4)
    assert header(file) == upright.shape[:2]


def test_the_size_is_checked_before_decoding_and_whatever_pillow_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bomb = png(30_000, 30_000, 8, 2, b"")
    limit = Image.MAX_IMAGE_PIXELS
    with pytest.raises(Unreadable, match=r"30000 × 30000 .*max_pixels=64_000_000"):
        load(bomb, Framing())  # Pillow's warning would be an error here
    assert limit == Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)
    assert levels(encoded(Image.fromarray(RGB))).shape == (6, 4, 3)
    with pytest.raises(Unreadable, match="max_pixels=23"):
        load(Image.fromarray(RGB), Framing(), 23)
    with monkeypatch.context() as patch:
        patch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
        assert header(encoded(Image.fromarray(RGB)), 24) == (6, 4)
        with pytest.raises(Unreadable):
            load(bomb, Framing())
    with pytest.raises(Unreadable, match="no side"):
        header(png(2**24 + 1, 1, 8, 0, b""))


WHOLE = Image.fromarray(RGB)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a PNG"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a PNG"),
        (b"RIFF\x04\x00\x00\x00WAVE", "not a PNG"),
        (encoded(WHOLE, "GIF"), "not a PNG"),
        (encoded(WHOLE, "BMP"), "not a PNG"),
        (encoded(WHOLE, "PPM"), "not a PNG"),
        (b"\x89PNG\r\n\x1a\n", "SyntaxError"),
        (b"\xff\xd8\xff\xe0", "SyntaxError"),
        (b"RIFF\x04\x00\x00\x00WEBP", "cannot be read"),
        (png(0, 4, 8, 2, b""), "SyntaxError"),
        (encoded(WHOLE)[:-40], "broken PNG"),
        (encoded(Image.new("RGB", (64, 64)), "JPEG")[:-40], "OSError.*truncated"),
        (encoded(WHOLE, "WEBP")[:-10], "cannot be read"),
    ],
    ids=range(13),
)
def test_what_is_no_whole_picture_is_unreadable_with_a_reason(
    content: bytes, reason: str, tmp_path: Path
) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(content)
    for source in (content, file):
        with pytest.raises(Unreadable, match=reason) as caught:
            load(source, Framing())
        assert "TypeCheckError" not in str(caught.value)
    with pytest.raises(ValueError, match=rf"a\.png': it .*{reason}"):
        read_image(file)


def test_fifos_folders_and_missing_files_are_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for name, reason in (("pipe.png", "regular"), (".", "regular"), ("no.png", "No such file")):
        with pytest.raises(ValueError, match=reason):
            read_image(tmp_path / name)


def test_a_failing_machine_is_not_taken_for_a_broken_picture(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def exhausted(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    [file] = save_images(torch.zeros(1, 1, 2, 2), tmp_path)
    monkeypatch.setattr(images, "open", exhausted, raising=False)
    with pytest.raises(OSError, match="Too many open files"):
        read_image(file)
    monkeypatch.undo()
    monkeypatch.setattr(Image.Image, "convert", lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        read_image(file)


def test_floats_are_refused() -> None:
    with pytest.raises(Unreadable, match="floating point"):
        load(Image.new("F", (2, 2), 0.5), Framing())


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_written_to_the_nearest_level(channels: int, tmp_path: Path) -> None:
    x = torch.rand(3, channels, 5, 7, generator=torch.Generator().manual_seed(0))
    paths = save_images(x.to(torch.float64), tmp_path / "new", start=9)
    assert [path.name for path in paths] == ["00009.png", "00010.png", "00011.png"]
    assert sorted((tmp_path / "new").iterdir()) == paths
    for path, one in zip(paths, x, strict=True):
        assert torch.equal(read_image(path)[:channels] * 255, (one * 255).round())
        with Image.open(path) as image:
            assert image.mode == ("L" if channels == 1 else "RGB")


def test_a_failure_to_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [path] = save_images(torch.zeros(1, 3, 4, 4), tmp_path)
    before = path.read_bytes()

    def full(self: Image.Image, file: io.BufferedWriter, kind: str) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full)
        with pytest.raises(OSError, match="No space"):
            save_images(torch.ones(1, 3, 4, 4), tmp_path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    save_images(torch.ones(1, 3, 4, 4), tmp_path)
    assert read_image(path).min() == 1


def test_a_sheet_has_every_image_in_its_place() -> None:
    x = torch.rand(5, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    sheet = torch.from_numpy(np.array(tile(x, columns=2, padding=3))).permute(2, 0, 1)
    expected = torch.full((3, 3 + 3 * 7, 3 + 2 * 9), 255, dtype=torch.uint8)
    for n, one in enumerate(x):
        top, left = 3 + n // 2 * 7, 3 + n % 2 * 9
        expected[:, top : top + 4, left : left + 6] = (one * 255).round().to(torch.uint8)
    assert torch.equal(sheet, expected)
    assert [tile(torch.zeros(n, 1, 1, 1), padding=0).size for n in (1, 2, 4, 5, 9, 10)] == [
        *((1, 1), (2, 1), (2, 2), (3, 2), (3, 3), (4, 3))
    ]


@pytest.mark.parametrize(
    ("x", "says"),
    [
        (torch.zeros(1, 4, 4, 4), r"\[B, 3, H, W\]"),
        (torch.zeros(0, 3, 4, 4), r"\[B, 3, H, W\]"),
        (torch.full((1, 3, 2, 2), -1.0), r"images / 2 \+ 0.5"),
        (torch.full((1, 3, 2, 2), float("nan")), "nan"),
    ],
)
def test_what_is_no_batch_of_images_is_refused(x: torch.Tensor, says: str, tmp_path: Path) -> None:
    for call in (lambda: save_images(x, tmp_path / "out"), lambda: tile(x)):
        with pytest.raises(ValueError, match=says):
            call()
    assert not (tmp_path / "out").exists()
