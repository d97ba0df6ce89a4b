"""The report: what a run was and what it did, as HTML, Markdown, JSON and JUnit XML; without torch or transformers."""
