"""A GGUF file has the template, the end token and the tokens of the model."""

from pathlib import Path

from conformance.case import Case, Finding
from conformance.conversations import row
from gguf import GGUFReader

USER = ("user", "Which colour is the sky?")


def judge(case, reference, results):
    [result] = results.values()
    reader = GGUFReader(Path(result.found["gguf"]))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tokenizer = reference.tokenizer
    wrong = []
    if fields.get("tokenizer.chat_template") != tokenizer.chat_template:
        wrong.append("no chat template" if "tokenizer.chat_template" not in fields else "another chat template")
    if fields.get("tokenizer.ggml.eos_token_id") != tokenizer.eos_token_id:
        wrong.append(f"end token {fields.get('tokenizer.ggml.eos_token_id')} instead of {tokenizer.eos_token_id}")
    tokens = [tokenizer.convert_ids_to_tokens(index) for index in range(len(tokenizer))]
    if list(fields.get("tokenizer.ggml.tokens", ()))[: len(tokens)] != tokens:
        wrong.append("other tokens")
    return Finding("silently wrong" if wrong else "right", "; ".join(wrong))


CASE = Case(
    title="Template and tokens of a GGUF file",
    group="what ships",
    question="The tool's own GGUF export of a Llama: does the file have the chat template, the end token and the "
    "vocabulary?",
    threads=["https://github.com/ollama/ollama/issues/6823", "https://github.com/unslothai/unsloth/issues/468"],
    rows=[row(USER, ("assistant", "Blue."))],
    settings={
        "model": "llama3",
        "method": "lora",
        "test_rows": [row(("user", "And a cat?"), ("assistant", "Black."))],
        "ask": {"gguf": True},
    },
    judge=judge,
)
