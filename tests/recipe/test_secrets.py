import json

import pytest

from llmtune.errors import RecipeError
from llmtune.recipe.secrets import (
    hide_environment,
    hide_paths,
    holds_secret,
    redact,
    redact_all,
    redact_yaml,
    secret_values,
)

SECRETS = [
    "hf_abcdefghijklmnopqrstuvwxyzABCDEFGH",
    "sk-proj-abcdefghijklmnop1234",
    "ghp_abcdefghijklmnopqrstuvwxyz0123456789",
    "github_pat_11ABCDEFG0abcdefghijkl_mnop",
    "glpat-abcdefghijklmnop-1234",
    "AKIAIOSFODNN7EXAMPLE",
    "AIza" + "a" * 35,
    "xoxb-123456789012-abcdefGHIJ",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.SflKxwRJSMeKKF2QT4",
]


@pytest.mark.parametrize("secret", SECRETS)
def test_known_tokens_are_removed_anywhere(secret):
    for text in (secret, f"token={secret}", f'"{secret}",', f"see {secret}.", f"https://x.example/?t={secret}&a=1"):
        assert secret not in redact(text)
        assert "[removed]" in redact(text)


@pytest.mark.parametrize(
    ("text", "gone", "kept"),
    [
        ("Authorization: Bearer abc.def-123", "abc.def-123", "Authorization: "),
        ("authorization: Basic dXNlcjpwYXNz", "dXNlcjpwYXNz", "authorization: "),
        ('{"Authorization": "token 12345"}', "12345", "Authorization"),
        ("WANDB_API_KEY=0123456789abcdef", "0123456789abcdef", "WANDB_API_KEY="),
        ("HF_TOKEN: 'quite secret'", "quite", "HF_TOKEN"),
        ("api_key: mine", "mine", "api_key"),
        ("https://ada:lovelace@example.org/x", "lovelace", "example.org/x"),
        ("https://0123456789abcdef0123@example.org/x", "0123456789abcdef0123", "example.org/x"),
        ("https://example.org/x?page=2&X-Amz-Signature=0123abcd&a=1", "0123abcd", "&a=1"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----", "MIIE", "[removed]"),
    ],
)
def test_given_secrets_are_removed_and_the_rest_is_unchanged(text, gone, kept):
    found = redact(text)
    assert gone not in found
    assert kept in found


@pytest.mark.parametrize(
    "text",
    [
        "hf_hub_download and HF_HUB_OFFLINE=1",
        "my password reset link has expired",
        "max_new_tokens: 128, pad_token: <pad>",
        "tokens_per_second: 1533",
        "sk-learn, sha256 3f1c3f1c3f1c3f1c3f1c3f1c3f1c3f1c",
        "http://localhost:8080/a@b",
        "ssh://git@example.org/x",
        "https://example.org/x?tokens=3&page=2",
        "the bearer of this letter",
        "task-classification-of-many-things",
    ],
)
def test_ordinary_text_is_unchanged(text):
    assert redact(text) == text


def test_values_of_secret_keys_are_removed_at_any_depth():
    found = redact_all({"a": [{"api_key": "x", "tokens": 5, "hf_token": "y", "secret": None, "pad_token": "<pad>"}]})
    assert found == {
        "a": [{"api_key": "[removed]", "tokens": 5, "hf_token": "[removed]", "secret": None, "pad_token": "<pad>"}]
    }


def test_secrets_are_removed_completely_including_numbers_and_lists():
    secret = {"password": 1234, "api_key": ["one", "two"], "secret": {"a": "three"}, "private_key": True}
    assert redact_all(secret) == {**dict.fromkeys(secret, "[removed]"), "private_key": True}


RECIPE = """model:
  name: m  # recipe.yaml:3
  chat_template_kwargs:  # recipe.yaml:4
    password: {password}
    mood: kind
    nested: [{{api_key: 'a "quoted" one', n: 1.0e-4}}]
"""


@pytest.mark.parametrize(
    "password", ["hunter2", "'hunter2'", "20220101", "|\n      hunter2\n      more", "[hunter2, x]"]
)
def test_secrets_in_yaml_are_removed_and_comments_kept(password):
    found = redact_yaml(RECIPE.format(password=password))
    assert "quoted" not in found
    assert "hunter2" not in found
    assert "20220101" not in found
    assert "name: m  # recipe.yaml:3\n" in found
    assert "mood: kind" in found
    assert "1.0e-4" in found


def test_yaml_without_secrets_is_unchanged():
    text = "a:   [1,2]   # why\n\n\nb: {c: 'd'}\n"
    assert redact_yaml(text) == text


def test_secrets_that_a_recipe_names_are_removed_from_texts():
    recipe = {"model": {"kwargs": {"password": "hunter2", "pin": {"secret": [471100, "abc"]}, "mood": "kind"}}}
    known = [*secret_values(recipe)]
    assert known == ["hunter2", "471100"]
    assert redact_all(["say hunter2, kind one", "471100 abc"], known) == ["say [removed], kind one", "[removed] abc"]


def test_secrets_in_keys_are_removed_too():
    assert SECRETS[0] not in str(redact_all({SECRETS[0]: 1}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hub_token", "quite ordinary"),
        ("wandb.token", 12345),
        ("env", {"HF_TOKEN": "quite ordinary"}),
        ("chat_template_kwargs", {"a": [{"db_password": "x"}]}),
        ("swanlab_lark_webhook_url", "https://example.org/x"),
        ("run_name", ["a", SECRETS[0]]),
        (SECRETS[0], "x"),
    ],
)
def test_a_setting_is_secret_by_its_name_or_the_format_of_its_value(name: str, value: object):
    assert holds_secret(name, value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("eos_token", "</s>"),
        ("special_tokens", {"pad_token": "<pad>", "mask_token": "<mask>"}),
        ("use_auth_token", True),
        ("hub_token", None),
        ("max_new_tokens", 20),
        ("split_special_tokens", "a"),
    ],
)
def test_settings_of_the_tokenizer_are_not_secret(name: str, value: object):
    assert not holds_secret(name, value)


def test_redacting_an_alias_bomb_is_refused_in_time():
    lists = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 1}]\n" for i in range(12))
    with pytest.raises(RecipeError, match="more than 20,000 values"):
        redact_yaml(lists)


def test_local_paths_are_cut_in_keys_too():
    lock = {"metrics": {"/home/ann/own.py": "1a2b"}, "folder": "/home/ann/run", "files": ["/home/ann/rows.jsonl"]}
    assert hide_paths(lock) == {"metrics": {"own.py": "1a2b"}, "files": ["rows.jsonl"]}


def test_secrets_of_the_environment_are_hidden_in_keys_and_texts_and_kept_in_names_of_files(monkeypatch, tmp_path):
    monkeypatch.setenv("MY_API_KEY", "s3cr3t-of-mine")
    file = tmp_path / "s3cr3t-of-mine.jsonl"
    file.touch()
    value = {"s3cr3t-of-mine": [("a s3cr3t-of-mine", 5, None)], "file": str(file), "plain": "abc"}
    expected = {"[removed]": [["a [removed]", 5, None]], "file": str(file), "plain": "abc"}
    assert hide_environment(value) == expected
    assert redact(f"at {file}") == f"at {tmp_path}/[removed].jsonl"


@pytest.mark.parametrize(
    "name", ["PGPASSWORD", "OPENAI_APIKEY", "openai_api_key", "GITHUB_PAT", "DB_PASS", "AWS_ACCESS_KEY_ID"]
)
def test_variables_with_other_names_of_secrets_are_hidden(monkeypatch, name):
    monkeypatch.setenv(name, "s3cr3t-of-mine")
    assert (hide_environment("a s3cr3t-of-mine"), redact("a s3cr3t-of-mine")) == ("a [removed]",) * 2


def test_the_password_in_an_address_of_the_environment_is_hidden_alone(monkeypatch):
    monkeypatch.setenv("DATABASE_URL", "postgres://bob:s3cretpw@db/x")
    assert hide_environment("s3cretpw of bob at db/x") == "[removed] of bob at db/x"


@pytest.mark.parametrize("quote", [str, repr, json.dumps, lambda text: repr(json.dumps(text))])
def test_quoted_secrets_of_the_environment_are_hidden(monkeypatch, quote):
    monkeypatch.setenv("DB_PASSWORD", "p'a\"ss\\wörd9")
    assert "wör" not in redact(quote("p'a\"ss\\wörd9")).encode("ascii", "backslashreplace").decode("unicode_escape")
