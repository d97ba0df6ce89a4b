import json

import pytest
from support.models import build_llama
from support.runs import finish_run, invoke

from llmtune.store.atomic_files import read_json


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    return finish_run(folder, build_llama(folder / "model"), deploy=["gguf"])


def deploy(run, *arguments):
    return invoke("deploy", "gguf", run, *arguments)


def test_a_recipe_makes_the_file_at_the_end_of_run(run):
    certificate = read_json(run / "gguf/f16/certificate.json")
    assert certificate["passed"]
    assert (run / "gguf/f16" / certificate["file"]).stat().st_size == certificate["file_bytes"]
    report = read_json(run / "report.json")["deploy"]["exports"]["gguf"]
    assert report["file"] == certificate["file"]
    assert report["measured"] == certificate["measured"]
    assert report["score"] == certificate["score"]


def test_the_command_writes_another_type_into_its_own_folder(run):
    result = deploy(run, "--type", "Q8_0", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["number_format"] == "q8_0"
    assert {path.name for path in (run / "gguf").iterdir()} >= {"f16", "q8_0"}


def test_the_adapter_alone_gets_its_own_folder(run):
    result = deploy(run, "--adapter-only", "--json")
    assert result.exit_code == 0, result.output
    assert (run / "gguf/adapter-f16" / json.loads(result.stdout)["file"]).is_file()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--type", "q9_0"], "'q9_0' is not a number format of a GGUF file. Did you mean 'q8_0'?"),
        (["--onto", "original"], "the base was not quantised in training"),
        (["--adapter-only", "--onto", "original"], "an adapter without its base ignores it"),
    ],
)
def test_inapplicable_gguf_options_exit_with_2(run, arguments, said):
    result = deploy(run, *arguments)
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())
