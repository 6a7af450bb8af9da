"""A Slurm cluster of one node, this machine, of one's own: in a folder, on free ports of loopback.

Its programs are those of the system's packages (Debian: `apt-get install slurm-wlm munge`), of
which nothing has to be running. There is no accounting, as on many clusters.
"""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol")
# More than this machine may have: jobs share them.
NUM_CPUS = 16
SECONDS_TO_START = 120.0
# For jobs that are cancelled.
SECONDS_TO_END = 10.0
# Of Python, where submitit runs a task.
TASK_ARGUMENTS = ["-u", "-m", "submitit.core._submit"]
# Major and minor number of /dev/null, which stands for a GPU.
NULL_DEVICE = os.makedev(1, 3)

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# A job that is queued again waits for so long, in case it has been taken away from a node that does
# not know it yet; 120 seconds by default.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPort={controller_port}
SlurmdPort={node_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=5
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
{gres}
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=1000 {node_gres} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes={host} PriorityTier=2 PreemptMode=OFF
"""


def missing_programs() -> list[str]:
    """What of Slurm and munge is not installed."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


class SlurmCluster:
    """As a context it is up, and gone when the block ends, with every job.

    num_gpus: that it pretends to have, which only root can do.
    """

    def __init__(self, folder: Path, num_gpus: int = 0) -> None:
        self._folder = folder
        self._num_gpus = num_gpus
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._resources = ExitStack()

    @property
    def environment(self) -> dict[str, str]:
        """Where Slurm's programs find it."""
        return {"SLURM_CONF": str(self._folder / "slurm.conf")}

    def run(self, *command: str) -> str:
        """What one of Slurm's programs prints."""
        done = subprocess.run(
            command, env={**os.environ, **self.environment}, capture_output=True, text=True
        )
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
        return done.stdout

    def jobs(self) -> dict[str, str]:
        """State of each job by its id."""
        lines = self.run("squeue", "--array", "--states=all", "--noheader", "--format=%i %T")
        return dict(line.split() for line in lines.splitlines())  # type: ignore[misc]

    def processes(self, job_id: str) -> list[psutil.Process]:
        """Those that run a job's tasks, without what Slurm starts them by and what they start."""
        array, _, task = job_id.partition("_")
        found = []
        for process in self._processes():
            with suppress(psutil.Error):
                given = process.environ()
                is_of_job = (
                    (given.get("SLURM_ARRAY_JOB_ID"), given.get("SLURM_ARRAY_TASK_ID"))
                    == (array, task)
                    if task
                    else given.get("SLURM_JOB_ID") == job_id
                )
                if is_of_job and process.cmdline()[1:4] == TASK_ARGUMENTS:
                    found.append(process)
        return found

    def __enter__(self) -> "SlurmCluster":
        for name in ("state", "spool"):
            (self._folder / name).mkdir(parents=True)
        (self._folder / "slurm.conf").write_text(self._config())
        try:
            self._start_daemons()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()

    def _config(self) -> str:
        host = socket.gethostname().partition(".")[0]
        gres = node_gres = ""
        if self._num_gpus:
            for number in range(self._num_gpus):
                os.mknod(self._folder / f"gpu{number}", 0o20666, NULL_DEVICE)
            files = f"{self._folder}/gpu[0-{self._num_gpus - 1}]"
            (self._folder / "gres.conf").write_text(f"NodeName={host} Name=gpu File={files}\n")
            gres, node_gres = "GresTypes=gpu", f"Gres=gpu:{self._num_gpus}"
        return CONFIG.format(
            host=host,
            user=getpass.getuser(),
            folder=self._folder,
            controller_port=_free_port(),
            node_port=_free_port(),
            cpus=NUM_CPUS,
            gres=gres,
            node_gres=node_gres,
        )

    def _start_daemons(self) -> None:
        key = self._folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        self._start(
            *("munged", "--foreground", "--force", "--num-threads=2", f"--key-file={key}"),
            f"--socket={self._folder}/munge.socket",
            *(f"--{name}-file={self._folder}/munge.{name}" for name in ("pid", "log", "seed")),
        )
        self._wait(lambda: (self._folder / "munge.socket").exists(), "munged")
        self._start("slurmctld", "-D", "-c")
        self._start("slurmd", "-D", "-c")
        self._wait(self._is_idle, "the node")

    def _start(self, program: str, *arguments: str) -> None:
        found = shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
        assert found is not None
        with (self._folder / f"{program}.out").open("wb") as log:
            daemon = subprocess.Popen(
                [found, *arguments],
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._folder,
            )
        self._daemons.append(daemon)

    def _is_idle(self) -> bool:
        with suppress(RuntimeError):
            return self.run("sinfo", "--noheader", "--format=%t").split()[:1] == ["idle"]
        return False

    def _wait(self, is_ready: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + SECONDS_TO_START
        while not is_ready():
            if time.monotonic() > deadline or any(d.poll() is not None for d in self._daemons):
                logs = {path.name: path.read_text()[-2000:] for path in self._folder.glob("*.out")}
                raise RuntimeError(f"{what} has not come up: {logs}")
            time.sleep(0.1)

    def _end(self) -> None:
        """End the jobs, then the daemons, then whatever of them is left."""
        with suppress(RuntimeError):
            self.run("scancel", f"--user={getpass.getuser()}")
            deadline = time.monotonic() + SECONDS_TO_END
            while time.monotonic() < deadline and self.run("squeue", "--noheader"):
                time.sleep(0.1)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(5.0)
            daemon.kill()
            daemon.wait()
        for process in self._processes():
            with suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)

    def _processes(self) -> list[psutil.Process]:
        """All that has been started in the cluster.

        It finds its configuration in this folder; of Slurm's own, which forget their environment,
        some are at home there.
        """
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                given = process.environ().get("SLURM_CONF")
                is_ours = given == self.environment["SLURM_CONF"]
                if (is_ours or process.cwd() == str(self._folder)) and process.pid != os.getpid():
                    found.append(process)
        return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
