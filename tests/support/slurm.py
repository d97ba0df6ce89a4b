"""A Slurm cluster of this machine alone: munged, slurmctld and slurmd of the system, in a folder of its own."""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
PLACES = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
"""Where distributions put daemons."""

NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} State=UNKNOWN"
SLURM_CONF = """
ClusterName=llmtune
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PreemptExemptTime=0
KillWait=60
MinJobAge=600
ReturnToService=2
{nodes}
PartitionName=spot Nodes=ALL Default=YES PriorityTier=1 GraceTime=60 State=UP
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF State=UP
"""


def missing() -> str | None:
    """Return what of Slurm is not installed, as the reason to skip a test."""
    lacking = [name for name in DAEMONS if shutil.which(name, path=PLACES) is None]
    return f"no {', '.join(lacking)}: apt-get install slurmctld slurmd slurm-client munge" if lacking else None


@contextlib.contextmanager
def cluster(folder: Path, *, machines: int = 1, private: Path | None = None) -> Iterator[dict[str, str]]:
    """Start the cluster; yield the environment in which Slurm's commands find it.

    Of two machines, both are this one under its two names. `private` becomes a disk of the machine that runs jobs,
    which nobody else sees.
    """
    host, user = socket.gethostname().split(".")[0], os.environ.get("USER") or subprocess.getoutput("id -un")
    names = [host, "localhost"][:machines]
    for path in (folder, folder / "state", *(folder / f"spool.{name}" for name in names)):
        path.mkdir(mode=0o755)
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    control, *ports = _free_ports(1 + machines)
    nodes = [
        NODE.format(name=name, host=host, port=port, cpus=2 // machines)
        for name, port in zip(names, ports, strict=True)
    ]
    conf = SLURM_CONF.format(host=host, user=user, folder=folder, port=control, nodes="\n".join(nodes))
    (folder / "slurm.conf").write_text(conf)
    (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
    environment = {**os.environ, "PATH": PLACES, "SLURM_CONF": str(folder / "slurm.conf")}
    munged = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={folder}/munge.key"]
    munged += [f"--{name}-file={folder}/munge.{name}" for name in ("pid", "log", "seed")]
    with contextlib.ExitStack() as stack:
        hidden = (
            []
            if private is None
            else ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {private}; exec "$@"', "-"]
        )
        slurmds = [[*hidden, "slurmd", "-D", "-N", name] for name in names]
        for words in (munged, ["slurmctld", "-D", "-i"], *slurmds):
            stack.enter_context(_daemon(words, environment, folder))
        _wait_until_idle(environment, folder)
        yield environment


@contextlib.contextmanager
def _daemon(words: list[str], environment: dict[str, str], folder: Path) -> Iterator[None]:
    with (folder / f"{words[0]}.out").open("ab") as out:
        process = subprocess.Popen(words, env=environment, stdout=out, stderr=out, stdin=subprocess.DEVNULL)
        time.sleep(0.5)
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait_until_idle(environment: dict[str, str], folder: Path) -> None:
    end = time.monotonic() + 30
    while True:
        found = subprocess.run(
            ["sinfo", "-h", "-o", "%T"], env=environment, capture_output=True, text=True, check=False
        )
        if found.returncode == 0 and set(found.stdout.split()) == {"idle"}:
            return
        if time.monotonic() > end:
            logs = "\n".join(path.read_text(errors="replace")[-2000:] for path in folder.glob("*.log"))
            raise AssertionError(f"the cluster never came up: {found.stdout}{found.stderr}\n{logs}")
        time.sleep(0.3)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
