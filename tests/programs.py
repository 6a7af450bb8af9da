"""The project's programs, each in a process of its own, as a person starts them.

Nine tenths of a small program's time go into importing torch and lightning. So a server imports
the libraries once, none of our modules, and forks for each program: what runs there is the whole
program, in its own folder and environment, to its exit code.

Programs that are to be killed, to start others of their kind, or to read variables that libraries
look at when they are imported, are started by `subprocess` instead.
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
# Libraries look at it when they are imported.
FIXED = {"OMP_NUM_THREADS": "1"}


def run_program(
    *arguments: object, folder: Path, environment: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run `python *arguments` in a folder, with what is added to this process's environment.

    arguments: begin with a file or with -m and a module.
    """
    words = [str(each) for each in arguments]
    with tempfile.TemporaryDirectory() as scratch:
        outputs = [Path(scratch) / name for name in ("stdout", "stderr")]
        request = {
            "arguments": words,
            "folder": str(folder),
            "environment": os.environ | FIXED | (environment or {}),
            "outputs": [str(path) for path in outputs],
        }
        server = _server()
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        return subprocess.CompletedProcess(
            words, code, *(path.read_text("utf-8") for path in outputs)
        )


@cache
def _server() -> "subprocess.Popen[str]":
    modules = Path(tempfile.gettempdir()) / f"hf_modules_{os.getpid()}"
    server = subprocess.Popen(
        [sys.executable, __file__],
        env=os.environ | FIXED | {"HF_MODULES_CACHE": str(modules)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(server.kill)
    return server


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
