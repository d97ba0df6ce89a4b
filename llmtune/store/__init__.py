"""The run folder: what is in it, what is still valid, and where its numbers came from."""
