"""Step 1: rows from any usual format, then encoded, masked, packed examples."""

from llmtune.data.preparation import prepare_rows
from llmtune.data.row_store import iterate_columns, iterate_ids, iterate_rows, load_rows, read_rows
from llmtune.data.sources import hash_sources, list_sources

__all__ = [
    "hash_sources",
    "iterate_columns",
    "iterate_ids",
    "iterate_rows",
    "list_sources",
    "load_rows",
    "prepare_rows",
    "read_rows",
]
