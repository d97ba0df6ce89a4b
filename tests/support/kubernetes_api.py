"""A stand-in for a cluster with Kubeflow Trainer: the few addresses that its SDK asks, and each job a local process."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support.http_server import answering

GROUP = "/apis/trainer.kubeflow.org/v1alpha1"
SINCE = "2026-01-01T00:00:00Z"
RUNTIME = {
    "apiVersion": "trainer.kubeflow.org/v1alpha1",
    "kind": "ClusterTrainingRuntime",
    "metadata": {"name": "torch-distributed", "labels": {"trainer.kubeflow.org/framework": "torch"}},
    "spec": {
        "mlPolicy": {"numNodes": 1, "torch": {}},
        "template": {
            "spec": {
                "replicatedJobs": [
                    {
                        "name": "node",
                        "template": {
                            "metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}},
                            "spec": {"template": {"spec": {"containers": [{"name": "node", "image": "torch"}]}}},
                        },
                    }
                ]
            }
        },
    },
}


@contextmanager
def kubernetes_api(volume: Path) -> Iterator[dict[str, str]]:
    """Serve; yields the environment in which clients find it. `volume` stands for the volume of the jobs."""
    jobs: dict[str, dict[str, Any]] = {}
    running: dict[str, subprocess.Popen[bytes]] = {}
    volume.mkdir()

    def answer(verb: str, path: str, headers: Any, body: bytes) -> tuple[int, Any, dict[str, str]]:
        path = path.split("?")[0]
        name = path.rstrip("/").split("/")[-1]
        if verb == "POST" and name == "trainjobs":
            job = json.loads(body)
            name = job["metadata"]["name"]
            job["metadata"] |= {"namespace": path.split("/")[-2], "creationTimestamp": SINCE}
            jobs[name], running[name] = job, _start(job, volume)
            return 201, job, {}
        if path.startswith(f"{GROUP}/clustertrainingruntimes/"):
            return 200, RUNTIME, {}
        if name in jobs:
            return 200, jobs[name] | {"status": {"conditions": _conditions(running[name])}}, {}
        if name == "pods":
            return 200, {"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": [*map(_pod, jobs)]}, {}
        if name == "log":
            job = path.split("/")[-2].removesuffix("-node-0-0")
            running[job].wait()
            return 200, (volume / f"{job}.log").read_bytes(), {"Content-Type": "text/plain"}
        return 404, {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 404}, {}

    with answering(answer) as address:
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "clusters": [{"name": "here", "cluster": {"server": address}}],
            "users": [{"name": "me", "user": {}}],
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
        }
        (volume / "config").write_text(json.dumps(config))
        yield {"KUBECONFIG": str(volume / "config")}


def _start(job: dict[str, Any], volume: Path) -> subprocess.Popen[bytes]:
    trainer = job["spec"]["trainer"]
    words = [*trainer["command"], *(word.replace("/llmtune &&", f"{volume} &&") for word in trainer["args"])]
    words[-1] = words[-1].replace("cd /llmtune\n", f"cd {volume}\n")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with (volume / f"{job['metadata']['name']}.log").open("wb") as log:
        return subprocess.Popen(words, stdout=log, stderr=log, env=environment)


def _conditions(process: subprocess.Popen[bytes]) -> list[dict[str, str]]:
    if process.poll() is None:
        return []
    kind = "Failed" if process.returncode else "Complete"
    return [{"type": kind, "status": "True", "lastTransitionTime": SINCE, "reason": kind, "message": ""}]


def _pod(job: str) -> dict[str, Any]:
    labels = {
        "jobset.sigs.k8s.io/jobset-name": job,
        "jobset.sigs.k8s.io/replicatedjob-name": "node",
        "batch.kubernetes.io/job-completion-index": "0",
        "jobset.sigs.k8s.io/job-index": "0",
    }
    metadata = {"name": f"{job}-node-0-0", "namespace": "default", "labels": labels, "creationTimestamp": SINCE}
    return {
        "metadata": metadata,
        "spec": {"containers": [{"name": "node", "image": "torch"}]},
        "status": {"phase": "Running"},
    }
