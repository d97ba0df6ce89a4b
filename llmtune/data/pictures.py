"""Pictures in rows: places them in messages, checks each picture once, and opens it as RGB."""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
import struct
import warnings
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import xxhash

from llmtune.data.rejected_rows import RowError, json_kind, parse_cell
from llmtune.errors import DataError
from llmtune.recipe.extras import require_extra
from llmtune.recipe.user_files import read_bytes

if TYPE_CHECKING:
    from PIL.Image import Image as PilImage

PLACE = "\ufffc"
"""Marks a picture in a message's text: U+FFFC, the object replacement character."""
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF")
"""Decoders that may run. Pillow has others, and one of them starts a program (EPS)."""
IMAGE = "<image>"
"""Marks a picture in the texts of rows with a column of pictures."""
MARK = re.compile(f"{PLACE}|{IMAGE}")
LOCATIONS = ("bytes", "base64", "data", "url", "path", "image", "image_url", "source")
"""Keys under which an object has a picture, the bytes first, as in the datasets library."""
MAX_BYTES = 64 * 2**20
"""A camera's largest files are smaller."""
MAX_PIXELS = 50_000_000
"""The largest pictures of phones: 8,160 x 6,120. With transparency, decoding needs 12 bytes a pixel: 600 MB."""
MIN_SIDE = 4
"""Image processors take an array with a side of 1 or 3 for one whose channels come first."""
MAX_RATIO = 200
"""Of the sides: the limit of Qwen's image processors."""
LOOK_SIDE = 32
DAMAGE = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, MemoryError),
    *(EOFError, struct.error, zlib.error),
)
"""What decoders raise for damaged files."""


class Picture(TypedDict):
    """A picture of a row that was checked."""

    picture: str
    """The absolute path of its file, or a `data:` URL if it came inside the row."""
    content: str
    """The hash of its bytes."""
    look: str
    """A hash of how it looks: 64 bits, of which pictures that look the same share most."""
    size: list[int]
    """Width and height in pixels, upright."""
    converted: NotRequired[str]
    """What `open_picture` converts."""


def read_picture(source: object, folder: Path | None) -> Picture:
    """Decode a picture of a row completely, and describe it.

    Args:
        source: A path, a `data:` URL, bytes, or an object with one of LOCATIONS.
        folder: The folder of the row's file, the base of relative paths. None for a row without a file, which can
            only have pictures inside.

    Raises:
        RowError: It is missing, no picture, damaged, animated, of an impossible size, or outside the folder.
        EnvironmentProblem: Pillow is not installed.
    """
    location, name, content = _load(source, folder)
    image, converted, kind = _decode(content, name)
    digest = xxhash.xxh3_128_hexdigest(content)
    url = location or f"data:image/{kind.lower()};base64,{base64.b64encode(content).decode()}"
    picture: Picture = {"picture": url, "content": digest, "look": _hash_look(image), "size": list(image.size)}
    return {**picture, "converted": ", ".join(converted)} if converted else picture


def open_picture(picture: Picture) -> PilImage:
    """Return a picture as RGB: upright by its EXIF orientation, transparent parts on white, 16 bits scaled to 8.

    Raises:
        DataError: It is missing or not the picture that `read_picture` described.
    """
    name = picture_name(picture)
    fix = "Restore it, or prepare the rows again."
    try:
        content = _load(picture["picture"], Path("/"))[2]
        if xxhash.xxh3_128_hexdigest(content) != picture["content"]:
            raise DataError.of("the picture changed after its row was read", name, fix)
        return _decode(content, name)[0]
    except RowError as error:
        raise DataError.of(str(error), name, fix) from None


def picture_name(picture: Picture) -> str:
    """Return a name for display: that of its file, or the start of its hash."""
    if picture["picture"].startswith("data:"):
        kind = picture["picture"].partition(";")[0].rpartition("/")[2]
        return f"{picture['content'][:8]}.{kind}"
    return Path(picture["picture"]).name


def may_be_picture(value: object) -> bool:
    """Whether a cell looks like a picture: a file's name, a data URL, or an object of the datasets library."""
    if isinstance(value, Mapping):
        return any(value.get(key) is not None for key in ("bytes", "path"))
    if isinstance(value, str):
        return value.startswith("data:image/") or value.lower().endswith(ENDINGS)
    return isinstance(value, bytes)


def _load(source: object, folder: Path | None) -> tuple[str, str, bytes]:
    """Return the absolute path of a picture (empty if the row has it inside), a name for messages, and its bytes."""
    if isinstance(source, Mapping):
        key = next((key for key in LOCATIONS if source.get(key) is not None), None)
        if key is None:
            raise RowError("picture missing", "an object without 'path', 'url', 'base64' or 'bytes'")
        value = source[key]
        inside = key in ("base64", "data") and not str(value).startswith("data:")
        return _load(f"data:;base64,{value}" if inside else value, folder)
    if isinstance(source, bytes | bytearray | memoryview):
        content = bytes(source)
        _check_bytes(len(content), "the picture in the row")
        return "", "the picture in the row", content
    if not isinstance(source, str) or not source:
        raise RowError("wrong type", f"a picture is {json_kind(source)}; it must be a path, a data URL or bytes")
    if source.startswith("data:"):
        head, _, text = source.partition(",")
        if not head.endswith(";base64"):
            raise RowError("picture unreadable", "a data URL without ';base64,'")
        try:
            return _load(base64.b64decode(text, validate=True), folder)
        except binascii.Error as error:
            raise RowError("picture unreadable", f"the data URL is not base64: {error}") from None
    return _load_file(source, folder)


def _load_file(source: str, folder: Path | None) -> tuple[str, str, bytes]:
    if "://" in source[:10] and not source.startswith("file://"):
        raise RowError("picture at an address", f"{source[:80]}: llmtune fetches no addresses; give a file")
    if folder is None:
        raise RowError("picture in a file", "only data URLs are read here: `data:image/png;base64,...`")
    if "\0" in source:
        raise RowError("wrong type", f"the path {source!r} contains NUL")
    path = Path(source.removeprefix("file://"))
    try:
        if not path.is_absolute():
            path = Path(os.path.abspath(folder / path))
            if not path.resolve().is_relative_to(folder.resolve()):
                raise RowError("picture outside the folder", f"{source} leads out of {folder}; give an absolute path")
        content = read_bytes(path, MAX_BYTES)
    except FileNotFoundError:
        raise RowError("picture missing", f"file not found: {path}") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: symlinks in a circle
        why = getattr(error, "strerror", None) or str(error)
        raise RowError("picture unreadable", f"{path}: {why}") from None
    _check_bytes(len(content), str(path))
    return str(path), str(path), content


def _check_bytes(count: int, name: str) -> None:
    if not count:
        raise RowError("picture empty", f"{name} has no bytes")
    if count > MAX_BYTES:
        raise RowError("picture too large", f"{name} has {count:,} bytes; up to {MAX_BYTES:,} are read")


def _decode(content: bytes, name: str) -> tuple[PilImage, list[str], str]:
    """Return a picture as RGB, what was converted, and its format. Raises RowError."""
    require_extra("images", "data")
    from PIL import Image, UnidentifiedImageError

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on damaged EXIF, and on sizes that `_check_size` refuses
        try:
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                _check_size(image, name)
                kind = str(image.format)
                if kind != "MPO" and getattr(image, "is_animated", False):  # a phone's MPO: the first is the picture
                    raise RowError("picture animated", f"{name} has several frames; save one of them")
                image.load()
                return *_to_rgb(image, name), kind
        except UnidentifiedImageError:
            raise RowError("not a picture", f"{name} is none of {', '.join(FORMATS)}") from None
        except Image.DecompressionBombError:
            raise RowError("picture too large", f"{name} has more than {MAX_PIXELS:,} pixels") from None
        except DAMAGE as error:
            raise RowError("picture unreadable", f"{name}: {error or type(error).__name__}") from None


def _check_size(image: PilImage, name: str) -> None:
    """Refuse impossible sizes by the header, before anything is decoded."""
    width, height = image.size
    short, long = sorted(image.size)
    if width * height > MAX_PIXELS:
        what = f"{name} has {width:,} x {height:,} pixels; up to {MAX_PIXELS:,} are read"
        raise RowError("picture too large", what)
    if short < MIN_SIDE:
        raise RowError("picture too small", f"{name} has {width:,} x {height:,} pixels; a side needs {MIN_SIDE}")
    if long > MAX_RATIO * short:
        raise RowError("picture too narrow", f"{name} has {width:,} x {height:,} pixels; sides up to 1:{MAX_RATIO}")


def _to_rgb(image: PilImage, name: str) -> tuple[PilImage, list[str]]:
    from PIL import Image, ImageOps

    converted = []
    if image.getexif().get(0x0112, 1) in range(2, 9):
        converted.append("turned upright by EXIF")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bits(image, name)
        converted.append("16 bit to 8")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layers = image.convert("RGBA")
        if min(layers.getchannel("A").getextrema()) != 255:
            converted.append("transparent parts on white")
        image = Image.new("RGB", layers.size, "white")
        image.paste(layers, mask=layers.getchannel("A"))
    elif image.mode != "RGB":
        names = {"1": "black and white", "L": "grey", "P": "palette"}
        converted.append(f"{names.get(image.mode, image.mode)} to RGB")
        image = image.convert("RGB")
    return image, converted


def _to_8_bits(image: PilImage, name: str) -> PilImage:
    """Scale 16 bits a pixel to 8; Pillow's conversion would clip them."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 2**16 - 1:
        raise RowError("picture unreadable", f"{name} has 32 bits a pixel; 8 and 16 are read")
    return Image.fromarray((values // 257).astype(np.uint8))


def _hash_look(image: PilImage) -> str:
    """Return the perceptual hash: the signs of the 8 x 8 lowest frequencies against their median, in hex."""
    import numpy as np
    from PIL import Image

    grey = image.resize((LOOK_SIDE, LOOK_SIDE), Image.Resampling.BOX, reducing_gap=2).convert("L")
    waves = np.cos(np.pi / LOOK_SIDE * np.outer(np.arange(8), np.arange(LOOK_SIDE) + 0.5))
    strengths = (waves @ np.asarray(grey, dtype=np.float64) @ waves.T).ravel()
    bits = strengths > np.median(strengths[1:])
    return np.packbits(bits).tobytes().hex()


def place_pictures(messages: Sequence[Any], column: object) -> None:
    """Give each place in the users' messages its picture, as the row states it; the messages change in place.

    The picture is in the part, or the next one of the row's column. A mark in a text becomes PLACE. Pictures without
    any place come first in the first message of the user, as in LLaMA-Factory and TRL.

    Raises:
        RowError: The row has more or fewer pictures than places, or an answer has one.
    """
    column = parse_cell(column)
    waiting = column if isinstance(column, list) else [] if column in (None, "") else [column]
    users = [message for message in messages if message["role"] == "user"]
    if waiting and users and not any(MARK.search(message["content"]) for message in users):
        users[0]["content"] = IMAGE * len(waiting) + users[0]["content"]
    places = 0
    for message in messages:
        stated = iter(message.get("images", ()))
        marks = MARK.findall(message["content"])
        if message["role"] != "user" and (message.get("images") or (IMAGE in marks and waiting)):
            raise RowError("picture in an answer", f"a message of the {message['role']} has a picture; only users' may")
        if message["role"] != "user" or not (marks and (waiting or message.get("images"))):
            continue
        if marks.count(PLACE) != len(message.get("images", ())):
            raise RowError("not a character", "U+FFFC in a text of a message with a picture; it stands for pictures")
        images = [next(stated, None) if mark == PLACE else None for mark in marks]
        places += images.count(None)
        filled = iter(waiting[places - images.count(None) :])
        message["images"] = [next(filled, None) if image is None else image for image in images]
        message["content"] = message["content"].replace(IMAGE, PLACE)
    if places != len(waiting):
        what = f"{places} places ({IMAGE}) without their own picture, and {len(waiting)} pictures in the row's column"
        raise RowError("pictures and places differ", what)


def read_pictures(messages: Sequence[Any], folder: Path | None) -> None:
    """Check the pictures that `place_pictures` placed; the messages change in place. Raises RowError."""
    for number, message in enumerate(messages, 1):
        if "images" in message:
            try:
                message["images"] = [read_picture(image, folder) for image in message["images"]]
            except RowError as error:
                raise RowError(error.reason, f"message {number}: {error.detail}") from None
