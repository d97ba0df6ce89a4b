"""Pairs of texts as ids: for encoder-decoders of every family, and for prompted decoders."""

import pytest
from support import families
from support.templates import CHATML, tokenizer_with
from transformers import AutoTokenizer, MBartTokenizer

from llmtune.data.text_pairs import first_token, set_languages, starts_with_language, target_ids
from llmtune.errors import RecipeError
from llmtune.recipe.schema import Recipe
from llmtune.tasks import summarize, translate

ROW = {"source": "The sky is blue.", "target": "Le ciel est bleu.", "source_language": None, "target_language": None}
DOCUMENT = {"document": " ".join(["The quick brown fox jumps over the lazy dog."] * 8), "summary": "A fox jumps."}
LANGUAGES = {
    "nllb": {"source_language": "eng_Latn", "target_language": "fra_Latn"},
    "mbart": {"source_language": "en_XX", "target_language": "fr_XX"},
}
FAMILIES = ("t5", "mt5", "bart", "mbart", "nllb", "marian")


def recipe_for(task="translate", section=None, **data):
    content = {"recipe_version": 1, "name": "t", "task": task, "model": {"name": "tiny"}}
    content["data"] = {"train": "rows.jsonl", **data}
    return Recipe.model_validate({**content, **({task: section} if section else {})})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seq2seq")
    return {family: getattr(families, f"build_{family}")(folder / family) for family in FAMILIES}


@pytest.fixture
def tokenizer(folders):
    return lambda family: AutoTokenizer.from_pretrained(folders[family])


def encode(row, processor, recipe, form=translate.VARIANTS[0]):
    (found,) = form.encode([row], processor, recipe)
    return found if isinstance(found, str) else found[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_source_and_target_have_the_tokenizers_ids_and_the_target_its_end(family, tokenizer):
    ours, theirs = tokenizer(family), tokenizer(family)
    languages = LANGUAGES.get(family)
    example = encode(ROW, ours, recipe_for(section=languages))
    if languages:
        theirs.src_lang, theirs.tgt_lang = languages.values()
    expected = theirs(ROW["source"], text_target=ROW["target"])
    assert list(example.input_ids) == expected["input_ids"]
    assert list(example.target_ids) == expected["labels"]
    start, end = example.target_spans
    assert example.target_ids[end - 1] == ours.eos_token_id
    assert end == len(example.target_ids)
    assert start == (1 if languages else 0)  # the language is given, not supervised
    assert example.supervised == end - start
    assert example.target_bytes == len(ROW["target"])
    assert example.tokens == len(example.input_ids) + len(example.target_ids)
    assert example.reach == max(len(example.input_ids), len(example.target_ids))


@pytest.mark.parametrize("family", ["nllb", "mbart"])
def test_languages_of_a_row_override_those_of_the_recipe(family, tokenizer):
    processor, named = tokenizer(family), LANGUAGES[family]
    third = {"nllb": "deu_Latn", "mbart": "de_DE"}[family]
    plain = encode(ROW, processor, recipe_for(section=named))
    other = encode({**ROW, "target_language": third}, processor, recipe_for(section=named))
    own = encode({**ROW, **named}, processor, recipe_for())
    assert (own.input_ids, own.target_ids) == (plain.input_ids, plain.target_ids)
    assert other.target_ids[0] == processor.convert_tokens_to_ids(third)
    assert other.target_ids[1:] == plain.target_ids[1:]
    assert other.input_ids == plain.input_ids
    again = encode(ROW, processor, recipe_for(section=named))  # the tokenizer keeps no state of the previous row
    assert again.target_ids == plain.target_ids


@pytest.mark.parametrize(
    ("family", "said", "meant"),
    [
        ("nllb", "eng_Latin", "eng_Latn"),
        ("nllb", "en", "eng_Latn"),  # a vocabulary word, not a language
        ("nllb", "English", "eng_Latn"),
        ("mbart", "en", "en_XX"),
        ("mbart", "en-US", "en_XX"),
    ],
)
def test_an_unknown_language_is_refused_with_a_suggestion(family, said, meant, tokenizer):
    section = {**LANGUAGES[family], "source_language": said}
    with pytest.raises(RecipeError, match=f"does not know the language '{said}'") as caught:
        encode(ROW, tokenizer(family), recipe_for(section=section))
    assert f"Did you mean '{meant}'?" in str(caught.value)
    assert caught.value.problems[0].where == "translate.source_language"


def test_every_missing_language_is_named(tokenizer):
    with pytest.raises(RecipeError) as caught:
        encode(ROW, tokenizer("nllb"), recipe_for())
    assert [problem.where for problem in caught.value.problems] == [
        "translate.source_language",
        "translate.target_language",
    ]


def test_the_models_codes_override_a_data_sets_language_names(tokenizer):
    row = {**ROW, "languages": ["en", "fr"]}
    example = encode(row, tokenizer("nllb"), recipe_for(section=LANGUAGES["nllb"]))
    assert example.target_ids == encode(ROW, tokenizer("nllb"), recipe_for(section=LANGUAGES["nllb"])).target_ids
    assert translate.languages_of(row, recipe_for()) == ("en", "fr")
    assert translate.languages_of(row, recipe_for(section={"target_language": "French"})) == ("en", "French")


@pytest.mark.parametrize("said", [("fr", "en"), ("fra_Latn", "eng_Latn"), ("French", "English")])
def test_a_recipe_with_swapped_languages_is_refused(said, tokenizer):
    section = dict(zip(("source_language", "target_language"), said, strict=True))
    with pytest.raises(RecipeError, match="the rows go from en into fr, but the recipe says from"):
        encode({**ROW, "languages": ["en", "fr"]}, tokenizer("t5"), recipe_for(section=section))


def test_an_mbart_with_the_language_after_the_end_begins_its_answers_with_it():
    pieces = families._make_unigram(families.FAIRSEQ_WORDS)
    processor = MBartTokenizer(vocab=pieces, src_lang="en_XX", tgt_lang="fr_XX")
    example = encode(ROW, processor, recipe_for(section=LANGUAGES["mbart"]))
    start, end = example.target_spans
    code = processor.convert_tokens_to_ids("fr_XX")
    assert list(example.target_ids[-2:]) == [processor.eos_token_id, code]
    assert (start, end) == (0, len(example.target_ids) - 1)  # the end is supervised, the language is not
    assert starts_with_language(processor)


@pytest.mark.parametrize(("family", "begins"), [("t5", None), ("mbart", False), ("nllb", False)])
def test_only_tokenizers_with_languages_force_a_first_token(family, begins, tokenizer):
    processor = tokenizer(family)
    pair = translate.VARIANTS[0].pair(ROW, recipe_for(section=LANGUAGES.get(family)))
    set_languages(pair.source_language, pair.target_language, processor)
    first = first_token(pair, processor)
    assert (first is None) == (begins is None)
    assert not starts_with_language(processor)
    if first is not None:
        assert target_ids(pair, processor)[0][0] == first


def test_the_recipes_prompt_surrounds_the_source(tokenizer):
    processor = tokenizer("t5")
    section = {"source_language": "English", "target_language": "French"}
    section["prompt"] = "translate {source_language} to {target_language}: {source}"
    example = encode(ROW, processor, recipe_for(section=section))
    assert list(example.input_ids) == processor("translate English to French: The sky is blue.")["input_ids"]
    odd = {**ROW, "source": "what is {target_language} in {braces}?"}
    assert translate.VARIANTS[0].pair(odd, recipe_for(section=section)).source.endswith(odd["source"])


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_long_document_is_cut_at_its_end_but_the_summary_never(family, tokenizer):
    processor, form = tokenizer(family), summarize.VARIANTS[0]
    whole = encode(DOCUMENT, processor, recipe_for("summarize", max_length=256), form)
    cut = encode(DOCUMENT, processor, recipe_for("summarize", max_length=24, on_overlong="truncate"), form)
    assert len(whole.input_ids) > 24 == len(cut.input_ids)
    assert list(cut.input_ids) == [*whole.input_ids[:23], processor.eos_token_id]
    assert cut.target_ids == whole.target_ids
    refused = encode(DOCUMENT, processor, recipe_for("summarize", max_length=24), form)
    assert refused == f"too long: {len(whole.input_ids)} tokens, data.max_length is 24"
    wordy = {"document": "A fox.", "summary": DOCUMENT["document"]}
    for on_overlong in ("error", "truncate"):
        recipe = recipe_for("summarize", max_length=24, on_overlong=on_overlong)
        assert str(encode(wordy, processor, recipe, form)).startswith("too long: ")


def test_an_empty_target_gives_a_reason_and_no_example(tokenizer):
    assert encode({**ROW, "target": " "}, tokenizer("t5"), recipe_for()) == "the target is empty"


# Prompted decoders

NAMED = {"source_language": "English", "target_language": "French"}


@pytest.mark.parametrize(("form", "task", "row"), [(translate, "translate", ROW), (summarize, "summarize", DOCUMENT)])
@pytest.mark.parametrize("template", [CHATML, None])
def test_a_decoder_trains_on_the_target_after_the_ids_of_its_prompt(form, task, row, template):
    processor = tokenizer_with(CHATML)
    processor.chat_template = template
    recipe = recipe_for(task, NAMED if task == "translate" else None)
    example = encode(row, processor, recipe, form.VARIANTS[1])
    prompt, answer = form.VARIANTS[1].split_answer(row)
    start, end = example.spans
    assert form.VARIANTS[1].prompt_ids(prompt, processor, recipe) == list(example.input_ids[:start])
    assert processor.decode(example.input_ids[start:end], skip_special_tokens=True) == answer
    assert end == len(example.input_ids)
    asked = processor.decode(example.input_ids[:start])
    assert row.get("source", row.get("document")) in asked
    assert ("<|im_start|>user" in asked) == (template is not None)


def test_a_decoder_gets_the_languages_or_refuses():
    processor = tokenizer_with(CHATML)
    example = encode(ROW, processor, recipe_for(section=NAMED), translate.VARIANTS[1])
    assert "Translate from English into French." in processor.decode(example.input_ids)
    with pytest.raises(RecipeError, match="the prompt needs the language") as caught:
        encode(ROW, processor, recipe_for(section={"source_language": "English"}), translate.VARIANTS[1])
    assert caught.value.problems[0].where == "translate.target_language"
    own = recipe_for(section={"prompt": "In French, please: {source}"})
    assert "In French, please: The sky is blue." in processor.decode(
        encode(ROW, processor, own, translate.VARIANTS[1]).input_ids
    )


def test_truncation_removes_the_start_of_a_document_and_keeps_the_instruction():
    processor = tokenizer_with(CHATML)
    recipe = recipe_for("summarize", max_length=96, on_overlong="truncate")
    example = encode(DOCUMENT, processor, recipe, summarize.VARIANTS[1])
    start, end = example.spans
    assert len(example.input_ids) <= 96
    assert processor.decode(example.input_ids[start:end], skip_special_tokens=True) == DOCUMENT["summary"]
    assert "Summarize the text above." in processor.decode(example.input_ids[:start])
