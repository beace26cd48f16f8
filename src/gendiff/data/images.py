"""Pictures in and out: reading files that may be hostile, writing samples, and a sheet of them."""

import io
import math
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from stat import S_ISREG

import numpy as np
import torch
from jaxtyping import Float, Int64
from PIL import ExifTags, Image, ImageFile, JpegImagePlugin, PngImagePlugin, WebPImagePlugin
from torch import Tensor

from gendiff.data.framing import Framing

MAX_PIXELS = 64_000_000
LONGEST = 2**24  # the edges of what Pillow resizes are float32

Source = str | os.PathLike[str] | bytes | Image.Image

# What Image.open(formats=["PNG", "JPEG", "WEBP"]) would choose from, by how a file of each begins. They are
# called directly, since Image.open compares the size with a limit that is global to the process, and warns.
_PLUGINS: tuple[tuple[bytes, bytes, type[ImageFile.ImageFile]], ...] = (
    (b"\x89PNG\r\n\x1a\n", b"", PngImagePlugin.PngImageFile),
    (b"\xff\xd8\xff", b"", JpegImagePlugin.JpegImageFile),
    (b"RIFF", b"WEBP", WebPImagePlugin.WebPImageFile),
)

# Orientation of EXIF -> what makes the picture upright; 5 … 8 exchange height and width.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Unreadable(ValueError):
    """A picture that cannot be read: not a PNG, JPEG or WebP, too large, truncated or damaged."""


def read_image(
    path: str | os.PathLike[str], size: int | Sequence[int] | None = None, *, max_pixels: int = MAX_PIXELS
) -> Float[Tensor, "3 H W"]:
    """The pixels of a PNG, JPEG or WebP file, upright, in RGB.

    The orientation that EXIF gives is applied. What is transparent is laid on white. Grey is repeated, CMYK
    is converted, 16 bits are rounded to 8; colour profiles are not applied. Of an animation it is the first
    frame. The size is checked in the header, before anything is decoded and whatever Pillow's own limit says
    (of WebP files, Pillow refuses what exceeds twice `Image.MAX_IMAGE_PIXELS` in addition).

    Args:
        path: of the file.
        size: (height, width), or one number for both, to which it is resized and cropped in the middle, as
            `Framing` does; None keeps its own.
        max_pixels: height times width of the file, at most.

    Returns:
        float32 in [0, 1].

    Raises:
        ValueError: for what cannot be read, naming the file and the reason.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     [file] = save_images(torch.full((1, 3, 8, 12), 0.2), folder)
    ...     read_image(file, size=4).shape, read_image(file)[0, 0, 0].item()
    (torch.Size([3, 4, 4]), 0.20000000298023224)
    """
    try:
        return load(path, Framing(size=size), max_pixels)[0]
    except Unreadable as error:
        raise ValueError(f"{os.fspath(path)!r}: {error}") from error


def save_images(
    images: Float[Tensor, "B C H W"], folder: str | os.PathLike[str], start: int = 0
) -> list[Path]:
    """Write pictures as 00000.png, 00001.png, …, rounded to the nearest of 256 levels.

    Each file is complete from the moment it has its name; a file of that name is replaced.

    Args:
        images: [B, 3, H, W] or, for grey, [B, 1, H, W], in [0, 1].
        folder: made if it is not there.
        start: number of the first.

    Returns:
        The paths.

    Raises:
        ValueError: for another shape, and values outside [0, 1] by more than half a level.
    """
    levels = _levels(images)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{start + n:05d}.png" for n in range(len(levels))]
    for path, level in zip(paths, levels, strict=True):
        _write(_picture(level), path)
    return paths


def tile(images: Float[Tensor, "B C H W"], columns: int | None = None, padding: int = 2) -> Image.Image:
    """One picture with all of them, row by row, on white.

    Args:
        images: [B, 3, H, W] or [B, 1, H, W], in [0, 1].
        columns: how many side by side; None makes about a square.
        padding: pixels between neighbours, and round the whole.

    Raises:
        ValueError: as for `save_images`, and for columns < 1 or padding < 0.

    >>> tile(torch.zeros(5, 3, 8, 8)).size
    (32, 22)
    """
    levels = _levels(images)
    count, _, h, w = levels.shape
    columns = min(count, math.isqrt(count - 1) + 1) if columns is None else columns
    if columns < 1 or padding < 0:
        raise ValueError(f"columns is >= 1 and padding >= 0, got {columns} and {padding}.")
    rows = -(-count // columns)
    size = columns * (w + padding) + padding, rows * (h + padding) + padding
    sheet = Image.new("RGB", size, "white")
    for n, level in enumerate(levels):
        row, column = divmod(n, columns)
        sheet.paste(_picture(level), (padding + column * (w + padding), padding + row * (h + padding)))
    return sheet


def load(
    source: Source, framing: Framing, max_pixels: int = MAX_PIXELS
) -> tuple[Float[Tensor, "3 h w"], Int64[Tensor, "6"]]:
    """Decode a picture and frame it: its pixels and the six facts of `Framing`.

    Args:
        source: a path, the bytes of a file, or a picture of Pillow's.
        framing: what is seen of it.
        max_pixels: height times width, at most.

    Raises:
        Unreadable: with the reason.
    """
    with _opened(source, max_pixels) as (image, orientation):
        try:
            image = _rgb(image)
        except Exception as error:
            raise _unreadable(error) from error
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    return framing(image)


def header(source: Source, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Height and width of a picture when it is upright, without decoding it.

    Raises:
        Unreadable: with the reason, as far as the header tells.
    """
    with _opened(source, max_pixels) as (image, orientation):
        height, width = image.height, image.width
    return (width, height) if orientation >= 5 else (height, width)


@contextmanager
def _opened(source: Source, max_pixels: int) -> Iterator[tuple[Image.Image, int]]:
    """A picture that is not decoded yet, and its orientation."""
    with ExitStack() as stack:
        try:
            if isinstance(source, Image.Image):
                image = source
            else:
                image = _sniffed(stack.enter_context(_file(source)))
            # Not image.getexif(), which decodes a PNG to look for EXIF after its pixels.
            orientation = int(Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1))
        except Exception as error:
            raise _unreadable(error) from error
        _check_size(image.height, image.width, max_pixels)
        yield image, orientation if orientation in _UPRIGHT else 1


@contextmanager
def _file(source: str | os.PathLike[str] | bytes) -> Iterator[io.BytesIO | io.BufferedReader]:
    if isinstance(source, bytes):
        yield io.BytesIO(source)
    elif S_ISREG(os.stat(source).st_mode):  # opening a FIFO would wait for its other end
        with open(source, "rb") as file:
            yield file
    else:
        raise Unreadable("it is not a regular file.")


def _sniffed(file: io.BytesIO | io.BufferedReader) -> Image.Image:
    start = file.read(12)
    file.seek(0)
    for known, end, plugin in _PLUGINS:
        if start.startswith(known) and start.endswith(end):
            return plugin(file)
    raise Unreadable("it is not a PNG, JPEG or WebP file; convert it to one of them.")


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise Unreadable(
            f"it has {height} × {width} pixels, which is more than max_pixels={max_pixels:_}; make it "
            f"smaller or raise max_pixels."
        )
    if max(height, width) > LONGEST:
        raise Unreadable(f"it has {height} × {width} pixels, and no side may be above {LONGEST}; crop it.")


def _unreadable(error: Exception) -> Exception:
    """What a failure to read means: the file is at fault, unless the machine is."""
    if isinstance(error, Unreadable | MemoryError):
        return error
    absent = isinstance(error, FileNotFoundError | NotADirectoryError | PermissionError)
    if isinstance(error, OSError) and error.errno is not None and not absent:
        return error  # too many open files, a disk that fails: not to be taken for a broken picture
    text = error.strerror if absent and isinstance(error, OSError) else str(error)
    return Unreadable(f"it cannot be read ({type(error).__name__}: {text}).")


def _rgb(image: Image.Image) -> Image.Image:
    """Decoded, in 8-bit RGB, on white where it is transparent."""
    image.load()
    if image.mode == "F":
        raise Unreadable("it has pixels of floating point, whose range nobody says; convert it to RGB.")
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip at 255
        values = np.asarray(image).astype(np.int64)
        grey = ((2 * values + 257) // 514).clip(0, 255)  # the integer nearest to values/257
        transparent = values == image.info.get("transparency", -1)
        return Image.fromarray(np.where(transparent, 255, grey).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _levels(images: Tensor) -> Tensor:
    """Pictures as uint8 on the CPU."""
    if images.ndim != 4 or len(images) == 0 or images.shape[1] not in (1, 3):
        raise ValueError(f"images are [B, 3, H, W] or [B, 1, H, W], got shape {tuple(images.shape)}.")
    levels = images.detach().to("cpu", torch.float32) * 255
    low, high = levels.min().item(), levels.max().item()
    if not (low >= -0.5 and high <= 255.5):
        raise ValueError(
            f"images lie in [0, 1], got values from {low / 255:.4g} to {high / 255:.4g}; of [-1, 1] give "
            f"images / 2 + 0.5, and clamp what exceeds it by intention."
        )
    return levels.round().clamp(0, 255).to(torch.uint8)


def _picture(level: Tensor) -> Image.Image:
    array = level.permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


def _write(image: Image.Image, path: Path) -> None:
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with open(aside, "xb") as file:
            image.save(file, "PNG")
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
