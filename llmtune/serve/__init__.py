"""A server for finished runs: requests batched on one model thread, with OpenAI's endpoints and one per other task."""
