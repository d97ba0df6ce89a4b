"""Counts and times for `/metrics`: requests, queue, tokens, latency."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from llmtune.serve.engine import Engine

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """What one server counts."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.requests = Counter("llmtune_requests", "Requests answered.", ["endpoint", "status"], registry=registry)
        self.latency = Histogram(
            "llmtune_request_seconds",
            "From a request to the end of its answer.",
            ["endpoint"],
            buckets=SECONDS,
            registry=registry,
        )
        self.first_token = Histogram(
            "llmtune_first_token_seconds", "From a request to its first token.", buckets=SECONDS, registry=registry
        )
        self.prompt_tokens = Counter("llmtune_prompt_tokens", "Tokens of prompts.", ["model"], registry=registry)
        self.answer_tokens = Counter("llmtune_generated_tokens", "Tokens of answers.", ["model"], registry=registry)
        self.disconnects = Counter(
            "llmtune_disconnects", "Answers given up because the client was gone.", registry=registry
        )
        waiting = Gauge("llmtune_queue_length", "Requests that wait in the queue.", registry=registry)
        waiting.set_function(lambda: len(engine.queue))
        running = Gauge("llmtune_running", "Requests that are being answered.", registry=registry)
        running.set_function(lambda: engine.queue.running)

    def text(self) -> bytes:
        """Return all of it in Prometheus' text format."""
        return generate_latest(self.registry)
