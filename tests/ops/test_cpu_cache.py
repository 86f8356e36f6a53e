"""Where the C++ kernels are kept, and every directory that will not do."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from svp_peft.ops import cpu
from svp_peft.ops.cpu import loader
from tests.ops.cpu_builds import (
    CPU,
    assert_built,
    assert_falls_back,
    environment,
    executable,
    needs_compiler,
    run,
    write_source,
)

pytestmark = needs_compiler


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_source(tmp_path / "csrc")


def test_an_unwritable_cache_sends_the_build_to_a_private_temporary_folder(
    tmp_path: Path, tiny: Path
) -> None:
    (tmp_path / "file").write_text("no folder can be made below a file")
    env = environment(tmp_path / "file" / "cache", TMPDIR=str(tmp_path))
    folder = tmp_path / f"svp_peft-{os.getuid()}"
    assert_built(run(tiny, env), folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    # one that others could write to is not trusted
    folder.chmod(0o777)
    assert_falls_back(run(tiny, env), "no directory to build them in", "Set SVP_PEFT_CACHE")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SVP_PEFT_CACHE": "/a"}, "/a/cpu"),
        ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/svp_peft/cpu"),
        ({"HOME": "/c"}, "/c/.cache/svp_peft/cpu"),
        ({"SVP_PEFT_CACHE": "~/d", "HOME": "/c"}, "/c/d/cpu"),
        ({"SVP_PEFT_CACHE": "here"}, f"{os.getcwd()}/here/cpu"),
    ],
)
def test_the_cache_is_where_the_variables_say(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str
) -> None:
    for name in ("SVP_PEFT_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert next(loader.cache_directories()) == Path(expected)


def test_a_folder_that_may_not_be_entered_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: Path
) -> None:
    """As in a container whose HOME belongs to another user: even asking for a file is refused."""
    closed = tmp_path / "closed"

    def outside(method: Callable[..., object]) -> Callable[..., object]:
        def guarded(self: Path, *arguments: object, **options: object) -> object:
            if self.is_relative_to(closed):
                raise PermissionError(13, "Permission denied", str(self))
            return method(self, *arguments, **options)

        return guarded

    for name in ("stat", "mkdir"):
        monkeypatch.setattr(Path, name, outside(getattr(Path, name)))
    monkeypatch.setattr(loader, "_library", None)
    monkeypatch.setattr(loader, "_reason", None)
    monkeypatch.setattr(loader, "SOURCES", tiny)
    monkeypatch.setattr(loader.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("SVP_PEFT_CACHE", str(closed))
    assert cpu.unavailable(CPU) is None
    assert loader._library is not None
    assert Path(loader._library._name).is_relative_to(tmp_path / f"svp_peft-{os.getuid()}")


def test_a_full_disk_sends_the_build_elsewhere(tmp_path: Path, tiny: Path) -> None:
    compiler = executable(
        tmp_path / "full-c++",
        'case "$PWD:$*" in */cache/*" -c "*)\n'
        '  echo "one.s: Fatal error: one.o: No space left on device"; exit 1;; esac\n'
        'exec c++ "$@"\n',
    )
    env = environment(tmp_path / "cache", CXX=str(compiler), TMPDIR=str(tmp_path))
    assert_built(run(tiny, env), tmp_path / f"svp_peft-{os.getuid()}")


def test_what_is_built_but_does_not_load_is_said_for_every_folder(
    tmp_path: Path, tiny: Path
) -> None:
    """As where both folders are mounted noexec."""
    compiler = executable(
        tmp_path / "odd-c++",
        'case "$*" in *" -c "*) exec c++ "$@";; *"-o svp_cpu.so"*) echo junk > svp_cpu.so;;\n'
        '*) exec c++ "$@";; esac\n',
    )
    env = environment(tmp_path / "cache", CXX=str(compiler), TMPDIR=str(tmp_path))
    result = run(tiny, env)
    assert_falls_back(result, "does not load", "svp_cpu.so: file too short", "Set SVP_PEFT_CACHE")
    assert result["reason"].count("does not load") == 2
