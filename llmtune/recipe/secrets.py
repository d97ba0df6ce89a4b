"""Recognises secrets, by name and by format, and local paths, and removes them from shared text."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from functools import reduce
from io import StringIO
from pathlib import Path
from typing import Any, TypeVar, cast

from llmtune.errors import EnvironmentProblem, Problem

T = TypeVar("T")
REMOVED = "[removed]"
SECRET_KEY = re.compile(
    r"(?:.*[_-])?(?:api[_-]?key|password|passwd|secret|secret[_-]key|access[_-]token|auth[_-]token|hf[_-]token"
    r"|bearer[_-]token|authorization|private[_-]key)",
    re.IGNORECASE,
)
SETTING = re.compile(
    r"(?<!(?:eos|bos|pad|unk|sep|cls)[_-])(?<!mask[_-])token$|secret|passw(?:or)?d|api[_-]?key|webhook|credential",
    re.IGNORECASE,
)
"""Names of secret settings in other tools' configurations. Not for reports, which have harmless keys of such names."""
_KNOWN = (
    r"hf_[A-Za-z0-9]{16,}",  # Hugging Face
    r"api_org_[A-Za-z0-9]{16,}",
    r"sk-[A-Za-z0-9_-]{16,}",  # OpenAI, Anthropic
    r"gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}",
    r"glpat-[A-Za-z0-9_-]{16,}",
    r"xox[abeoprs]-[A-Za-z0-9-]{10,}",  # Slack
    r"(?:AKIA|ASIA)[0-9A-Z]{16}",  # AWS
    r"AIza[0-9A-Za-z_-]{35}",  # Google
    r"eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}",  # JSON Web Token
)
TOKEN = re.compile(r"(?<![A-Za-z0-9])(?:" + "|".join(_KNOWN) + r")")
HEADER = re.compile(
    r"(?P<head>\b(?:proxy-)?authorization[\"']?\s*[:=]\s*[\"']?)(?:(?:basic|bearer|token|negotiate)\s+)?[^\s\"',;]+",
    re.IGNORECASE,
)
BEARER = re.compile(r"(?P<head>\bbearer\s+)[A-Za-z0-9._~+/=-]{16,}", re.IGNORECASE)
ASSIGNED = re.compile(
    r"(?P<head>\b(?:[A-Z0-9]+_)*(?:API_KEY|APIKEY|ACCESS_KEY|SECRET|SECRET_KEY|TOKEN|PASSWORD)\b[\"']?\s*[:=]\s*[\"']?)[^\s\"',;]+"
    r"|(?P<head2>\b(?i:api[_-]?key)[\"']?\s*[:=]\s*[\"']?)[^\s\"',;]+"
)
IN_URL = re.compile(
    r"(?P<head>\b[a-z][a-z0-9+.-]{0,20}://)(?:[^\s/@:]{1,200}:[^\s/@]{1,200}|[^\s/@:]{16,200})@", re.IGNORECASE
)
IN_QUERY = re.compile(
    r"(?P<head>[?&][^\s?&=#]{0,100}(?:token|key|secret|passw(?:or)?d|sig|signature|credential)=)[^\s&#\"',;]+",
    re.IGNORECASE,
)
PRIVATE_KEY = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)
SHORTEST = 4
"""Minimum length of secrets to remove from texts; shorter strings occur by chance."""
VARIABLE = re.compile(r".*(?:KEY|KEY_ID|TOKEN|SECRET|PASSWORD|PASSWD)|.*_(?:PASS|PAT|PWD)", re.IGNORECASE)
"""Names of environment variables with secrets."""
PASSWORD_IN_URL = re.compile(r"://[^\s/@:]*:([^\s/@]+)@")
SHORTEST_KEY, SHORTEST_WORD = 8, 20
"""Minimum length of keys to remove: local servers take EMPTY, and production is the value of some APP_KEY."""


def redact(text: str, secrets: Collection[str] = ()) -> str:
    """Replace tokens, keys, passwords in URLs, authorization headers and `secrets` by `[removed]`.

    So are the secrets of the environment, here and in `redact_all`.
    """
    for secret in (*secrets, *environment_secrets()):
        text = text.replace(secret, REMOVED)
    text = PRIVATE_KEY.sub(REMOVED, text)
    text = IN_URL.sub(lambda match: match["head"] + REMOVED + "@", text)
    text = IN_QUERY.sub(lambda match: match["head"] + REMOVED, text)
    text = HEADER.sub(lambda match: match["head"] + REMOVED, text)
    text = BEARER.sub(lambda match: match["head"] + REMOVED, text)
    text = TOKEN.sub(REMOVED, text)
    return ASSIGNED.sub(lambda match: (match["head"] or match["head2"]) + REMOVED, text)


def redact_all(value: T, secrets: Collection[str] = ()) -> T:
    """Redact every string in a nested value, and replace the values of secret keys."""
    redacted: Any = value
    if isinstance(value, str):
        redacted = redact(value, secrets)
    elif isinstance(value, Mapping):
        redacted = {redact(str(key), secrets): hide(str(key), item, secrets) for key, item in value.items()}
    elif isinstance(value, list | tuple):
        redacted = [redact_all(item, secrets) for item in value]
    elif is_dataclass(value) and not isinstance(value, type):
        redacted = replace(
            value, **{field.name: hide(field.name, getattr(value, field.name), secrets) for field in fields(value)}
        )
    return cast(T, redacted)


def hide(key: str, value: object, secrets: Collection[str] = ()) -> object:
    """Redact the value of one key; replace the value of a secret key completely, whatever its type."""
    is_secret = bool(SECRET_KEY.fullmatch(key)) and not isinstance(value, bool) and value not in (None, "")
    return REMOVED if is_secret else redact_all(value, secrets)


def secret_values(value: object, secret: bool = False) -> Iterator[str]:
    """Yield the values of secret keys, to remove them elsewhere too: from prompts and file contents."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from secret_values(item, secret or bool(SECRET_KEY.fullmatch(str(key))))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from secret_values(item, secret)
    elif secret and isinstance(value, str | int) and len(str(value)) >= SHORTEST and not isinstance(value, bool):
        yield str(value)


def environment_secrets() -> list[str]:
    """Return the secrets in environment variables, also as Python and JSON quote them; long ones first."""
    values = [value for name, value in os.environ.items() if VARIABLE.fullmatch(name)]
    values += [found for value in os.environ.values() for found in PASSWORD_IN_URL.findall(value)]
    parts = {part for value in values for part in secret_parts(value)}
    forms = {form for part in parts for form in (part, repr(part)[1:-1], json.dumps(part)[1:-1])}
    return sorted(forms, key=len, reverse=True)


def hide_environment(value: T, secrets: Collection[str] | None = None) -> T:
    """Return a JSON value without the environment's secrets, by default; a name of an existing file keeps them.

    Everything that others may read passes here: JSON, console and the files of a run that have words of its code.
    """
    known, given = environment_secrets() if secrets is None else secrets, cast(Any, value)
    if isinstance(given, Mapping):
        given = {hide_environment(key, known): hide_environment(item, known) for key, item in given.items()}
    elif isinstance(given, list | tuple):
        given = [hide_environment(item, known) for item in given]
    elif isinstance(given, str) and not os.path.exists(given):
        given = reduce(lambda text, secret: text.replace(secret, REMOVED), known, given)
    return cast(T, given)


def secret_parts(key: str) -> list[str]:
    """Return the parts of a key to remove from texts: split where a text shows an escape, and no plain words."""
    return [part for part in key.split() if len(part) >= (SHORTEST_WORD if part.isalpha() else SHORTEST_KEY)]


def redact_yaml(text: str) -> str:
    """Return YAML text without secrets; comments are kept. Raises RecipeError if it is not a recipe's YAML."""
    from ruamel.yaml import YAML  # late: slow for --help

    from llmtune.recipe.yaml_reader import parse_yaml

    if _hide_within(parse_yaml(text, "recipe.yaml", Path()).plain()):
        writer = YAML()  # keeps comments
        writer.width = 10_000
        read = writer.load(text)
        _hide_within(read)
        written = StringIO()
        writer.dump(read, written)
        text = written.getvalue()
    return redact(text)


def _hide_within(node: object) -> bool:
    """Replace the values of secret keys in place; return whether any existed."""
    any_hidden = False
    for key, item in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        if isinstance(key, str) and hide(key, item) == REMOVED:
            cast(dict[str, object], node)[key], any_hidden = REMOVED, True
        else:
            any_hidden |= _hide_within(item)
    return any_hidden


def holds_secret(name: str, value: object) -> bool:
    """Return whether a setting is secret by its name, or by the format of its value, at any depth."""
    if value is None or value == "" or isinstance(value, bool):
        return False
    if SETTING.search(name) or redact(name) != name:
        return True
    if isinstance(value, Mapping):
        return any(holds_secret(str(key), item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return any(holds_secret(name, item) for item in value)
    return redact(str(value)) != str(value)


# Local paths


TEXT_SUFFIXES = {".json", ".yaml", ".md", ".lock", ".jinja", ".txt", ""}
"""Extensions of text files; the empty one is for an Ollama Modelfile."""
PATH_KEYS = ("folder",)
"""Keys of a lock whose value is only a path."""


def hide_paths(value: object) -> object:
    """Return a JSON-able value with absolute paths cut to their last part and secrets removed."""
    return redact_all(_cut_paths(value))


def _cut_paths(value: object) -> object:
    if isinstance(value, dict):
        return {_cut_paths(key): _cut_paths(item) for key, item in value.items() if key not in PATH_KEYS}
    if isinstance(value, list | tuple):
        return [_cut_paths(item) for item in value]
    return Path(value).name if isinstance(value, str) and is_local_path(value) else value


def is_local_path(text: str) -> bool:
    """Return whether a string is an absolute path or a path below a home folder."""
    return os.path.isabs(text) or text.startswith("~")


def recipe_to_share(values: Mapping[str, object]) -> str:
    """Return a resolved recipe as YAML, without local paths and origin comments."""
    from ruamel.yaml import YAML

    writer = YAML(typ="safe")
    writer.default_flow_style = False
    writer.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    text = StringIO()
    writer.dump(hide_paths(dict(values)), text)
    head = "# The recipe of this model. Paths are cut to their last part: replace them with your own.\n"
    return head + text.getvalue()


def refuse_paths(folder: Path, private: Iterable[Path]) -> None:
    """Raise EnvironmentProblem if a text file still contains one of the `private` paths."""
    names = sorted({str(path) for path in private if len(path.parts) > 2})
    texts = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix in TEXT_SUFFIXES]
    EnvironmentProblem.collect(
        Problem(f"contains a local path: {name}", path.name, "Remove it from the model or its template.")
        for path in texts
        for name in names
        if name in path.read_text("utf-8", errors="replace")
    )
