"""First use of the C++ kernels in a process of its own, as a user's first call is.

Processes are forked from this one, which has PyTorch loaded already. They build one function
instead of the kernels, which takes a second.
"""

import multiprocessing
import os
import tempfile
import warnings
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from svp_peft.ops import backends, cpu
from svp_peft.ops.cpu import loader

CPU = torch.device("cpu")

needs_compiler = pytest.mark.skipif(
    cpu.unavailable(CPU) is not None or not hasattr(os, "fork"),
    reason="needs a C++ compiler and fork",
)


def first_use() -> dict:
    """What a user's process sees of the kernels."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        reason, again = cpu.unavailable(CPU), cpu.unavailable(CPU)
        chosen = backends.choose("auto", CPU, torch.float32)
    return {
        "reason": reason,
        "again": again,
        "chosen": chosen,
        "warnings": [f"{w.category.__name__}: {w.message}" for w in seen],
        "library": loader._library and loader._library._name,
    }


def _child(sources: Path, env: dict[str, str], said: Path, answer: Connection) -> None:
    os.setsid()
    with open(said, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None
    loader._library = loader._reason = None
    loader.SOURCES = sources
    answer.send(first_use())


class Forked:
    """`first_use` in a forked process with sources, environment and session of its own."""

    def __init__(self, sources: Path, env: dict[str, str]) -> None:
        context = multiprocessing.get_context("fork")
        self._said = Path(tempfile.mkstemp()[1])
        self._answer, other = context.Pipe(duplex=False)
        with warnings.catch_warnings():
            # later Pythons warn of forking beside threads: the child runs none of their code
            warnings.simplefilter("ignore", DeprecationWarning)
            self.process: BaseProcess = context.Process(
                target=_child, args=(sources, env, self._said, other)
            )
            self.process.start()
        other.close()

    def result(self) -> dict:
        try:
            assert self._answer.poll(200), "no answer"
            found = self._answer.recv()
            self.process.join()
            assert self._said.read_text() == ""
            return found
        finally:
            self._said.unlink()


def run(sources: Path, env: dict[str, str]) -> dict:
    return Forked(sources, env).result()


def environment(cache: Path | str, **changes: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("SVP_PEFT") and k != "CXX"}
    return kept | {"SVP_PEFT_CACHE": str(cache), "OMP_NUM_THREADS": "1"} | changes


def executable(path: Path, body: str) -> Path:
    path.write_text("#!/bin/sh\n" + body)
    path.chmod(0o755)
    return path


def counting_compiler(folder: Path) -> Path:
    """A wrapper around the compiler that logs its calls, and waits where SVP_TEST_WAIT is set."""
    return executable(
        folder / "counting-c++",
        f'echo "$@" >> {folder}/compiled.log\n'
        'case "$*" in *" -c "*) sleep ${SVP_TEST_WAIT:-0};; esac\n'
        'exec c++ "$@"\n',
    )


def compilations(folder: Path) -> int:
    log = folder / "compiled.log"
    return sum(" -c " in line for line in log.read_text().splitlines()) if log.exists() else 0


def write_source(folder: Path, text: str = 'extern "C" int svp_one() { return 1; }\n') -> Path:
    """A source folder that compiles at once."""
    folder.mkdir(exist_ok=True)
    (folder / "one.cpp").write_text(text)
    return folder


def assert_built(result: dict, below: Path) -> None:
    assert result["reason"] is None
    assert result["warnings"] == []
    assert result["chosen"] == "cpu"
    assert Path(result["library"]).is_relative_to(below)


def assert_falls_back(result: dict, *words: str) -> None:
    """The reference runs, after one warning that says what is wrong and what to install."""
    assert result["chosen"] == "reference"
    assert result["reason"] == result["again"]
    assert len(result["warnings"]) == 1, result["warnings"]
    warning = result["warnings"][0]
    assert warning.startswith("RuntimeWarning: svp_peft runs without its C++ kernels: ")
    for word in words:
        assert word in warning
        assert word in result["reason"]
