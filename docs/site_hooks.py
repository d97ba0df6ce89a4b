"""Hooks of mkdocs for a site that includes pages outside docs/: recipes, benchmarks, CI examples, changes."""

from __future__ import annotations

import posixpath
import re
import subprocess
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = ("recipes", "examples", "benchmarks", "llmtune/evaluate/suites/general", "CHANGELOG.md", "CONTRIBUTING.md")
SHOWN = {"", ".md", ".yaml", ".yml", ".txt", ".svg", ".png", ".ipynb"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside docs/, each under its own path in the repository."""
    listed = subprocess.run(["git", "ls-files", *OUTSIDE], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for path in listed.split():
        if Path(path).suffix in SHOWN:
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links of the site, where docs/ is the top."""
    source = page.file.src_uri
    folder = posixpath.dirname(source if (ROOT / source).exists() else f"docs/{source}")

    def relink(match: re.Match[str]) -> str:
        path, anchor = match[2], match[3] or ""
        target = posixpath.normpath(posixpath.join(folder, path)).removeprefix("docs/")
        return f"{match[1]}({posixpath.relpath(target, posixpath.dirname(source) or '.')}{anchor})"

    return re.sub(r"(\])\((?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)", relink, markdown)
