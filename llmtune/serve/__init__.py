"""A server for a finished run: one request at a time, with OpenAI's endpoints and one per other task."""
