"""Encode one row, and return the supervised texts."""

from tokenizers.processors import TemplateProcessing

from llmtune.data.chat_encoding import encode_chat
from llmtune.data.completion_encoding import encode_completion
from support.templates import recipe_for


def learned(example, tokenizer):
    """Return the supervised texts of an example, one per span."""
    borders = zip(example.spans[::2], example.spans[1::2], strict=True)
    return [tokenizer.decode(example.input_ids[start:end]) for start, end in borders]


def encode(row, tokenizer, **keys):
    (result,) = encode_chat([row], tokenizer, recipe_for(**keys))
    return result


def with_start_token(tokenizer, *more):
    """Prepend the start token, and optionally further tokens, to every text, as Gemma's tokenizer does."""
    tokens = [tokenizer.bos_token, *more]
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=" ".join([*tokens, "$A"]),
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in tokens],
    )
    return tokenizer


def complete(prompt, completion, tokenizer, **keys):
    row = {"prompt": prompt, "completion": completion}
    (result,) = encode_completion([row], tokenizer, recipe_for("completion", **keys))
    return result
