import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from ruamel.yaml import YAML
from support.kubernetes_api import kubernetes_api
from support.runs import invoke, llmtune, write_recipe

from llmtune.launch.job import read_log
from llmtune.store.run_folder import REPORTS

SKY = shutil.which("sky")
VALIDATE = """
import sys, sky, yaml
config = yaml.safe_load(sys.stdin)
names = [(name, "value") for name in config.get("secrets", ())]
task = sky.Task.from_yaml_config(config, secrets_overrides=names)
task.validate()
print(task.num_nodes, *task.secrets, *task.storage_mounts, *(one.use_spot for one in task.resources))
"""


@pytest.fixture
def recipe(here: Path, tiny_llama: Path, chat_rows: Path) -> Path:
    shutil.copy(chat_rows, here / "rows.jsonl")
    shutil.copytree(tiny_llama, here / "model")
    return write_recipe(here / "tiny.yaml", "model", "rows.jsonl", train={"num_train_epochs": 1})


def dry_run(*words: object) -> dict:
    result = invoke("launch", *words, "--dry-run")
    assert result.exit_code == 0, result.stderr
    return YAML(typ="safe").load(result.stdout)


def test_a_sky_task_takes_the_folder_along_and_keeps_the_run_on_the_storage(recipe, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret-value")
    words = ["--secret", "HF_TOKEN", "--storage", "s3://runs", "--use-spot", "--processes", 8]
    task = dry_run("sky", "tiny.yaml", "--gpus", "H100:8", *words)
    spaced = dry_run("sky", "tiny.yaml", "--out", "my run")
    assert spaced["name"] == "my-run"
    assert "-C 'runs/my run' report" in spaced["run"]
    assert task["workdir"] == "."
    assert task["resources"] == {"accelerators": "H100:8", "use_spot": True}
    assert task["secrets"] == {"HF_TOKEN": None}
    (mounted,) = task["file_mounts"]
    assert f"llmtune launch local tiny.yaml --out {mounted}/tiny-" in task["run"]
    assert "secret-value" not in json.dumps(task)


@pytest.mark.skipif(SKY is None, reason="no command sky: pip install skypilot, in an environment of its own")
def test_a_sky_task_is_what_skypilot_reads(recipe, tmp_path):
    words = ["--secret", "HF_TOKEN", "--storage", "s3://runs", "--use-spot", "--cpus", "8+"]
    task = invoke("launch", "sky", "tiny.yaml", *words, "--dry-run").stdout
    python = Path(str(SKY)).read_text().splitlines()[0].removeprefix("#!")
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    done = subprocess.run([python, "-c", VALIDATE], input=task, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "1 HF_TOKEN /llmtune-runs True"


@pytest.mark.slow
@pytest.mark.parametrize("gate", ["loss >= 0", "exact_match >= 0.9"])
def test_the_script_of_a_sky_job_runs_and_its_log_brings_report_and_exit_code(recipe, here, gate):
    script = dry_run("sky", "tiny.yaml", "--set", f"evaluate.gates=[{gate}]")["run"]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], env=environment, stdout=-1, stderr=-2, text=True)
    shown = io.StringIO()
    log = [f"(tiny-1234, pid=77) {line}" for line in done.stdout.splitlines(keepends=True)]
    code = read_log(log, here / "brought", Console(file=shown))
    assert code == done.returncode == (6 if "exact" in gate else 0), done.stdout
    assert {path.name for path in (here / "brought").iterdir()} == set(REPORTS)
    (report,) = here.glob("runs/*/report.json")
    assert (here / "brought" / "report.json").read_bytes() == report.read_bytes()
    assert "BEGIN" not in shown.getvalue()
    assert len(shown.getvalue().splitlines()) < 100


def test_a_damaged_or_missing_report_in_a_log_leaves_nothing_behind(here):
    for packed in ("", "AAAA", "not base64!"):
        lines = ["llmtune ended with exit code 3", "-----BEGIN LLMTUNE REPORT-----", packed]
        lines.append("-----END LLMTUNE REPORT-----")
        assert read_log(lines, here / "brought", Console(file=io.StringIO())) == 3
        assert not (here / "brought").exists()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["sky", "tiny.yaml", "--secret", "NO_SUCH"], 2, "NO_SUCH is not set"),
        (["sky", "tiny.yaml", "--secret", "TOKEN=abc"], 2, "Give its name alone"),
        (["sky", "tiny.yaml", "--secret", "A B", "--dry-run"], 2, "no name of a variable"),
        (["sky", "tiny.yaml", "--set", "model.name=OUTSIDE", "--dry-run"], 2, "outside this folder"),
        (["sky", "tiny.yaml", "--lock", "none.lock", "--dry-run"], 2, "no such lock file"),
        (["slurm", "tiny.yaml", "--out", "OUTSIDE", "--dry-run"], 2, "not empty and not a run"),
        (["slurm", "tiny.yaml", "--sbatch", "--comment=a\nb", "--dry-run"], 2, "line break"),
        (["sky", "tiny.yaml", "--machines", "2", "--dry-run"], 2, "one machine with more GPUs"),
        (["kubernetes", "tiny.yaml", "--image", "x", "--machines", "2"], 2, "ReadWriteMany"),
        (["kubernetes", "tiny.yaml", "--image", "x", "--strategy", "deepspeed"], 2, "zero2 and zero3"),
        (["sky", "tiny.yaml", "--strategy", "fsdp", "--set", "adapter.method=qlora"], 2, "4 bits"),
        (["sky", "tiny.yaml"], 4, "no command sky"),
        (["sky", "OUTSIDE/tiny.yaml", "--dry-run"], 2, "outside this folder"),
        (["kubernetes", "tiny.yaml"], 2, "--image"),
        (["kubernetes", "tiny.yaml", "--image", "x"], 4, "kubectl cluster-info"),
        (["kubernetes", "longer.yaml", "--image", "x"], 2, "extends another recipe"),
    ],
)
@pytest.mark.filterwarnings("ignore:Support for class-based:DeprecationWarning")  # Kubeflow's
def test_what_cannot_be_sent_is_named(words, code, said, recipe, here, tmp_path_factory, monkeypatch):
    outside = tmp_path_factory.mktemp("elsewhere")
    shutil.copy(recipe, outside)
    shutil.copy(here / "rows.jsonl", outside)
    (here / "longer.yaml").write_text("recipe_version: 1\nextends: tiny.yaml\n")
    monkeypatch.setenv("PATH", str(here))
    monkeypatch.setenv("KUBECONFIG", str(here / "none"))
    result = invoke("launch", *(word.replace("OUTSIDE", str(outside)) for word in words))
    assert result.exit_code == code, result.stderr
    assert said in " ".join(result.stderr.split())
    assert "abc" not in result.stderr


@pytest.mark.filterwarnings("ignore:Support for class-based:DeprecationWarning")
def test_a_train_job_is_what_kubeflow_has_published(recipe):
    from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

    words = ["--secret", "HF_TOKEN", "--storage", "claim", "--gpus", 8, "--machines", 2, "--processes", 8]
    job = dry_run("kubernetes", "tiny.yaml", "--image", "llmtune:1", *words)
    assert TrainerV1alpha1TrainJob.from_dict(job).to_dict() == job
    trainer = job["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (2, 8)
    assert trainer["env"][0]["valueFrom"]["secretKeyRef"] == {"name": "llmtune", "key": "HF_TOKEN"}
    assert trainer["resourcesPerNode"]["limits"] == {"nvidia.com/gpu": "8"}
    assert recipe.read_text().strip() in trainer["args"][0]
    assert subprocess.run(["bash", "-n", "-c", trainer["args"][0]]).returncode == 0


def test_a_recipe_with_a_space_in_its_name_is_one_file_in_the_container(recipe, here):
    (here / "my tiny.yaml").write_text(recipe.read_text())
    script = dry_run("kubernetes", "my tiny.yaml", "--image", "x")["spec"]["trainer"]["args"][0]
    assert "cat > 'my tiny.yaml' <<" in script
    assert "launch local 'my tiny.yaml'" in script


@pytest.mark.slow
@pytest.mark.parametrize(("gate", "code"), [("loss >= 0", 0), ("exact_match >= 0.9", 6)])
def test_a_train_job_is_sent_followed_and_its_report_brought_back(gate, code, tiny_llama, chat_rows, here):
    write_recipe(here / "tiny.yaml", tiny_llama, chat_rows, train={"num_train_epochs": 1}, evaluate={"gates": [gate]})
    with kubernetes_api(here / "volume") as environment:
        words = ["launch", "kubernetes", "tiny.yaml", "--image", "llmtune:1", "--follow", "--json"]
        done = llmtune(*words, cwd=here, **environment)
    assert done.returncode == code, done.stderr
    (report,) = here.glob("runs/*/report.json")
    (made,) = here.glob("volume/runs/*/report.json")
    assert report.read_bytes() == made.read_bytes()
    assert "kubectl delete trainjob tiny-" in done.stderr
    assert done.stderr.count(f"llmtune ended with exit code {code}") == 1
