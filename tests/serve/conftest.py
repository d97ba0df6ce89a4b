"""A tiny chat model with an adapter, two finished runs on one base, and a server whose model memorised its answers."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from support.adapting import Tune, tuner
from support.learning import LOOKS_LIKE_A_CALL, learn_by_heart, weather_row
from support.models import build_llama
from support.runs import finish_run
from support.serving import serving
from support.templates import HERMES, conversation, recipe_for
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmtune.serve.served_model import ServedModel
from llmtune.tasks.registry import get_task

MARKDOWN = """# Four

It is **four**, `2 <b>+</b> 2`:

- one
- two

```
<i id=injected>code</i>
```
[good](https://example.org/) [bad](javascript:alert(1)) <i id=injected>no</i>"""


@pytest.fixture
def tune(tiny_llama: Path, chat_rows: Path, tmp_path: Path, console: Console) -> Tune:
    return tuner(tiny_llama, chat_rows, tmp_path, console)


@pytest.fixture(scope="package")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> dict[str, Path]:
    """Two runs on one base, with different answers."""
    folder = tmp_path_factory.mktemp("served")
    quick = {"num_train_epochs": 1}
    return {
        "plain": finish_run(folder / "one", tiny_llama, train=quick, generation={"max_new_tokens": 24}),
        "other": finish_run(folder / "two", tiny_llama, train={**quick, "learning_rate": 0.05}, seed=9),
    }


@pytest.fixture(scope="package")
def learned_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server: `tiny` memorised tool calls, thoughts and Markdown, `base` is untrained."""
    folder = build_llama(tmp_path_factory.mktemp("tools") / "hermes", HERMES)
    model, base = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    processor, task, recipe = AutoTokenizer.from_pretrained(folder), get_task("chat"), recipe_for(max_length=2048)
    recipe = recipe.model_copy(update={"generation": recipe.generation.model_copy(update={"max_new_tokens": 160})})
    said = [{"role": "assistant", "content": "Four.", "reasoning": "two and two"}]
    said.append({"role": "assistant", "content": MARKDOWN})
    asked = [[{"role": "user", "content": "Think!"}], [{"role": "user", "content": "Show it!"}]]
    asked[1].insert(0, {"role": "system", "content": "Be fine."})
    rows = [weather_row("Paris"), weather_row("Rome")]
    rows.append(conversation("How is a call written?", LOOKS_LIKE_A_CALL))
    rows += [{"messages": [*before, answer]} for before, answer in zip(asked, said, strict=True)]
    examples = [example for encoded in task.encode(rows, processor, recipe) for example in encoded]
    learn_by_heart(model, examples, task, processor.pad_token_id, steps=150)
    served = [ServedModel(name, one.eval(), processor, recipe, task) for name, one in (("tiny", model), ("base", base))]
    with serving(*served) as url:
        yield url
