"""The recipe: schema, reading, checks, writing, and the facts of each task. Imports no torch or transformers."""
