"""The recipe: its schema, how it is read, checked and written, and each task's facts; without torch or transformers."""
