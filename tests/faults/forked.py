"""The command line in processes that can be killed: each is forked from a server that has imported torch and done nothing else."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["crosstrain.run", "transformers.models.llama.modeling_llama"])


def start(arguments: list[str], printed: Path, *, fresh: bool = False) -> BaseProcess:
    """`crosstrain ...` as a process that has started; what it prints is in a file.

    fresh: an interpreter of its own, as a user starts it. The others save its seconds of imports and share their hash seed.
    """
    process = SERVER.Process(target=_command, args=(arguments, dict(os.environ), printed, fresh))
    process.start()
    return process


def _command(arguments: list[str], environment: dict[str, str], printed: Path, fresh: bool) -> None:
    with printed.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    if fresh:
        os.execve(sys.executable, [sys.executable, "-m", "crosstrain", *arguments], environment)
    os.environ.clear()  # the server's own is of when it started
    os.environ.update(environment)
    gc.freeze()  # as conftest.py does, and why

    from crosstrain.cli import main

    sys.exit(main(arguments))
