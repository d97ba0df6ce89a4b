"""A checkpoint that also reads images, tuned on text: the rest of it and its processor must stay those of the base."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from llmtune.adapter.load import put_adapter
from llmtune.adapter.reference_model import switches_off, without_adapter
from llmtune.deploy.exported_model import ExportedModel, ModelSource
from llmtune.deploy.parity import Certificate, Limits, measure_distance
from llmtune.deploy.tuned_model import QUESTION, TunedModel
from llmtune.errors import RecipeError, first_line
from llmtune.model.base_tensors import build_complete, compare_other_tensors
from llmtune.model.causal_lm_loss import unwrap
from llmtune.model.config import UNREADABLE, read_model_config
from llmtune.model.library_logging import unreported
from llmtune.model.processor import PROCESSOR_FILES, check_image_processor, open_processor, set_image_size
from llmtune.model.quantized_base import keep_quantized_format
from llmtune.model.towers import find_projectors, find_towers, image_text_class, patch_text_forward, text_class
from llmtune.recipe.task_facts import TASK_FACTS

PIXELS = 224


@dataclass(frozen=True)
class AskedPicture:
    """A picture with a question, as the base's processor encodes them, and the logits [T, V] of the complete model."""

    prompt: str
    inputs: Mapping[str, torch.Tensor]
    tuned: torch.Tensor
    base: torch.Tensor | None
    """None if the adapter cannot be disabled."""
    other: torch.Tensor
    """The tuned model's logits for another picture."""


class BaseCheckpoint:
    """The base of a tuned model, complete with its towers."""

    def __init__(self, tuned: TunedModel) -> None:
        inner = cast(PreTrainedModel, unwrap(tuned.model))
        self.tuned, self.folder = tuned, tuned.model_ref.path
        self.skeleton = build_complete(inner)
        """The complete model without memory."""
        self.trained = find_projectors(self.skeleton) if tuned.recipe.adapter.train_projector else []
        """Modules between its towers and its language model that are not the base's."""
        self.picture: AskedPicture | str | None = None
        """The picture after `ask_picture`, or why it could not be asked."""

    @classmethod
    def find(cls, tuned: TunedModel) -> BaseCheckpoint | None:
        """Return the base of a model with towers; None for a model of text alone."""
        if image_text_class(cast(PreTrainedModel, unwrap(tuned.model)).config) is None:
            return None
        base = cls(tuned)
        return base if find_towers(base.skeleton) else None

    def ask_picture(self) -> None:
        """Ask the adapter on the complete base about a picture, before it is merged."""
        kind = self.tuned.task.model_kind
        if self.picture is not None or kind.takes_images or not kind.decodes:
            return  # a model tuned with pictures has its towers, and answers pictures as its other questions
        try:
            processor = self._open_processor(self.folder)
            prompt = _write_prompt(processor)
            inputs = _encode(processor, prompt, _draw())
            other = _encode(processor, prompt, _draw().rotate(90))
        except (*UNREADABLE, NameError) as error:
            self.picture = f"the base's processor cannot encode a picture: {first_line(error)}"
            return
        with unreported():
            model = self._load_complete()
        base = None
        if isinstance(model, PeftModel) and switches_off(model):
            with without_adapter(model, keeps_head=False):
                base = _read_logits(model, inputs)
        self.picture = AskedPicture(prompt, inputs, _read_logits(model, inputs), base, _read_logits(model, other))

    def _open_processor(self, folder: Path) -> ProcessorMixin:
        processor = open_processor(folder, self.tuned.recipe.model.trust_remote_code)
        if folder == self.folder:  # an export has the limits of `model.image_pixels` in its own files
            set_image_size(processor, self.tuned.processor)
        return processor

    def _load_complete(self) -> PreTrainedModel:
        """Load the base with its towers as plain transformers and PEFT do, with the trained weights."""
        selected, inner = self.tuned.adapted.selected, cast(PreTrainedModel, unwrap(self.tuned.model))
        options: dict[str, Any] = {"device_map": {"": inner.device}, "dtype": inner.dtype}
        if selected.quantized and not selected.base_quantization:
            options["quantization_config"] = stated = cast(Any, inner.config.quantization_config)
            options["dtype"] = stated.bnb_4bit_compute_dtype
        model = type(inner).from_pretrained(str(self.folder), local_files_only=True, **options)
        patch_text_forward(model)
        keep_quantized_format(model)
        rows = inner.get_input_embeddings().weight.shape[0]
        if model.get_input_embeddings().weight.shape[0] < rows:  # the recipe added tokens
            model.resize_token_embeddings(rows, mean_resizing=False)
        if not isinstance(self.tuned.model, PeftModel):
            model.load_state_dict(inner.state_dict(), strict=False)
            return cast(PreTrainedModel, model.eval())
        adapted = put_adapter(model, replace(self.tuned.model.peft_config["default"]), trainable=False)
        set_peft_model_state_dict(adapted, get_peft_model_state_dict(self.tuned.model, save_embedding_layers=False))
        return cast(PreTrainedModel, adapted.eval())

    def certify(self, exported: ExportedModel, certified: Certificate, limits: Limits) -> Certificate:
        """Add to a folder's certificate how its towers and its processor compare with the base's, and what differs."""
        if not exported.is_folder or image_text_class(exported.model.config) is None:
            return certified
        self.ask_picture()
        tensors, breaches = compare_other_tensors(self.folder, exported.path, self.skeleton, self.trained)
        files = []
        if not self.tuned.task.model_kind.has_head:
            breaches += self._compare_processors(exported.path)
            files = [name for name in PROCESSOR_FILES if (self.folder / name).is_file()]
        checked: Certificate = {"towers": tensors, "processor_files": files, "picture": None}
        if isinstance(picture := self.picture, str):
            checked["picture"] = {"not_measured": picture}
        elif picture is not None:
            compare = partial(measure_distance, [picture.tuned])
            effect, other = (None if one is None else compare([one]).kl_mean for one in (picture.base, picture.other))
            distance, limit = compare([_read_logits(exported.model, picture.inputs)]), limits.kl(effect)
            checked["picture"] = {**asdict(distance), "limit": limit, "effect_kl": effect, "other_kl": other}
            if not distance.kl_mean <= limit:
                numbers = f"mean KL is {distance.kl_mean:.2g} nats per position; the limit is {limit:.2g}"
                breaches.append(f"asked about a picture, its {numbers}")
        passed = certified["passed"] and not breaches
        return {**certified, "passed": passed, "breaches": [*certified["breaches"], *breaches], "checkpoint": checked}

    def _compare_processors(self, folder: Path) -> list[str]:
        """Describe how the processor of a folder differs from the base's; newer folders need only its first file."""
        breaches = []
        try:
            processor, expected = self._open_processor(folder), self._open_processor(self.folder)
            if type(processor) is not type(expected):
                kinds = type(processor).__name__, type(expected).__name__
                breaches.append(f"its processor is a {kinds[0]}; the base's is a {kinds[1]}")
            elif isinstance(self.picture, AskedPicture):
                inputs = _encode(processor, self.picture.prompt, _draw())
                different = [name for name, part in self.picture.inputs.items() if not torch.equal(inputs[name], part)]
                breaches += [f"its processor makes other {name} of a picture" for name in different]
        except (*UNREADABLE, NameError) as error:
            breaches.append(f"its processor cannot be used as the base's: {first_line(error)}")
        optional = () if breaches or not (folder / PROCESSOR_FILES[0]).is_file() else PROCESSOR_FILES
        stated = [name for name in PROCESSOR_FILES if (self.folder / name).is_file() and name not in optional]
        return [*(f"{name} of the base is missing" for name in stated if not (folder / name).is_file()), *breaches]


def describe_checkpoint(certificate: Certificate) -> list[str]:
    """Return the line to print about the rest of a certified checkpoint; none for a model of text alone."""
    if (checked := certificate.get("checkpoint")) is None:
        return []
    parts = [f"towers: {checked['towers']['equal']:,} tensors equal to the base"]
    if files := checked["processor_files"]:
        parts.append(f"processor files: {len(files)}")
    if picture := checked["picture"]:
        reason = picture.get("not_measured")
        parts.append("one picture: within its limit" if reason is None else f"no picture, because {reason}")
    return [f"  {'; '.join(parts)}"]


def check_processor(source: ModelSource, export: str) -> None:
    """Check that a complete checkpoint that reads images can be written; `export` is its name in `deploy`.

    Raises EnvironmentProblem if the base has no processor that opens, RecipeError for pairs of texts.
    """
    config = read_model_config(source.model_ref, source.recipe.model)
    complete = image_text_class(config) if config.sub_configs else None  # Mistral 4 alone has no part for images
    headed = source.task.model_kind.has_head
    if complete is not None and TASK_FACTS[source.task.name].loader == "CrossEncoder":
        what = "sentence-transformers gives pairs of texts to the model's processor, which takes none"
        fix = f"Use the adapter, in PEFT or with `llmtune deploy serve`, without {export!r} in `deploy`."
        raise RecipeError.of(what, "deploy", fix)
    if headed or complete is None or complete.__name__ not in (config.architectures or ()):
        return
    alternative = ""
    if source.task.model_kind.decodes and text_class(config) is not None:
        planned = export in source.recipe.exports
        first = f"remove {export!r} from `deploy`, run the recipe, and then: " if planned else ""
        alternative = f" Or merge its text alone: {first}llmtune deploy merge RUN --text-only"
    check_image_processor(source.model_ref.path, source.recipe.model.trust_remote_code, alternative)


def _draw() -> Image.Image:
    """Return a picture of two gradients."""
    rows = Image.linear_gradient("L").resize((PIXELS, PIXELS))
    return Image.merge("RGB", [rows, rows.rotate(90), rows.rotate(180)])


def _write_prompt(processor: Any) -> str:
    """Return a question about a picture: by the processor's chat template, if that writes the picture's token."""
    token = str(getattr(processor, "boi_token", None) or processor.image_token)
    if processor.chat_template:
        content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
        chat = [{"role": "user", "content": content}]
        text = str(processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))
        if token in text or processor.image_token in text:
            return text
    return f"{token}{QUESTION}"


def _encode(processor: Callable[..., Any], prompt: str, picture: Image.Image) -> dict[str, torch.Tensor]:
    inputs = processor(text=[prompt], images=[picture], return_tensors="pt")
    return {name: part for name, part in inputs.items() if isinstance(part, torch.Tensor)}


@torch.inference_mode()
def _read_logits(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the logits [T, V] for a picture and its question, on the CPU in float32."""
    moved = {
        name: part.to(model.device, model.dtype if part.is_floating_point() else None) for name, part in inputs.items()
    }
    logits_BTV: torch.Tensor = model(**moved, use_cache=False).logits
    return logits_BTV[0].float().cpu()
