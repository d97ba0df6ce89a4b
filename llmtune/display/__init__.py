"""Numbers, tables, charts and progress, in the terminal and elsewhere."""
