"""Train every architecture with llmtune and with plain transformers and PEFT, side by side.

`make architectures` writes the results to docs/architectures.md.
"""

import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, PreTrainedTokenizerBase

from llmtune.adapter.injection import inject, trained_parameters
from llmtune.adapter.saving import save_adapter
from llmtune.data.collators import IGNORED
from llmtune.data.example import Example
from llmtune.data.text_pairs import source_ids
from llmtune.errors import LlmtuneError
from llmtune.evaluate.decoder_generation import decoder_settings
from llmtune.evaluate.evaluated_task import LoadedModel
from llmtune.evaluate.generation import end_output, generate_completions, generation_settings
from llmtune.model.config import read_model_config
from llmtune.model.library_logging import hushed
from llmtune.model.loading import load_model
from llmtune.model.processor import load_processor
from llmtune.model.resolve import resolve_model
from llmtune.recipe.schema import Recipe
from llmtune.records import AdaptedModel, Prompt
from llmtune.tasks.base import AnyTask
from llmtune.tasks.registry import choose_variant
from llmtune.tasks.text_to_text import TargetExample
from llmtune.tasks.token_classify import TagExample
from support.adapting import quiet
from support.architectures import KINDS, build

LENGTHS = [5, 17, 9, 9, 30]
PROMPTS = ["The quick brown fox", "Which colour", "one two three four five six seven", "a"]
TOLERANCE = 1e-5
PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"


def check(kind: str, model_type: str, folder: Path) -> dict[str, str]:
    """Check a training step with packed rows, one with padded rows, and answers; each is `equal` or a reason.

    Compares an adapter's loss and gradient with those of the plain, eager model into which PEFT loads the adapter's
    files, a row at a time.
    """
    with suppress_all() as failed, hushed():
        build(kind, model_type, folder)
    if failed:
        return {"built": _tell(failed[0]).removeprefix("traceback: ")}
    found = {"built": "yes"}
    for packing in (True, False):
        with suppress_all() as failed, hushed():
            recipe = _recipe(kind, folder, packing)
            adapted, task = _adapt(recipe)
            return found | _compare(kind, adapted, task, recipe, folder)
        found["packed" if packing else "padded"] = (
            _tell(failed[0]).replace(f"in {folder} ", "").replace(f"{folder} is", "it is")
        )
    return found


@contextmanager
def suppress_all() -> Iterator[list[Exception]]:
    """Yield a list that collects the exception raised in the block, for the table."""
    failed: list[Exception] = []
    try:
        yield failed
    except Exception as error:  # noqa: BLE001
        failed.append(error)


def _recipe(kind: str, folder: Path, packing: bool) -> Recipe:
    own = KINDS[kind]
    packs = {} if kind == "encoder-decoder" else {"packing": packing}
    sections = {"generation": {"max_new_tokens": 6}} if kind != "encoder" else {}
    return Recipe.model_validate(
        {
            "task": own.task,
            "data": {"train": "/nowhere.jsonl", "max_length": 64, **packs},
            "model": {"name": str(folder), "dtype": "float32"},
            "adapter": {"lora_dropout": 0.0},
            **own.sections,
            **sections,
        }
    )


def _adapt(recipe: Recipe) -> tuple[AdaptedModel, AnyTask]:
    place = resolve_model(str(recipe.model.name), recipe.model, quiet())
    task = choose_variant(recipe, read_model_config(place, recipe.model), place.name)
    processor = load_processor(place, recipe.model)
    selected = load_model(place, recipe, task, processor, device="cpu", training=True)
    adapted = inject(selected, recipe, quiet())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trained_parameters(adapted.model):
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return adapted, task


def _compare(kind: str, adapted: AdaptedModel, task: AnyTask, recipe: Recipe, folder: Path) -> dict[str, str]:
    if task.model_kind.auto_class != KINDS[kind].auto_class:
        return {"padded": f"learns as a decoder ({task.model_kind.auto_class})"}
    save_adapter(adapted, folder / "adapter")
    auto = getattr(transformers, KINDS[kind].auto_class)
    labels = {"num_labels": adapted.selected.model.config.num_labels} if kind == "encoder" else {}
    plain = auto.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32, **labels)
    plain.config.use_cache = False  # with a cache some decoders skip the causal mask
    plain = PeftModel.from_pretrained(plain, folder / "adapter", is_trainable=True)
    examples = [_example(kind, length) for length in LENGTHS]
    for model in (plain, adapted.model):
        model.train()
    with suppress_all() as failed:
        wanted = torch.stack([_plain_loss(kind, plain, example) for example in examples]).sum()
        wanted.backward()
    if failed:
        return {"padded": _tell(failed[0]).replace("traceback", "plain transformers fails")}
    found = {}
    for packs in (True, False) if adapted.selected.packs else (False,):
        adapted.model.zero_grad()
        collate = task.collator(adapted.selected.processor, recipe, packs)
        loss = task.loss(adapted.model, collate(examples, 0), False).sum
        loss.backward()
        found["packed" if packs else "padded"] = _judge(loss, wanted, adapted.model, plain)
    if kind != "encoder":
        with suppress_all() as failed:
            found["answers"] = _answers(kind, adapted, plain, task, recipe)
        if failed:
            found["answers"] = _tell(failed[0])
    return found


def _example(kind: str, length: int) -> Example:
    ids = torch.randint(4, 400, (2, length), generator=torch.Generator().manual_seed(length)).tolist()
    if kind == "causal":
        return Example(ids[0], [length // 3 + 1, length], length)
    if kind == "encoder":
        tags = [token % 3 if i % 2 else IGNORED for i, token in enumerate(ids[0])]
        return TagExample(ids[0], [], 0, tag_ids=tags, counted=length // 2)
    target, spans = ids[1][: length // 2], [0, length // 2]
    return TargetExample(ids[0], [], 0, target_ids=target, target_spans=spans, counted=length // 2)


def _plain_loss(kind: str, plain: torch.nn.Module, example: Any) -> torch.Tensor:
    ids = torch.tensor([example.input_ids])
    if kind == "causal":
        start = example.spans[0]
        return cross_entropy(plain(input_ids=ids).logits[0, start - 1 : -1], ids[0, start:], reduction="sum")
    if kind == "encoder":
        logits = plain(input_ids=ids).logits[0]
        return cross_entropy(logits, torch.tensor(example.tag_ids), ignore_index=IGNORED, reduction="sum")
    target = torch.tensor([example.target_ids], dtype=torch.int64)
    shift = getattr(plain.get_base_model(), "prepare_decoder_input_ids_from_labels", None)
    start = torch.tensor([[plain.config.decoder_start_token_id]])
    written = torch.cat([start, target[:, :-1]], 1) if shift is None else shift(labels=target)
    logits = plain(input_ids=ids, decoder_input_ids=written).logits[0]
    return cross_entropy(logits, target[0], reduction="sum")


def _judge(loss: torch.Tensor, wanted: torch.Tensor, model: torch.nn.Module, plain: torch.nn.Module) -> str:
    """Compare loss and gradient; the gradient by its norm over all weights."""
    theirs = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if ours.keys() != theirs.keys():
        return f"differs: gradients at {len(ours)} and {len(theirs)} weights"
    apart = sum(float((ours[name] - theirs[name]).square().sum()) for name in ours) ** 0.5
    length = sum(float(part.square().sum()) for part in theirs.values()) ** 0.5
    off = abs(float(loss - wanted) / float(wanted)), apart / length
    return (
        "equal"
        if off[0] <= TOLERANCE and off[1] <= 10 * TOLERANCE
        else f"differs: loss by {off[0]:.1e}, gradient by {off[1]:.1e}"
    )


def _answers(kind: str, adapted: AdaptedModel, plain: PeftModel, task: AnyTask, recipe: Recipe) -> str:
    """Compare answers to many prompts with those of transformers' `generate` to each prompt alone."""
    processor, model = adapted.selected.processor, adapted.model.eval()
    plain.eval()
    with torch.inference_mode():
        if kind == "causal":
            prompts = [processor(text).input_ids for text in PROMPTS]
            settings = generation_settings(model, processor, recipe)
        else:
            rows = [{"document": text, "summary": None} for text in PROMPTS]
            prompts = [source_ids(task.pair(row, recipe), processor, recipe) for row in rows]
            settings = decoder_settings(None, adapted.selected.model, processor, recipe)
        plain.generation_config = plain.get_base_model().generation_config = GenerationConfig()
        with suppress_all() as failed:
            theirs = [_plain_answer(kind, plain, prompt, settings, processor) for prompt in prompts]
        if failed:
            return _tell(failed[0]).replace("traceback", "plain transformers fails")
        if kind == "causal":
            written = generate_completions(model, [*map(Prompt, prompts)], processor, recipe, device="cpu")
            ours = [processor.decode(output.token_ids, skip_special_tokens=True) for output in written]
        else:
            predicted = task.predict(rows, LoadedModel(model, processor, recipe, "cpu"))
            ours = [task.format_prediction(prediction) for prediction in predicted]
    same = sum(one.strip() == other.strip() for one, other in zip(ours, theirs, strict=True))
    return "equal" if same == len(prompts) else f"differs: {len(prompts) - same} of {len(prompts)}"


def _plain_answer(
    kind: str, plain: PeftModel, prompt: list[int], settings: GenerationConfig, processor: PreTrainedTokenizerBase
) -> str:
    read = torch.tensor([prompt])
    out = plain.generate(input_ids=read, attention_mask=torch.ones_like(read), generation_config=settings)[0]
    ids = end_output(out[len(prompt) :].tolist(), {processor.eos_token_id}).token_ids if kind == "causal" else out
    return str(processor.decode(ids, skip_special_tokens=True))


def _tell(error: Exception) -> str:
    if isinstance(error, LlmtuneError):
        return f"refused: {error.problems[0].what}"
    return f"traceback: {type(error).__name__}: {' '.join(str(error).split())[:160]}"


HEADER = """# Architectures

Every type of model that transformers {version} has for causal, encoder and encoder-decoder models, built small from
its configuration and trained one step, with a LoRA adapter, in float32. *Equal*: loss and gradient are those of plain,
eager transformers with PEFT, which reads the saved adapter and one row at a time (the loss to {tolerance:g} of its
size, the gradient to ten times that); and answers in batches are, to the letter, those of `generate` to each prompt
alone. Causal models learn `chat`, encoders `token-classify`, encoder-decoders `summarize`. What cannot be done is
refused by name before training.

Made by `make architectures`; do not edit.
"""
COLUMNS = ("packed", "padded", "answers")


def write_row(model_type: str, found: dict[str, str]) -> str:
    """Return the line of the table for one model type."""
    if found["built"] != "yes":
        return f"| `{model_type}` | not built: {found['built']} | | |"
    return f"| `{model_type}` | {' | '.join(found.get(column, '') for column in COLUMNS)} |"


def write_page(results: dict[str, dict[str, dict[str, str]]]) -> str:
    """Return the page: counts by kind, then a table for each kind."""
    lines = [HEADER.format(version=transformers.__version__, tolerance=TOLERANCE)]
    lines += [
        "| kind | types | built | trained | packed | answers equal | refused |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for kind, types in results.items():
        found = [*types.values()]
        built = [one for one in found if one["built"] == "yes"]
        trained = [one for one in built if one.get("padded") == "equal"]
        equal = Counter(column for one in trained for column in COLUMNS if one.get(column) == "equal")
        refused = sum(one.get("padded", "").startswith("refused") for one in built)
        numbers = (len(found), len(built), len(trained), equal["packed"], equal["answers"], refused)
        lines.append(f"| {kind} | {' | '.join(map(str, numbers))} |")
    for kind, types in results.items():
        lines += ["", f"## {kind}", "", "| type | packed rows | padded rows | answers |", "|---|---|---|---|"]
        lines += [write_row(model_type, found) for model_type, found in types.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Check every type and write the page."""
    transformers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    results: dict[str, dict[str, dict[str, str]]] = {}
    for kind, (_, _, types, _) in KINDS.items():
        for model_type in types:
            with tempfile.TemporaryDirectory() as folder:
                found = check(kind, model_type, Path(folder))
            results.setdefault(kind, {})[model_type] = found
            print(kind, write_row(model_type, found), file=sys.stderr)
    PAGE.write_text(write_page(results), "utf-8")


if __name__ == "__main__":
    main()
