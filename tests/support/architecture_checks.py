"""Train every architecture with llmtune and with plain transformers and PEFT, side by side.

`make architectures` writes the results to docs/architectures.md.
"""

import re
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, PreTrainedTokenizerBase

from llmtune.adapter.injection import inject, trained_parameters
from llmtune.adapter.merging import merge_adapter
from llmtune.adapter.saving import save_adapter
from llmtune.data.collators import IGNORED
from llmtune.data.example import Example
from llmtune.data.text_pairs import source_ids
from llmtune.deploy.base_checkpoint import BaseCheckpoint
from llmtune.deploy.merged_model import save_settings
from llmtune.deploy.tuned_model import TunedModel
from llmtune.errors import LlmtuneError
from llmtune.evaluate.decoder_generation import decoder_settings
from llmtune.evaluate.evaluated_task import LoadedModel
from llmtune.evaluate.generation import end_output, generate_completions, generation_settings
from llmtune.model.base_tensors import copy_other_tensors
from llmtune.model.config import read_model_config
from llmtune.model.library_logging import hushed
from llmtune.model.loading import load_model
from llmtune.model.processor import load_processor
from llmtune.model.resolve import resolve_model
from llmtune.model.towers import find_towers, patch_text_forward, remove_towers
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
DECODERS = ("causal", "image-text")
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
            recipe = recipe_for(kind, folder, packing)
            adapted, task = adapt(recipe)
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


def recipe_for(kind: str, folder: Path, packing: bool) -> Recipe:
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


def adapt(recipe: Recipe) -> tuple[AdaptedModel, AnyTask]:
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
    if KINDS[kind].auto_class not in (task.model_kind.auto_class, task.model_kind.image_text_class):
        return {"padded": f"learns as a decoder ({task.model_kind.auto_class})"}
    plain = load_plain(kind, adapted, folder)
    examples = [example_for(kind, length) for length in LENGTHS]
    with suppress_all() as failed:
        wanted = plain_step(kind, plain, examples)
    if failed:
        return {"padded": _tell(failed[0]).replace("traceback", "plain transformers fails")}
    found = {}
    for packs in (True, False) if adapted.selected.packs else (False,):
        loss = take_step(adapted, task, recipe, examples, packs)
        found["packed" if packs else "padded"] = _judge(loss, wanted, adapted.model, plain)
    if kind != "encoder":
        with suppress_all() as failed:
            found["answers"] = _answers(kind, adapted, plain, task, recipe)
        if failed:
            found["answers"] = _tell(failed[0])
    if kind == "image-text":
        with suppress_all() as failed:
            found["merged"] = _merge(adapted, plain, task, recipe, folder)
        if failed:
            found["merged"] = _tell(failed[0])
    return found


def load_plain(kind: str, adapted: AdaptedModel, folder: Path) -> PeftModel:
    """Save the adapter, and let plain PEFT put it on the model that transformers opens, with its towers."""
    save_adapter(adapted, folder / "adapter")
    auto = getattr(transformers, KINDS[kind].auto_class)
    labels = {"num_labels": adapted.selected.model.config.num_labels} if kind == "encoder" else {}
    plain = auto.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32, **labels)
    patch_text_forward(plain)
    plain.config.use_cache = False  # with a cache some decoders skip the causal mask
    return PeftModel.from_pretrained(plain, folder / "adapter", is_trainable=True)


def plain_step(kind: str, plain: PeftModel, examples: Sequence[Example]) -> torch.Tensor:
    """Return the loss of the examples, read one at a time; their gradients are left in the model."""
    plain.train()
    loss = torch.stack([_plain_loss(kind, plain, example) for example in examples]).sum()
    loss.backward()
    return loss.detach()


def take_step(
    adapted: AdaptedModel, task: AnyTask, recipe: Recipe, examples: Sequence[Example], packs: bool
) -> torch.Tensor:
    """Return llmtune's loss of the examples, in one batch; their gradients are left in the model."""
    adapted.model.train().zero_grad()
    collate = task.collator(adapted.selected.processor, recipe, packs)
    loss = task.loss(adapted.model, collate(examples, 0), False).sum
    loss.backward()
    return loss.detach()


def example_for(kind: str, length: int) -> Example:
    ids = torch.randint(4, 400, (2, length), generator=torch.Generator().manual_seed(length)).tolist()
    if kind in DECODERS:
        return Example(ids[0], [length // 3 + 1, length], length)
    if kind == "encoder":
        tags = [token % 3 if i % 2 else IGNORED for i, token in enumerate(ids[0])]
        return TagExample(ids[0], [], 0, tag_ids=tags, counted=length // 2)
    target, spans = ids[1][: length // 2], [0, length // 2]
    return TargetExample(ids[0], [], 0, target_ids=target, target_spans=spans, counted=length // 2)


def _plain_loss(kind: str, plain: torch.nn.Module, example: Any) -> torch.Tensor:
    ids = torch.tensor([example.input_ids])
    if kind in DECODERS:
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
    ours, theirs = gradients(model), gradients(plain)
    if ours.keys() != theirs.keys():
        return f"differs: gradients at {len(ours)} and {len(theirs)} weights"
    off = abs(float(loss - wanted) / float(wanted)), relative_distance(ours, theirs)
    return (
        "equal"
        if off[0] <= TOLERANCE and off[1] <= 10 * TOLERANCE
        else f"differs: loss by {off[0]:.1e}, gradient by {off[1]:.1e}"
    )


def relative_distance(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> float:
    """Return the norm of the difference over all weights, divided by the norm."""
    apart = sum(float((ours[name] - theirs[name]).square().sum()) for name in theirs) ** 0.5
    return apart / sum(float(part.square().sum()) for part in theirs.values()) ** 0.5


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the gradients in a model by the name of their weight."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _answers(kind: str, adapted: AdaptedModel, plain: PeftModel, task: AnyTask, recipe: Recipe) -> str:
    """Compare answers to many prompts with those of transformers' `generate` to each prompt alone."""
    processor, model = adapted.selected.processor, adapted.model.eval()
    plain.eval()
    with torch.inference_mode():
        if kind in DECODERS:
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
        if kind in DECODERS:
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
    ids = end_output(out[len(prompt) :].tolist(), {processor.eos_token_id}).token_ids if kind in DECODERS else out
    return str(processor.decode(ids, skip_special_tokens=True))


def _tell(error: Exception) -> str:
    if isinstance(error, LlmtuneError):
        return f"refused: {error.problems[0].what}"
    return f"traceback: {type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _merge(adapted: AdaptedModel, plain: PeftModel, task: AnyTask, recipe: Recipe, folder: Path) -> str:
    """Merge and save with the base's towers, and compare what transformers opens with the adapter on the base."""
    ids = torch.tensor([example_for("image-text", max(LENGTHS)).input_ids])
    tuned = TunedModel(adapted, recipe, task)
    checkpoint = BaseCheckpoint.find(tuned)
    with torch.inference_mode():
        wanted = plain.eval()(input_ids=ids).logits
    merged, out = merge_adapter(adapted).eval(), folder / "merged"
    save_settings(merged, tuned, out, torch.float32)
    remove_towers(merged)
    merged.save_pretrained(out)
    if checkpoint is not None:
        copy_other_tensors(folder, checkpoint.skeleton, out)
    opened, notes = transformers.AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    if wrong := [name for names in notes.values() for name in names]:
        return f"differs: {len(wrong)} weights are missing or unknown, such as {wrong[0]}"
    patch_text_forward(opened.eval())
    base = plain.unload().state_dict()
    towers = tuple(f"{name}." for name in find_towers(opened))
    changed = [n for n, part in opened.state_dict().items() if n.startswith(towers) and not torch.equal(part, base[n])]
    if changed:
        return f"differs: {len(changed)} weights of towers, such as {changed[0]}"
    with torch.inference_mode():
        off = float((opened(input_ids=ids).logits - wanted).abs().max() / wanted.std())
    return "equal" if off <= 10 * TOLERANCE else f"differs: scores by {off:.1e}"


HEADER = """# Architectures

Every type of model that transformers {version} has for causal, encoder, encoder-decoder and image-text models, built
small from its configuration and trained one step, with a LoRA adapter, in float32. *Equal*: loss and gradient are those
of plain, eager transformers with PEFT, which reads the saved adapter and one row at a time (the loss to {tolerance:g}
of its size, the gradient to ten times that); and answers in batches are, to the letter, those of `generate` to each
prompt alone. Causal and image-text models learn `chat`, encoders `token-classify`, encoder-decoders `summarize`. What
cannot be done is refused by name before training.

Image-text models read rows of text here. The plain one is complete, with the towers that read images. *Merged*: the
adapter is merged, saved with the base's towers, and opened again by the class for text and images. No weight is missing
or unknown, the towers are the base's to the bit, and the scores of a text are those of the adapter.

Made by `make architectures`, of one kind by `make architectures KIND=image-text`; do not edit.
"""
COLUMNS = {"packed": "packed rows", "padded": "padded rows", "answers": "answers"}
SUMMARY = "| kind | types | built | trained | packed | answers equal | refused |\n|---|---:|---:|---:|---:|---:|---:|\n"


def columns_of(kind: str) -> dict[str, str]:
    """Return the columns of the table of a kind, with their titles."""
    return COLUMNS | ({"merged": "merged"} if kind == "image-text" else {})


def write_row(kind: str, model_type: str, found: dict[str, str]) -> str:
    """Return the line of the table for one model type."""
    columns = columns_of(kind)
    if found["built"] != "yes":
        return f"| `{model_type}` | not built: {found['built']} |{' |' * (len(columns) - 1)}"
    return f"| `{model_type}` | {' | '.join(found.get(column, '') for column in columns)} |"


def write_section(kind: str, types: dict[str, dict[str, str]]) -> tuple[str, str]:
    """Return a kind's line of the summary, and its section."""
    found = [*types.values()]
    built = [one for one in found if one["built"] == "yes"]
    trained = [one for one in built if one.get("padded") == "equal"]
    equal = Counter(column for one in trained for column in COLUMNS if one.get(column) == "equal")
    refused = sum(one.get("padded", "").startswith("refused") for one in built)
    numbers = (len(found), len(built), len(trained), equal["packed"], equal["answers"], refused)
    titles = columns_of(kind).values()
    lines = [f"| type | {' | '.join(titles)} |", f"|---|{'---|' * len(titles)}"]
    lines += [write_row(kind, model_type, one) for model_type, one in types.items()]
    return f"| {kind} | {' | '.join(map(str, numbers))} |\n", f"\n## {kind}\n\n" + "\n".join(lines) + "\n"


def write_page(sections: dict[str, tuple[str, str]], written: str) -> str:
    """Return the page; kinds that were not checked keep their section."""
    for kind in KINDS.keys() - sections.keys():
        line = re.search(rf"^\| {kind} \|.*\n", written, re.MULTILINE)
        section = re.search(rf"\n## {kind}\n(?:(?!\n## ).)*", written, re.DOTALL)
        sections[kind] = line[0] if line else "", section[0] if section else ""
    header = HEADER.format(version=transformers.__version__, tolerance=TOLERANCE)
    lines, tables = zip(*(sections[kind] for kind in KINDS), strict=True)
    return f"{header}\n{SUMMARY}{''.join(lines)}{''.join(tables)}"


def main() -> None:
    """Check every type of the kinds that are named, or of all, and write the page."""
    transformers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    sections = {}
    for kind in sys.argv[1:] or KINDS:
        results = {}
        for model_type in KINDS[kind].types:
            with tempfile.TemporaryDirectory() as folder:
                results[model_type] = check(kind, model_type, Path(folder))
            print(kind, write_row(kind, model_type, results[model_type]), file=sys.stderr)
        sections[kind] = write_section(kind, results)
    PAGE.write_text(write_page(sections, PAGE.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
