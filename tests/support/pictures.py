"""Pictures for tests: drawn ones, and files that no program should trust."""

import base64
import io
import os
import struct
import zlib

from PIL import Image, ImageDraw


def draw(seed=1, size=(48, 40), mode="RGB"):
    """Return a picture with a gradient and a few shapes that depend on the seed."""
    width, height = size
    image = Image.linear_gradient("L").resize(size).convert("RGB")
    pen = ImageDraw.Draw(image)
    for number in range(4):
        spot = [(seed * 37 + number * 53) % width, (seed * 61 + number * 29) % height]
        ink = tuple((seed * step + number * 71) % 256 for step in (97, 41, 151))
        pen.ellipse([*spot, spot[0] + width // 3, spot[1] + height // 3], fill=ink)
    return image.convert(mode)


def save(path, seed=1, size=(48, 40), mode="RGB", **options):
    """Write a drawn picture, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(seed, size, mode).save(path, **options)
    return path


def picture_bytes(seed=1, kind="PNG", **options):
    """Return the bytes of a drawn picture."""
    stream = io.BytesIO()
    draw(seed).save(stream, kind, **options)
    return stream.getvalue()


def data_url(seed=1):
    """Return a drawn picture as a data URL."""
    return f"data:image/png;base64,{base64.b64encode(picture_bytes(seed)).decode()}"


def write_bomb(path, side=60_000):
    """Write a PNG of a few kilobytes whose header promises `side` x `side` pixels."""
    path.write_bytes(_png(side, side, 8, 2, bytes(2**20)))
    return path


def deep_png(values):
    """Return a PNG with 16 bits in each of two to four channels, which Pillow cannot write."""
    height, width, channels = values.shape
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    return _png(width, height, 16, {2: 4, 3: 2, 4: 6}[channels], lines)


def _png(width, height, bits, kind, lines):
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines, 9)) + chunk(b"IEND", b"")


def write_animated(path):
    """Write two frames; the ending chooses GIF, WebP or PNG."""
    draw(1).save(path, save_all=True, append_images=[draw(2)], duration=100)
    return path


def write_cut(path):
    """Write the first two thirds of a picture."""
    save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    return path


def write_link_out(path):
    """Write a link to a picture next to the folder of `path`."""
    path.symlink_to(save(path.parent.parent / "outside.png"))
    return path


def write_pipe(path):
    """Make a named pipe, which blocks every reader that waits for it."""
    os.mkfifo(path)
    return path
