"""Signatures of release files, by an SSH key (`ssh-keygen -Y`) or Sigstore's own program, each in a file beside it."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from llmtune.errors import EnvironmentProblem, GateFailed, RecipeError

NAMESPACE = "llmtune-release"
SIGSTORE = "sigstore"
ENDINGS = {"ssh": ".sig", SIGSTORE: ".sigstore.json"}
INSTALL = {"ssh-keygen": "Install OpenSSH 8.1 or later.", SIGSTORE: "pip install sigstore"}


@dataclass(frozen=True)
class Signature:
    """What is known of a release's signature."""

    kind: str
    file: str
    by: str
    """Whose it is, where that was checked; else the fingerprint of the key, or how to check it."""
    checked: bool
    """Whether it was held against the keys of those who may sign."""


def sign(path: Path, how: str) -> Path:
    """Sign a release by the SSH key in the file `how`, or by Sigstore; return the file with the signature.

    Raises:
        RecipeError: there is no such key.
        EnvironmentProblem: the program is not installed, or refused.
    """
    remove_signatures(path)
    if how == SIGSTORE:
        call([SIGSTORE, "sign", "--bundle", str(signature_file(path, SIGSTORE)), str(path)])
        return signature_file(path, SIGSTORE)
    if not Path(how).is_file():
        fix = "Name the file of an SSH key, such as ~/.ssh/id_ed25519, or write sigstore."
        raise RecipeError.of(f"there is no SSH key {how}", "--sign", fix)
    call(["ssh-keygen", "-Y", "sign", "-f", how, "-n", NAMESPACE, str(path)])
    return signature_file(path, "ssh")


def check_signature(path: Path, signers: Path | None) -> Signature | None:
    """Check the signature of a release, if it has one; `signers` is a file of keys as ssh-keygen's ALLOWED SIGNERS are.

    Raises:
        GateFailed: the file is not what was signed; or, with `signers`, nobody of them signed it.
        EnvironmentProblem: ssh-keygen is not installed.
    """
    found = {kind: file for kind in ENDINGS if (file := signature_file(path, kind)).exists()}
    if signers is not None and "ssh" not in found:
        raise GateFailed.of("nobody signed this with an SSH key", str(path), "Sign it: llmtune release RUN --sign KEY")
    if "ssh" in found:
        words, content = ["-n", NAMESPACE, "-s", str(found["ssh"])], path.read_bytes()
        valid = run(["ssh-keygen", "-Y", "check-novalidate", *words], content)
        if valid.returncode:
            fix = "Take the file and its signature as they were released."
            raise GateFailed.of("this is not the file that was signed", str(path), fix)
        if signers is None:
            return Signature("ssh", found["ssh"].name, valid.stdout.decode().strip().rpartition(" ")[2], checked=False)
        names = run(["ssh-keygen", "-Y", "find-principals", "-f", str(signers), "-s", str(found["ssh"])])
        for name in names.stdout.decode().split():
            if not run(["ssh-keygen", "-Y", "verify", "-f", str(signers), "-I", name, *words], content).returncode:
                return Signature("ssh", found["ssh"].name, name, checked=True)
        raise GateFailed.of(f"signed by a key that is not in {signers}", str(path), "Add the key, or do not trust it.")
    if SIGSTORE in found:
        how = f"check with: sigstore verify identity --bundle {found[SIGSTORE]} --cert-identity WHO ... {path}"
        return Signature(SIGSTORE, found[SIGSTORE].name, how, checked=False)
    return None


def signature_file(path: Path, kind: str) -> Path:
    """Return where the signature of a release lies."""
    return path.with_name(path.name + ENDINGS[kind])


def remove_signatures(path: Path) -> None:
    """Remove the signatures of an earlier content."""
    for kind in ENDINGS:
        signature_file(path, kind).unlink(missing_ok=True)


def run(words: list[str], given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run a program; raises EnvironmentProblem where it is not installed."""
    if shutil.which(words[0]) is None:
        raise EnvironmentProblem.of(f"{words[0]} is not installed", "--sign", INSTALL[words[0]])
    return subprocess.run(words, input=given, capture_output=True, check=False)  # noqa: S603


def call(words: list[str]) -> None:
    """Run a program that asks a person what it has to know; raises EnvironmentProblem with its last line."""
    done = run(words)
    if done.returncode:
        said = re.sub(r"\s+", " ", done.stderr.decode(errors="replace")).strip()[-300:]
        raise EnvironmentProblem.of(f"{words[0]} did not sign: {said}", "--sign", "Try it by hand: " + " ".join(words))
