"""`launch kubernetes`: a TrainJob of Kubeflow Trainer, sent and followed by Kubeflow's own SDK."""

from __future__ import annotations

import shlex
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from ruamel.yaml import YAML

from llmtune.errors import EnvironmentProblem, RecipeError
from llmtune.launch.job import Job, fail_as, read_log, require_package, with_report
from llmtune.records import Json

INSTALL = 'pip install "llmtune-cli[kubernetes]"'
GROUP, VERSION = "trainer.kubeflow.org", "v1alpha1"
HOME = "/llmtune"
"""The working folder of the container, and where the volume is mounted."""
SAVE_SECONDS = 120
FOREVER = 10**8
"""Seconds of waiting for the cluster: the SDK wants a number."""
HEREDOC = "LLMTUNE-RECIPE"


def train_job(
    job: Job,
    resources: Mapping[str, str | None],
    *,
    image: str,
    runtime: str,
    storage: str | None,
    secrets: Sequence[str],
    secret_object: str,
) -> Json:
    """Return the TrainJob; each secret is a key of the Secret `secret_object`, `storage` a PersistentVolumeClaim.

    Raises RecipeError where the recipe cannot be sent, or several machines share no storage.
    """
    if job.topology.machines > 1 and not storage:
        what = f"{job.topology.machines} machines need a folder that all of them see"
        raise RecipeError.of(what, "--machines", "Name a claim that many may write (ReadWriteMany): --storage CLAIM.")
    recipe = job.shipped or job.loaded.file.name
    folder = f"runs/{job.folder.name}"
    command = job.command("llmtune", recipe, folder, "$PET_NODE_RANK", "$PET_MASTER_ADDR:$PET_MASTER_PORT")
    script = f"mkdir -p {HOME} && cd {HOME}\n{_write_recipe(job)}{with_report(command, folder, '${PET_NODE_RANK:-0}')}"
    limits = {name: value for name, value in resources.items() if value}
    trainer: Json = {"image": image, "numNodes": job.topology.machines, "numProcPerNode": job.topology.processes}
    trainer |= {"command": ["bash", "-c"], "args": [script]}
    if limits:
        trainer["resourcesPerNode"] = {"limits": limits, "requests": dict(limits)}
    if secrets:
        trainer["env"] = [
            {"name": name, "valueFrom": {"secretKeyRef": {"name": secret_object, "key": name}}} for name in secrets
        ]
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "TrainJob",
        "metadata": {"name": f"{job.slug}-{uuid.uuid4().hex[:5]}"},
        "spec": {
            "runtimeRef": {"name": runtime},
            "trainer": trainer,
            "runtimePatches": [{"manager": f"{GROUP}/kubeflow-sdk", "trainingRuntimeSpec": _patch(storage)}],
        },
    }


def _write_recipe(job: Job) -> str:
    """Return the lines of a script that write the recipe into the container."""
    if job.shipped:
        return ""
    text = job.loaded.file.read_text(encoding="utf-8")
    if "extends" in YAML(typ="safe").load(text):
        what = "extends another recipe, which would not be in the container"
        raise RecipeError.of(what, str(job.loaded.file), "Write both into one file.")
    return f"cat > {shlex.quote(job.loaded.file.name)} <<'{HEREDOC}'\n{text.rstrip()}\n{HEREDOC}\n"


def _patch(storage: str | None) -> Json:
    pod: Json = {"terminationGracePeriodSeconds": SAVE_SECONDS}
    if storage:
        pod["volumes"] = [{"name": "llmtune", "persistentVolumeClaim": {"claimName": storage}}]
        pod["containers"] = [{"name": "node", "volumeMounts": [{"name": "llmtune", "mountPath": HOME}]}]
    jobs = [{"name": "node", "template": {"spec": {"template": {"spec": pod}}}}]
    return {"template": {"spec": {"replicatedJobs": jobs}}}


def submit(manifest: Json, namespace: str | None, console: Console) -> Json:
    """Create the TrainJob. Raises EnvironmentProblem where the SDK or a cluster is missing, or the cluster refuses."""
    require_package("kubeflow", INSTALL)
    from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

    whole = TrainerV1alpha1TrainJob.from_dict(manifest)
    assert whole is not None
    assert whole.to_dict() == manifest, "each of its keys is one of the published schema"
    with _explained():
        backend = _client(namespace).backend
        backend.custom_api.create_namespaced_custom_object(GROUP, VERSION, backend.namespace, "trainjobs", manifest)
        name = manifest["metadata"]["name"]
    console.print(f"Job {name} is submitted. Cancel it: {cancel(name, backend.namespace)}", highlight=False)
    return {"job": name, "namespace": backend.namespace}


def cancel(name: str, namespace: str) -> str:
    """Return the command that cancels the job."""
    return f"kubectl delete trainjob {name} --namespace {namespace}"


def follow(job: Job, sent: Json, console: Console) -> None:
    """Show the log of the first machine until the job has ended; unpack the report into the run folder here.

    Raises LlmtuneError, with the exit code of the job, where it failed.
    """
    name, code, status = sent["job"], None, ""
    seen: list[str] = []
    with _explained():
        client = _client(sent["namespace"])
        while status not in ("Complete", "Failed"):
            status = client.wait_for_job_status(name, {"Running", "Complete", "Failed"}, timeout=FOREVER).status
            log = _new_lines(client.get_job_logs(name, follow=True), seen)
            code = read_log(log, job.folder, console) or code
    if status == "Failed":
        raise fail_as(
            code or 4, f"job {name} failed, exit code {code}", f"Look at it: kubectl describe trainjob {name}"
        )


def _new_lines(log: Iterable[str], seen: list[str]) -> Iterator[str]:
    """Yield the lines of a log without those that it began with before: `seen`, which grows by what is new."""
    for number, line in enumerate(log):
        if seen[number : number + 1] != [line]:
            seen[number:] = [line]
            yield line


def _client(namespace: str | None) -> Any:
    from kubeflow.common.types import KubernetesBackendConfig
    from kubeflow.trainer import TrainerClient

    return TrainerClient(KubernetesBackendConfig(namespace=namespace))


@contextmanager
def _explained() -> Iterator[None]:
    from kubernetes.client.exceptions import ApiException
    from kubernetes.config.config_exception import ConfigException
    from urllib3.exceptions import HTTPError

    fix = "kubectl cluster-info tells whether this machine reaches the cluster; --dry-run prints what is sent."
    try:
        yield
    except (ApiException, ConfigException, HTTPError) as error:
        raise EnvironmentProblem.of(str(error).strip(), "kubernetes", fix) from error
    except (RuntimeError, TimeoutError) as error:  # what the SDK makes of them
        raise EnvironmentProblem.of(f"{error}: {error.__cause__}", "kubernetes", fix) from error
