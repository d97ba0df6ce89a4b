"""A server for finished runs: requests batched on one model thread, OpenAI's endpoints and one for each other task."""
