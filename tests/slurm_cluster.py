"""A real Slurm on this machine: munge, MariaDB, slurmdbd, slurmctld and four slurmd.

Everything lies in one private folder and listens on ports of its own, so that several clusters
run side by side and beside a Slurm that the machine may have. Tests take it as the fixture `slurm`.

Slurm has no node apart from this machine: all four slurmd run here, share its CPUs and its memory,
and promise Slurm more of both than there is.
"""

import atexit
import os
import pwd
import secrets
import shutil
import socket
import stat
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

import slurm_janitor

PACKAGES = "slurm-wlm slurmctld slurmd slurm-client munge mariadb-server slurmdbd"
PROGRAMS = (
    *("munged", "mariadb-install-db", "mariadbd", "slurmdbd", "slurmctld", "slurmd"),
    *("sbatch", "srun", "scontrol", "squeue", "sinfo", "scancel", "sacct", "sacctmgr", "useradd"),
)
USER = "hpcuser"
SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# Below the range from which Linux takes ports for outgoing connections.
FIRST_PORT = 20000
PORTS_EACH = 10
NODES = 4
#: What names begin with that Slurm's programs look for in their environment.
CLIENTS = ("SLURM", "SBATCH_", "SQUEUE_", "SACCT_", "SCANCEL_", "SINFO_", "SRUN_")


class SlurmClusterError(RuntimeError):
    """The test cluster did not do what was asked; the message quotes what Slurm said."""


def missing() -> str | None:
    """What a test cluster lacks here and how to get it, in one sentence; None if nothing."""
    lacking = [name for name in PROGRAMS if shutil.which(name, path=SEARCH_PATH) is None]
    if lacking:
        return f"no {', '.join(lacking)} for a Slurm cluster: apt-get install -y {PACKAGES}"
    if os.geteuid() != 0:
        return "a Slurm cluster that runs jobs of several users needs root: run as root"
    return None


def outside(environ: Mapping[str, str]) -> dict[str, str]:
    """An environment as it is outside of any job, and without wishes of the user's."""
    return {name: value for name, value in environ.items() if not name.startswith(CLIENTS)}


def wait_until(what: str, ready: Callable[[], object], timeout: float) -> None:
    """Look 20 times a second whether ready; an error that says what after timeout seconds."""
    deadline = time.monotonic() + timeout
    while not ready():
        if time.monotonic() > deadline:
            raise SlurmClusterError(f"waited {timeout:g} s for {what}")
        time.sleep(0.05)


class SlurmCluster:
    """Four nodes, partitions main and high, accounting, and one ordinary user.

    A context manager, or start() and stop(). When this process ends without stop(), by SIGKILL
    too, nothing of the cluster stays.
    """

    folder: Path
    """Configuration, state and logs; the name and the nodes' prefix are this cluster's alone."""
    nodes: list[str]
    """Names of the nodes, such as qa1, qa2, qa3, qa4."""
    env: dict[str, str]
    """What a process needs in its environment to speak to this cluster."""
    user: str
    """An account that is not root, for `run(..., user=cluster.user)`."""
    home: Path
    """That user's home, mode 0700."""
    has_cgroups: bool
    """Whether steps live in cgroups: without, signals reach every process of a step, and
    running out of memory has no record of its own."""

    def __init__(
        self,
        *,
        accounting: bool = True,
        extra_conf: Mapping[str, str] | None = None,
        cred_expire_s: int = 10,
    ) -> None:
        self._cred_expire_s = cred_expire_s
        self.accounting = accounting
        self.user = USER
        self.has_cgroups = all(
            os.access(slurm_janitor.CGROUPS / name, os.W_OK) for name in ("freezer", "memory")
        )
        self._extra_conf = dict(extra_conf or {})
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._janitor: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()

    def __enter__(self) -> "SlurmCluster":
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    # Start and stop

    def start(self) -> None:
        """Bring everything up; returns when four nodes are idle."""
        if reason := missing():
            raise SlurmClusterError(reason)
        self.folder, prefix, self._port = _claim_place()
        self.nodes = [f"{prefix}{number}" for number in range(1, NODES + 1)]
        self.env = {"SLURM_CONF": str(self.folder / "slurm.conf")}
        self._janitor = subprocess.Popen(
            [sys.executable, slurm_janitor.__file__, str(self.folder), *self.nodes],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        atexit.register(self.stop)
        try:
            self._configure()
            self._start_munge()
            if self.accounting:
                self._start_accounting()
            self.start_controller()
            for node in self.nodes:
                self._start_daemon(node, "slurmd", "-D", "-N", node)
            idle = dict.fromkeys(self.nodes, "idle")
            self._wait_for(self.nodes[0], lambda: self.node_states() == idle)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Kill every process of the cluster and remove all that it made; may be repeated."""
        # A forked child of the test process that exits must not take the cluster with it.
        if self._janitor is None or os.getpid() != self._owner:
            return
        janitor, self._janitor = self._janitor, None
        atexit.unregister(self.stop)
        _, said = janitor.communicate(b"stop", timeout=60)
        for daemon in self._daemons.values():
            daemon.wait(timeout=10)
        self._daemons.clear()
        if janitor.returncode:
            raise SlurmClusterError(said.decode())

    # Clients

    def run(
        self, *argv: str, check: bool = True, user: str | None = None, timeout: float = 60
    ) -> str:
        """What a command on the cluster wrote to stdout; with check, an error if it failed.

        It runs in the current directory, or as user in their home and with a fresh environment.
        """
        env = {**outside(os.environ), **self.env}
        cwd = uid = gid = groups = None
        if user is not None:
            account = pwd.getpwnam(user)
            cwd, uid, gid, groups = self.home, account.pw_uid, account.pw_gid, list[int]()
            env = {**self._plain_env(), "HOME": str(cwd), "USER": user, "LOGNAME": user}
        done = subprocess.run(
            argv,
            check=False,
            env=env,
            cwd=cwd,
            user=uid,
            group=gid,
            extra_groups=groups,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check and done.returncode != 0:
            said = f"{done.stdout}{done.stderr}".strip()
            raise SlurmClusterError(f"{' '.join(argv)} ended with {done.returncode}: {said}")
        return done.stdout

    def queue(self) -> list[dict[str, str]]:
        """The jobs that are pending, running or completing; one dict each, id first."""
        columns = dict(
            id="%i", state="%T", reason="%r", name="%j", user="%u", nodes="%N", dependency="%E"
        )
        states = "--states=pending,running,suspended,configuring,completing"
        text = self.run("squeue", "-h", states, "-o", "\x1f".join(columns.values()))
        return [dict(zip(columns, row.split("\x1f"), strict=True)) for row in text.splitlines()]

    def sacct(self, job_id: str | int, *fields: str) -> list[dict[str, str]]:
        """The accounting rows of a job and its steps, earlier lives of the same id included."""
        names = fields or ("JobIDRaw", "State", "ExitCode")
        options = ("--noheader", "--parsable2", "--duplicates", "--delimiter=\x1f")
        text = self.run("sacct", *options, f"--jobs={job_id}", f"--format={','.join(names)}")
        return [dict(zip(names, row.split("\x1f"), strict=True)) for row in text.splitlines()]

    def cancel_all(self) -> None:
        """Cancel every job, pending ones first so that none of them starts meanwhile."""
        for state in ("PENDING", "RUNNING", "SUSPENDED"):
            self.run("scancel", f"--state={state}")

    def wait_idle(self, timeout: float = 60) -> None:
        """Wait until the queue is empty and every node is idle."""
        try:
            wait_until("an idle cluster", self._is_idle, timeout)
        except SlurmClusterError as error:
            raise SlurmClusterError(f"{error}: {self.queue()}, {self.node_states()}") from None

    def node_states(self) -> dict[str, str]:
        """Each node's state as sinfo says it, such as idle, mixed or down*."""
        text = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T", check=False)
        return dict(line.split() for line in text.splitlines())

    # Breaking and mending

    def node_down(self, name: str) -> None:
        """Fail a node: its jobs end NODE_FAIL. A living slurmd brings it back within a second."""
        self.run("scontrol", "update", f"nodename={name}", "state=down", "reason=test")

    def node_resume(self, name: str) -> None:
        """Bring a node back that was down or drained; its slurmd must live."""
        # "Invalid node state specified" is the answer for a node that came back by itself.
        self.run("scontrol", "update", f"nodename={name}", "state=resume", check=False)
        up = ("idle", "mixed", "allocated")
        self._wait_for(name, lambda: self.node_states().get(name) in up)

    def kill_slurmd(self, name: str) -> None:
        """SIGKILL a node's slurmd. Its tasks run on, and Slurm does not notice for 300 s."""
        self._daemons[name].kill()
        self._daemons.pop(name).wait()

    def power_off(self, name: str) -> None:
        """SIGKILL a node's slurmd and all its steps; Slurm is not told. Needs cgroups."""
        assert self.has_cgroups
        self.kill_slurmd(name)
        slurm_janitor.kill(lambda: slurm_janitor.step_processes([name]), [name])

    def start_slurmd(self, name: str) -> None:
        """Start the slurmd of a node again; returns when it listens."""
        self._start_daemon(name, "slurmd", "-D", "-N", name)
        port = self._port + self.nodes.index(name)
        self._wait_for(name, lambda: not _is_free(port))

    def stop_controller(self) -> None:
        """End slurmctld in good order, which takes 3 s; clients then fail after 9 s each."""
        controller = self._daemons.pop("slurmctld")
        controller.terminate()
        controller.wait(timeout=30)

    def start_controller(self) -> None:
        """Start slurmctld with the state that it left; returns when it answers."""
        self._start_daemon("slurmctld", "slurmctld", "-D")
        self._wait_for("slurmctld", lambda: "is UP" in self.run("scontrol", "ping", check=False))

    # Inside

    def _configure(self) -> None:
        """Write every file that the daemons read, each with the mode that they insist on."""
        for name, mode in {"munge": 0o755, "state": 0o700, "gpu": 0o755, "home": 0o700}.items():
            self.folder.joinpath(name).mkdir()
            self.folder.joinpath(name).chmod(mode)
        account = _account(self.user)
        self.home = self.folder / "home"
        os.chown(self.home, account.pw_uid, account.pw_gid)

        nodes = f"{self.nodes[0][:-1]}[1-{NODES}]"
        gpus = [self._make_gpu(number) for number in range(2)]
        self._write("gres.conf", f"NodeName={nodes} Name=gpu File={','.join(gpus)}\n")
        self._write(
            "cgroup.conf", "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\nConstrainRAMSpace=yes\n"
        )
        conf = {**self._slurm_conf(), **self._extra_conf}
        last_port = self._port + NODES - 1
        limits = "MaxTime=02:00:00 State=UP"
        self._write(
            "slurm.conf",
            *(f"{key}={value}\n" for key, value in conf.items()),
            f"NodeName={nodes} NodeHostname=localhost Port=[{self._port}-{last_port}] CPUs=4"
            f" RealMemory={_node_memory_mb()} Gres=gpu:2 State=UNKNOWN\n",
            f"PartitionName=main Nodes={nodes} Default=YES {limits} PriorityTier=1"
            " PreemptMode=REQUEUE GraceTime=5\n",
            f"PartitionName=high Nodes={nodes} {limits} PriorityTier=10\n",
        )

    def _slurm_conf(self) -> dict[str, str]:
        munge = self.folder / "munge" / "socket"
        conf = {
            "ClusterName": f"test{self.nodes[0][:-1]}",
            "SlurmctldHost": "localhost",
            "SlurmctldPort": str(self._port + NODES),
            "SlurmUser": "root",
            "SlurmdUser": "root",
            "AuthType": "auth/munge",
            # A requeued job waits for cred_expire; the default is two minutes.
            "AuthInfo": f"socket={munge},cred_expire={self._cred_expire_s}",
            "StateSaveLocation": str(self.folder / "state"),
            "SlurmdSpoolDir": f"{self.folder}/%n",
            "SlurmctldPidFile": f"{self.folder}/slurmctld.pid",
            "SlurmdPidFile": f"{self.folder}/%n.pid",
            "ProctrackType": "proctrack/cgroup" if self.has_cgroups else "proctrack/linuxproc",
            "TaskPlugin": "task/cgroup" if self.has_cgroups else "task/none",
            # Lets a node have more CPUs and memory than its share of this machine.
            "SlurmdParameters": "config_overrides",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core_Memory",
            "DefMemPerCPU": "1500",
            "GresTypes": "gpu",
            "MpiDefault": "none",
            "MailProg": "/bin/true",
            "SchedulerType": "sched/backfill",
            "SchedulerParameters": (
                "sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0"
            ),
            "PreemptType": "preempt/partition_prio",
            "PreemptMode": "REQUEUE",
            "JobRequeue": "1",
            "KillWait": "5",
            "MinJobAge": "300",
            "ReturnToService": "2",
            "JobAcctGatherType": "jobacct_gather/linux",
        }
        if self.accounting:
            conf |= {
                "AccountingStorageType": "accounting_storage/slurmdbd",
                "AccountingStorageHost": "localhost",
                "AccountingStoragePort": str(self._port + NODES + 1),
                # Here the word means munge's socket; connections to slurmdbd ignore AuthInfo.
                "AccountingStoragePass": str(munge),
            }
        return conf

    def _start_munge(self) -> None:
        folder = self.folder / "munge"
        folder.joinpath("key").write_bytes(secrets.token_bytes(1024))
        folder.joinpath("key").chmod(0o400)
        files = [f"--{name}-file={folder / name}" for name in ("key", "pid", "log", "seed")]
        self._start_daemon("munged", "munged", "-F", f"--socket={folder / 'socket'}", *files)
        self._wait_for("munged", folder.joinpath("socket").exists)

    def _start_accounting(self) -> None:
        """MariaDB, slurmdbd, and the cluster's tables, which slurmctld wants to find."""
        data, password = self.folder / "database", secrets.token_hex()
        mariadb_port, slurmdbd_port = self._port + NODES + 2, self._port + NODES + 1
        # In a shared tmpdir, one MariaDB that starts removes the temporary tables of another.
        tmpdir = self.folder / "database-tmp"
        tmpdir.mkdir()
        options = ("--no-defaults", "--user=root", f"--datadir={data}", f"--tmpdir={tmpdir}")
        # Small files, no waiting for the disk: the database lives as long as the tests.
        engine = ("--innodb-log-file-size=8M", "--innodb-flush-log-at-trx-commit=0")
        self._start_daemon("install", "mariadb-install-db", *options, *engine, "--skip-test-db")
        if self._daemons["install"].wait(timeout=120):
            raise SlurmClusterError(f"mariadb-install-db failed; {self._log_end('install')}")
        grant = self._write(
            "grant.sql",
            "CREATE DATABASE slurm;\n",
            f"CREATE USER slurm@'%' IDENTIFIED BY '{password}';\n",
            "GRANT ALL ON slurm.* TO slurm@'%';\n",
            mode=0o600,
        )
        self._start_daemon(
            "mariadbd",
            "mariadbd",
            *options,
            *engine,
            f"--socket={data / 'socket'}",
            f"--port={mariadb_port}",
            "--bind-address=127.0.0.1",
            "--innodb-buffer-pool-size=64M",
            f"--init-file={grant}",
        )
        # If the database does not answer at once, slurmdbd asks again only after 5 s.
        self._wait_for("mariadbd", lambda: not _is_free(mariadb_port))
        self._write(
            "slurmdbd.conf",
            "AuthType=auth/munge\n",
            f"AuthInfo=socket={self.folder / 'munge' / 'socket'}\n",
            f"DbdHost=localhost\nDbdPort={slurmdbd_port}\nSlurmUser=root\n",
            f"PidFile={self.folder / 'slurmdbd.pid'}\n",
            "StorageType=accounting_storage/mysql\nStorageHost=127.0.0.1\n",
            f"StoragePort={mariadb_port}\n",
            f"StorageUser=slurm\nStoragePass={password}\nStorageLoc=slurm\n",
            mode=0o600,
        )
        self._start_daemon("slurmdbd", "slurmdbd", "-D")
        self._wait_for("slurmdbd", lambda: not _is_free(slurmdbd_port))
        self.run("sacctmgr", "-i", "add", "cluster", f"test{self.nodes[0][:-1]}")

    def _start_daemon(self, name: str, *argv: str) -> None:
        """Start a program in the foreground of its own session, with NAME.log as its output."""
        program = shutil.which(argv[0], path=SEARCH_PATH)
        assert program is not None, argv[0]
        with self.folder.joinpath(f"{name}.log").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                [program, *argv[1:]],
                env=self._plain_env(),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _wait_for(self, daemon: str, ready: Callable[[], object], timeout: float = 90) -> None:
        """Wait until a daemon is ready; if it dies or takes too long, quote its log."""
        process = self._daemons[daemon]
        try:
            wait_until(daemon, lambda: process.poll() is not None or ready(), timeout)
            if process.returncode is not None:
                raise SlurmClusterError(f"{daemon} ended with {process.returncode}")
        except SlurmClusterError as error:
            raise SlurmClusterError(f"{error}; {self._log_end(daemon)}") from None

    def _log_end(self, daemon: str) -> str:
        log = self.folder.joinpath(f"{daemon}.log").read_text(errors="replace")
        return f"its log ends:\n{log[-2000:]}"

    def _plain_env(self) -> dict[str, str]:
        return {"PATH": SEARCH_PATH, "LANG": "C.UTF-8", **self.env}

    def _is_idle(self) -> bool:
        return not self.queue() and set(self.node_states().values()) == {"idle"}

    def _make_gpu(self, number: int) -> str:
        """A second /dev/null; Slurm sets CUDA_VISIBLE_DEVICES for character devices only."""
        path = self.folder / "gpu" / f"nvidia{number}"
        try:
            os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        except PermissionError:
            path.touch()
        return str(path)

    def _write(self, name: str, *text: str, mode: int = 0o644) -> Path:
        path = self.folder / name
        path.touch(mode=mode)
        path.write_text("".join(text))
        return path


def _claim_place() -> tuple[Path, str, int]:
    """A new folder, and the prefix and the first of ten free ports that belong to its name.

    Making the folder is the claim: no other cluster has its name, nodes or ports while it exists.
    """
    letters = string.ascii_lowercase
    for attempt in range(len(letters) ** 2):
        number = (os.getpid() + attempt) % len(letters) ** 2
        prefix = letters[number // len(letters)] + letters[number % len(letters)]
        port = FIRST_PORT + number * PORTS_EACH
        folder = Path(tempfile.gettempdir()) / f"slurm-test-{prefix}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        if all(map(_is_free, range(port, port + PORTS_EACH))):
            folder.chmod(0o755)
            return folder, prefix, port
        folder.rmdir()
    raise SlurmClusterError(f"no place for a test cluster in {tempfile.gettempdir()}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def _account(name: str) -> pwd.struct_passwd:
    """The user's account, made if it is missing. Two clusters may try that at the same moment."""

    def exists() -> bool:
        try:
            pwd.getpwnam(name)
        except KeyError:
            options = ("--system", "--no-create-home", "--home-dir=/nonexistent")
            useradd = ["useradd", *options, "--shell=/bin/bash", name]
            subprocess.run(useradd, check=False, capture_output=True)
            return False
        return True

    wait_until(f"useradd {name}", exists, 60)
    return pwd.getpwnam(name)


def _node_memory_mb() -> int:
    """A quarter of this machine, but never less than four CPUs may ask for by default."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(total // 2**20 // NODES, 6000)
