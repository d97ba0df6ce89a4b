import contextlib
import getpass
import io
import json
import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index
from support import classifying
from support.families import build_bert
from support.http_server import hub_at_work
from support.models import CHATML, build_llama
from support.runs import finish_run, llmtune

from llmtune.deploy.export import export
from llmtune.deploy.merged_model import merged_format
from llmtune.deploy.model_card import PublishOptions
from llmtune.deploy.publish import publish_run
from llmtune.errors import EnvironmentProblem, GateFailed, RecipeError
from llmtune.model.library_logging import hushed
from llmtune.plan import open_finished
from llmtune.store.atomic_files import hash_file, hash_folder

SWITCHES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
BRIEF = {"num_train_epochs": None, "max_steps": 1}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_llama(tmp_path_factory.mktemp("publish") / "tiny-llama")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, base):
    return finish_run(tmp_path_factory.mktemp("publish"), base, evaluate={"gates": ["loss < base"]}, deploy=["merged"])


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def publish(run, to, console, **options):
    return publish_run(run, PublishOptions(to=to, **options), console)


def refuse(run, to, console, error, match, **options):
    with pytest.raises(error, match=match) as raised:
        publish(run, to, console, **options)
    assert not to.exists()
    return raised.value


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def run_snippet(folder, base=None):
    """Run a card's code with base and model on disk; return the code and its output."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    stated = re.search(r'^(base, )?tuned = "([^"]+)"(?:, "([^"]+)")?', code, flags=re.MULTILINE)
    names = f'base, tuned = "{base}", "{folder}"' if stated[1] else f'tuned = "{folder}"'
    assert "llmtune" not in code
    with contextlib.redirect_stdout(io.StringIO()) as printed, hushed():
        exec(code.replace(stated[0], names), {})
    return code, printed.getvalue()


def test_a_secret_template_value_is_not_published(tmp_path, console):
    template = "{% if password is defined %}{{ password }}{% endif %}{{ api.api_key if api is defined }}" + CHATML
    base = build_llama(tmp_path / "base", template)
    kwargs = {"password": "hunter2", "api": {"api_key": ["tuna4711"]}}
    model = {"name": str(base), "dtype": "float32", "chat_template_kwargs": kwargs}
    run = finish_run(tmp_path, base, train=BRIEF, model=model)
    publish(run, tmp_path / "hub", console, license="mit")
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name not in ("tiny.yaml", "recipe.yaml")]
    assert {"report.html", "report.md", "report.json", "README.md", "chat_template.jinja"} <= {
        path.name for path in files
    }
    files.append(tmp_path / "hub/recipe.yaml")
    for secret in (b"hunter2", b"tuna4711"):
        assert [path for path in files if secret in path.read_bytes()] == []
    assert "[removed]" in (run / "report.html").read_text()
    assert "hunter2" not in console.file.getvalue()


def test_a_published_adapter_is_readable_by_the_hub_and_its_card_code_runs(run, base, tmp_path, console):
    published = publish(
        run, tmp_path / "hub", console, base_model="example/tiny-llama", license="mit", languages=("en",)
    )
    folder = tmp_path / "hub"
    names = {path.name for path in folder.iterdir()}
    expected = {"README.md", "certificate.json", "llmtune.lock", "recipe.yaml", "adapter_model.safetensors"}
    assert {*expected, "adapter_config.json", "tokenizer.json", "chat_template.jinja"} <= names
    assert names == set(published["files"])
    card = ModelCard.load(folder / "README.md")
    data = card.data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("example/tiny-llama", "adapter")
    assert (data["library_name"], data["pipeline_tag"], data["license"]) == ("peft", "text-generation", "mit")
    assert data["language"] == ["en"]
    report = json.loads((run / "report.json").read_text())
    results = {result.metric_type: result for result in card.data.eval_results}
    assert results["loss"].metric_value == pytest.approx(report["evaluation"]["tuned"]["loss"], abs=1e-6)
    assert "95 % interval" in results["loss"].metric_name
    assert data["model-index"] == eval_results_to_model_index("tiny", card.data.eval_results)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "example/tiny-llama"
    assert json.loads((folder / "certificate.json").read_text())["passed"]
    text = (folder / "README.md").read_text()
    assert all(part in text for part in ("byte for byte", "mean KL", "| seed | `7` |"))
    run_snippet(folder, base)


def test_a_published_merge_loads_without_its_base_and_shows_its_parity(run, tmp_path, console):
    publish(run, tmp_path / "hub", console, merged=True)
    assert ModelCard.load(tmp_path / "hub/README.md").data.library_name == "transformers"
    assert not (tmp_path / "hub/adapter_config.json").exists()
    measured = json.loads((tmp_path / "hub/certificate.json").read_text())["measured"]
    text = (tmp_path / "hub/README.md").read_text()
    assert f"mean KL {measured['kl_mean']:.2g} nats" in text
    assert "Scores are those of the adapter" in text
    run_snippet(tmp_path / "hub")
    assert "--base-model" in console.file.getvalue()
    assert "--data-license" in console.file.getvalue()


def test_published_files_contain_no_path_person_or_secret(tmp_path, base, console):
    secret = "hf_" + "a1B2" * 8
    run = finish_run(tmp_path / "home" / "ann", base, name=f"tuned-{secret}", train={**BRIEF, "report_to": []})
    export(open_finished(run, console, offline=True), merged_format())
    for merged in (False, True):
        publish(run, tmp_path / "hub", console, merged=merged)
        for path in (tmp_path / "hub").iterdir():
            content = path.read_bytes().decode("utf-8", "replace")
            for private in (str(tmp_path), str(base), "/home/", "ann/", secret, str(Path.home())):
                assert private not in content, path.name
            if path.suffix in {".json", ".md", ".lock"} and getpass.getuser() not in {"user", "root"}:
                assert getpass.getuser() not in content, path.name
        assert not re.search(r'"/[a-z]', (tmp_path / "hub/llmtune.lock").read_text())


def test_a_template_with_a_local_path_is_refused(run, tmp_path, console):
    lock = json.loads((run / "llmtune.lock").read_text())
    (run / "adapter/chat_template.jinja").write_text(f"{{# of {lock['model']['folder']} #}}")
    manifest = json.loads((run / "run.json").read_text())
    manifest["steps"]["evaluate"]["facts"]["trained"] = hash_folder(run / "adapter")
    (run / "run.json").write_text(json.dumps(manifest))
    refuse(run, tmp_path / "hub", console, EnvironmentProblem, "contains a local path")


def test_a_failed_gate_blocks_publishing_unless_overridden_and_the_card_shows_it(run, tmp_path, console):
    gate = {"name": "accuracy >= 1", "wanted": "accuracy >= 1", "got": "0.3", "passed": False}
    change_json(run / "report.json", gates=[gate])
    assert refuse(run, tmp_path / "hub", console, GateFailed, "gate failed").exit_code == 6
    publish(run, tmp_path / "hub", console, despite_gates=True)
    assert "| `accuracy >= 1` | accuracy \\>= 1 | 0.3 | ❌ failed |" in (tmp_path / "hub/README.md").read_text()


def test_only_evaluated_weights_are_published(run, tmp_path, console):
    weights = run / "adapter/adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refuse(run, tmp_path / "hub", console, GateFailed, "changed since it was evaluated")
    weights.write_bytes(content)
    change_json(run / "report.json", evaluation=None)
    refuse(run, tmp_path / "hub", console, RecipeError, "was not evaluated")


def test_a_changed_failed_or_missing_merge_is_refused(run, tmp_path, console):
    (name,) = json.loads((run / "merged/certificate.json").read_text())["files_sha256"]
    with (run / "merged" / name).open("ab") as file:
        file.write(b"x")
    refuse(run, tmp_path / "hub", console, GateFailed, "changed since it was certified", merged=True)
    change_json(run / "merged/certificate.json", trained_sha256="0")
    refuse(run, tmp_path / "hub", console, GateFailed, "made from other weights", merged=True)
    shutil.rmtree(run / "merged")
    refuse(run, tmp_path / "hub", console, RecipeError, "merged model not found", merged=True)
    (run / "merged.failed.json").write_text(json.dumps({"breaches": ["mean KL is 3"]}))
    refuse(run, tmp_path / "hub", console, GateFailed, "mean KL is 3", merged=True)


def test_an_older_publication_is_replaced_and_other_folders_are_refused(run, tmp_path, console):
    listed = publish(run, tmp_path / "hub", console, dry_run=True)
    assert "README.md" in listed["files"]
    assert "README.md" in console.file.getvalue()
    assert not (tmp_path / "hub").exists()
    publish(run, tmp_path / "hub", console)
    (tmp_path / "hub/stale.txt").write_text("old")
    publish(run, tmp_path / "hub", console)
    assert not (tmp_path / "hub/stale.txt").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("do not lose me")
    with pytest.raises(RecipeError, match="contains something else"):
        publish(run, tmp_path / "mine", console)
    assert (tmp_path / "mine/thesis.txt").read_text() == "do not lose me"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "one of --to FOLDER and --repo"),
        ({"to": Path("x"), "repo": "a/b"}, "one of --to FOLDER and --repo"),
        ({"repo": "no-owner"}, "has no owner"),
        ({"repo": "a/b/c"}, "not a valid name on the hub"),
        ({"to": Path("x"), "private": True}, "does not apply to a folder"),
        ({"to": Path("x"), "license": "Apache 2"}, "not a licence of the hub"),
        ({"to": Path("x"), "gguf": Path("none.gguf")}, "file not found"),
        ({"to": Path("x"), "base_model": "a//b"}, "not a valid name on the hub"),
    ],
)
def test_conflicting_publish_options_are_refused(finished, console, options, message):
    with pytest.raises(RecipeError, match=message):
        publish_run(finished, PublishOptions(**options), console)


def test_a_gguf_file_needs_its_certificate_to_be_published(run, tmp_path, console):
    file = tmp_path / "gguf/tiny-F16.gguf"
    file.parent.mkdir()
    file.write_bytes(b"GGUF and so on")
    refuse(run, tmp_path / "hub", console, GateFailed, "has no certificate", gguf=file)
    report = json.loads((run / "report.json").read_text())
    numbers = {"positions": 9, "kl_mean": 1e-6, "largest_logit_difference": 0.01, "top1_agreement": 1.0}
    numbers |= {"answer_agreement": 1.0, "same_ids": True}
    certificate = {"passed": True, "file_sha256": hash_file(file), "base_sha256": report["model"]["sha256"]}
    certificate |= {"number_format": "f16", "reader": "transformers", "measured": numbers}
    (file.parent / "certificate.json").write_text(json.dumps(certificate))
    refuse(run, tmp_path / "hub", console, GateFailed, "another training", gguf=file)
    change_json(file.parent / "certificate.json", trained_sha256=hash_folder(run / "adapter"))
    publish(run, tmp_path / "hub", console, gguf=file)
    card = ModelCard.load(tmp_path / "hub/README.md")
    assert "gguf" in card.data.tags
    assert "GGUF (f16, read by transformers)" in card.text
    assert (tmp_path / "hub/tiny-F16.gguf").read_bytes() == b"GGUF and so on"
    file.write_bytes(b"another")
    refuse(run, tmp_path / "new", console, GateFailed, "changed since it was certified", gguf=file)


def test_an_upload_without_network_or_token_is_refused_early(finished, console, monkeypatch, tmp_path):
    with pytest.raises(EnvironmentProblem, match="--offline forbids"):
        publish_run(finished, PublishOptions(repo="ann/tiny", offline=True), console)
    for name in SWITCHES:
        monkeypatch.delenv(name)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(EnvironmentProblem, match=r"no token(?s:.*)hf auth login"):
        publish_run(finished, PublishOptions(repo="ann/tiny"), console)


@pytest.mark.slow
def test_an_upload_reaches_the_hub_completely(finished):
    switches = dict.fromkeys(SWITCHES, "0")
    token = {"HF_TOKEN": "hf_token_of_ann", "HF_HUB_DISABLE_XET": "1"}
    command = ("deploy", "publish", finished, "--repo", "ann/tiny", "--license", "mit", "--private", "--json")
    with hub_at_work() as hub:
        done = llmtune(*command, cwd=finished.parent, HF_ENDPOINT=hub.url, **token, **switches)
    assert done.returncode == 0, done.stderr
    assert hub.repos == {"ann/tiny": True}
    assert hub.tokens == {"Bearer hf_token_of_ann"} | (hub.tokens & {""})  # files go to a storage that needs none
    assert set(hub.files) == set(json.loads(done.stdout)["files"])
    assert hub.files["adapter_model.safetensors"] == (finished / "adapter/adapter_model.safetensors").read_bytes()
    assert b"ann/tiny" in hub.files["README.md"]
    assert b"hf_token_of_ann" not in b"".join(hub.files.values())


def test_a_token_refused_by_the_hub_is_reported(finished, console, monkeypatch):
    for name in SWITCHES:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_TOKEN", "hf_token_of_ann")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with hub_at_work(refuses=403) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        with pytest.raises(EnvironmentProblem, match="may not write to ann/tiny") as raised:
            publish_run(finished, PublishOptions(repo="ann/tiny"), console)
    assert raised.value.exit_code == 4
    assert hub.asked


@pytest.mark.slow
def test_cards_of_a_quantised_base_and_of_a_classifier_load_too(tmp_path, base, console):
    run = finish_run(tmp_path / "q", base, adapter={"method": "qlora"}, train=BRIEF)
    publish(run, tmp_path / "hub-q", console)
    assert "load_in_4bit=True" in run_snippet(tmp_path / "hub-q", base)[0]
    bert = build_bert(tmp_path / "bert")
    _, run = classifying.run(classifying.recipe_for(tmp_path / "c.yaml", bert, classifying.colour_rows()))
    publish(run, tmp_path / "hub-c", console)
    assert ModelCard.load(tmp_path / "hub-c/README.md").data.pipeline_tag == "text-classification"
    assert "green" in run_snippet(tmp_path / "hub-c", bert)[1]
