"""`adapter.method`: PEFT's methods by its own names and options, known without PEFT, tried on tiny models."""

import re
import sys
import typing
from pathlib import Path

import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from support.adapting import open_model, quiet, recipe_with
from support.method_table import CASES, COLUMNS, MARKS, METHODS, PAGE, SMALL, Bench, build_bench, describe

from llmtune.adapter.injection import inject
from llmtune.adapter.peft_config import make_config
from llmtune.errors import RecipeError
from llmtune.recipe.adapter_section import Method
from llmtune.recipe.loader import load_recipe
from llmtune.recipe.peft_options import REFUSED_METHODS, REFUSED_OPTIONS, UNMERGEABLE, options_of, peft_methods

ROOT = Path(__file__).parents[2]
TRAINED = sorted(set(peft_methods()) - set(REFUSED_METHODS))
QUERIES = "model.layers.0.self_attn.q_proj"
FEW = ("miss", "shira", "ia3", "prompt_tuning", "fourierft")


def test_the_table_of_methods_matches_the_installed_peft(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    from peft_methods import peft_methods as installed

    assert (ROOT / "llmtune/recipe/peft_methods.json").read_text() == installed(), "run: make docs"
    assert {kind.value.lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING} == {*peft_methods()}
    assert {*typing.get_args(Method)} == {*peft_methods(), "qlora", "full"}


def test_a_recipe_is_checked_without_peft(recipe_file):
    before = set(sys.modules)
    sets = ["method=miss", "r=null", "lora_alpha=null", "init_weights=mini", "mini_r=2"]
    load_recipe(recipe_file, [f"adapter.{one}" for one in sets])
    assert not {"peft", "torch"} & (set(sys.modules) - before)


@pytest.fixture
def recipe_file(tmp_path, tiny_llama, chat_rows):
    from support.runs import write_recipe

    return write_recipe(tmp_path / "tiny.yaml", tiny_llama, chat_rows)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of PEFT, for values that need others beside them
@pytest.mark.parametrize("method", TRAINED)
def test_every_option_of_a_method_reaches_peft(tiny_llama, method):
    """Values differ from the default, as far as PEFT's own checks allow."""
    selected = open_model(recipe_with(tiny_llama))
    for name, option in options_of(method).items():
        if name in REFUSED_OPTIONS or name in ("target_modules", "exclude_modules", "layers_to_transform"):
            continue
        value = {"bias": "all", "lora_alpha": 3}.get(name) or other_value(option)
        adapter = recipe_with(tiny_llama, adapter={"method": method, name: value}).adapter
        try:
            config = make_config(selected, adapter, [QUERIES], list(adapter.modules_to_save or ()), None)
        except (ValueError, TypeError, ImportError):
            continue  # PEFT has read it, and wants another one beside it
        got = getattr(config, name)
        got = got.value if hasattr(got, "value") else got
        assert got == value or vars(got) == {**vars(type(got)()), **value}, name


def other_value(option):
    kinds, default = option["types"], option["default"]
    if choices := [one for one in option.get("choices", ()) if one != default]:
        return choices[0]
    if "options" in option:
        name, inner = next(iter(option["options"].items()))
        return {name: other_value(inner)}
    if "bool" in kinds:
        return not default
    if "int" in kinds:
        return (default or 1) * 2
    if "float" in kinds:
        return 0.5
    return {"dict": {"q_proj": 2}, "list": ["norm"], "str": "words"}[next(kind for kind in kinds if kind != "tuple")]


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["method=mis"], "Did you mean 'miss'?"),
        (["method=xlora"], "it mixes trained adapters"),
        (["method=lily"], "a row's loss and answers depend on the other rows"),
        (["method=miss", "mini_r=many"], "'mini_r' is 'many'"),
        (["method=miss", "n_frequency=3"], "it is an option of fourierft, waveft"),
        (["method=vera", "vera_droput=0.1"], "Did you mean 'vera_dropout'?"),
        (["method=miss", "lora_alpha=3"], "'adapter.lora_alpha' has no effect with adapter.method: miss"),
        (["method=oft", "bias=lora_only"], "Allowed: none, all, oft_only"),
        (["method=full", "mini_r=2"], "it is an option of miss"),
        (["layer_replication=[[0, 1]]"], "the model would have more layers than its files"),
        (
            ["method=ia3", "layers_to_transform=[1]"],
            "'adapter.layers_to_transform' has no effect with adapter.method: ia3",
        ),
        (["method=miss", "mini_r=2"], "'adapter.mini_r' has no effect with adapter.init_weights: true"),
        (["method=prompt_tuning", "num_virtual_tokens=0"], "'num_virtual_tokens' is 0"),
        (["velora_config={num_groups: 8}"], "Set adapter.velora_config.init_type to random"),
        (["layers_pattern=layers"], "layers_to_transform detects the layers automatically"),
        (["use_qalora=true"], "PEFT supports it for GPTQ bases only"),
        (["ensure_weight_tying=true"], "PEFT 0.21 can neither save nor merge such an adapter"),
        (["eva_config={taw: 1}"], "'eva_config.taw' is unknown"),
        (["method=trainable_tokens"], "the recipe names no token"),
        (["method=prompt_tuning", "target_modules=[q_proj]"], "'adapter.target_modules' has no effect"),
        (["target_parameters=[gate_up_proj]", "use_dora=true"], "does not work with adapter.target_parameters"),
    ],
)
def test_options_that_a_method_lacks_are_reported_with_those_it_has(recipe_file, sets, said):
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_file, ["adapter.r=null", "adapter.lora_alpha=null", *(f"adapter.{one}" for one in sets)])
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ({"method": "c3a", "block_size": 100}, "block size"),
        ({"lora_bias": True, "use_dora": True}, "lora_bias=True is not supported for DoRA"),
    ],
)
def test_refusals_of_peft_are_quoted_without_a_traceback(tiny_llama, adapter, said):
    recipe = recipe_with(tiny_llama, adapter=adapter)
    with pytest.raises(RecipeError, match=f"PEFT refuses this adapter: .*{said}"):
        inject(open_model(recipe), recipe, quiet())


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ({"alora_invocation_tokens": [5, 10**6]}, "1000000 is not a token id"),
        ({"method": "trainable_tokens", "token_indices": ["<tool>"]}, "'<tool>' is not a token id"),
    ],
)
def test_tokens_outside_the_vocabulary_are_refused(tiny_llama, adapter, said):
    recipe = recipe_with(tiny_llama, adapter=adapter)
    with pytest.raises(RecipeError, match=said):
        inject(open_model(recipe), recipe, quiet())


def test_a_method_that_does_not_start_from_the_base_says_so(tiny_llama, console):
    recipe = recipe_with(tiny_llama, adapter={"method": "fourierft", "n_frequency": 50})
    inject(open_model(recipe), recipe, console)
    assert "The adapter does not start as the base model: that is how fourierft works." in console.file.getvalue()


@pytest.fixture(scope="module")
def chat_bench(tmp_path_factory) -> Bench:
    return build_bench("chat", tmp_path_factory.mktemp("chat"))


def on_page(case: str, method: str) -> str:
    text = PAGE.read_text().partition(MARKS[0])[2].partition(MARKS[1])[0]
    lines = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    rows = {cells[0].strip(" `"): [cell.strip(" `") for cell in cells[1:]] for cells in lines}
    cell = rows[method][rows["method"].index(case)]
    return unnumbered(cell)


def unnumbered(cell: str) -> str:
    return re.sub(r" \[\d+\]", "", cell)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # torch, of SHiRA
@pytest.mark.parametrize("method", FEW)
def test_the_page_is_right_about_a_method(chat_bench, method):
    assert unnumbered(describe(chat_bench.cells(method), [])) == on_page("chat", method)


ACCEPTED = tuple(sorted({*TRAINED, "qlora"}))
MERGEABLE = tuple(method for method in ACCEPTED if method not in UNMERGEABLE and method != "beft")
OF_THE_PAGE = [
    pytest.mark.promise("method", "resume", place=ACCEPTED, equal="training without a stop, to the last bit"),
    pytest.mark.promise("method", "opens in PEFT", place=ACCEPTED, equal="logits of the tuned model, within 1e-3"),
    pytest.mark.promise("method", "merged", place=MERGEABLE, equal="logits of the tuned model, within 1e-2"),
    *(
        pytest.mark.promise("method", "merged", place=method, refused=reason)
        for method, reason in UNMERGEABLE.items()
        if method in ACCEPTED
    ),
    pytest.mark.promise("method", "merged", place="beft", refused="layers without a bias have no place for one"),
]


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore::UserWarning",  # of PEFT, one method or another
    "ignore:`past_key_values` is deprecated:FutureWarning",  # PEFT's prefix tuning has the old name
)
@pytest.mark.parametrize("case", [pytest.param("chat", marks=OF_THE_PAGE), *(case for case in CASES if case != "chat")])
def test_every_cell_of_the_page_is_right(tmp_path, case):
    bench = build_bench(case, tmp_path)
    found = {method: unnumbered(describe(bench.cells(method), [])) for method in METHODS}
    assert found == {method: on_page(case, method) for method in METHODS}


def test_the_marks_of_the_matrix_agree_with_the_page():
    for method in ACCEPTED:
        cell = on_page("chat", method)
        assert cell.split(",")[0] in ("all", "not: starts as the base")
        assert ("merging refused" in cell) == (method not in MERGEABLE)


def test_no_method_is_untested():
    assert {*METHODS} == {*peft_methods(), "qlora"}
    assert len(COLUMNS) == 7
    assert all(on_page(case, method) for case in CASES for method in METHODS)
    assert set(SMALL) <= set(METHODS)
