"""A page in headless Chromium: what it shows, what it asks of the network, and how it looks on a phone."""

import html
import json
import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
PHONE_WIDTH = 390


def browse(page: Path, log: Path | None = None, *, dark: bool = False) -> str:
    """Return the document as it stands once its scripts have run; `log` gets what was asked of the network."""
    quiet = ("--disable-background-networking", "--disable-component-update", "--no-first-run")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000", *quiet]
    options += ["--force-dark-mode"] if dark else []
    options += [f"--log-net-log={log}"] if log else []
    command = [str(CHROMIUM), *options, "--dump-dom", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def asked_of_the_network(log: Path) -> set[str]:
    """What a page asked for; the browser asks for things itself, without an origin."""
    events = [event.get("params", {}) for event in json.loads(log.read_text("utf-8"))["events"]]
    return {event["url"] for event in events if event.get("initiator", "not an origin") != "not an origin"}


def with_script(page: Path, script: str) -> Path:
    """The page with a visitor in it, who acts after all else."""
    copy = page.with_name("visited.html")
    copy.write_text(page.read_text("utf-8").replace("</body>", f"<script>{script}</script></body>"), "utf-8")
    return copy


def on_a_phone(page: Path, script: str) -> Path:
    """The page in a frame as wide as a phone; `script` sees it as `page`, once it is laid out, and the outer document.

    A headless window is never that narrow by itself.
    """
    copy = page.with_name("phone.html")
    frame = f'<iframe width="{PHONE_WIDTH}" height="900" srcdoc="{html.escape(page.read_text("utf-8"))}"></iframe>'
    seen = (
        "const frame = document.querySelector('iframe');"
        f"frame.addEventListener('load', () => {{ const page = frame.contentDocument; {script} }});"
    )
    copy.write_text(f"<!doctype html><script>addEventListener('DOMContentLoaded', () => {{ {seen} }})</script>{frame}")
    return copy
