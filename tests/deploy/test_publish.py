from __future__ import annotations

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
from support.finished import finish_run
from support.hub import hub_at_work
from support.models import build_llama
from support.runs import llmtune

from llmtune.deploy.products import merge_run
from llmtune.deploy.publish import Wishes, publish_run
from llmtune.errors import EnvironmentProblem, GateFailed, RecipeError
from llmtune.model.library_logging import hushed


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_llama(tmp_path_factory.mktemp("publish") / "tiny-llama")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, base):
    run = finish_run(tmp_path_factory.mktemp("publish"), base, evaluate={"gates": ["loss < base"]}, deploy=["merged"])
    assert (run / "merged").is_dir()
    return run


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def publish(run, to, console, **wishes):
    return publish_run(run, Wishes(to=to, **wishes), console)


def code_of(folder):
    (snippet,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    return snippet


def run_snippet(folder, base=None):
    """Run the code of a card as a reader would who has both on his disk."""
    code = code_of(folder)
    stated = re.search(r'^(base, )?tuned = "([^"]+)"(?:, "([^"]+)")?', code, flags=re.MULTILINE)
    names = f'base, tuned = "{base}", "{folder}"' if stated[1] else f'tuned = "{folder}"'
    assert "llmtune" not in code
    with contextlib.redirect_stdout(io.StringIO()) as said, hushed():
        exec(code.replace(stated[0], names), {})
    return said.getvalue()


def test_a_published_adapter_is_a_folder_that_the_hubs_library_reads_and_its_card_loads(run, base, tmp_path, console):
    told = publish(run, tmp_path / "hub", console, base_model="example/tiny-llama", license="mit", languages=("en",))
    folder = tmp_path / "hub"
    names = {path.name for path in folder.iterdir()}
    wanted = {"README.md", "certificate.json", "llmtune.lock", "recipe.yaml", "adapter_model.safetensors"}
    assert {*wanted, "adapter_config.json", "tokenizer.json", "chat_template.jinja"} <= names == set(told["files"])
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
    assert "byte for byte" in text
    assert "mean KL" in text
    assert "| seed | `7` |" in text
    run_snippet(folder, base)


def test_a_published_merge_loads_without_its_base_and_says_its_parity(run, tmp_path, console):
    publish(run, tmp_path / "hub", console, merged=True)
    data = ModelCard.load(tmp_path / "hub/README.md").data
    assert data.library_name == "transformers"
    assert not (tmp_path / "hub/adapter_config.json").exists()
    measured = json.loads((tmp_path / "hub/certificate.json").read_text())["measured"]
    text = (tmp_path / "hub/README.md").read_text()
    assert f"mean KL {measured['kl_mean']:.2g} nats" in text
    assert "Scores are those of the adapter" in text
    run_snippet(tmp_path / "hub")
    assert "--base-model" in console.file.getvalue()
    assert "--data-license" in console.file.getvalue()


@pytest.mark.parametrize("merged", [False, True])
def test_nothing_that_is_published_names_a_place_a_person_or_a_secret(tmp_path, base, console, merged, monkeypatch):
    secret = "hf_" + "a1B2" * 8
    run = finish_run(tmp_path / "home" / "ann", base, name=f"tuned-{secret}", train={"report_to": []})
    if merged:
        merge_run(run, out=None, onto=None, dtype="auto", offline=True, console=console)
    publish(run, tmp_path / "hub", console, merged=merged)
    for path in (tmp_path / "hub").iterdir():
        content = path.read_bytes().decode("utf-8", "replace")
        for private in (str(tmp_path), str(base), "/home/", "ann/", secret, str(Path.home())):
            assert private not in content, path.name
        if path.suffix in {".json", ".md", ".lock"} and getpass.getuser() not in {"user", "root"}:
            assert getpass.getuser() not in content, path.name
    assert not re.search(r'"/[a-z]', (tmp_path / "hub/llmtune.lock").read_text())


def test_a_template_that_names_a_place_is_refused(run, tmp_path, console):
    lock = json.loads((run / "llmtune.lock").read_text())
    (run / "adapter/chat_template.jinja").write_text(f"{{# of {lock['model']['folder']} #}}")
    forget_hash(run)
    with pytest.raises(EnvironmentProblem, match="names a place on this machine"):
        publish(run, tmp_path / "hub", console)
    assert not (tmp_path / "hub").exists()


def forget_hash(run):
    """Have the run believe that it evaluated what it holds now."""
    from llmtune.store.atomic_files import hash_folder

    manifest = json.loads((run / "run.json").read_text())
    manifest["steps"]["evaluate"]["facts"]["trained"] = hash_folder(run / "adapter")
    (run / "run.json").write_text(json.dumps(manifest))


def change_report(run, **changes):
    report = json.loads((run / "report.json").read_text())
    (run / "report.json").write_text(json.dumps(report | changes))


def test_a_failed_gate_stops_it_unless_that_is_wanted_and_then_the_card_shows_it(run, tmp_path, console):
    change_report(run, gates=[{"name": "accuracy >= 1", "wanted": "accuracy >= 1", "got": "0.3", "passed": False}])
    with pytest.raises(GateFailed, match="gate failed") as raised:
        publish(run, tmp_path / "hub", console)
    assert raised.value.exit_code == 6
    assert not (tmp_path / "hub").exists()
    publish(run, tmp_path / "hub", console, despite_gates=True)
    assert "| `accuracy >= 1` | accuracy \\>= 1 | 0.3 | ❌ failed |" in (tmp_path / "hub/README.md").read_text()


def test_weights_that_are_not_those_evaluated_are_refused(run, tmp_path, console):
    weights = run / "adapter/adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(GateFailed, match="not what was evaluated"):
        publish(run, tmp_path / "hub", console)


def test_a_merge_that_changed_or_failed_or_is_missing_is_refused(run, tmp_path, console):
    certificate = json.loads((run / "merged/certificate.json").read_text())
    (name,) = certificate["files_sha256"]
    with (run / "merged" / name).open("ab") as file:
        file.write(b"x")
    with pytest.raises(GateFailed, match="changed since it was certified"):
        publish(run, tmp_path / "hub", console, merged=True)
    (run / "merged/certificate.json").write_text(json.dumps(certificate | {"trained_sha256": "0"}))
    with pytest.raises(GateFailed, match="made of other weights"):
        publish(run, tmp_path / "hub", console, merged=True)
    shutil.rmtree(run / "merged")
    with pytest.raises(RecipeError, match="no merged model"):
        publish(run, tmp_path / "hub", console, merged=True)
    (run / "merged.failed.json").write_text(json.dumps({"breaches": ["mean KL is 3"]}))
    with pytest.raises(GateFailed, match="mean KL is 3"):
        publish(run, tmp_path / "hub", console, merged=True)


def test_an_older_publication_is_replaced_and_a_folder_with_something_else_is_left_alone(run, tmp_path, console):
    publish(run, tmp_path / "hub", console)
    (tmp_path / "hub/stale.txt").write_text("old")
    publish(run, tmp_path / "hub", console)
    assert not (tmp_path / "hub/stale.txt").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("do not lose me")
    with pytest.raises(RecipeError, match="holds something else"):
        publish(run, tmp_path / "mine", console)
    assert (tmp_path / "mine/thesis.txt").read_text() == "do not lose me"


def test_a_dry_run_lists_the_files_and_writes_none(run, tmp_path, console):
    told = publish(run, tmp_path / "hub", console, dry_run=True)
    assert "README.md" in told["files"]
    assert "README.md" in console.file.getvalue()
    assert not (tmp_path / "hub").exists()


@pytest.mark.parametrize(
    ("wishes", "said"),
    [
        ({}, "one of --to FOLDER and --repo"),
        ({"to": Path("x"), "repo": "a/b"}, "one of --to FOLDER and --repo"),
        ({"repo": "no-owner"}, "does not say whose it is"),
        ({"repo": "a/b/c"}, "no name on the hub"),
        ({"to": Path("x"), "private": True}, "a folder has no --private"),
        ({"to": Path("x"), "license": "Apache 2"}, "none of the hub's licences"),
        ({"to": Path("x"), "gguf": Path("none.gguf")}, "no such file"),
        ({"to": Path("x"), "base_model": "a//b"}, "no name on the hub"),
    ],
)
def test_options_that_do_not_go_together_are_told(run, console, wishes, said):
    with pytest.raises(RecipeError, match=said):
        publish_run(run, Wishes(**wishes), console)


def test_a_run_without_an_evaluation_is_not_published(run, tmp_path, console):
    change_report(run, evaluation=None)
    with pytest.raises(RecipeError, match="was not evaluated"):
        publish(run, tmp_path / "hub", console)


def test_a_gguf_file_goes_along_with_its_certificate_alone(run, tmp_path, console):
    from llmtune.store.atomic_files import hash_file, hash_folder

    file = tmp_path / "gguf/tiny-F16.gguf"
    file.parent.mkdir()
    file.write_bytes(b"GGUF and so on")
    with pytest.raises(GateFailed, match="without a certificate"):
        publish(run, tmp_path / "hub", console, gguf=file)
    report = json.loads((run / "report.json").read_text())
    numbers = {"positions": 9, "kl_mean": 1e-6, "largest_logit_difference": 0.01, "top1_agreement": 1.0}
    numbers |= {"answer_agreement": 1.0, "same_ids": True}
    certificate = {"passed": True, "file_sha256": hash_file(file), "base_sha256": report["model"]["sha256"]}
    certificate |= {"number_format": "f16", "reader": "transformers", "measured": numbers}
    (file.parent / "certificate.json").write_text(json.dumps(certificate))
    with pytest.raises(GateFailed, match="another training"):
        publish(run, tmp_path / "hub", console, gguf=file)
    certificate["trained_sha256"] = hash_folder(run / "adapter")
    (file.parent / "certificate.json").write_text(json.dumps(certificate))
    publish(run, tmp_path / "hub", console, gguf=file)
    card = ModelCard.load(tmp_path / "hub/README.md")
    assert "gguf" in card.data.tags
    assert "GGUF (f16, read by transformers)" in card.text
    assert (tmp_path / "hub/tiny-F16.gguf").read_bytes() == b"GGUF and so on"
    file.write_bytes(b"another")
    with pytest.raises(GateFailed, match="changed since it was certified"):
        publish(run, tmp_path / "hub", console, gguf=file)


def test_an_upload_without_network_or_token_is_refused_before_anything_is_done(run, console, monkeypatch, tmp_path):
    with pytest.raises(EnvironmentProblem, match="--offline forbids"):
        publish_run(run, Wishes(repo="ann/tiny", offline=True), console)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(EnvironmentProblem, match="no token") as raised:
        publish_run(run, Wishes(repo="ann/tiny"), console)
    assert "hf auth login" in str(raised.value)


def publish_by_command(run, hub, *options):
    switches = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"), "0")
    return llmtune(
        *("deploy", "publish", run, "--repo", "ann/tiny", "--license", "mit", *options),
        cwd=run.parent,
        HF_ENDPOINT=hub.url,
        HF_TOKEN="hf_token_of_ann",
        HF_HUB_DISABLE_XET="1",
        **switches,
    )


def test_an_upload_arrives_whole_at_a_hub(run):
    with hub_at_work() as hub:
        done = publish_by_command(run, hub, "--private", "--json")
    assert done.returncode == 0, done.stderr
    assert hub.repos == {"ann/tiny": True}
    assert hub.tokens == {"Bearer hf_token_of_ann"} | (hub.tokens & {""})  # files go to a storage that needs none
    assert set(hub.files) == set(json.loads(done.stdout)["files"])
    assert hub.files["adapter_model.safetensors"] == (run / "adapter/adapter_model.safetensors").read_bytes()
    assert b"ann/tiny" in hub.files["README.md"]
    assert b"hf_token_of_ann" not in b"".join(hub.files.values())


def test_a_hub_that_refuses_the_token_is_told_without_a_traceback(run):
    with hub_at_work(refuses=403) as hub:
        done = publish_by_command(run, hub)
    assert done.returncode == 4
    assert "Traceback" not in done.stderr
    assert "may not write to ann/tiny" in done.stderr


def test_cards_of_a_quantised_base_and_of_a_classifier_load_too(tmp_path, base, console):
    run = finish_run(tmp_path / "q", base, adapter={"method": "qlora"})
    publish(run, tmp_path / "hub-q", console)
    assert "load_in_4bit=True" in code_of(tmp_path / "hub-q")
    run_snippet(tmp_path / "hub-q", base)
    bert = build_bert(tmp_path / "bert")
    _, run = classifying.run(classifying.recipe_for(tmp_path / "c.yaml", bert, classifying.colour_rows()))
    publish(run, tmp_path / "hub-c", console)
    data = ModelCard.load(tmp_path / "hub-c/README.md").data
    assert data.pipeline_tag == "text-classification"
    assert "green" in run_snippet(tmp_path / "hub-c", bert)
