"""Data sets of the Hugging Face hub: the commit of a revision, and their rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import xxhash

from llmtune.data.arrow_rows import drop_filled, name_classes
from llmtune.data.rejected_rows import RawRow
from llmtune.errors import DataError, EnvironmentProblem
from llmtune.recipe.data_section import Source
from llmtune.store.atomic_files import atomic_file, explained, write_text

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

HUB = "hub:"
HubRow = dict[str, object]


class Recording(TypedDict):
    """A recording that is not decoded."""

    bytes: bytes | None
    path: str | None


def dataset_name(source: Source) -> str | None:
    """Return the hub's name for the data set, or None if the source is something else."""
    return source.path.removeprefix(HUB) if source.path.startswith(HUB) else None


@cache
def resolve_commit(name: str, revision: str | None) -> str:
    """Return the commit of `revision` (the newest, if None); offline, the one that is in the cache.

    It is looked up once in a process, so that what is read is what was hashed.

    Raises:
        DataError: There is no such data set or revision, or it may not be read.
        EnvironmentProblem: The hub cannot be reached, and the cache does not know.
    """
    from huggingface_hub import HfApi, constants

    with _explained(name):
        if constants.HF_HUB_OFFLINE:
            return _cached_commit(name, revision)
        commit = HfApi().dataset_info(name, revision=revision, timeout=30).sha
    assert commit, "the hub names the commit"
    if commit != revision:  # rows are asked for by commit, so nothing else would note what the name stood for
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

    With `limit`, rows are streamed and no more is fetched than needed; else the split goes to the hub's cache once.

    Raises:
        DataError: There is no such data set, configuration or split, or its files are damaged.
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
            yield f"{HUB}{name}/{split}:row {number}", plain(row)


def as_files_hold_it(
    rows: Dataset | IterableDataset,
) -> tuple[Dataset | IterableDataset, Callable[[HubRow], HubRow]]:
    """Return rows whose recordings and pictures are not decoded, and what makes plain values of a row's.

    Numbers of classes become their names; a recording becomes the name of a file with its bytes. Keys that Arrow
    filled in are dropped.
    """
    from datasets import Audio, ClassLabel

    features = rows.features or {}  # None where rows are streamed from files that do not say
    makers: dict[str, Callable[..., object]] = {}
    for column, feature in features.items():
        inner = getattr(feature, "feature", feature)  # of a list
        if isinstance(inner, ClassLabel):
            makers[column] = partial(name_classes, inner.names)
        if getattr(feature, "decode", False):  # a field of sounds, pictures, films
            rows = rows.cast_column(column, replace(feature, decode=False))
        if isinstance(feature, Audio):
            makers[column] = store_recording

    def plain(row: HubRow) -> HubRow:
        made = {**row, **{column: make(row[column]) for column, make in makers.items() if column in row}}
        return drop_filled(made, features)

    return rows, plain


def store_recording(value: Recording | None) -> str | None:
    """Write a recording's bytes next to the cache of data sets, named for them, and return the file.

    A recording that lies in a file is left there.
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
    """Return `train`, or the only split there is."""
    from datasets import get_dataset_split_names

    splits = get_dataset_split_names(name, source.config, revision=commit)
    if "train" in splits:
        return "train"
    if len(splits) == 1:
        return str(splits[0])
    raise DataError.of(f"there is no split 'train' but {', '.join(splits)}", HUB + name, "Say which with `split:`.")


def _check_cached(rows: Dataset, name: str, commit: str) -> None:
    """Refuse rows of another commit: offline, the library takes the ones that it made last, whatever is asked for."""
    commits = {Path(file["filename"]).parent.name for file in rows.cache_files}
    if commits - {commit}:
        what = f"the cache holds the rows of another commit: {min(commits)[:12]}, not {commit[:12]}"
        fix = "Run once without --offline (HF_HUB_OFFLINE), or give a local file."
        raise EnvironmentProblem.of(what, HUB + name, fix)


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn what the hub's libraries raise into an error that says whose fault it is."""
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
        raise DataError.of("there is no such revision", where, "Check `revision`.") from error
    except (DatasetNotFoundError, RepositoryNotFoundError) as error:
        fix = "Check the name; log in with `hf auth login` if it is private."
        raise DataError.of("there is no such data set on the hub", where, fix) from error
    except ValueError as error:
        raise DataError.of(f"it cannot be loaded: {error}", where, "Check `config`, `split` and `revision`.") from error
    except (DatasetsError, RuntimeError) as error:
        raise DataError.of(f"it cannot be loaded: {error}", where, "Fetch it by hand, and give the files.") from error
    except (HTTPError, OSError) as error:
        fix = "Check the network and its proxy, or give local files."
        raise EnvironmentProblem.of(f"the hub cannot be reached ({error})", where, fix) from error
