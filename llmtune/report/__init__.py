"""The report of a run as HTML, Markdown, JSON and JUnit XML. Imports no torch or transformers."""
