"""Other processes for tests: quick to start, each with an environment of its own.

A server process imports torch and svp_peft once and forks a child for every call. The Hub client
reads its settings when it is imported, and svp_peft imports it late, so every child can have other
settings; or it is imported once, with the settings given, which makes calls ten times quicker.
Functions are called by name: they must be at the top of a test module.

    processes = Processes()                 # or Processes(env, preload=["huggingface_hub"])
    answer = processes.call(function, 1, 2, env={"HF_HUB_OFFLINE": "1"})
    answer.value            # what it returned; any JSON value
    answer.error            # or the name of the exception's type, and answer.message

SVP_PEFT_TEST_HUB_PATH names a folder with another release of huggingface_hub
(`pip install --target`), which the children then use.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import os
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIMIT = 120  # seconds for one call


@dataclass
class Answer:
    """What a call in another process came to."""

    value: object = None
    error: str = ""
    message: str = ""
    log: str = ""
    """Warnings and log records of svp_peft."""
    traceback: str = ""


class Processes:
    """The forking server. Close it, or use it as a context manager."""

    def __init__(self, env: dict[str, str] | None = None, *, preload: tuple[str, ...] = ()) -> None:
        hub = os.environ.get("SVP_PEFT_TEST_HUB_PATH")
        path = os.pathsep.join(filter(None, [hub, str(ROOT), os.environ.get("PYTHONPATH")]))
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.processes", *preload],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **(env or {}), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            text=True,
        )

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(30)

    def call(
        self,
        function: Callable[..., object],
        *args: object,
        env: dict[str, str] | None = None,
        **kwargs: object,
    ) -> Answer:
        """Run `function` in a new process; raises for nothing but a broken server."""
        return self.call_all([(function, args, kwargs)], env=env)[0]

    def call_all(
        self,
        calls: list[tuple[Callable[..., object], tuple[object, ...], dict[str, object]]],
        env: dict[str, str] | None = None,
    ) -> list[Answer]:
        """Run several calls at once, each in a process of its own."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        jobs = [
            {"module": f.__module__, "name": f.__name__, "args": a, "kwargs": k, "env": env or {}}
            for f, a, k in calls
        ]
        self._server.stdin.write(json.dumps(jobs) + "\n")
        self._server.stdin.flush()
        return [Answer(**answer) for answer in json.loads(self._server.stdout.readline())]


def _serve() -> None:
    import torch

    from svp_peft.ops import set_backend

    for module in ("svp_peft", "pytest", *sys.argv[1:]):
        importlib.import_module(module)

    # a fork copies one thread only
    torch.set_num_threads(1)
    set_backend("reference")
    # the first forward pass imports half of torch
    tiny = importlib.import_module("tests.tiny")
    tiny.trained()(tiny.images())
    answers = sys.stdout
    for line in sys.stdin:
        children = [_start(job) for job in json.loads(line)]
        results = []
        for child, pipe in children:
            with os.fdopen(pipe) as file:
                text = file.read()
            _, status = os.waitpid(child, 0)
            died = {"error": "Died", "message": f"wait status {status}"}
            results.append(json.loads(text) if text else died)
        answers.write(json.dumps(results) + "\n")
        answers.flush()
    # nothing here needs the interpreter's slow way out
    os._exit(0)


def _start(job: dict) -> tuple[int, int]:
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    signal.alarm(LIMIT)
    with os.fdopen(writing, "w") as pipe:
        pipe.write(json.dumps(_run(job)))
    os._exit(0)


def _run(job: dict) -> dict:
    os.environ.update(job["env"])
    for name in [name for name, value in job["env"].items() if value == ""]:
        del os.environ[name]
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    logging.getLogger("svp_peft").addHandler(handler)
    warnings.showwarning = lambda message, *_, **__: print(message, file=log)
    warnings.simplefilter("always")
    answer: dict[str, object] = {}
    # the answers go through stdout, and a test function may print
    with contextlib.redirect_stdout(sys.stderr):
        try:
            function = getattr(importlib.import_module(job["module"]), job["name"])
            answer["value"] = function(*job["args"], **job["kwargs"])
        except BaseException as error:
            answer["error"] = type(error).__name__
            answer["message"] = str(error)
            answer["traceback"] = traceback.format_exc()
    return {**answer, "log": log.getvalue()}


if __name__ == "__main__":
    _serve()
