"""Every PEFT method that llmtune trains keeps what a run promises: a few methods by default, all of them if slow."""

import httpx
import pytest
import torch
from support.adapting import documents, nudge, open_model, packed, padded, quiet, recipe_with
from support.method_table import CHATS, SMALL
from support.models import build_llama
from support.pairs import recipe_of
from support.runs import expect_equal_run, expect_every_change_named, invoke
from support.serving import load_served, serving
from support.training import TRAIN, leave_step_4, make_recipe, run_training, write_examples

from llmtune.adapter.injection import inject, trained_parameters
from llmtune.data.example import Example
from llmtune.evaluate.generation import generate_completions
from llmtune.model.causal_lm_loss import causal_loss
from llmtune.pipeline import run_pipeline
from llmtune.recipe.loader import load_recipe
from llmtune.recipe.peft_options import REFUSED_METHODS, peft_methods
from llmtune.records import Prompt
from llmtune.serve.finished_run import FinishedRun
from llmtune.store.run_request import RunRequest

METHODS = sorted({*peft_methods(), "qlora", "full"} - {*REFUSED_METHODS})
FEW = ("lora", "full", "ia3", "prompt_tuning", "p_tuning", "prefix_tuning", "adaption_prompt")
EACH = [pytest.param(method, marks=() if method in FEW else pytest.mark.slow) for method in METHODS]
PROMPTS = [[*range(first, first + count)] for first, count in ((5, 9), (30, 3), (70, 15), (9, 6), (120, 9), (200, 2))]
NOISY = ("pvera",)
"""Methods that draw noise in training mode, as dropout does."""
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of PEFT, one method or another
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),  # PEFT's prefix tuning
]


def options_of(method):
    sizes = {"method": method, **SMALL.get(method, {})}
    return sizes if method in ("lora", "qlora", "full") else {"r": None, "lora_alpha": None, **sizes}


@pytest.fixture
def adapted(tiny_llama, method):
    """A model whose adapter matters, with its recipe."""
    adapter = {name: value for name, value in options_of(method).items() if value is not None}
    recipe = recipe_with(tiny_llama, adapter=adapter, generation={"max_new_tokens": 8})
    selected = open_model(recipe)
    with torch.no_grad():
        for parameter in selected.model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 and parameter.is_floating_point() else 1)
    tuned = inject(selected, recipe, quiet())
    for _ in range(2):
        nudge(tuned.model)
    return tuned, recipe


def gradients_of(model, batches):
    model.zero_grad()
    losses = []
    for batch in batches:
        loss = causal_loss(model, batch)
        loss.sum.backward()
        losses.append(float(loss.sum.detach()))
    return sum(losses), [parameter.grad.clone() for parameter in trained_parameters(model)]


@pytest.mark.promise(
    "method", "loss and gradient", equal="the sum over single rows, padded and packed: relative difference below 1e-4"
)
@pytest.mark.parametrize("method", EACH)
def test_loss_and_gradient_do_not_depend_on_how_rows_are_batched(method, adapted):
    tuned, recipe = adapted
    rows = documents([9, 17, 30, 12])
    tuned.model.train(method not in NOISY)
    if method not in ("qlora", "adamss"):  # which keep the dtype of their layers
        tuned.model.double()  # some methods enlarge differences in the last digits
    loss, gradients = gradients_of(tuned.model, [padded([row]) for row in rows])
    ways = [[padded(rows)], [padded(rows[:1]), padded(rows[1:])]]
    if not recipe.needs_rows_apart:
        assert tuned.selected.packs
        ways.append([packed(rows)])
    for way in ways:
        other, others = gradients_of(tuned.model, way)
        assert other == pytest.approx(loss, rel=1e-4)
        for one, two in zip(gradients, others, strict=True):
            assert float((one - two).norm()) <= 1e-4 * float(one.norm()) + 1e-6


@pytest.mark.promise(
    "method", "answers", equal="the most likely tokens of the trained forward pass, batched and single"
)
@pytest.mark.parametrize("method", EACH)
def test_answers_are_the_first_choices_of_the_loss(method, adapted):
    tuned, recipe = adapted
    model, processor = tuned.model.eval(), tuned.selected.processor
    learned = 0
    with torch.inference_mode():
        together = generate_completions(model, [*map(Prompt, PROMPTS)], processor, recipe, device="cpu")
        alone = [
            generate_completions(model, [Prompt(prompt)], processor, recipe, device="cpu")[0] for prompt in PROMPTS
        ]
        for prompt, output in zip(PROMPTS * 2, [*together, *alone], strict=True):
            end = len(prompt) + len(output.token_ids)
            example = Example([*prompt, *output.token_ids], [len(prompt), end], 1)
            loss = causal_loss(model, padded([example]), by_row=True)
            assert int(loss.row_correct.sum()) == loss.count == len(output.token_ids)
            learned += loss.count
    assert learned > 20


@pytest.mark.slow
@pytest.mark.promise("method", "resume", equal="training without a stop, to the last bit")
@pytest.mark.parametrize("method", ["full"])
def test_full_training_resumes_to_the_same_bytes(method, tmp_path, tiny_llama):
    examples = write_examples(tmp_path / "examples", train=61, validation=7)
    recipe = make_recipe(tmp_path, tiny_llama, train=TRAIN, adapter={"method": method})
    for name in ("whole", "stopped"):
        run_training(tmp_path / name, recipe, examples)
    leave_step_4(tmp_path / "stopped")
    assert run_training(tmp_path / "stopped", recipe, examples).resumed_from == 4
    (whole,), (stopped,) = ([*(tmp_path / name / "weights").glob("*.safetensors")] for name in ("whole", "stopped"))
    assert whole.read_bytes() == stopped.read_bytes()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The run folder of a method, made once."""
    runs = {}

    def run(method):
        if method not in runs:
            folder = tmp_path_factory.mktemp(method)
            sections = {"train": {"max_steps": 3, "num_train_epochs": None, "learning_rate": 0.03}}
            file = recipe_of(
                folder, build_llama(folder / "model"), CHATS, "chat", adapter=options_of(method), **sections
            )
            run_pipeline(load_recipe(str(file)), RunRequest(out=folder / "run"), quiet())
            runs[method] = folder / "run"
        return runs[method]

    return run


@pytest.mark.slow
@pytest.mark.promise("method", "served", equal="`generate`: the same text")
@pytest.mark.parametrize("method", METHODS)
def test_the_server_answers_as_generate_does(method, finished):
    question = {"prompt": "Which colour has the cat 4?"}
    expected = FinishedRun(finished(method)).answer(question)
    served = load_served(mine=finished(method))
    with serving(*served.values()) as url:
        body = {"messages": [{"role": "user", "content": question["prompt"]}]}
        (choice,) = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()["choices"]
    assert choice["message"]["content"] == expected["text"]


@pytest.mark.slow
@pytest.mark.promise("method", "reproduce", equal="the run: every byte of its weights, every score")
@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_reproduced_to_the_byte(method, finished, tmp_path):
    run = finished(method)
    done = invoke("reproduce", run, "--out", tmp_path / "again")
    assert done.exit_code == 0, done.stderr
    expect_equal_run(tmp_path / "again", run)


@pytest.mark.slow
@pytest.mark.promise("method", "verify", refused="a changed byte in any file of the trained model")
@pytest.mark.parametrize("method", METHODS)
def test_a_changed_byte_of_the_trained_model_fails_verify_by_name(method, finished):
    run = finished(method)
    files = [path for folder in ("adapter", "weights") for path in sorted((run / folder).rglob("*")) if path.is_file()]
    assert len(files) > 3
    expect_every_change_named(run, files)
