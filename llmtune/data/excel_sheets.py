"""Reads a sheet of an Excel workbook as a CSV file of it would be read: all cells are texts."""

from __future__ import annotations

import io
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmtune.data.arrow_rows import check_column_names
from llmtune.data.byte_streams import GROWN_BYTES, MAX_GROWTH, ByteStream, GrowthError, open_bytes
from llmtune.data.rejected_rows import RawRow
from llmtune.data.table_header import LOOKED_AT, refuse_title
from llmtune.errors import DataError, nearest, write_origin
from llmtune.recipe.extras import require_extra

DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError, TypeError, AttributeError, SyntaxError)
"""What pandas and openpyxl raise for other files, files with a password, and damaged ones."""
AT_MIDNIGHT = r"^(\d{4}-\d\d-\d\d) 00:00:00$"


def read_sheet(stream: ByteStream, name: str, sheet: str | None) -> Iterator[RawRow]:
    """Yield the rows of a sheet, the first if `sheet` is None; row 1 has the names of the columns.

    Raises DataError for files that are no workbook, or have no such sheet or header.
    """
    with _opened(stream, name) as book:
        if sheet not in (None, *book.sheet_names):
            fix = f"Its sheets are: {', '.join(book.sheet_names)}.{nearest(sheet or '', book.sheet_names)}"
            raise DataError.of(f"the workbook has no sheet {sheet!r}", name, fix)
        table = book.parse(sheet or 0, header=None, dtype=str, na_filter=False)
        lines = table.replace(AT_MIDNIGHT, r"\1", regex=True).to_numpy().tolist()
    refuse_title(lines[:LOOKED_AT], f"{name}:row 1")
    header = [cell.strip() for cell in lines[0]] if lines else []
    check_column_names(header, f"{name}:row 1")
    for number, cells in enumerate(lines[1:], 2):
        if any(cells):
            yield write_origin(name, row=number), dict(zip(header, cells, strict=True))


def list_sheets(path: Path) -> list[str]:
    """Return the names of a workbook's sheets."""
    with open_bytes(path) as stream, _opened(stream, str(path)) as book:
        return [str(name) for name in book.sheet_names]


@contextmanager
def _opened(stream: ByteStream, name: str) -> Iterator[Any]:
    """Open a workbook of pandas; raise DataError if it is none, or damaged."""
    require_extra("excel", name)
    import pandas as pd  # late: slow

    content = io.BytesIO(stream.read())
    try:
        size = sum(one.file_size for one in zipfile.ZipFile(content).infolist())
        if size > GROWN_BYTES and size > MAX_GROWTH * content.getbuffer().nbytes:
            raise GrowthError
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on formats that rows do not have
            yield pd.ExcelFile(content, engine="openpyxl")
    except DAMAGE as error:
        fix = "In Excel, save it as Excel workbook (.xlsx), or as CSV UTF-8."
        raise DataError.of("the file is not a readable Excel workbook", name, fix) from error
