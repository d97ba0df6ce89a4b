"""The files with which sentence-transformers loads a folder: how token vectors become one, prompts, and lengths."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from llmtune.errors import EnvironmentProblem, RecipeError
from llmtune.store.atomic_files import read_json, write_json

MODULES, PROMPTS, POOLING = "modules.json", "config_sentence_transformers.json", "1_Pooling"
LENGTH = "sentence_bert_config.json"
SIGMOID = "torch.nn.modules.activation.Sigmoid"
MODES = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
"""By our names, those of versions before 6, which all versions read."""
PASSAGE_PROMPTS = ("document", "passage", "corpus")
"""Names of the prompt of passages, in the order in which sentence-transformers looks for one."""
USE_OTHER = "Use a base with mean, cls, max or lasttoken pooling and no further layers."


@dataclass(frozen=True)
class SentenceSettings:
    """Settings in a base model's folder; None for missing ones."""

    pooling: str | None = None
    normalize: bool | None = None
    query_prompt: str | None = None
    passage_prompt: str | None = None
    dimensions: tuple[int, ...] = ()
    """Shorter lengths that the vectors were trained for."""

    def prompt_of(self, name: str) -> str:
        """Return the text that the model puts before a `query`, or before a text of another name."""
        return (self.query_prompt if name == "query" else self.passage_prompt) or ""


def read_settings(folder: Path) -> SentenceSettings:
    """Read the settings of a sentence-transformers folder; nothing if it is another model's.

    Raises:
        RecipeError: its vectors are made in a way that cannot be trained here, such as by a further layer.
        EnvironmentProblem: a file is damaged or missing.
    """
    modules = _read_part(folder / MODULES)
    if modules is None:
        return SentenceSettings()
    kinds = {str(one["type"]).rsplit(".", 1)[-1]: folder / one["path"] for one in modules}
    if unknown := kinds.keys() - {"Transformer", "Pooling", "Normalize"}:
        what = f"the base makes its vectors with a module {min(unknown)}, which llmtune does not train"
        raise RecipeError.of(what, str(folder / MODULES), USE_OTHER)
    prompts = (_read_part(folder / PROMPTS) or {}).get("prompts") or {}
    return SentenceSettings(
        _read_pooling(kinds["Pooling"]) if "Pooling" in kinds else None,
        "Normalize" in kinds,
        prompts.get("query"),
        next((prompts[name] for name in PASSAGE_PROMPTS if prompts.get(name)), None),
    )


def _read_part(path: Path) -> Any:
    if not path.exists():
        return None
    content = read_json(path)
    if content is None:
        raise EnvironmentProblem.of("damaged: not JSON", str(path), "Download the model again.")
    return content


def _read_pooling(folder: Path) -> str:
    path = folder / "config.json"
    config = _read_part(path)
    if config is None:
        raise EnvironmentProblem.of("missing: it says how vectors are pooled", str(path), "Download the model again.")
    stated = config.get("pooling_mode")
    modes = (
        [stated]
        if isinstance(stated, str)
        else stated
        or [
            name.removeprefix("pooling_mode_") for name, on in config.items() if name.startswith("pooling_mode_") and on
        ]
    )
    ours = [next((one for one, name in MODES.items() if mode in (one, name[13:])), None) for mode in modes]
    if len(ours) != 1 or ours[0] is None:
        raise RecipeError.of(f"the base pools by {' and '.join(modes)}", str(path), USE_OTHER)
    if config.get("include_prompt") is False:
        raise RecipeError.of("the base leaves prompts out of its pooling", str(path), USE_OTHER)
    return ours[0]


def write_settings(folder: Path, config: PretrainedConfig, settings: SentenceSettings, max_length: int) -> None:
    """Make a saved model or adapter a sentence-transformers folder; `settings` are complete.

    Prompts of the base for other uses stay, and so does the one that `encode` takes by default.
    """
    modules = [
        ("", "Transformer"),
        (POOLING, "Pooling"),
        *([("2_Normalize", "Normalize")] if settings.normalize else []),
    ]
    size = config.get_text_config().hidden_size
    (folder / POOLING).mkdir(exist_ok=True)
    write_json(
        folder / MODULES,
        [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(modules)
        ],
    )
    modes = {name: mode == settings.pooling for mode, name in MODES.items()}
    write_json(folder / POOLING / "config.json", {"word_embedding_dimension": size, **modes})
    write_json(folder / LENGTH, {"max_seq_length": max_length, "do_lower_case": False})
    base = _read_part(Path(config.name_or_path) / PROMPTS) or {}
    ours = {"query": settings.query_prompt or "", "document": settings.passage_prompt or ""}
    others = {name: text for name, text in (base.get("prompts") or {}).items() if name not in PASSAGE_PROMPTS}
    prompts, default = {**others, **ours}, base.get("default_prompt_name")
    default = "document" if default in PASSAGE_PROMPTS else default if default in prompts else None
    write_json(folder / PROMPTS, {"prompts": prompts, "default_prompt_name": default, "similarity_fn_name": "cosine"})
