"""Run an exported ONNX model with onnxruntime, numpy and transformers; needs neither torch nor llmtune.

A copy of this file is next to the model's files, with `run_model.json`: the kind of model and its settings.
"""

from __future__ import annotations

import json
import sys
import wave
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoFeatureExtractor, AutoTokenizer

FOLDER = Path(__file__).parent


def answer() -> None:
    """Answer the arguments of the command line."""
    settings = json.loads((FOLDER / "run_model.json").read_text("utf-8"))
    if len(sys.argv) <= settings["needed"]:
        needs = "Needs onnxruntime, numpy and transformers; neither torch nor llmtune."
        sys.exit(f"Run this model: python run_model.py {settings['arguments']}\n\n{needs}")
    KINDS[settings["kind"]](AutoTokenizer.from_pretrained(FOLDER), settings, sys.argv[1:])


def read_inputs(tokenizer: Any, settings: dict[str, Any], *texts: Any, truncation: Any = True, **options: Any) -> Any:
    """Return the inputs of a text or a pair of texts; a text that is too long is cut."""
    limit = settings["max_length"]
    if (size := len(tokenizer(*texts, **options)["input_ids"])) > limit:
        print(f"The text has {size:,} tokens. Only the first {limit:,} are read.", file=sys.stderr)
    return tokenizer(*texts, truncation=truncation, max_length=limit, return_tensors="np", **options)


def read_recording(path: str) -> Any:
    """Return the inputs of a WAV file with one channel of 16 bits."""
    extract = AutoFeatureExtractor.from_pretrained(FOLDER)
    with wave.open(path) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), np.int16) / np.float32(32768)
        given = extract(samples, sampling_rate=file.getframerate(), return_attention_mask=True, return_tensors="np")
    given["attention_mask"] = given["attention_mask"].astype(np.int64)
    return given


def open_graph(name: str) -> Any:
    """Open an ONNX file of the folder."""
    import onnxruntime  # late: it starts threads, and other modules of llmtune need none of it

    return onnxruntime.InferenceSession(FOLDER / name)


def compute(given: Any, session: Any = None) -> list[Any]:
    """Return the outputs of the model, which is opened unless it is given."""
    session = session or open_graph("model.onnx")
    outputs: list[Any] = session.run(None, {one.name: given[one.name] for one in session.get_inputs()})
    return outputs


def list_labels() -> dict[str, str]:
    """Return the labels by the number of the output."""
    labels: dict[str, str] = json.loads((FOLDER / "config.json").read_text("utf-8"))["id2label"]
    return labels


def scale(logits: Any) -> Any:
    """Divide logits by the temperature that makes probabilities calibrated, if the run found one."""
    calibration = FOLDER / "calibration.json"
    temperature = json.loads(calibration.read_text("utf-8"))["temperature"] if calibration.is_file() else 1.0
    return logits.astype(np.float64) / temperature


def softmax(logits: Any) -> Any:
    """Return the probabilities of exclusive classes, on the last axis."""
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def print_class(tokenizer: Any, settings: dict[str, Any], arguments: list[str]) -> None:
    """Print the class of a text or a pair, then the probability of each class."""
    scaled = scale(compute(read_inputs(tokenizer, settings, *arguments[:2]))[0][0])
    labels = list_labels()
    print(labels[str(scaled.argmax())])
    for i, share in enumerate(softmax(scaled)):
        print(f"{labels[str(i)]}\t{share:.6f}")


def print_several(tokenizer: Any, settings: dict[str, Any], arguments: list[str]) -> None:
    """Print the labels that apply to a text, then the probability of each label."""
    scaled = scale(compute(read_inputs(tokenizer, settings, *arguments[:2]))[0][0])
    labels = list_labels()
    names = [labels[str(i)] for i in np.flatnonzero(scaled > 0)]
    listed = json.dumps(names, ensure_ascii=False) if "," in "".join(names) else ", ".join(names)
    print(listed or "(none)")
    for i, share in enumerate(np.exp(-np.logaddexp(0, -scaled))):
        print(f"{labels[str(i)]}\t{share:.6f}")


def print_number(tokenizer: Any, settings: dict[str, Any], arguments: list[str]) -> None:
    """Print the number of a text or a pair."""
    if "places" in settings:  # a reward model reads a conversation
        given = read_inputs(tokenizer, settings, fill_prompt(settings, arguments), add_special_tokens=False)
    else:
        given = read_inputs(tokenizer, settings, *arguments[:2])
    print(compute(given)[0][0, 0])


def print_ranking(tokenizer: Any, settings: dict[str, Any], arguments: list[str]) -> None:
    """Print a line per passage, best first: its score for the query, which is the first argument, and the passage."""
    session, (query, *passages) = open_graph("model.onnx"), arguments
    logits = [float(compute(read_inputs(tokenizer, settings, query, one), session)[0][0, 0]) for one in passages]
    for logit, passage in sorted(zip(logits, passages, strict=True), key=lambda pair: -pair[0]):
        print(f"{np.exp(-np.logaddexp(0, -logit)):.6f}\t{passage}")


def print_tags(tokenizer: Any, settings: dict[str, Any], arguments: list[str]) -> None:
    """Print a line per word: the word, its tag, and the tag's probability."""
    words, labels = arguments[0].split(), list_labels()
    given = read_inputs(tokenizer, settings, words, is_split_into_words=True)
    shares, owners = softmax(scale(compute(given)[0][0])), given.word_ids(0)
    for i, word in enumerate(words):
        if i in owners:
            share = shares[owners.index(i)]
            print(f"{word} {labels[str(share.argmax())]} {share.max():.6f}")


def print_span(tokenizer: Any, settings: dict[str, Any], arguments: list[str]) -> None:
    """Print the part of the second text that answers the first."""
    question, context = arguments[:2]
    given = read_inputs(tokenizer, settings, question, context, truncation="only_second", return_offsets_mapping=True)
    offsets, logits = given["offset_mapping"][0], [part[0] for part in compute(given)]
    inside = np.array([text == 1 for text in given.sequence_ids(0)]) & (offsets[:, 1] > offsets[:, 0])
    start, end = (np.where(inside, part, -np.inf) for part in logits)
    size, longest = len(start), settings["longest_answer"]
    ordered = np.tri(size, dtype=bool).T & np.tri(size, size, longest - 1, dtype=bool)
    scores = np.where(ordered, start[:, None] + end, -np.inf)
    first, last = np.unravel_index(scores.argmax(), scores.shape)
    null = int((given["input_ids"][0] == tokenizer.cls_token_id).argmax())
    none = (
        settings["threshold"] is not None and sum(part[null] for part in logits) - scores.max() > settings["threshold"]
    )
    print("(no answer)" if none else context[offsets[first][0] : offsets[last][1]])


def print_vector(tokenizer: Any, settings: dict[str, Any], arguments: list[str]) -> None:
    """Print the vector of a query."""
    prompt, pooling = settings["prompt"] or "", settings["pooling"]
    hidden = compute(read_inputs(tokenizer, settings, prompt + arguments[0]))[0][0]
    vector = {"cls": hidden[0], "lasttoken": hidden[-1], "max": hidden.max(0), "mean": hidden.mean(0)}[pooling]
    print((vector / np.linalg.norm(vector) if settings["normalize"] else vector).tolist())


def print_masked(tokenizer: Any, settings: dict[str, Any], arguments: list[str]) -> None:
    """Print the tokens in the place of masks."""
    given = read_inputs(tokenizer, settings, *arguments[:2])
    print(tokenizer.decode(compute(given)[0][given["input_ids"] == tokenizer.mask_token_id].argmax(-1)))


def print_letters(tokenizer: Any, settings: dict[str, Any], arguments: list[str]) -> None:
    """Print the letters of a recording."""
    print(tokenizer.decode(compute(read_recording(arguments[0]))[0][0].argmax(-1)))


def fill_prompt(settings: dict[str, Any], arguments: list[str]) -> str:
    """Return the prompt with the arguments in their places."""
    text: str = settings["prompt"]
    for place, argument in zip(settings["places"], arguments, strict=False):
        text = text.replace(place, argument)
    return text


def continue_prompt(tokenizer: Any, settings: dict[str, Any], arguments: list[str]) -> None:
    """Print a decoder's answer."""
    text = fill_prompt(settings, arguments)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="np")["input_ids"]
    print_answer(tokenizer, settings, open_graph("model.onnx"), ids, {})


def answer_encoded(tokenizer: Any, settings: dict[str, Any], arguments: list[str]) -> None:
    """Print the answer of an encoder-decoder to a text or a recording."""
    if settings["kind"] == "recording":
        given = read_recording(arguments[0])
    else:
        given = tokenizer(fill_prompt(settings, arguments), return_tensors="np")
    encoder = open_graph("encoder_model.onnx")
    outputs = encoder.run(None, {one.name: given[one.name] for one in encoder.get_inputs()})
    values = dict(zip([one.name for one in encoder.get_outputs()], outputs, strict=True))
    values["encoder_attention_mask"] = given.get("attention_mask")
    print_answer(tokenizer, settings, open_graph("decoder_model.onnx"), np.array([settings["start"]]), values)


def print_answer(tokenizer: Any, settings: dict[str, Any], session: Any, ids: Any, values: dict[str, Any]) -> None:
    """Print the greedy answer after the tokens `ids`; `values` are further inputs of each step."""
    names = [one.name for one in session.get_inputs()]
    past = {one.name: one.shape for one in session.get_inputs() if one.name.startswith("past_key_values")}
    values |= {name: np.zeros((1, shape[1], 0, shape[3]), np.float32) for name, shape in past.items()}
    never, never_first = settings["never"], settings["never_first"]
    size = 0
    answer: list[int] = []
    while len(answer) < settings["max_new_tokens"] and not (answer and answer[-1] in settings["ends"]):
        positions = np.arange(size, size + ids.shape[1])[None]
        size += ids.shape[1]
        values |= {"input_ids": ids, "attention_mask": np.ones((1, size), np.int64), "position_ids": positions}
        logits, *present = session.run(None, {name: values[name] for name in names})
        logits[..., never if answer else never + never_first] = -np.inf
        answer.append(int(logits[0, -1].argmax()))
        values |= dict(zip(past, present, strict=True))
        ids = np.array([answer[-1:]])
    print(tokenizer.decode(answer, skip_special_tokens=True).strip())


KINDS = {
    "choice": print_class,
    "yes-no": print_several,
    "number": print_number,
    "ranking": print_ranking,
    "tags": print_tags,
    "span": print_span,
    "vector": print_vector,
    "masked": print_masked,
    "letters": print_letters,
    "decoder": continue_prompt,
    "text-to-text": answer_encoded,
    "recording": answer_encoded,
}
"""By the `kind` of `run_model.json`."""

if __name__ == "__main__":
    answer()
