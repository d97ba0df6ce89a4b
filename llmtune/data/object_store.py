"""Files of object stores and web servers, through fsspec: finds them, identifies versions, and streams contents."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.errors import DataError, EnvironmentProblem
from llmtune.recipe.secrets import redact
from llmtune.recipe.section import STORES

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

PACKAGES = {"s3": "'llmtune-cli[s3]'", "gs": "'llmtune-cli[gs]'"}
CREDENTIALS = {
    "s3": "Set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; "
    "AWS_ENDPOINT_URL (https://HOST:PORT) for a store of your own.",
    "gs": "Log in: `gcloud auth application-default login`.",
}
AUTHORITIES = {"s3": "AWS_CA_BUNDLE"}
"""Variables that name a file of trusted authorities; other protocols use OpenSSL's SSL_CERT_FILE."""
TAGS = ("ETag", "etag")
DAMAGED = ("Truncated compressed", "decompress failed", "inflate failed")


def is_remote(path: str) -> bool:
    """Whether a source's path is a URL."""
    return path.startswith(STORES)


@dataclass(frozen=True)
class RemoteFile:
    """A file read over the network, block by block."""

    url: str
    size: int
    """Size in bytes; 0 if the server does not report it."""
    etag: str
    """Identifies the content, such as a strong etag; empty if the server has none."""

    def open(self) -> Any:
        """Open it for reading bytes. Raises the errors of `reached`."""
        with reached(self.url):
            return _filesystem(self.url).open(self.url, "rb")

    def hash(self) -> str:
        """Return the sha256 of its content, which is read completely."""
        with reached(self.url), self.open() as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def find_objects(url: str) -> list[RemoteFile]:
    """Return the files that a URL names, sorted by name: one file, the matches of a pattern, or all below a folder.

    Raises:
        DataError: No file is found, or access is denied.
        EnvironmentProblem: The store cannot be reached, or the package that reads it is not installed.
    """
    protocol = url.partition("://")[0]
    with reached(url, ValueError):  # from botocore, for an endpoint that is no URL
        store = _filesystem(url)
        if protocol.startswith("http"):
            info_by_name = {url: store.info(url)}
        else:
            info_by_name = store.glob(url, detail=True) if "*" in url or "?" in url else store.find(url, detail=True)
    files = [
        RemoteFile(url if protocol.startswith("http") else f"{protocol}://{name}", info.get("size") or 0, _etag(info))
        for name, info in sorted(info_by_name.items())
        if info["type"] == "file"
    ]
    if not files:
        raise DataError.of("file or folder not found", url, "Check the address; `**` crosses folders.")
    return files


def _etag(info: dict[str, Any]) -> str:
    tag = next((str(info[name]) for name in TAGS if info.get(name)), "")
    return "" if tag.startswith("W/") else tag.strip('"')  # a weak etag may stay the same while bytes change


def _filesystem(url: str) -> AbstractFileSystem:
    from fsspec import filesystem  # slow to import, and --help does not need it

    protocol = url.partition("://")[0]
    for name in ("gcsfs", "google.auth"):  # they print tracebacks of the errors they raise
        logging.getLogger(name).setLevel(logging.CRITICAL)
    options = {"client_kwargs": {"trust_env": True}} if protocol.startswith("http") else {}  # proxies, ~/.netrc
    return filesystem(protocol, use_listings_cache=False, **options)


def is_damage(error: Exception) -> bool:
    """Whether Arrow failed on a damaged compressed file, as opposed to a system or network error."""
    return isinstance(error, OSError) and error.errno is None and any(word in str(error) for word in DAMAGED)


@contextmanager
def reached(url: str, *more: type[Exception]) -> Iterator[None]:
    """Turn errors of the libraries, and `more`, into a DataError or EnvironmentProblem without secrets."""
    protocol = url.partition("://")[0]
    try:
        yield
    except ImportError as error:
        package = PACKAGES.get(protocol, "'fsspec[http]'")
        raise EnvironmentProblem.of(f"{protocol}:// needs a package", url, f"pip install {package}") from error
    except (*_errors(), *more) as error:
        if is_damage(error):
            raise  # not an error of the store
        # fsspec raises "not found" for every failure of a web server.
        answer = error.__cause__ if protocol.startswith("http") and error.__cause__ else error
        status = answer.status if hasattr(answer, "status") else getattr(answer, "code", None)
        denied = isinstance(answer, PermissionError) or str(answer).startswith("Forbidden")  # gcsfs's wording
        if denied or status in (401, 403):
            fix = CREDENTIALS.get(protocol, "Put the password into ~/.netrc.")
            raise DataError.of("the file cannot be read (permission denied)", url, fix) from error
        if isinstance(answer, FileNotFoundError) or status in (404, 410):
            raise DataError.of("file not found", url, "Check the address.") from error
        if problem := _insecure(answer, AUTHORITIES.get(protocol, "SSL_CERT_FILE")):
            raise EnvironmentProblem.of(problem[0], url, problem[1]) from error
        what = redact(str(answer).partition("\n")[0]) or type(answer).__name__
        fix = f"Check the network and its proxy. {CREDENTIALS.get(protocol, '')}".strip()
        raise EnvironmentProblem.of(f"the store cannot be read ({what})", url, fix) from error


def _insecure(error: BaseException | None, variable: str) -> tuple[str, str] | None:
    """Return the problem with a certificate and its fix, if one caused the error."""
    import ssl  # late: local files do not need it

    fault = None
    while error is not None:
        fault = error if isinstance(error, ssl.SSLError | FileNotFoundError) else fault  # innermost
        error = error.__cause__ or error.__context__
    if fault is None:
        return None
    file = os.environ.get(variable)
    if file and not Path(file).exists():
        return f"{variable} is {file!r}, which does not exist", "Name a PEM file with trusted certificates."
    reason = getattr(fault, "verify_message", None) or (getattr(fault, "reason", None) or str(fault)).replace("_", " ")
    now = f"now {file!r}" if file else "not set"
    return (
        f"no secure connection to the store ({reason})",
        "Check the address: https or http, and the name that the certificate is for. "
        f"{variable} ({now}) names the PEM file with the authorities that are trusted.",
    )


def _errors() -> tuple[type[Exception], ...]:
    """Return the exception types of the libraries that are loaded."""
    error_types = (
        ("aiohttp", "ClientError"),
        ("botocore.exceptions", "BotoCoreError"),
        ("gcsfs.retry", "HttpError"),
        ("google.auth.exceptions", "GoogleAuthError"),
    )
    return (OSError, *(getattr(sys.modules[module], name) for module, name in error_types if module in sys.modules))
