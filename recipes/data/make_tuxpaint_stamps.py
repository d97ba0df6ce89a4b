"""Make tuxpaint-stamps/: the pictures of Tux Paint's stamps with their English captions, for chat-images-offline.

    python recipes/data/make_tuxpaint_stamps.py

Downloads the Debian package tuxpaint-stamps-default (81 MB) with apt, or takes it unpacked with --unpacked. Pictures
and captions are under GPL-2 (copyright 2002-2022 Bill Kendrick and others), so llmtune does not ship them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageOps

PACKAGE = "tuxpaint-stamps-default"
STAMPS = "usr/share/tuxpaint/stamps"
COPYRIGHT = f"usr/share/doc/{PACKAGE}/copyright"
QUESTION = "What is in the picture?"
SIZE = (224, 224)
MAX_CHARACTERS = 60
"""Longer captions tell a story."""


def main() -> None:
    """Fetch the package if necessary; write pictures, captions and the package's copyright file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unpacked", type=Path, help="folder with the unpacked package")
    parser.add_argument("out", type=Path, nargs="?", default=Path(__file__).parent / "tuxpaint-stamps")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        unpacked = options.unpacked or fetch(Path(folder))
        (options.out / "pictures").mkdir(parents=True, exist_ok=True)
        rows = list(read_stamps(unpacked / STAMPS, options.out))
        (options.out / "copyright").write_bytes((unpacked / COPYRIGHT).read_bytes())
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (options.out / "captions.jsonl").write_text(lines, encoding="utf-8")
    print(f"{len(rows)} pictures, {len({row['caption'] for row in rows})} captions: {options.out / 'captions.jsonl'}")


def fetch(folder: Path) -> Path:
    """Download and unpack the package into `folder`, without installing it."""
    subprocess.run(["apt-get", "download", "--quiet", PACKAGE], check=True, cwd=folder)
    (archive,) = folder.glob(f"{PACKAGE}_*.deb")
    subprocess.run(["dpkg-deb", "--extract", archive, folder], check=True)
    return folder


def read_stamps(stamps: Path, out: Path) -> Iterator[dict[str, object]]:
    """Yield a row for each stamp that has a short caption, and write its picture."""
    for file in sorted(stamps.rglob("*.png")):
        text = file.with_suffix(".txt")
        caption = text.read_text("utf-8").splitlines()[0].strip() if text.is_file() else ""
        if not 0 < len(caption) <= MAX_CHARACTERS:
            continue
        place = file.relative_to(stamps)
        name = "pictures/" + "-".join(place.parts)
        draw_square(file).save(out / name)
        question = [{"type": "image", "path": name}, {"type": "text", "text": QUESTION}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": caption}]
        yield {"messages": messages, "caption": caption, "category": place.parts[0]}


def draw_square(file: Path) -> Image.Image:
    """Read a stamp and center it on a white square, as large as fits; models squeeze other shapes."""
    with Image.open(file) as picture:
        stamp = ImageOps.contain(picture.convert("RGBA"), SIZE)
    square = Image.new("RGBA", SIZE, "white")
    square.alpha_composite(stamp, ((SIZE[0] - stamp.width) // 2, (SIZE[1] - stamp.height) // 2))
    return square.convert("RGB")


if __name__ == "__main__":
    main()
