"""Every variant of every task on a tiny model: what `tests/tasks/test_contract.py` and the matrix of promises train."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoModelForCTC

from support import families
from support.image_text import build_image_text
from support.models import build_gpt2, build_llama
from support.pairs import DOCUMENTS, LIKED, PAIRS, THUMBS
from support.pictures import data_url

COLOURS = ("red", "green", "blue", "black", "white")
THINGS = ("cat", "dog", "bird", "fish", "fox", "house", "river", "stone")
WORDS = [
    (f"The quick {t} is {c}" + " and the sky is blue" * (i % 3), t, c) for i, t in enumerate(THINGS) for c in COLOURS
]
TEXTS = [{"text": f"{text}."} for text, _, _ in WORDS]
SEEN = [
    {
        "prompt": [{"role": "user", "content": [{"type": "image", "image": data_url(i)}, {"type": "text", "text": t}]}],
        "completion": [{"role": "assistant", "content": f"It is {c}"}],
    }
    for i, (_, t, c) in enumerate(WORDS)
]
CHATS = [{"prompt": f"Which colour has the {t} {i}?", "completion": f"It is {c}"} for i, (_, t, c) in enumerate(WORDS)]
SINGLE = [{"text": text, "label": c} for text, _, c in WORDS]
MULTI = [{"text": text, "label": [c, t][: 1 + i % 2]} for i, (text, t, c) in enumerate(WORDS)]
NUMBERS = [{"text": text, "label": COLOURS.index(c) + 0.5} for text, _, c in WORDS]
TAGS = [
    {
        "tokens": text.split(),
        "tags": [f"B-{'THING' if w == t else 'COLOUR'}" if w in (t, c) else "O" for w in text.split()],
    }
    for text, t, c in WORDS
]
ANSWERS = [
    {"question": f"Which colour has the {t}?", "context": text, "answer": "" if i % 5 == 4 else c}
    for i, (text, t, c) in enumerate(WORDS)
]
FOUND = [
    {"query": f"Where is the {t}?", "passage": f"{text}.", "negatives": [f"A {t} was {c} once"][: i % 2]}
    for i, (text, t, c) in enumerate(WORDS)
]
SCORED = [
    {"query": text, "passage": f"The {t} was {COLOURS[i % 3]}", "score": float(COLOURS[i % 3] == c)}
    for i, (text, t, c) in enumerate(WORDS)
]
RANKED = [
    {"query": f"Which colour has the {t}?", "passages": [text, f"The {t} is quick."], "relevances": [1 + i % 2, 0]}
    for i, (text, t, _) in enumerate(WORDS)
]
NO_TEXT = {"generation": {"max_new_tokens": None}}
RATES = {"lora": 1e-2, "qlora": 4e-3, "full": 2e-3}
MASKED = {"completion": {"objective": "masked"}, "generation": {"max_new_tokens": None}}
SAMPLED = {"rewards": {"chrf": 1.0}, "samples": 16, "max_new_tokens": 2, "mask_truncated": False, "loss": "dapo"}
KEPT = {"method": "filter", "rewards": {"chrf": 1.0}, "samples": 4, "max_new_tokens": 8, "accept": 0.02, "rounds": 1}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@dataclass(frozen=True)
class Case:
    """A variant on a tiny model."""

    task: str
    variant: int
    build: Callable[..., Path]
    rows: list[dict[str, Any]] = field(default_factory=list)
    sections: dict[str, Any] = field(default_factory=dict)
    method: str = "lora"
    config: dict[str, Any] = field(default_factory=dict)
    adapter: dict[str, Any] = field(default_factory=dict)


def speech(**section: Any) -> dict[str, Any]:
    return {"speech": {"window_seconds": 2, **section}}


def build_headless(folder: Path) -> Path:
    """A CTC model that has not learned any letters."""
    families.build_wav2vec2(folder)
    AutoModelForCTC.from_pretrained(folder).wav2vec2.save_pretrained(folder)
    return folder


CASES = {
    "chat": Case("chat", 0, build_llama, CHATS),
    "chat-pictures": Case("chat", 1, partial(build_image_text, family="gemma3"), SEEN),
    "completion-full": Case("completion", 0, build_gpt2, CHATS, method="full"),
    "completion": Case("completion", 0, build_llama, CHATS),
    "masked": Case("completion", 1, families.build_bert, TEXTS, MASKED, config=STILL),
    "masked-full": Case("completion", 1, families.build_deberta, TEXTS, MASKED, "full", STILL),
    "translate": Case("translate", 0, families.build_t5, PAIRS, config={"dropout_rate": 0.0}),
    "translate-full": Case("translate", 0, families.build_marian, PAIRS, method="full", config={"dropout": 0.0}),
    "translate-decoder": Case("translate", 1, build_llama, PAIRS, {"translate": {"prompt": "In French: {source}"}}),
    "summarize": Case("summarize", 0, families.build_bart, DOCUMENTS, config={"dropout": 0.0}),
    "summarize-decoder": Case("summarize", 1, build_llama, DOCUMENTS, method="qlora"),
    "qa-extractive": Case("qa", 0, families.build_bert, ANSWERS, {"qa": {"stride": 4}, **NO_TEXT}, config=STILL),
    "qa-extractive-full": Case(
        "qa", 0, families.build_deberta, ANSWERS, {"qa": {"stride": 4}, **NO_TEXT}, "full", STILL
    ),
    "qa": Case("qa", 1, families.build_t5, ANSWERS, config={"dropout_rate": 0.0}),
    "qa-decoder": Case("qa", 2, build_llama, ANSWERS),
    "classify": Case(
        "classify", 0, families.build_bert, SINGLE, {"classify": {"class_weights": "balanced"}, **NO_TEXT}, config=STILL
    ),
    "classify-qlora": Case("classify", 0, families.build_bert, SINGLE, NO_TEXT, method="qlora"),
    "classify-multi": Case("classify", 0, families.build_deberta, MULTI, NO_TEXT, method="full", config=STILL),
    "classify-number": Case("classify", 0, build_llama, NUMBERS, NO_TEXT),
    "token-classify": Case("token-classify", 0, families.build_modernbert, TAGS, NO_TEXT),
    "token-classify-full": Case("token-classify", 0, families.build_bert, TAGS, NO_TEXT, "full", STILL),
    "whisper": Case("speech", 0, families.build_whisper, sections=speech(language="fr")),
    "whisper-full": Case("speech", 0, families.build_whisper, sections=speech(language="fr"), method="full"),
    "ctc-headless": Case("speech", 1, build_headless, sections=speech()),
    "ctc": Case("speech", 1, families.build_wav2vec2, sections=speech()),
    "preference": Case("preference", 0, build_llama, LIKED, {"preference": {"loss": "dpo"}}),
    "preference-kto": Case("preference", 0, build_llama, THUMBS, {"preference": {"loss": "kto"}}),
    "preference-orpo": Case("preference", 0, build_llama, LIKED, {"preference": {"loss": "orpo"}}),
    "reinforce": Case("reinforce", 0, build_llama, CHATS, {"reinforce": SAMPLED}),
    "reinforce-filter": Case("reinforce", 0, build_llama, CHATS, {"reinforce": KEPT}),
    "embed": Case("embed", 0, families.build_bert, FOUND, NO_TEXT, config=STILL),
    "embed-scores-full": Case("embed", 0, families.build_modernbert, SCORED, NO_TEXT, method="full"),
    "embed-labels": Case(
        "embed",
        0,
        build_llama,
        [{"text": text, "label": c} for text, _, c in WORDS],
        {**NO_TEXT, "embed": {"margin": 1.0}},
    ),
    "rerank": Case("rerank", 0, families.build_bert, RANKED, NO_TEXT, config=STILL),
    "rerank-decoder": Case("rerank", 0, build_llama, RANKED, NO_TEXT),
    "reward": Case("preference", 1, build_llama, LIKED, {"preference": {"loss": "reward"}, **NO_TEXT}),
}
RELATIVES = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 16}},
    "saved": {"modules_to_save": ["norm"]},
}
VARIED = {
    f"{name}-{method}": replace(case, method=method)
    for name, case in CASES.items()
    for method in RATES
    if not name.endswith((*RATES,)) and method != case.method and f"{name}-{method}" not in CASES
}
"""Methods that the default suite does not train for a variant."""
RELATED = {f"chat-{name}": replace(CASES["chat"], adapter=adapter) for name, adapter in RELATIVES.items()}
RELATED |= {
    f"{name}-images": replace(CASES[name], build=partial(build_image_text, family="gemma3"))
    for name in ("chat", "qa-decoder", "classify-number", "preference", "embed-labels", "reward")
}
"""A text tune of a checkpoint that also reads images."""
SECOND = ("completion", "masked-full", "translate-full", "qa-extractive-full", "classify-qlora", "token-classify-full")
SECOND += ("reinforce-filter", "embed-labels", "whisper-full", "ctc-headless", "preference-orpo", "preference-kto")
SECOND += ("rerank-decoder", "embed-scores-full")
"""Cases of a variant that the default suite covers with another method, model or loss."""
SLOW = {*VARIED, *RELATED, *SECOND}
CELLS = CASES | VARIED | RELATED
"""All variants of tasks with LoRA, QLoRA and full tuning, a decoder with LoRA's relatives, and one that sees."""

EVALUATED = {
    "chat-beams": replace(CASES["chat"], sections={"generation": {"num_beams": 2}}),
    "chat-sampled": replace(CASES["chat"], sections={"generation": {"do_sample": True}}),
    "chat-choices": replace(CASES["chat"], rows=[{"prompt": text, "completion": c} for text, _, c in WORDS]),
    "chat-forgetting": replace(CASES["chat"], sections={"evaluate": {"metrics": ["loss"], "forgetting": {}}}),
    "classify-suspects": replace(
        CASES["classify"], sections={**NO_TEXT, "evaluate": {"metrics": ["accuracy"], "suspects": True}}
    ),
    "translate-beams": replace(CASES["translate"], sections={"generation": {"num_beams": 2}}),
}
"""Other kinds of answers and studies."""


def place_of(name: str) -> str:
    """A case without its method: its row in the matrix of promises."""
    return re.sub(f"-({'|'.join([*RATES, *RELATIVES, 'images'])})$", "", name)


PLACES = [*dict.fromkeys(map(place_of, CASES))]
