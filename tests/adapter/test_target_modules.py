"""The recipe's module targets are resolved to the model's names; targets without a match are an error."""

import pytest
from support.adapting import build_family, open_model, quiet, recipe_with

from llmtune.adapter.injection import inject
from llmtune.adapter.target_modules import resolve_targets, shorten_targets
from llmtune.errors import RecipeError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = build_family(tmp_path_factory.mktemp("targets"), "llama", tie_word_embeddings=False)
    return open_model(recipe_with(folder)).model


def resolve(model, **adapter):
    return resolve_targets(model, recipe_with("x", adapter=adapter).adapter)


def problems(model, **adapter):
    with pytest.raises(RecipeError) as caught:
        resolve(model, **adapter)
    return caught.value.problems


def test_all_linear_is_every_linear_module_except_the_head(model):
    found = resolve(model)
    assert len(found) == 14
    assert "lm_head" not in found
    assert resolve(model, target_modules="all-linear", exclude_modules=["down_proj"]) == [
        name for name in found if not name.endswith("down_proj")
    ]


def test_endings_expressions_and_layers_choose_modules(model):
    assert resolve(model, target_modules=["q_proj", "layers.1.mlp.up_proj"]) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    ]
    assert resolve(model, target_modules=r".*\.1\..*(q|v)_proj") == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    ]
    assert resolve(model, target_modules=["k_proj"], layers_to_transform=1) == ["model.layers.1.self_attn.k_proj"]
    assert len(resolve(model, layers_to_transform=[0])) == 7
    assert resolve(model, target_modules=["q_proj", "embed_tokens"])[0] == "model.embed_tokens"


def test_a_target_without_a_match_lists_the_nearest_and_all_modules(model):
    (problem,) = problems(model, target_modules=["q_porj"])
    assert problem.where == "adapter.target_modules"
    assert "'q_porj' matches no module" in problem.what
    assert "Did you mean 'q_proj'?" in problem.what
    for name in ("q_proj (2)", "k_proj (2)", "down_proj (2)", "lm_head (1)"):
        assert name in problem.fix


def test_all_targets_without_a_match_are_reported_at_once(model):
    found = problems(
        model,
        target_modules=["q_proj", "a"],
        exclude_modules=["b"],
        modules_to_save=["c"],
        layers_to_transform=[7],
        rank_pattern={"d": 4},
        alpha_pattern={"e": 4},
    )
    assert [problem.where for problem in found] == [
        "adapter.target_modules",
        "adapter.exclude_modules",
        "adapter.modules_to_save",
        "adapter.layers_to_transform",
        "adapter.rank_pattern.d",
        "adapter.alpha_pattern.e",
    ]
    assert "Layers here: 0 to 1." in found[3].fix


@pytest.mark.parametrize("expression", ["(", "q_proj", "[z-a]"])
def test_an_invalid_or_unmatched_expression_is_refused(model, expression):
    (problem,) = problems(model, target_modules=expression)
    assert problem.where == "adapter.target_modules"
    (problem,) = problems(model, target_modules=["q_proj"], exclude_modules=["q_proj"])
    assert "no module is left" in problem.what


def test_norms_are_named_and_excluded_like_other_modules(model):
    assert len(resolve(model, method="ln_tuning")) == 5
    assert resolve(model, method="ln_tuning", layers_to_transform=1, exclude_modules=["input_layernorm"]) == [
        "model.layers.1.post_attention_layernorm"
    ]
    assert resolve(model, method="ln_tuning", target_modules=["norm"]) == ["model.norm"]


def test_a_name_ending_outside_a_list_is_reported(model):
    (problem,) = problems(model, target_modules="q_proj")
    assert problem.what == "'q_proj' matches no complete module name"
    assert problem.fix.startswith("For name endings, write a list: [q_proj].")


def test_biases_are_not_trained_if_the_model_has_none(model, tiny_gpt2):
    for bias in ("all", "lora_only"):
        (problem,) = problems(model, bias=bias)
        assert problem.what == f"'{bias}' has no effect: this model has no biases"
    with_biases = open_model(recipe_with(tiny_gpt2)).model
    assert resolve(with_biases, bias="lora_only")
    (problem,) = problems(with_biases, bias="lora_only", target_modules=["wte"])
    assert "no module with an adapter has a bias" in problem.what


def test_an_untied_head_may_be_named_and_a_tied_one_may_not(model, tiny_llama):
    assert resolve(model, target_modules=["lm_head"]) == ["lm_head"]
    tied = open_model(recipe_with(tiny_llama)).model
    (problem,) = problems(tied, target_modules=["q_proj", "lm_head"])
    assert "shares its weight with the embedding" in problem.what


def test_names_are_shortened_only_if_the_short_ones_match_the_same_modules(model):
    assert shorten_targets(resolve(model, target_modules=["q_proj", "v_proj"]), model) == ["q_proj", "v_proj"]
    one = resolve(model, target_modules=["q_proj"], layers_to_transform=0)
    assert shorten_targets(one, model) == ["model.layers.0.self_attn.q_proj"]


@pytest.mark.parametrize(
    "adapter",
    [
        {"target_modules": ["q_proj"], "layers_to_transform": 1},
        {"exclude_modules": ["model.layers.0.mlp.up_proj"]},
        {"target_modules": r".*mlp\.(up|down)_proj"},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}},
        {"modules_to_save": ["norm"], "target_modules": ["v_proj"]},
    ],
)
def test_peft_adapts_the_resolved_modules(tiny_llama, adapter):
    recipe = recipe_with(tiny_llama, adapter=adapter)
    selected = open_model(recipe)
    wanted = resolve_targets(selected.model, recipe.adapter)
    adapted = inject(selected, recipe, quiet())
    assert sorted(adapted.matched_modules) == sorted(wanted)
    layers = {name: module for name, module in adapted.model.named_modules() if hasattr(module, "lora_A")}
    assert len(layers) == len(wanted)
    ranks = {layer.r["default"] for name, layer in layers.items() if name.endswith("q_proj")}
    assert ranks <= {2 if "rank_pattern" in adapter else 16}
