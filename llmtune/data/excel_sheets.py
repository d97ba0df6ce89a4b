"""Reads a sheet of an Excel workbook as a CSV file of it would be read: all cells are texts."""

from __future__ import annotations

import io
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from datetime import datetime, time
from pathlib import Path
from typing import Any

from llmtune.data.arrow_rows import check_column_names
from llmtune.data.byte_streams import GROWN_BYTES, MAX_GROWTH, ByteStream, GrowthError, open_bytes
from llmtune.data.rejected_rows import RawRow
from llmtune.data.table_header import LOOKED_AT, refuse_title
from llmtune.errors import DataError, nearest, write_origin
from llmtune.recipe.extras import require_extra

DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError, TypeError, AttributeError, SyntaxError)
"""What openpyxl raises for other files, files with a password, and damaged ones."""
AS_CSV = "In Excel, save it as Excel workbook (.xlsx), or as CSV UTF-8."


def read_sheet(stream: ByteStream, name: str, sheet: str | None) -> Iterator[RawRow]:
    """Yield the rows of a sheet, the first if `sheet` is None; row 1 has the names of the columns.

    Raises DataError for files that are no workbook, or have no such sheet or header.
    """
    lines = [[_write_cell(cell) for cell in cells] for cells in _read_cells(stream, name, sheet)]
    used = [any(column) for column in zip(*lines, strict=True)]  # sheets may have formats right of their cells
    lines = [[cell for cell, is_used in zip(line, used, strict=True) if is_used] for line in lines]
    refuse_title(lines[:LOOKED_AT], f"{name}:row 1")
    header = [cell.strip() for cell in lines[0]] if lines else []
    check_column_names(header, f"{name}:row 1")
    for number, cells in enumerate(lines[1:], 2):
        if any(cells):
            yield write_origin(name, row=number), dict(zip(header, cells, strict=True))


def list_sheets(path: Path) -> list[str]:
    """Return the names of a workbook's sheets."""
    with open_bytes(path) as stream:
        return [one.title for one in _open_workbook(stream, str(path)).worksheets]


def _open_workbook(stream: ByteStream, name: str) -> Any:
    require_extra("excel", name)
    import openpyxl  # late: an extra

    content = io.BytesIO(stream.read())
    try:
        size = sum(one.file_size for one in zipfile.ZipFile(content).infolist())
        if size > GROWN_BYTES and size > MAX_GROWTH * content.getbuffer().nbytes:
            raise GrowthError
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on formats that rows do not have
            return openpyxl.load_workbook(content, read_only=True, data_only=True)
    except DAMAGE as error:
        raise DataError.of("the file is not a readable Excel workbook", name, AS_CSV) from error


def _read_cells(stream: ByteStream, name: str, sheet: str | None) -> list[list[object]]:
    """Return the cells of a sheet, all rows equally long."""
    sheets = {one.title: one for one in _open_workbook(stream, name).worksheets}
    if not sheets or sheet not in (None, *sheets):
        fix = f"Its sheets are: {', '.join(sheets) or 'none'}.{nearest(sheet or '', [*sheets])}"
        raise DataError.of(f"the workbook has no sheet {sheet!r}" if sheet else "the workbook has no sheet", name, fix)
    chosen = sheets[sheet] if sheet else next(iter(sheets.values()))
    chosen.reset_dimensions()  # as other programs state them
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows = [[*cells] for cells in chosen.iter_rows(values_only=True)]
    except DAMAGE as error:
        raise DataError.of(f"the sheet {chosen.title!r} is damaged", name, AS_CSV) from error
    width = max(map(len, rows), default=0)
    return [[*cells, *[None] * (width - len(cells))] for cells in rows]


def _write_cell(cell: object) -> str:
    """Write a cell as a CSV file has it."""
    if isinstance(cell, datetime) and cell.time() == time():
        return str(cell.date())
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    return "" if cell is None else str(cell)
