"""Pictures in rows: places them in messages, checks each picture once, and opens it as RGB."""

from __future__ import annotations

import base64
import io
import os
import re
import struct
import warnings
import zlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict, cast

import xxhash

from llmtune.data.rejected_rows import RowError, json_kind, parse_cell
from llmtune.errors import DataError
from llmtune.recipe.extras import require_extra
from llmtune.recipe.user_files import read_bytes
from llmtune.records import Row

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image as PilImage

PLACE = "\ufffc"
"""Marks a picture in a text: U+FFFC, the object replacement character."""
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
SIGNS = re.compile(rb"image|\.(png|jpe?g|webp|gif|bmp|tiff?)\b", re.IGNORECASE)
"""One of these is in the rows of a file with pictures."""
PICTURE_KEY = b"image"
"""A part of every column in IMAGES and of every type in PICTURE_PARTS."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Decoders that may run. Pillow has others, and one of them starts a program (EPS)."""
PICTURE_PARTS = ("image", "image_url", "input_image")
"""Types of parts with a picture: of transformers, of OpenAI's chat completions, and of its responses."""
IMAGES = ("image", "images")
IMAGE = "<image>"
"""Marks a picture in the texts of rows with a column of pictures."""
MARK = re.compile(f"{PLACE}|{IMAGE}")
LOCATIONS = ("bytes", "base64", "data", "url", "path", "image", "image_url", "source")
"""Keys under which an object has a picture, the bytes first, as in the datasets library."""
MAX_BYTES = 64 * 2**20
MAX_PIXELS = 50_000_000
"""The largest pictures of phones: 8,160 x 6,120. With transparency, decoding needs 9 bytes a pixel: 450 MB."""
MIN_SIDE, MAX_RATIO = 4, 200
"""Image processors take a side of 1 or 3 for the channels; 200 is the limit of Qwen's."""
DEPTHS = (8, 10, 12, 14, 16)
"""Bits of a value in a file with 16: cameras, scanners and microscopes often use fewer, at its lower end."""
LOOK_SIDE, THUMBNAIL, LOOK_STEP = 32, 64, 1.5
"""Largest difference between two thumbnails that look the same, in standard deviations of their values.

Measured for photos, cards and pages of text: up to 0.7 for nearly all copies in half and double size, in JPEG quality
30, or with other brightness, and from 3.4 for other pictures. The perceptual hashes of 99 % of pairs of pages match.
"""
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
    """Return a picture as RGB: upright by its EXIF orientation, transparent parts on white, 16 bits as 8.

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


def absolute_pictures(value: Any, folder: Path, names: Collection[str] = (), is_picture: bool = False) -> Any:
    """Return a row as its file has it with absolute paths of pictures, and data URLs in place of bytes.

    Pictures are in the columns `names`, and in parts of messages.
    """
    if isinstance(value, Mapping):
        is_part = is_picture or value.get("type") in PICTURE_PARTS
        flags = {key: key in names or (is_part and key in LOCATIONS) for key in value}
        return {key: absolute_pictures(one, folder, (), flags[key]) for key, one in value.items()}
    if isinstance(value, list):
        return [absolute_pictures(one, folder, (), is_picture) for one in value]
    if isinstance(value, bytes):
        return f"data:image/*;base64,{base64.b64encode(value).decode()}"
    is_path = is_picture and isinstance(value, str) and value and ":" not in value[:8]
    return str((folder / value).absolute()) if is_path else value


def locate_picture(source: object, folder: Path | None) -> Path | bytes:
    """Return the absolute path of a picture, or its bytes if the row has it inside. Raises RowError."""
    if isinstance(source, Mapping):
        key = next((key for key in LOCATIONS if source.get(key) is not None), None)
        if key is None:
            raise RowError("picture missing", "an object without 'path', 'url', 'base64' or 'bytes'")
        value = source[key]
        inside = key in ("base64", "data") and not str(value).startswith("data:")
        return locate_picture(f"data:;base64,{value}" if inside else value, folder)
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source)
    if not isinstance(source, str) or not source:
        raise RowError("wrong type", f"a picture is {json_kind(source)}; it must be a path, a data URL or bytes")
    if source.startswith("data:"):
        head, _, text = source.partition(",")
        if not head.endswith(";base64"):
            raise RowError("picture unreadable", "a data URL without ';base64,'")
        try:
            return base64.b64decode(text, validate=True)
        except ValueError as error:
            raise RowError("picture unreadable", f"the data URL is not base64: {error}") from None
    return _locate_file(source, folder)


def _locate_file(source: str, folder: Path | None) -> Path:
    cure = "a data URL" if folder is None else "a file"
    if "://" in source[:10] and not source.startswith("file://"):
        raise RowError("picture at an address", f"{source[:80]}: llmtune fetches no addresses; give {cure}")
    if folder is None:
        raise RowError("picture in a file", "only data URLs are read here: `data:image/png;base64,...`")
    if "\0" in source:
        raise RowError("wrong type", f"the path {source!r} contains NUL")
    path = Path(source.removeprefix("file://"))
    if path.is_absolute():
        return path
    path = Path(os.path.abspath(folder / path))
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError) as error:  # RuntimeError: symlinks in a circle
        raise RowError("picture unreadable", f"{path}: {error}") from None
    if not inside:
        raise RowError("picture outside the folder", f"{source} leads out of {folder}; give an absolute path")
    return path


def _load(source: object, folder: Path | None) -> tuple[str, str, bytes]:
    """Return the absolute path of a picture (empty if the row has it inside), a name for messages, and its bytes."""
    content = locate_picture(source, folder)
    path = str(content) if isinstance(content, Path) else ""
    name = path or "the picture in the row"
    if isinstance(content, Path):
        try:
            content = read_bytes(content, MAX_BYTES)
        except FileNotFoundError:
            raise RowError("picture missing", f"file not found: {name}") from None
        except OSError as error:
            raise RowError("picture unreadable", f"{name}: {error.strerror or error}") from None
    if not content:
        raise RowError("picture empty", f"{name} has no bytes")
    if len(content) > MAX_BYTES:
        raise RowError("picture too large", f"{name} has {len(content):,} bytes; up to {MAX_BYTES:,} are read")
    return path, name, content


def _decode(content: bytes, name: str) -> tuple[PilImage, list[str], str]:
    """Return a picture as RGB, what was converted, and its format. Raises RowError."""
    require_extra("images", "data")
    from PIL import Image, UnidentifiedImageError

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on damaged EXIF, and on sizes that `_check_size` refuses
        try:
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                _check_size(image, name)
                kind, tile = str(image.format), str(image.tile)
                if kind != "MPO" and getattr(image, "is_animated", False):  # a phone's MPO: the first is the picture
                    raise RowError("picture animated", f"{name} has several frames; save one of them")
                image.load()
                if isinstance(key := image.info.get("transparency"), int):  # Pillow scales grey values alone
                    image.info["transparency"] = key * (85 if "L;2" in tile else 17 if "L;4" in tile else 1)
                return *_to_rgb(image, name, ";16" in tile), kind
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


def _to_rgb(image: PilImage, name: str, deep: bool) -> tuple[PilImage, list[str]]:
    from PIL import Image, ImageOps

    converted = []
    inverted = getattr(image, "tag_v2", {}).get(262) == 0 and image.mode.startswith("I")  # zero is white
    if image.getexif().get(0x0112, 1) in range(2, 9):
        converted.append("turned upright by EXIF")
        image = ImageOps.exif_transpose(image)  # it copies others too
    if deep and "transparency" in image.info:
        raise RowError("picture unreadable", f"{name} has a transparent colour of 16 bits; save it with 8 bits")
    if image.mode.startswith("I") or image.mode == "F":
        image, bits = _to_8_bits(image, name)
        image = ImageOps.invert(image) if inverted else image  # Pillow inverts 8 bits alone
        converted.append("16 bit to 8" if bits == DEPTHS[-1] else f"{bits} bit in 16 to 8")
    elif deep:  # Pillow keeps the upper 8 of 16 bits in pictures of several channels
        if (high := max(cast(Any, band.getextrema())[1] for band in image.convert("RGB").split())) < 2**6:
            what = (
                f"{name} has 16 bits a channel, but no value above {high * 256 + 255:,} of 65,535; scale them to 8 bits"
            )
            raise RowError("picture nearly black", what)
        converted.append("16 bit to 8")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layers = image if image.mode == "RGBA" else image.convert("RGBA")
        if min(layers.getchannel("A").getextrema()) != 255:
            converted.append("transparent parts on white")
        image = Image.new("RGB", layers.size, "white")
        image.paste(layers, mask=layers.getchannel("A"))
    elif image.mode != "RGB":
        names = {"1": "black and white", "L": "grey", "P": "palette"}
        converted.append(f"{names.get(image.mode, image.mode)} to RGB")
        image = image.convert("RGB")
    return image, converted


def _to_8_bits(image: PilImage, name: str) -> tuple[PilImage, int]:
    """Scale the bits in use of 16 bits a pixel to 8, and return how many; Pillow's conversion would clip them."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() >= 2 ** DEPTHS[-1]:
        raise RowError("picture unreadable", f"{name} has 32 bits a pixel; 8 and 16 are read")
    bits = next(bits for bits in DEPTHS if values.max() < 2**bits)
    return Image.fromarray((values.astype(np.uint32) * 255 // (2**bits - 1)).astype(np.uint8)), bits


def _hash_look(image: PilImage) -> str:
    """Return the perceptual hash: the signs of the 8 x 8 lowest frequencies against their median, in hex."""
    import numpy as np
    from PIL import Image

    grey = image.resize((LOOK_SIDE, LOOK_SIDE), Image.Resampling.BOX, reducing_gap=2).convert("L")
    waves = np.cos(np.pi / LOOK_SIDE * np.outer(np.arange(8), np.arange(LOOK_SIDE) + 0.5))
    strengths = (waves @ np.asarray(grey, dtype=np.float64) @ waves.T).ravel()
    bits = strengths > np.median(strengths[1:])
    return np.packbits(bits).tobytes().hex()


def look_same(one: Picture, other: Picture, thumbnails: dict[str, NDArray[np.float32]]) -> bool:
    """Whether the thumbnails of two pictures differ nowhere by much, but for their brightness and contrast.

    `thumbnails` keeps those that were made, by content.
    """
    import numpy as np
    from PIL import Image

    for picture in (one, other):
        if picture["content"] not in thumbnails:
            small = open_picture(picture).convert("L").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
            values = np.asarray(small, dtype=np.float32)
            thumbnails[picture["content"]] = (values - values.mean()) / max(float(values.std()), 1.0)
    return bool(abs(thumbnails[one["content"]] - thumbnails[other["content"]]).max() < LOOK_STEP)


def row_pictures(row: Row) -> list[Picture]:
    """Return all pictures of a canonical row, in order."""
    return [picture for message in row.get("messages") or () for picture in message.get("images", ())]


def without_pictures(row: Row) -> Row:
    """Return a conversation without its pictures, and other rows as they are; texts keep the places of pictures."""
    return (
        row
        if not row_pictures(row)
        else {**row, "messages": [{key: one[key] for key in one if key != "images"} for one in row["messages"]]}
    )


def show_places(message: Mapping[str, Any]) -> str:
    """Return a message's text with the name of each picture in its place."""
    before, *after = str(message["content"]).split(PLACE)
    names = map(picture_name, message.get("images", ()))
    return before + "".join(f"[image: {name}]{text}" for name, text in zip(names, after, strict=True))


def place_pictures(messages: Sequence[Any], column: object) -> None:
    """Give each place in the users' messages its picture, as the row states it; the messages change in place.

    The picture is in the part, or the next one of the row's column. A mark in a text becomes PLACE. Pictures without
    any place come first in the first message of the user, as in LLaMA-Factory and TRL.

    Raises:
        RowError: The row has more or fewer pictures than places, or an answer has one.
    """
    column = parse_cell(column)
    pictures = column if isinstance(column, list) else [] if column in (None, "") else [column]
    if not pictures and not any("images" in message for message in messages):
        return
    users = [message for message in messages if message["role"] == "user"]
    if pictures and users and not any(MARK.search(message["content"]) for message in users):
        users[0]["content"] = IMAGE * len(pictures) + users[0]["content"]
    places = 0
    for message in messages:
        of_parts = iter(message.get("images", ()))
        marks = MARK.findall(message["content"])
        if message["role"] != "user" and (message.get("images") or (IMAGE in marks and pictures)):
            raise RowError("picture in an answer", f"a message of the {message['role']} has a picture; only users' may")
        if message["role"] != "user" or not (marks and (pictures or message.get("images"))):
            continue
        if marks.count(PLACE) != len(message.get("images", ())):
            raise RowError("not a character", "U+FFFC in a text of a message with a picture; it stands for pictures")
        images = [next(of_parts, None) if mark == PLACE else None for mark in marks]
        places += images.count(None)
        of_column = iter(pictures[places - images.count(None) :])
        message["images"] = [next(of_column, None) if image is None else image for image in images]
        message["content"] = message["content"].replace(IMAGE, PLACE)
    if places != len(pictures):
        what = f"{places} places ({IMAGE}) without their own picture, and {len(pictures)} pictures in the row's column"
        raise RowError("pictures and places differ", what)


def refuse_bare_marks(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raise RowError for a question with `<image>` and no picture: it would be read as text."""
    for number, message in enumerate(messages, 1):
        if message["role"] == "user" and IMAGE in message["content"]:
            where = "in a column 'images' or 'image', or as a part of the message"
            raise RowError("picture missing", f"message {number} has {IMAGE}, but no picture {where}")


def read_pictures(messages: Sequence[Any], folder: Path | None) -> None:
    """Check the pictures that `place_pictures` placed; the messages change in place. Raises RowError."""
    for number, message in enumerate(messages, 1):
        if "images" in message:
            try:
                message["images"] = [read_picture(image, folder) for image in message["images"]]
            except RowError as error:
                raise RowError(error.reason, f"message {number}: {error.detail}") from None
