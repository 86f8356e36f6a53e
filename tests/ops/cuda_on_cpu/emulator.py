"""The translation of a kernel, its build, and what stands for NVRTC and the driver."""

import ctypes
import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from svp_peft.errors import BackendError
from svp_peft.ops.cuda import disk_cache

RUNTIME = Path(__file__).with_name("runtime.h")
ORDERS = ("forwards", "backwards", "shuffled")
_FLAGS = (
    *("-std=c++17", "-O1", "-w", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off"),
    "-U_FORTIFY_SOURCE",  # its longjmp refuses to change stacks
    "-fsanitize=alignment,bounds",
    "-ftrivial-auto-var-init=pattern",
)
_ENTRY = re.compile(
    r'extern\s+"C"\s+__global__\s+void(?P<bounds>[^{;]*?)\b(?P<name>\w+)\s*\(\s*const'
)
_DYNAMIC = re.compile(r"extern\s+__shared__\s+(\w+)\s+(\w+)\[\];")
_OPERAND = re.compile(r'"[=+&]*[a-z]"\s*(\((?:[^()]|\([^()]*\))*\))')


def unavailable() -> str | None:
    """None where kernels can be run, else one sentence: what is missing."""
    if not sys.platform.startswith("linux"):
        return "CUDA kernels are emulated on Linux only."
    command = shlex.split(os.environ.get("CXX", "c++"))
    if not command or shutil.which(command[0]) is None:
        return f"there is no C++ compiler {' '.join(command)!r} to emulate CUDA kernels with."
    return None


def translate(text: str) -> str:
    """CUDA C++ as C++: PTX instructions become calls, dynamic shared memory a pointer."""
    text = _DYNAMIC.sub(r"\1* const \2 = (\1*)emulator::arena;", text)
    text = _ENTRY.sub(r"static void\g<bounds>\g<name>(const", text)
    pieces, at = [], 0
    for found in re.finditer(r"\basm\s*(?:volatile\s*)?\(", text):
        end = _closing(text, found.end())
        body = text[found.end() : end]
        pieces += [text[at : found.start()], _call(body), "\n" * body.count("\n")]
        at = end + 1
    return "".join([*pieces, text[at:]])


def _closing(text: str, at: int) -> int:
    """Where the bracket ends that was opened before `at`."""
    depth = 1
    while depth:
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        at += 1
    return at - 1


def _call(body: str) -> str:
    """What is in the brackets of an asm statement, as a call of the instruction's emulation."""
    literals = re.match(r'\s*((?:"[^"]*"\s*)+)', body)
    assert literals is not None, body
    template = "".join(re.findall(r'"([^"]*)"', literals[1]))
    instruction, *_ = template.replace(";", " ").split()
    operands = _OPERAND.findall(body[literals.end() :])
    order = list(dict.fromkeys(int(n) for n in re.findall(r"%(\d+)", template)))
    if template.count(";") != 1 or order != list(range(len(operands))):
        raise ValueError(
            f"asm {template!r}: the emulator takes one instruction with its operands in order."
        )
    return f"ptx_{re.sub(r'[^a-z0-9]', '_', instruction)}({', '.join(operands)})"


class Nvrtc:
    """Stands for `svp_peft.ops.cuda.nvrtc.Nvrtc`; its machine code is C++."""

    version = (0, 0)
    path = str(RUNTIME)

    def target(self, capability: tuple[int, int]) -> str:
        return f"sm_{capability[0]}{capability[1]}"

    def compile(
        self, source: str, name: str, headers: dict[str, str], options: tuple[str, ...]
    ) -> bytes:
        macros = [option[2:].replace("=", " ", 1) for option in options if option.startswith("-D")]

        def included(match: re.Match[str]) -> str:
            text = headers[match[1]]
            return "" if text in seen else seen.setdefault(text, expand(text))

        def expand(text: str) -> str:
            return re.sub(r'#include "([^"]+)"', included, text)

        seen: dict[str, str] = {}
        whole = "".join(f"#define {macro}\n" for macro in macros) + expand(source)
        return translate(whole).encode()


class Driver:
    """Stands for `svp_peft.ops.cuda.driver.Driver`: builds, loads and calls the C++."""

    version = 0

    def __init__(self, cache: Path, order: str = "forwards") -> None:
        self.order = order
        self.launches: list[str] = []
        self._cache = cache
        self._loaded: list[tuple[str, ctypes._FuncPointer]] = []

    def load(self, image: bytes, entry: str, index: int, dynamic_shared: int) -> int:
        library = ctypes.PyDLL(str(_built(self._cache, image.decode(), entry)))
        self._loaded.append((entry, library.cuda_on_cpu))
        return len(self._loaded)

    def launch(
        self,
        function: int,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        stream: int,
        arguments: ctypes.Array,
        index: int,
    ) -> None:
        entry, run = self._loaded[function - 1]
        self.launches.append(entry)
        given = ctypes.cast(arguments, ctypes.POINTER(ctypes.c_void_p))[0]
        told = ctypes.create_string_buffer(600)
        refused = run(
            ctypes.c_void_p(given), (ctypes.c_uint * 3)(*grid), threads, shared,
            ORDERS.index(self.order), told, len(told),
        )  # fmt: skip
        if refused:
            raise BackendError(f"{entry}: {told.value.decode()}")


def _built(cache: Path, text: str, entry: str) -> Path:
    """The library of one kernel, from the cache or from the compiler."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    text = f"""{RUNTIME.read_text()}
{text}
extern "C" __attribute__((visibility("default"))) int cuda_on_cpu(
    const void* args, const unsigned* grid, unsigned threads, unsigned shared, unsigned order,
    char* told, size_t room) {{
  return emulator::launch([](const void* given) {{ {entry}(*(const Args*)given); }}, args, grid,
                          threads, shared, order, told, room);
}}
"""
    path = cache / f"{disk_cache.key_of(_version(compiler[0]), *compiler, *_FLAGS, text)}.so"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="build-") as scratch:
            Path(scratch, "kernel.cpp").write_text(text)
            # linked on its own: with -fsanitize the linker would ask for the sanitizer's library
            for step in ([*_FLAGS, "-c", "kernel.cpp"], ["-shared", "kernel.o", "-o", "kernel.so"]):
                done = subprocess.run(
                    [*compiler, *step], cwd=scratch, capture_output=True, text=True
                )
                if done.returncode:
                    raise BackendError(f"{entry} does not compile for a CPU:\n{done.stderr[:4000]}")
            os.replace(Path(scratch, "kernel.so"), path)
    return path


@functools.cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
