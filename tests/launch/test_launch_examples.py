"""SkyPilot and Kubeflow accept the files in examples/launch/."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from llmtune import __version__

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "launch"
SKY = shutil.which("sky")
VALIDATE = """
import sys, jsonschema, sky, yaml
from sky.utils import schemas
config = yaml.safe_load(sys.stdin)
for value, schema in ((config, schemas.get_task_schema()), (config["resources"], schemas.get_resources_schema())):
    jsonschema.Draft202012Validator(schema).validate(value)
config["resources"]["cpus"] = config["resources"].pop("accelerators").split(":")[1]  # cards are in a catalogue online
task = sky.Task.from_yaml_config(config, secrets_overrides=[("HF_TOKEN", "value")])
task.validate()
print(task.num_nodes, *task.secrets, *task.storage_mounts, *(one.use_spot for one in task.resources))
"""


def read(name: str) -> dict:
    return YAML(typ="safe").load((EXAMPLES / name).read_text())


@pytest.mark.skipif(SKY is None, reason="no command sky: pip install skypilot, in an environment of its own")
def test_skypilot_reads_the_task(tmp_path):
    python = Path(str(SKY)).read_text().splitlines()[0].removeprefix("#!")
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    task = (EXAMPLES / "skypilot.yaml").read_text().replace("YOUR-BUCKET", "bucket")
    done = subprocess.run([python, "-c", VALIDATE], input=task, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "1 HF_TOKEN /llmtune-runs True"


def test_the_task_runs_torchrun_on_the_recipe_in_its_folder(tmp_path):
    script = read("skypilot.yaml")["run"]
    (tmp_path / "torchrun").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "torchrun").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == shlex.split(
        "--standalone --nproc-per-node 8 -m llmtune run recipe.yaml --out /llmtune-runs/recipe"
    )


@pytest.mark.filterwarnings("ignore:Support for class-based:DeprecationWarning")  # Kubeflow's
@pytest.mark.needs("kubeflow_trainer_api")
def test_the_train_job_matches_the_published_kubeflow_schema():
    from kubeflow_trainer_api.models import IoK8sApiCoreV1PodSpec, TrainerV1alpha1TrainJob

    job = read("trainjob.yaml")
    assert TrainerV1alpha1TrainJob.from_dict(job).to_dict() == job
    (patch,) = job["spec"]["runtimePatches"]
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    assert IoK8sApiCoreV1PodSpec.from_dict(pod).to_dict() == pod
    mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
    recipe, out = job["spec"]["trainer"]["args"][1], job["spec"]["trainer"]["args"][3]
    assert (str(Path(recipe).parent), str(Path(out).parent)) == (mounts["recipe"], mounts["llmtune"])


def test_the_examples_run_this_version():
    image = read("trainjob.yaml")["spec"]["trainer"]["image"]
    assert image == f"REGISTRY/llmtune:{__version__}"
    assert f"docker build --tag {image} --build-arg TORCH=cu128 .\n" in (EXAMPLES / "README.md").read_text()
    assert read("skypilot.yaml")["setup"].endswith(f"@v{__version__}'")
