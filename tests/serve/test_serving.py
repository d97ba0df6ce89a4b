import json
import os
import shutil
import socket
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.adapting import quiet
from support.models import build_llama
from support.runs import finish_run
from support.serving import load_served, serving
from typer.testing import CliRunner, Result

from llmtune.cli.app import app
from llmtune.errors import RecipeError
from llmtune.plan import open_finished
from llmtune.serve.finished_run import FinishedRun
from llmtune.serve.server import ServeOptions, open_served, read_key
from llmtune.serve.vllm_engine import check_shared_base, vllm_command
from llmtune.store.atomic_files import hash_folder, write_json
from llmtune.store.run_folder import CERTIFICATE

KEY = "correct-horse-battery"
BRIEF = {"num_train_epochs": None, "max_steps": 1}


def serve(*arguments: object, **environment: str) -> Result:
    env = {"COLUMNS": "200", "LLMTUNE_API_KEY": None, **environment}
    return CliRunner().invoke(app, ["deploy", "serve", *map(str, arguments)], env=env)


def test_a_run_and_its_base_are_served_by_name_and_answer_like_generate(runs: dict[str, Path]) -> None:
    models = load_served(plain=runs["plain"])
    assert list(models) == ["plain", "tiny-llama"]
    question = "What comes after 3 and before 5?"
    answers = {}
    with serving(*models.values()) as url:
        for name in models:
            body = {"model": name, "messages": [{"role": "user", "content": question}], "max_tokens": 8}
            answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30).json()
            answers[name] = answer["choices"][0]["message"]["content"]
    run = FinishedRun(runs["plain"])
    for name, base in (("plain", False), ("tiny-llama", True)):
        assert run.answer({"prompt": question}, base=base, max_new_tokens=8)["text"] == answers[name]
    assert answers["plain"] != answers["tiny-llama"]


def test_merged_weights_answer_like_the_adapter(runs: dict[str, Path]) -> None:
    models = load_served(ServeOptions(merged=True), one=runs["plain"])
    assert list(models) == ["one"]
    assert not any("lora" in name for name, _ in models["one"].model.named_parameters())
    question = {"role": "user", "content": "What comes after 3?"}
    wanted = FinishedRun(runs["plain"]).answer({"prompt": question["content"]})["text"]
    with serving(*models.values()) as url:
        answer = httpx.post(f"{url}/v1/chat/completions", json={"messages": [question]}).json()
    assert answer["choices"][0]["message"]["content"] == wanted


def test_a_fully_trained_run_is_served_without_its_base(tmp_path: Path, tiny_llama: Path) -> None:
    full = finish_run(tmp_path, tiny_llama, adapter={"method": "full", "r": None, "lora_alpha": None}, train=BRIEF)
    assert list(load_served(full=full)) == ["full"]
    refused = serve(full, "--merged", "--port", 0)
    assert (refused.exit_code, "has no adapter" in refused.output) == (2, True)


def test_runs_that_cannot_share_a_base_are_refused_by_name(
    tmp_path: Path, tiny_llama: Path, runs: dict[str, Path]
) -> None:
    ia3 = finish_run(tmp_path, tiny_llama, adapter={"method": "ia3", "r": None, "lora_alpha": None}, train=BRIEF)
    another = finish_run(tmp_path / "runs", build_llama(tmp_path / "another", seed=4), train=BRIEF)
    assert list(load_served(ia3=ia3)) == ["ia3", tiny_llama.name]
    plain, *others = (open_finished(path, quiet(), offline=True) for path in (runs["plain"], ia3, another))
    for other, words in zip(others, ("its method is ia3, but that of a is lora", "its base is .*another"), strict=True):
        with pytest.raises(RecipeError, match=words):
            check_shared_base({"a": plain, "b": other}, ServeOptions())
    with pytest.raises(RecipeError, match="served alone"):
        check_shared_base({"a": plain, "b": plain}, ServeOptions(merged=True))


@pytest.mark.parametrize(
    ("arguments", "about"),
    [
        ([], "nothing to serve"),
        (["--adapter", "RUN"], "is not NAME=RUN"),
        (["--engine", "vllm", "RUN", "RUN"], "two runs are called"),
        (["--engine", "vlm", "RUN"], "Did you mean 'vllm'"),
        (["--engine", "vllm", "--max-queue", "3", "RUN"], "--max-queue: has no effect"),
        *[(["--host", host, "RUN"], "without an API key") for host in ("0.0.0.0", "::", "no such host")],
        (["RUN/adapter"], "run"),
    ],
)
def test_invalid_serve_options_are_refused_with_a_fix(runs: dict[str, Path], arguments: list[str], about: str) -> None:
    done = serve(*(word.replace("RUN", str(runs["plain"])) for word in arguments), "--port", 0)
    assert done.exit_code == 2, done.output
    assert about in done.output


def test_a_key_is_read_from_a_file_or_the_environment_and_a_weak_one_refused(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    assert read_key(ServeOptions(host="0.0.0.0", key_file=file)) == KEY
    monkeypatch.setenv("LLMTUNE_API_KEY", KEY)
    assert read_key(ServeOptions(host="0.0.0.0")) == KEY
    for weak in ("", "short", "with spaces in between them", "ключ-которого-нет-в-ascii"):
        file.write_text(weak)
        done = serve(runs["plain"], "--api-key-file", file, "--port", 0)
        assert done.exit_code == 2
        assert "at least 16" in done.output
        assert not weak or weak not in done.output
    assert serve(runs["plain"], "--api-key-file", tmp_path / "none").exit_code == 2


def test_a_taken_port_is_an_error_before_anything_is_loaded(runs: dict[str, Path]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = serve(runs["plain"], "--port", taken.getsockname()[1])
    assert done.exit_code == 4
    assert "cannot listen" in done.output


def test_without_vllm_the_error_says_how_to_install_it(runs: dict[str, Path]) -> None:
    done = serve(runs["plain"], "--engine", "vllm", PATH="/nowhere")
    assert done.exit_code == 4
    assert "pip install vllm" in done.output


@pytest.mark.parametrize(
    ("section", "change", "reason"),
    [("adapter", {"method": "qlora"}, "quantised to 4 bits"), ("generation", {"num_beams": 2}, "with beams")],
)
def test_vllm_is_not_asked_for_what_it_cannot_do(
    runs: dict[str, Path], section: str, change: dict[str, Any], reason: str
) -> None:
    context = open_served(runs["plain"], ServeOptions(), quiet())
    recipe = context.plan.recipe
    changed = recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=change)})
    context.resolved = replace(context.plan, recipe=changed)
    with pytest.raises(RecipeError, match=reason):
        vllm_command({"plain": context}, ServeOptions())


def test_vllm_gets_only_the_merged_weights_of_this_training(runs: dict[str, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs["plain"], tmp_path / "run"))
    options = ServeOptions(merged=True)
    context = open_served(run, options, quiet())
    merged = run / "merged"
    merged.mkdir()
    (merged / "config.json").touch()
    write_json(merged / CERTIFICATE, {"trained_sha256": "that of an earlier training"})
    with pytest.raises(RecipeError, match=r"no merged model of this training found(?s:.*)llmtune deploy merge"):
        vllm_command({"plain": context}, options)
    write_json(merged / CERTIFICATE, {"trained_sha256": hash_folder(run / "adapter")})
    assert vllm_command({"plain": context}, options)[2] == str(merged)


@pytest.mark.slow
def test_vllm_gets_the_base_and_the_adapters_and_the_key_by_its_environment(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    """A fake program `vllm` prints its arguments."""
    program = tmp_path / "vllm"
    told = "import json, os, sys; print(json.dumps([sys.argv[1:], os.environ.get('VLLM_API_KEY')]))"
    program.write_text(f"#!{sys.executable}\n{told}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    command = [sys.executable, "-m", "llmtune", "deploy", "serve", "--engine", "vllm", "--port", "9000"]
    command += ["--adapter", f"one={runs['plain']}", "--adapter", f"two={runs['other']}"]
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "LLMTUNE_API_KEY": KEY}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=True)
    words, key = json.loads(done.stdout)
    assert key == KEY
    assert KEY not in done.stderr

    def after(option: str) -> Any:
        return words[words.index(option) + 1]

    assert words[0] == "serve"
    assert (Path(words[1]) / "config.json").is_file()
    assert after("--served-model-name") == "tiny-llama"
    at = words.index("--lora-modules")
    assert words[at + 1 : at + 3] == [f"one={runs['plain'] / 'adapter'}", f"two={runs['other'] / 'adapter'}"]
    assert (after("--max-lora-rank"), after("--max-loras"), after("--dtype")) == ("8", "2", "float32")
    assert (after("--host"), after("--port")) == ("127.0.0.1", "9000")
    assert json.loads(after("--override-generation-config")) == {"max_new_tokens": 24, "temperature": 0.0}
    assert Path(after("--chat-template")).is_file()
    assert Path(after("--tokenizer")) == runs["plain"] / "adapter"
