"""The script next to ONNX files: it runs them with onnxruntime, numpy and the tokenizer, without llmtune or torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from llmtune.data.text_pairs import first_token
from llmtune.data.tokenization import decode
from llmtune.deploy.tuned_model import TunedModel
from llmtune.evaluate.decoder_generation import decoder_settings
from llmtune.evaluate.generation import answer_ends
from llmtune.model.memory_plan import context_length
from llmtune.recipe.model_kind import CTC, MASKED, SPANS, TOKENS, VECTORS
from llmtune.store.atomic_files import write_text

SCRIPT = "run_model.py"
TOP = '''"""Run this model: python run_model.py {arguments}

Needs onnxruntime, numpy and transformers; neither torch nor llmtune.
"""

import json
import sys
import wave
from pathlib import Path

import numpy as np
import onnxruntime
from transformers import AutoFeatureExtractor, AutoTokenizer

{constants}
if len(sys.argv) <= {needed}:
    sys.exit(__doc__)
folder = Path(__file__).parent
tokenizer = AutoTokenizer.from_pretrained(folder)
'''
READ = """
session = onnxruntime.InferenceSession(folder / "model.onnx")
outputs = session.run(None, {one.name: given[one.name] for one in session.get_inputs()})
"""
CUT = """
if (size := len(tokenizer({text})["input_ids"])) > MAX_LENGTH:
    print(f"The text has {{size:,}} tokens. Only the first {{MAX_LENGTH:,}} are read.", file=sys.stderr)
given = tokenizer({text}, truncation={how}, max_length=MAX_LENGTH, return_tensors="np")"""
TEXT = CUT.format(text="*sys.argv[1:3]", how=True) + READ
LABELS = """
labels = json.loads((folder / "config.json").read_text("utf-8"))["id2label"]
calibration = folder / "calibration.json"
temperature = json.loads(calibration.read_text("utf-8"))["temperature"] if calibration.is_file() else 1.0
scaled = outputs[0][0].astype(np.float64) / temperature
"""
SHARES = """
for i, share in enumerate(shares):
    print(f"{labels[str(i)]}\\t{share:.6f}")
"""
SOFTMAX = "powers = np.exp(scaled - scaled.max(-1, keepdims=True))\nshares = powers / powers.sum(-1, keepdims=True)\n"
SIGMOID = "shares = np.exp(-np.logaddexp(0, -scaled))\n"
CHOICE = TEXT + LABELS + SOFTMAX + "print(labels[str(scaled.argmax())])" + SHARES
NAMES = """names = [labels[str(i)] for i in np.flatnonzero(scaled > 0)]
listed = json.dumps(names, ensure_ascii=False) if "," in "".join(names) else ", ".join(names)
print(listed or "(none)")"""
YES_NO = TEXT + LABELS + SIGMOID + NAMES + SHARES
NUMBER = TEXT + "print(outputs[0][0, 0])\n"
TAGS = (
    CUT.format(text="sys.argv[1].split(), is_split_into_words=True", how=True)
    + READ
    + LABELS
    + SOFTMAX
    + """
owners = given.word_ids(0)
for i, word in enumerate(sys.argv[1].split()):
    if i in owners:
        share = shares[owners.index(i)]
        print(f"{word} {labels[str(share.argmax())]} {share.max():.6f}")
"""
)
SPAN = (
    CUT.format(text="*sys.argv[1:3], return_offsets_mapping=True", how='"only_second"')
    + READ
    + """
inside = np.array([text == 1 for text in given.sequence_ids(0)])
start, end = (np.where(inside, part[0], -np.inf) for part in outputs)
scores = np.where(np.tri(len(start), dtype=bool).T, start[:, None] + end, -np.inf)
first, last = np.unravel_index(scores.argmax(), scores.shape)
offsets = given["offset_mapping"][0]
print(sys.argv[2][offsets[first][0] : offsets[last][1]].strip())
"""
)
VECTOR = (
    CUT.format(text="PROMPT + sys.argv[1]", how=True)
    + READ
    + """
hidden = outputs[0][0]
vector = {"cls": hidden[0], "lasttoken": hidden[-1], "max": hidden.max(0), "mean": hidden.mean(0)}[POOLING]
print((vector / np.linalg.norm(vector) if NORMALIZE else vector).tolist())
"""
)
MASK = TEXT + "print(tokenizer.decode(outputs[0][given['input_ids'] == tokenizer.mask_token_id].argmax(-1)))\n"
SOUND = """
extract = AutoFeatureExtractor.from_pretrained(folder)
with wave.open(sys.argv[1]) as file:  # one channel of 16 bits
    samples = np.frombuffer(file.readframes(file.getnframes()), np.int16) / np.float32(32768)
    given = extract(samples, sampling_rate=file.getframerate(), return_attention_mask=True, return_tensors="np")
given["attention_mask"] = given["attention_mask"].astype(np.int64)
"""
LETTERS = SOUND + READ + "print(tokenizer.decode(outputs[0][0].argmax(-1)))\n"
PROMPT = """
text = PROMPT
for place, argument in zip(PLACES, sys.argv[1:]):
    text = text.replace(place, argument)
"""
DECODER = (
    PROMPT
    + """
ids = tokenizer(text, add_special_tokens=False, return_tensors="np")["input_ids"]
session, known = onnxruntime.InferenceSession(folder / "model.onnx"), {}
"""
)
ENCODER = """
ids = np.array([START])
reader = onnxruntime.InferenceSession(folder / "encoder_model.onnx")
session = onnxruntime.InferenceSession(folder / "decoder_model.onnx")
outputs = reader.run(None, {one.name: given[one.name] for one in reader.get_inputs()})
known = dict(zip([one.name for one in reader.get_outputs()], outputs))
known["encoder_attention_mask"] = given.get("attention_mask")
"""
WRITE = """
names = [one.name for one in session.get_inputs()]
past = {one.name: one.shape for one in session.get_inputs() if one.name.startswith("past_key_values")}
known |= {name: np.zeros((1, shape[1], 0, shape[3]), np.float32) for name, shape in past.items()}
size, answer = 0, []
while len(answer) < MAX_NEW_TOKENS and not (answer and answer[-1] in ENDS):
    positions = np.arange(size, size + ids.shape[1])[None]
    size += ids.shape[1]
    known |= {"input_ids": ids, "attention_mask": np.ones((1, size), np.int64), "position_ids": positions}
    logits, *present = session.run(None, {name: known[name] for name in names})
    logits[..., NEVER if answer else NEVER + NEVER_FIRST] = -np.inf
    answer.append(int(logits[0, -1].argmax()))
    known |= dict(zip(past, present))
    ids = np.array([answer[-1:]])
print(tokenizer.decode(answer, skip_special_tokens=True).strip())
"""


def write_script(model: PreTrainedModel, tuned: TunedModel, folder: Path) -> None:
    """Write the script that answers the text, question or recording given as its arguments."""
    context, longest = context_length(model.config), tuned.recipe.data.max_length
    constants: dict[str, Any] = {"MAX_LENGTH": min(longest, context or longest)}
    if model.config.is_encoder_decoder:
        body, constants = _encoder_decoder_script(model, tuned)
    elif tuned.task.model_kind.decodes:
        body, constants = DECODER + WRITE, _decoder_constants(model, tuned)
    else:
        body = _head_script(model, tuned)
        constants |= tuned.task.export_constants(tuned.recipe)
    needed = constants.get("PLACES") or tuned.task.required_inputs or tuned.task.optional_inputs[:1]
    optional = ["[pair]"] if "pair" in tuned.task.optional_inputs else []
    arguments = " ".join([*needed, *optional]).upper().replace("<", "").replace(">", "")
    lines = "".join(f"{name} = {value!r}\n" for name, value in constants.items())
    write_text(folder / SCRIPT, TOP.format(arguments=arguments, constants=lines, needed=len(needed)) + body)


def _head_script(model: PreTrainedModel, tuned: TunedModel) -> str:
    kinds = {"choice": CHOICE, "yes-no": YES_NO, "number": NUMBER}
    by_kind = {TOKENS: TAGS, SPANS: SPAN, MASKED: MASK, CTC: LETTERS, VECTORS: VECTOR}
    return by_kind.get(tuned.task.model_kind) or kinds[tuned.task.output_kind(tuned.recipe)]


def _decoder_constants(model: PreTrainedModel, tuned: TunedModel) -> dict[str, Any]:
    """Return the constants of a decoder's script; the prompt is written as the task renders it."""
    places = _placeholders(tuned)
    own = tuned.task.stated_inputs(tuned.rows[0], tuned.recipe) if tuned.rows else {}
    ids = tuned.task.prompt_ids(tuned.task.make_row({**own, **places}), tuned.processor, tuned.recipe)
    return {
        "PROMPT": decode(tuned.processor, ids),
        "PLACES": list(places.values()),
        "MAX_NEW_TOKENS": tuned.recipe.generation.max_new_tokens,
        "ENDS": answer_ends(model, tuned.processor, tuned.recipe),
        "NEVER": [],
        "NEVER_FIRST": [],
    }


def _placeholders(tuned: TunedModel) -> dict[str, str]:
    """Return a placeholder for each required input of a prompt, and for each language that the rows state."""
    first = tuned.rows[0] if tuned.rows else {}
    stated = [name for name in tuned.task.optional_inputs if first.get(name) is not None]
    return {name: f"<{name}>" for name in (*tuned.task.required_inputs, *stated)}


def _encoder_decoder_script(model: PreTrainedModel, tuned: TunedModel) -> tuple[str, dict[str, Any]]:
    task, processor, recipe = tuned.task, tuned.processor, tuned.recipe
    places = {name: f"<{name}>" for name in task.required_inputs}
    constants: dict[str, Any] = {}
    if task.model_kind.takes_audio:
        task.prepare_processor(processor, recipe)
        start, first, body = list(processor.prefix_tokens), None, SOUND
    else:
        own = task.stated_inputs(tuned.rows[0], recipe) if tuned.rows else {}
        pair = task.pair(task.make_row({**own, **places}), recipe)
        first, body = first_token(pair, processor), PROMPT + 'given = tokenizer(text, return_tensors="np")\n'
        constants = {"PROMPT": pair.source, "PLACES": list(places.values())}
        start = []
    settings = decoder_settings(model.generation_config, model, processor, recipe, first)
    if not start:
        forced = settings.forced_bos_token_id
        start = [settings.decoder_start_token_id, *([] if forced is None else [forced])]
    never = [ids[0] for ids in settings.bad_words_ids or () if len(ids) == 1]
    constants |= {
        "START": start,
        "MAX_NEW_TOKENS": recipe.generation.max_new_tokens,
        "ENDS": settings.eos_token_id,
        "NEVER": [*never, *(settings.suppress_tokens or ())],
        "NEVER_FIRST": list(settings.begin_suppress_tokens or ()),
    }
    return body + ENCODER + WRITE, constants
