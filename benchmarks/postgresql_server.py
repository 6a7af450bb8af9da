"""A PostgreSQL server of one's own, in a folder that is removed with it.

It listens on a Unix socket in that folder only. Its programs are those of the system's package
(Debian: `apt-get install postgresql`), of which nothing has to be running.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType

# The server refuses to run as root; it then runs as this user, who comes with the package.
USER = "postgres"
# A fast stop ends every session, an immediate one is a crash.
STOPS = ("fast", "immediate")


class PostgreSQLServer:
    """As a context it is up, and gone when the block ends. Raises FileNotFoundError without one."""

    def __init__(self) -> None:
        self._programs = _find_programs()
        self.password = secrets.token_hex(8)

    def environment(self, database: str) -> dict[str, str]:
        """Where any program finds a database of it, as libpq reads it."""
        return {
            "PGHOST": str(self._folder),
            "PGUSER": USER,
            "PGDATABASE": database,
            "PGPASSWORD": self.password,
        }

    def create_database(self, name: str) -> None:
        """Create an empty database."""
        self._run("createdb", name)

    def start(self) -> None:
        """Start it, and wait until it answers."""
        # It may crash, but the machine will not: nothing has to be on the disk.
        settings = f"-c fsync=off -c listen_addresses='' -c unix_socket_directories={self._folder}"
        self._run("pg_ctl", "start", "-w", "-o", settings)

    def stop(self, how: str = "fast") -> None:
        """Stop it; how: one of STOPS."""
        self._run("pg_ctl", "stop", "-w", "-m", how)

    def __enter__(self) -> PostgreSQLServer:
        # Where another user may go, and where the path is short enough for a socket.
        self._folder = Path(tempfile.mkdtemp(prefix="postgresql-", dir="/tmp"))
        self._log = self._folder / "log"
        if os.geteuid() == 0:
            shutil.chown(self._folder, USER)
        password_file = self._folder / "password"
        password_file.write_text(self.password)
        password_file.chmod(0o644)
        options = ("--no-sync", "--encoding=UTF8", "--locale=C", f"--username={USER}")
        self._run("initdb", *options, "--auth=scram-sha-256", f"--pwfile={password_file}")
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if (self._folder / "data" / "postmaster.pid").exists():
            self.stop("immediate")
        shutil.rmtree(self._folder)

    def _run(self, program: str, *arguments: str) -> None:
        environment = self.environment("postgres") | {"PGDATA": str(self._folder / "data")}
        # A file, which the server inherits: a pipe would stay open as long as it runs.
        with self._log.open("ab") as log:
            done = subprocess.run(
                [str(self._programs / program), *arguments],
                cwd=self._folder,
                env={**os.environ, **environment},
                user=USER if os.geteuid() == 0 else None,
                stdout=log,
                stderr=log,
            )
        if done.returncode != 0:
            said = self._log.read_text()
            raise RuntimeError(f"{program} ended with code {done.returncode}: {said}")


def _find_programs() -> Path:
    """The folder of the newest server's programs: Debian's is not on the PATH."""
    debian = Path("/usr/lib/postgresql").glob("*/bin/initdb")
    found = shutil.which("initdb") or max(debian, default=None, key=lambda p: int(p.parts[-3]))
    if found is None:
        raise FileNotFoundError("there is no PostgreSQL server: apt-get install postgresql")
    return Path(found).resolve().parent
