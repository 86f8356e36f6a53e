"""The translation of a kernel, its build, and what stands for NVRTC and the driver."""

import contextlib
import ctypes
import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from svp_peft.errors import BackendError
from svp_peft.ops.cuda import disk_cache

_HERE = Path(__file__).parent
ORDERS = ("forwards", "backwards", "shuffled")
_RUNTIME = ("runtime.cpp", "memory.h", "device.h")
# without _FORTIFY_SOURCE, whose longjmp refuses to change stacks
_FLAGS = """
    -std=c++17 -O1 -g1 -gdwarf-4 -w -fPIC -fvisibility=hidden -fno-strict-aliasing
    -ffp-contract=off -U_FORTIFY_SOURCE
""".split()
_CHECKS = ["-fsanitize=thread,bounds"]
_ENTRY = re.compile(r'extern\s+"C"\s+__global__\s+void([^{;]*?)\b(\w+)\s*\(\s*const')
_DYNAMIC = re.compile(r"extern\s+__shared__\s+(\w+)\s+(\w+)\[\];")
_INCLUDE = re.compile(r'#include "([^"]+)"')
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
    text = _DYNAMIC.sub(r"\1* const \2 = (\1*)emulator::dynamic_shared();", text)
    text = _ENTRY.sub(_entry, text)
    pieces, at = [], 0
    for found in re.finditer(r"\basm\s*(?:volatile\s*)?\(", text):
        end = _closing(text, found.end())
        body = text[found.end() : end]
        pieces += [text[at : found.start()], _call(body), "\n" * body.count("\n")]
        at = end + 1
    return "".join([*pieces, text[at:]])


def _entry(found: re.Match[str]) -> str:
    bounds, name = found.groups()
    return f"constexpr unsigned most_threads_of_{name} = {bounds or 1024}; static void {name}(const"


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
    path = str(_HERE)

    def target(self, capability: tuple[int, int]) -> str:
        return f"sm_{capability[0]}{capability[1]}"

    def compile(
        self, source: str, name: str, headers: dict[str, str], options: tuple[str, ...]
    ) -> bytes:
        macros = [option[2:].replace("=", " ", 1) for option in options if option.startswith("-D")]
        seen: set[str] = set()

        def expand(name: str, text: str) -> str:
            if name in seen:
                return ""
            seen.add(name)
            return f'#line 1 "{name}"\n' + _INCLUDE.sub(
                lambda match: (
                    expand(match[1], headers[match[1]])
                    + f'#line {text.count(chr(10), 0, match.start()) + 1} "{name}"\n'
                ),
                text,
            )

        whole = "".join(f"#define {macro}\n" for macro in macros) + expand(name, source)
        return translate(whole).encode()


class Driver:
    """Stands for `svp_peft.ops.cuda.driver.Driver`: builds, loads and calls the C++."""

    version = 0

    def __init__(self, cache: Path) -> None:
        self.order = "forwards"
        self.launches: list[str] = []
        self.tensors: dict[int, int] = {}  # address and size of every storage, the latest last
        self._cache = cache
        self._loaded: list[_Library] = []

    def load(self, image: bytes, entry: str, index: int, dynamic_shared: int) -> int:
        self._loaded.append(_Library(_built(self._cache, image.decode(), entry), entry))
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
        library = self._loaded[function - 1]
        self.launches.append(library.entry)
        library(grid, threads, shared, arguments, self.tensors, ORDERS.index(self.order))


class _Library:
    """One kernel, loaded."""

    def __init__(self, path: Path, entry: str) -> None:
        self.entry, self._path = entry, path
        library = ctypes.PyDLL(str(path))
        self._run, self._kernel = library.cuda_on_cpu_launch, library.cuda_on_cpu_kernel
        self._bytes = ctypes.c_size_t.in_dll(library, "cuda_on_cpu_bytes").value
        self._most_threads = ctypes.c_uint.in_dll(library, "cuda_on_cpu_threads").value

    def __call__(
        self,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        arguments: ctypes.Array,
        tensors: dict[int, int],
        order: int,
    ) -> None:
        if not (0 < threads <= self._most_threads and min(grid) > 0 and max(grid[1:]) < 1 << 16):
            raise BackendError(
                f"{self.entry}: {threads} threads in a grid of {grid}, and its __launch_bounds__ "
                f"are {self._most_threads}."
            )
        given = ctypes.cast(arguments, ctypes.POINTER(ctypes.c_void_p))[0]
        assert given is not None
        words = (ctypes.c_size_t * (self._bytes // 8)).from_address(given)
        found = {r for word in words if (r := _range_of(word, tensors)) is not None}
        flat = [number for begin in found for number in (begin, tensors[begin])]
        told = ctypes.create_string_buffer(700)
        self._run(
            self._kernel, ctypes.c_void_p(given), ctypes.c_size_t(self._bytes),
            (ctypes.c_size_t * len(flat))(*flat), len(found), (ctypes.c_uint * 3)(*grid), threads,
            shared, order, told, ctypes.c_size_t(len(told)),
        )  # fmt: skip
        if told.value:
            raise BackendError(f"{self.entry}: {self._located(told.value.decode())}")

    def _located(self, message: str) -> str:
        """The address after an @ as a line of the source, where a tool for it is installed."""
        at = re.search(r"@([0-9a-f]+)", message)
        tool = shutil.which("addr2line")
        if at is None or tool is None:
            return message
        place = subprocess.run(
            [tool, "-e", str(self._path), hex(int(at[1], 16) - 1)], capture_output=True, text=True
        )
        return message.replace(at[0], place.stdout.strip().rpartition("/")[2])


def _range_of(address: int, tensors: dict[int, int]) -> int | None:
    """Where the storage begins that holds this address."""
    for begin in reversed(tensors):
        if begin <= address < begin + tensors[begin]:
            return begin
    return None


def _built(cache: Path, text: str, entry: str) -> Path:
    """The library of one kernel, from the cache or from the compiler."""
    compiler = tuple(shlex.split(os.environ.get("CXX", "c++")))
    text = f"""#include "device.h"
{text}
#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT void cuda_on_cpu_kernel(const void* args) {{ {entry}(*(const Args*)args); }}
EXPORT const size_t cuda_on_cpu_bytes = sizeof(Args);
EXPORT const unsigned cuda_on_cpu_threads = most_threads_of_{entry};
"""
    runtime = [(_HERE / name).read_text() for name in _RUNTIME]
    kernel_flags = [*_FLAGS, *_CHECKS, *_pattern(compiler)]
    key = disk_cache.key_of(_version(compiler), *compiler, *kernel_flags, *runtime, text)
    path = cache / f"{key}.so"
    if path.exists():
        path.touch()
        return path
    _forget_old(cache)
    shared_object = _compiled(cache, [*compiler, *_FLAGS], runtime)
    return _stored(
        path,
        text,
        [
            [*compiler, *kernel_flags, f"-I{_HERE}", "-c", "source.cpp"],
            # without -fsanitize here: with it the linker would ask for the sanitizer's library
            [*compiler, "-shared", "source.o", str(shared_object), "-o", "result"],
        ],
    )


def _compiled(cache: Path, command: list[str], runtime: list[str]) -> Path:
    """The object file of runtime.cpp."""
    path = cache / f"{disk_cache.key_of(*command, *runtime)}.o"
    if path.exists():
        return path
    return _stored(path, runtime[0], [[*command, f"-I{_HERE}", "-c", "source.cpp", "-o", "result"]])


def _stored(path: Path, source: str, steps: list[list[str]]) -> Path:
    """Run the steps beside source.cpp and keep the file `result` as `path`, in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as scratch:
        Path(scratch, "source.cpp").write_text(source)
        for step in steps:
            done = subprocess.run(step, cwd=scratch, capture_output=True, text=True)
            if done.returncode:
                raise BackendError(f"It does not compile for a CPU:\n{done.stderr[:4000]}")
        os.replace(Path(scratch, "result"), path)
    return path


@functools.cache
def _forget_old(cache: Path) -> None:
    """Delete what no test has used for a month: every change of a source makes new libraries."""
    for path in cache.glob("*.*o"):
        with contextlib.suppress(OSError):  # another process was faster
            if time.time() - path.stat().st_mtime > 30 * 86_400:
                path.unlink()


@functools.cache
def _version(compiler: tuple[str, ...]) -> str:
    return subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout


@functools.cache
def _pattern(compiler: tuple[str, ...]) -> tuple[str, ...]:
    """The flag that fills local variables with a pattern, for compilers that know it."""
    flag = "-ftrivial-auto-var-init=pattern"
    command = [*compiler, flag, "-x", "c++", "-fsyntax-only", os.devnull]
    return (flag,) if subprocess.run(command, capture_output=True).returncode == 0 else ()
