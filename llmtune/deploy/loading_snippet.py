"""The few lines of Python that load what is published: plain transformers and PEFT, nothing of llmtune."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ENDINGS = (
    ("ForCausalLM", "AutoModelForCausalLM"),
    ("LMHeadModel", "AutoModelForCausalLM"),
    ("ForSequenceClassification", "AutoModelForSequenceClassification"),
    ("ForTokenClassification", "AutoModelForTokenClassification"),
    ("ForQuestionAnswering", "AutoModelForQuestionAnswering"),
    ("ForQuestionAnsweringSimple", "AutoModelForQuestionAnswering"),
    ("ForMaskedLM", "AutoModelForMaskedLM"),
    ("ForCTC", "AutoModelForCTC"),
    ("WhisperForConditionalGeneration", "AutoModelForSpeechSeq2Seq"),
    ("ForConditionalGeneration", "AutoModelForSeq2SeqLM"),
    ("MTModel", "AutoModelForSeq2SeqLM"),
)
TASK_TYPES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}
"""By PEFT's name of a task, the class that loads its base."""
HEADS = (
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForCTC",
)
HEAR = ("AutoModelForSpeechSeq2Seq", "AutoModelForCTC")


@dataclass(frozen=True)
class Loading:
    """What has to be known to load a model: where it is, its class, and what lies between it and its base."""

    auto_class: str
    tuned: str
    base: str | None = None
    """None: a whole model."""
    revision: str | None = None
    adapter: Mapping[str, Any] | None = None
    """adapter_config.json."""
    quantization: Mapping[str, Any] | None = None
    added_tokens: bool = False
    chat: bool = False
    template_kwargs: Mapping[str, Any] | None = None


def find_auto_class(config: Mapping[str, Any]) -> str:
    """Return the Auto class of an adapter_config.json, or of a model's config.json."""
    if "peft_type" in config:
        if config.get("task_type"):
            return TASK_TYPES[config["task_type"]]
        name = str((config.get("auto_mapping") or {}).get("base_model_class"))
    else:
        name = str((config.get("architectures") or [""])[0])
    return next((found for ending, found in ENDINGS if name.endswith(ending)), "AutoModel")


def write_snippet(loading: Loading) -> str:
    """Return the code that loads the model and asks it once."""
    lines = [*_load(loading), "", *_ask(loading)]
    torch = ["import torch"] if any("torch." in line for line in lines) else []
    return "\n".join([*torch, *_imports(loading), "", *lines]) + "\n"


def _reader(loading: Loading) -> str:
    return "AutoProcessor" if loading.auto_class in HEAR else "AutoTokenizer"


def _imports(loading: Loading) -> list[str]:
    names = [loading.auto_class, _reader(loading)]
    if loading.base and loading.auto_class in HEADS:
        names.append("AutoConfig")
    if loading.quantization:
        names.append("BitsAndBytesConfig")
    peft = ["from peft import PeftModel"] if loading.base else []
    return [*peft, f"from transformers import {', '.join(sorted(names))}"]


def _load(loading: Loading) -> list[str]:
    reader = f"processor = {_reader(loading)}.from_pretrained(tuned)"
    if not loading.base:
        lines = [f'tuned = "{loading.tuned}"', reader]
        return [*lines, f'model = {loading.auto_class}.from_pretrained(tuned, dtype="auto").eval()']
    lines = [f'base, tuned = "{loading.base}", "{loading.tuned}"', reader]
    options = ['dtype="auto"']
    if loading.revision:
        options.append(f'revision="{loading.revision}"')
    if loading.auto_class in HEADS:
        lines.append("config = AutoConfig.from_pretrained(tuned)  # names of the outputs")
        options += ["config=config", "ignore_mismatched_sizes=True"]
    if loading.quantization:
        given = ", ".join(f"{name}={_literal(name, value)}" for name, value in loading.quantization.items())
        lines.append(f"quantization = BitsAndBytesConfig({given})")
        options.append("quantization_config=quantization")
    lines.append(f"model = {loading.auto_class}.from_pretrained(base, {', '.join(options)})")
    if loading.added_tokens:
        lines.append("model.resize_token_embeddings(len(processor), mean_resizing=False)")
    return [*lines, "model = PeftModel.from_pretrained(model, tuned).eval()"]


def _literal(name: str, value: Any) -> str:
    return f"torch.{value}" if name.endswith("dtype") else repr(value)


def _ask(loading: Loading) -> list[str]:
    text = 'inputs = processor("Some text.", return_tensors="pt")'
    asked = {
        "AutoModelForCausalLM": _write(loading),
        "AutoModelForSeq2SeqLM": [
            text,
            "answer = model.generate(**inputs, max_new_tokens=64)",
            "print(processor.decode(answer[0], skip_special_tokens=True))",
        ],
        "AutoModelForSequenceClassification": [text, *_forward(), "print(model.config.id2label, logits.tolist())"],
        "AutoModelForTokenClassification": [
            text,
            *_forward(),
            "print([model.config.id2label[i] for i in logits[0].argmax(-1).tolist()])",
        ],
        "AutoModelForQuestionAnswering": [
            'inputs = processor("Who?", "Ann wrote it.", return_tensors="pt")',
            "with torch.inference_mode():",
            "    ends = model(**inputs)",
            "first, last = int(ends.start_logits.argmax()), int(ends.end_logits.argmax())",
            'print(processor.decode(inputs["input_ids"][0, first : last + 1]))',
        ],
        "AutoModelForMaskedLM": [
            'inputs = processor(f"Some {processor.mask_token}.", return_tensors="pt")',
            *_forward(),
            'masked = inputs["input_ids"][0] == processor.mask_token_id',
            "print(processor.decode(logits[0, masked].argmax(-1)))",
        ],
        **dict.fromkeys(HEAR, _hear(loading)),
    }
    return asked.get(loading.auto_class, [text, "print(model(**inputs))"])


def _forward() -> list[str]:
    return ["with torch.inference_mode():", "    logits = model(**inputs).logits"]


def _write(loading: Loading) -> list[str]:
    if loading.chat:
        given = "".join(f", {name}={value!r}" for name, value in (loading.template_kwargs or {}).items())
        asked = [
            'messages = [{"role": "user", "content": "Hello!"}]',
            f"text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False{given})",
            'inputs = processor(text, add_special_tokens=False, return_tensors="pt")',
        ]
    else:
        asked = ['inputs = processor("Once upon a time", return_tensors="pt")']
    return [
        *asked,
        'ids, mask = inputs["input_ids"], inputs["attention_mask"]',
        "answer = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=64, do_sample=False)",
        "print(processor.decode(answer[0, ids.shape[1] :], skip_special_tokens=True))",
    ]


def _hear(loading: Loading) -> list[str]:
    lines = [
        "sound = torch.zeros(16_000).numpy()  # one second of your recording, at 16 kHz",
        'inputs = processor(sound, sampling_rate=16_000, return_tensors="pt")',
    ]
    if loading.auto_class == "AutoModelForCTC":
        return [*lines, *_forward(), "print(processor.batch_decode(logits.argmax(-1))[0])"]
    return [
        *lines,
        "answer = model.generate(**inputs)",
        "print(processor.batch_decode(answer, skip_special_tokens=True)[0])",
    ]
