"""The embedding of an added token is saved with the adapter."""

from conformance.case import Case, Finding
from conformance.cases.evaluation_loss import TESTED
from conformance.conversations import row
from conformance.reference import read_weights
from transformers import AutoTokenizer

TOKEN = "<|ticket|>"


def judge(case, reference, results):
    [result] = results.values()
    ids = [len(reference.tokenizer)]  # where a tool saves no tokenizer, and adds the token again for each use
    if (result.model / "tokenizer.json").exists():
        ids = AutoTokenizer.from_pretrained(result.model)(TOKEN, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        return Finding("silently wrong", "the saved tokenizer splits the added token")
    saved = read_weights(result.model)
    wide = [name for name, weight in saved.items() if "embed_tokens" in name and weight.shape[0] > ids[0]]
    single = [
        name for name in saved if "embed_tokens" in name and ("token_adapter" in name or "trainable_tokens" in name)
    ]
    if wide or single:
        return Finding("right", f"saved as {(wide or single)[0]}")
    return Finding(
        "silently wrong", "the adapter folder has no embedding for the token; a reload draws another one at random"
    )


CASE = Case(
    title="An added token with LoRA",
    group="what ships",
    question="A token is added to the vocabulary and the model trained with LoRA: does the folder have its embedding?",
    threads=["https://github.com/huggingface/peft/issues/1457", "https://github.com/unslothai/unsloth/issues/1343"],
    rows=[row(("system", "You are brief."), ("user", f"Close {TOKEN} now."), ("assistant", f"Closed {TOKEN}."))],
    settings={"test_rows": [row(*TESTED)], "method": "lora", "extra": {"add_tokens": [TOKEN]}},
    reason="modules_to_save|embed_tokens",
    judge=judge,
)
