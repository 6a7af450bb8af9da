"""The project's programs, each in a process of its own, as a person starts them.

Most of a small program's time goes into importing torch and lightning: a training of two steps
takes 8.4 s, and 2.2 s without. So a server imports the libraries once, none of our modules, and
forks for each program: what runs there is the whole program, in its own folder and environment, to
its exit code.

Programs that are to be killed, or to have variables that libraries look at when they are imported,
are started by `subprocess` instead.
"""

import atexit
import gc
import importlib
import json
import os
import random
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

LIBRARIES = ("lightning.pytorch", "optuna", "pandas", "pyarrow.parquet", "scipy.stats")
# How variables begin that libraries look at when they are imported; and those of the server.
READ_AT_IMPORT = ("HF_", "OMP_", "GOMP_")
OWN = ("OMP_NUM_THREADS", "HF_MODULES_CACHE")


def run_program(
    *arguments: object, folder: Path, environment: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run `python *arguments` in a folder, with what is added to this process's environment.

    arguments: begin with a file or with -m and a module.
    """
    words = [str(each) for each in arguments]
    server, begun_with = _server()
    own = {name: begun_with[name] for name in OWN}
    asked = {**os.environ, **own, **(environment or {})}
    late = [
        name
        for name, value in asked.items()
        if name.startswith(READ_AT_IMPORT) and begun_with.get(name) != value
    ]
    assert not late, f"{late}: libraries have been imported with others; use subprocess"
    with tempfile.TemporaryDirectory() as scratch:
        outputs = [Path(scratch) / name for name in ("stdout", "stderr")]
        request = {
            "arguments": words,
            "folder": str(folder),
            "environment": asked,
            "outputs": [str(path) for path in outputs],
        }
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        try:
            code = int(server.stdout.readline())
        except BaseException:
            # Whoever asks next must not take this program's code for theirs.
            server.kill()
            _server.cache_clear()
            raise
        return subprocess.CompletedProcess(
            words, code, *(path.read_text("utf-8") for path in outputs)
        )


@cache
def _server() -> tuple["subprocess.Popen[str]", dict[str, str]]:
    """It, and its environment."""
    modules = Path(tempfile.gettempdir()) / f"hf_modules_{os.getpid()}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": str(modules)}
    server = subprocess.Popen(
        [sys.executable, __file__],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(server.kill)
    return server, environment


def _serve() -> list[str]:
    """Fork for every request; returns a program's arguments in the process that is to run it."""
    for name in LIBRARIES:
        importlib.import_module(name)
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        process = os.fork()
        if process == 0:
            _become(**request)
            return request["arguments"]
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    return []


def _become(
    arguments: list[str], folder: str, environment: dict[str, str], outputs: list[str]
) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    nothing = os.open(os.devnull, os.O_RDONLY)
    files = (os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for path in outputs)
    for number, file in enumerate((nothing, *files)):
        os.dup2(file, number)
        os.close(file)
    # It may have been asked for while libraries were imported.
    tempfile.tempdir = None
    random.seed()
    first = folder if arguments[0] == "-m" else str(Path(arguments[0]).resolve().parent)
    added = environment.get("PYTHONPATH", "")
    sys.path[:1] = [first, *filter(None, added.split(os.pathsep))]


def _run(arguments: list[str]) -> None:
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    if program := _serve():
        _run(program)
