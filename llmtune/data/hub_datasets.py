"""Data sets of the Hugging Face hub: resolves the commit of a revision, and reads rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import xxhash

from llmtune.data.arrow_rows import decode_class_ids, drop_filled
from llmtune.data.pictures import MAX_BYTES
from llmtune.data.rejected_rows import RawRow
from llmtune.errors import DataError, EnvironmentProblem, write_origin
from llmtune.recipe.data_section import Source
from llmtune.recipe.user_files import read_bytes
from llmtune.store.atomic_files import atomic_file, explained, write_text

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

HUB = "hub:"
HubRow = dict[str, object]


class Recording(TypedDict):
    """An undecoded recording."""

    bytes: bytes | None
    path: str | None


def dataset_name(source: Source) -> str | None:
    """Return the data set's name on the hub, or None if the source is something else."""
    return source.path.removeprefix(HUB) if source.path.startswith(HUB) else None


@cache
def resolve_commit(name: str, revision: str | None) -> str:
    """Return the commit of `revision` (the newest, if None); offline, the cached commit.

    It is looked up once per process, so the rows read are those that were hashed.

    Raises:
        DataError: The data set or revision does not exist or is not accessible.
        EnvironmentProblem: The hub cannot be reached, and the cache has no commit.
    """
    from huggingface_hub import HfApi, constants

    with _explained(name):
        if constants.HF_HUB_OFFLINE:
            return _cached_commit(name, revision)
        commit = HfApi().dataset_info(name, revision=revision, timeout=30).sha
    assert commit, "the hub names the commit"
    if commit != revision:  # rows are requested by commit, so only this records the name's commit
        note = _cache_folder(name) / "refs" / (revision or "main")
        with explained(note):
            write_text(note, commit)
    return commit


def _cache_folder(name: str) -> Path:
    """Return the data set's folder in the hub's cache: `refs/` has commits by branch, `snapshots/` files by commit."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="dataset")


def _cached_commit(name: str, revision: str | None) -> str:
    folder = _cache_folder(name)
    if revision and (folder / "snapshots" / revision).is_dir():
        return revision
    reference = folder / "refs" / (revision or "main")
    if reference.is_file():
        return reference.read_text().strip()
    what = f"the data set is not in the cache, and the hub's offline switch is set (revision {revision or 'main'})"
    raise EnvironmentProblem.of(what, HUB + name, "Run once without --offline (HF_HUB_OFFLINE), or give a local file.")


def read_hub(name: str, source: Source) -> Iterator[RawRow]:
    """Yield the rows of a data set's split.

    With `limit`, rows are streamed, so only the needed part is fetched. Otherwise the split is downloaded to the hub's
    cache once.

    Raises:
        DataError: The data set, configuration or split does not exist, or its files are damaged.
        EnvironmentProblem: The hub cannot be reached.
    """
    from datasets import load_dataset
    from huggingface_hub import constants

    commit = resolve_commit(name, source.revision)
    streaming = source.limit is not None and not constants.HF_HUB_OFFLINE
    with _explained(name):
        split = source.split or _only_split(name, source, commit)
        rows = load_dataset(name, source.config, split=split, revision=commit, streaming=streaming)
        if constants.HF_HUB_OFFLINE:
            _check_cached(rows, name, commit)
        rows, plain = as_files_hold_it(rows)
        for number, row in enumerate(rows, 1):
            yield write_origin(f"{HUB}{name}/{split}", row=number), plain(row)


def as_files_hold_it(
    rows: Dataset | IterableDataset,
) -> tuple[Dataset | IterableDataset, Callable[[HubRow], HubRow]]:
    """Return rows with undecoded recordings and pictures, and a function that makes a row's values plain.

    Class numbers become class names, a recording the name of a file with its bytes, and a picture its bytes. Null keys
    that Arrow added are dropped.
    """
    from datasets import Audio, ClassLabel, Image

    features = rows.features or {}  # None if rows are streamed from files without a schema
    makers: dict[str, Callable[..., object]] = {}
    for column, feature in features.items():
        inner = getattr(feature, "feature", feature)  # of a list
        if isinstance(inner, ClassLabel):
            makers[column] = partial(decode_class_ids, inner.names)
        if getattr(feature, "decode", False):  # audio, image or video
            rows = rows.cast_column(column, replace(feature, decode=False))
        elif isinstance(inner, Image):
            rows = rows.cast_column(column, replace(feature, feature=replace(inner, decode=False)))
        if isinstance(feature, Audio):
            makers[column] = store_recording
        if isinstance(inner, Image):
            makers[column] = load_pictures

    def plain(row: HubRow) -> HubRow:
        made = {**row, **{column: make(row[column]) for column, make in makers.items() if column in row}}
        return drop_filled(made, features)

    return rows, plain


def load_pictures(value: Any) -> Any:
    """Return undecoded pictures with their bytes. A file outside the hub's caches stays a path, which rows refuse."""
    from datasets import config

    if isinstance(value, list):
        return [load_pictures(one) for one in value]
    if not isinstance(value, dict) or value["bytes"] is not None or not value["path"]:
        return value
    file = Path(value["path"])
    is_cached = file.is_file() and file.resolve().is_relative_to(Path(config.HF_CACHE_HOME).resolve())
    return {**value, "bytes": read_bytes(file, MAX_BYTES)} if is_cached else value


def store_recording(value: Recording | None) -> str | None:
    """Write a recording's bytes next to the cache of data sets, named by their hash, and return the file.

    A recording that is already a file stays in place.
    """
    from datasets import config

    if value is None or value["bytes"] is None:
        return None if value is None else value["path"]
    content = value["bytes"]
    ending = Path(value["path"] or "").suffix.lower()
    folder = Path(config.HF_DATASETS_CACHE).parent / "llmtune-recordings"
    path = folder / f"{xxhash.xxh3_128_hexdigest(content)}{ending}"
    if not path.is_file():
        with explained(path):
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as temporary:
                temporary.write_bytes(content)
    return str(path)


def _only_split(name: str, source: Source, commit: str) -> str:
    """Return `train`, or the only split."""
    from datasets import get_dataset_split_names

    splits = get_dataset_split_names(name, source.config, revision=commit)
    if "train" in splits:
        return "train"
    if len(splits) == 1:
        return str(splits[0])
    raise DataError.of(f"no split 'train'; the splits are {', '.join(splits)}", HUB + name, "Choose one with `split:`.")


def _check_cached(rows: Dataset, name: str, commit: str) -> None:
    """Refuse cached rows of another commit: offline, the library loads its newest cache entry, whatever the request."""
    commits = {Path(file["filename"]).parent.name for file in rows.cache_files}
    if commits - {commit}:
        what = f"the cache holds the rows of another commit: {min(commits)[:12]}, not {commit[:12]}"
        fix = "Run once without --offline (HF_HUB_OFFLINE), or give a local file."
        raise EnvironmentProblem.of(what, HUB + name, fix)


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn errors of the hub's libraries into a DataError (user's fault) or an EnvironmentProblem."""
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is the HTTP library's
        GatedRepoError,
        HTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = HUB + name
    try:
        yield
    except GatedRepoError as error:
        fix = "Accept its terms on the hub, and log in: `hf auth login`."
        raise DataError.of("the data set is gated, and you have no access to it", where, fix) from error
    except RevisionNotFoundError as error:
        raise DataError.of("the revision does not exist", where, "Check `revision`.") from error
    except (DatasetNotFoundError, RepositoryNotFoundError) as error:
        fix = "Check the name; log in with `hf auth login` if it is private."
        raise DataError.of("the data set does not exist on the hub", where, fix) from error
    except ValueError as error:
        raise DataError.of(f"it cannot be loaded: {error}", where, "Check `config`, `split` and `revision`.") from error
    except (DatasetsError, RuntimeError) as error:
        raise DataError.of(f"it cannot be loaded: {error}", where, "Download it and name the files.") from error
    except (HTTPError, OSError) as error:
        fix = "Check the network and its proxy, or give local files."
        raise EnvironmentProblem.of(f"the hub cannot be reached ({error})", where, fix) from error
