from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtune.errors import RecipeError
from llmtune.recipe.loader import load_recipe
from llmtune.recipe.yaml_reader import MAX_BYTES, parse_yaml, resolve_scalar
from llmtune.recipe.yaml_writer import scalar

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        (".5", 0.5),
        ("-3.", -3.0),
        ("0x1F", 31),
        ("0o17", 15),
        ("017", 17),
        ("yes", "yes"),
        ("True", True),
        ("~", None),
        ("", None),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("-.inf", float("-inf")),
        ("1e", "1e"),
        ("٣", "٣"),
    ],
)
def test_plain_scalars_follow_the_core_schema_of_yaml_1_2(text, value):
    found = resolve_scalar(text)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "words", "place"),
    [
        ("task: chat\ntask: chat\n", "duplicate key 'task' (first: recipe.yaml:1)", "recipe.yaml:2"),
        ("a:\n  b: [1, 2\n", "not valid YAML", "recipe.yaml:3"),
        ("a: b: c\n", "not valid YAML: mapping values are not allowed here", "recipe.yaml:1"),
        ("\tseed: 3\n", "not valid YAML", "recipe.yaml:1"),
        ("task: chat\nx: !!python/object/apply:os.system [ls]\n", "is not allowed", "recipe.yaml:2"),
        ("x: !mine 3\n", "the tag '!mine' is not allowed", "recipe.yaml:1"),
        ("a: 1\n---\nb: 2\n", "expected a single document", "recipe.yaml:2"),
        ("a: &a {b: 1}\nc:\n  <<: *a\n", "merge keys", "recipe.yaml:3"),
        ("? [a]\n: 3\n", "a key is not text", "recipe.yaml:1"),
        ("a: &x 1\nb: &x 2\n", "found duplicate anchor 'x'", "recipe.yaml"),
        ("a: *b\n", "undefined alias 'b'", "recipe.yaml:1"),
        ("a: &a [*a]\n", "nested more than 24 deep", "recipe.yaml:1"),
        (BOMB, "more than 20,000 values", "recipe.yaml:1"),
        ("[" * 1000, "nested more than 24 deep", "recipe.yaml"),
        ("a: '\x07'\n", "not valid YAML", "recipe.yaml"),
        ('a: "\\ud800"\n', "half a surrogate pair", "recipe.yaml:1"),
        ('a: "\\UFFFFFFFF"\n', "not valid YAML", "recipe.yaml"),
        ("seed: " + "9" * 5000, "a number of 5000 digits", "recipe.yaml:1"),
        ("seed: 99999999999999999999", "is too large", "recipe.yaml:1"),
        ("", "the recipe is empty", "recipe.yaml"),
        ("# nothing\n", "the recipe is empty", "recipe.yaml"),
        ("- a\n", "the recipe is not a mapping of keys", "recipe.yaml:1"),
        ("hello", "the recipe is not a mapping of keys", "recipe.yaml:1"),
        ("x" * (MAX_BYTES + 1), "more than 256 KiB", "recipe.yaml"),
    ],
)
def test_text_that_is_not_a_recipe_is_refused_with_its_place(refuse, text, words, place):
    problems = refuse(text, whole=True)
    assert any(words in problem.what and problem.where == place for problem in problems), problems
    assert all(problem.fix for problem in problems)


def test_all_mistakes_in_a_file_are_reported_at_once(refuse):
    problems = refuse("a: 1\na: 2\nb: !x 3\n<<: {}\n", whole=True)
    assert [problem.where for problem in problems] == ["recipe.yaml:2", "recipe.yaml:3", "recipe.yaml:4"]


def test_bytes_that_are_not_utf8_are_refused_with_their_line(tmp_path):
    path = tmp_path / "latin.yaml"
    path.write_bytes("task: chat\nname: café\n".encode("latin-1"))
    with pytest.raises(RecipeError, match=r"latin\.yaml:2: not UTF-8 \(byte 0xe9\)"):
        load_recipe(path)


def test_a_byte_order_mark_and_a_few_anchors_are_allowed(write):
    text = "\ufefftask: chat\ndata: {train: &rows [a.jsonl], test: *rows}\nmodel: {name: m}\n"
    loaded = load_recipe(write(text, whole=True))
    assert loaded.recipe.data.test == loaded.recipe.data.train


def load_or_refuse(path: Path, raw: bytes, sets: list[str]) -> None:
    path.write_bytes(raw)
    try:
        loaded = load_recipe(path, sets)
    except RecipeError as error:
        said = str(error)
    else:
        path.write_text(loaded.to_yaml(), encoding="utf-8")
        said = load_recipe(path).recipe.name
    assert said


@settings(max_examples=200, deadline=None)
@given(text=st.text(), setting=st.text(max_size=30))
def test_any_text_is_loaded_or_refused(tmp_path_factory, text, setting):
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    load_or_refuse(path, text.encode("utf-8", "surrogatepass"), [setting])


YAMLISH = st.text(alphabet="abc:-[]{}&*!|>'\"%@`#,?~ \n\t\\0123.eE_<=xuU", max_size=60)


@settings(max_examples=600, deadline=None)
@given(raw=st.binary(max_size=200) | YAMLISH.map(str.encode))
def test_any_bytes_and_yaml_syntax_are_loaded_or_refused(tmp_path_factory, raw):
    load_or_refuse(tmp_path_factory.getbasetemp() / "fuzz.yaml", raw, [])


WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63) + 1, 2**63 - 1) | st.floats() | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(value=VALUES)
def test_written_values_are_read_back_unchanged(value):
    assert repr(parse_yaml(scalar(value), "value", Path()).plain()) == repr(value)


def test_the_same_text_in_two_files_has_the_lines_of_each():
    first, second = (parse_yaml("a: 1\nb: [2]\n", label, Path(label)) for label in ("one.yaml", "two.yaml"))
    assert first.plain() == second.plain() == {"a": 1, "b": [2]}
    assert [(node.value["b"].origin, node.value["b"].folder) for node in (first, second)] == [
        ("one.yaml:2", Path("one.yaml")),
        ("two.yaml:2", Path("two.yaml")),
    ]
