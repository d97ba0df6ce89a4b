"""Which of vLLM's parsers read the calls and thoughts of a chat template: found by the marks that it writes.

Names are those of https://docs.vllm.ai/en/latest/features/tool_calling.html and `reasoning_outputs.html`.
"""

from __future__ import annotations

from collections.abc import Sequence

Parsers = Sequence[tuple[tuple[str, ...], str]]
"""Marks that a template has all of, and the parser; the first that fits counts."""
TOOL_PARSERS: Parsers = (
    (("<|channel|>", "<|start|>"), "openai"),
    (("<arg_key>",), "glm45"),
    (("<minimax:tool_call>",), "minimax_m2"),
    (("<tool_call>", "<function="), "qwen3_xml"),
    (("<tool_call>",), "hermes"),
    (("<tool_calls>",), "hunyuan_a13b"),
    (("[TOOL_CALLS]",), "mistral"),
    (("<｜tool▁calls▁begin｜>", "```json"), "deepseek_v3"),
    (("<｜tool▁calls▁begin｜>",), "deepseek_v31"),
    (("<|START_ACTION|>", "<|START_THINKING|>"), "cohere_command3"),
    (("<|tool_calls_section_begin|>",), "kimi_k2"),
    (("<|tool_call|>", "<|start_of_role|>"), "granite"),
    (("<|tool_call|>",), "phi4_mini_json"),
    (("<function_calls>",), "olmo3"),
    (("<start_function_call>",), "functiongemma"),
    (("<|header_start|>", '"parameters"'), "llama4_json"),
    (("<|header_start|>", "tools"), "llama4_pythonic"),
    (("<|start_header_id|>", "tools"), "llama3_json"),
)
REASONING_PARSERS: Parsers = (
    (("<|channel|>", "<|start|>"), "openai_gptoss"),
    (("<arg_key>", "<think>"), "glm45"),
    (("<minimax:tool_call>", "<think>"), "minimax_m2_append_think"),
    (("<|START_THINKING|>",), "cohere_command3"),
    (("[THINK]",), "mistral"),
    (("<answer>", "<think>"), "hunyuan_a13b"),
    (("Here is my thought process",), "granite"),
    (("<｜Assistant｜>", "thinking"), "deepseek_v3"),
    (("<｜Assistant｜>", "<think>"), "deepseek_r1"),
    (("enable_thinking", "<think>"), "qwen3"),
    ((r"<|im_start|>assistant\n<think>",), "deepseek_r1"),
)


def parser_options(template: str) -> list[str]:
    """Return the options of `vllm serve` for a chat template; none for what no parser is known for."""
    tools, reasoning = (
        next((name for marks, name in parsers if all(mark in template for mark in marks)), None)
        for parsers in (TOOL_PARSERS, REASONING_PARSERS)
    )
    options = ["--enable-auto-tool-choice", "--tool-call-parser", tools] if tools else []
    return [*options, "--reasoning-parser", reasoning] if reasoning else options
