"""Damaged files and killed saves: an error of ours, or exactly a saved adapter."""

import os
import random
import signal
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from svp_peft.adapter_build import check_contents
from svp_peft.adapter_config import CONFIG_NAME
from svp_peft.adapter_file import load_adapter, save_adapter
from svp_peft.adapter_format import WEIGHTS_NAME, AdapterContents, decode, encode
from svp_peft.adapter_store import HubOptions, read_adapter, write_folder
from svp_peft.adapter_tensors import adapter_state
from svp_peft.errors import AdapterNotFoundError, SVPError
from svp_peft.patch import remove_svp
from tests.tiny import assert_unchanged, base, snapshot, trained

# docs/reliability.md was measured with more of both
DAMAGED_FILES = int(os.environ.get("SVP_PEFT_DAMAGED_FILES", "2000"))
KILLS = int(os.environ.get("SVP_PEFT_KILLS", "50"))

Files = tuple[bytes, bytes]
"""adapter_config.json and adapter_model.safetensors."""


def flip_bit(data: bytes, position: int, bit: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :]


def flip_anywhere(files: Files, rng: random.Random) -> Files:
    config, weights = files
    return config, flip_bit(weights, rng.randrange(len(weights)), rng.randrange(8))


def flip_in_header(files: Files, rng: random.Random) -> Files:
    config, weights = files
    header = 8 + int.from_bytes(weights[:8], "little")
    return config, flip_bit(weights, rng.randrange(header), rng.randrange(8))


def flip_in_config(files: Files, rng: random.Random) -> Files:
    config, weights = files
    return flip_bit(config, rng.randrange(len(config)), rng.randrange(8)), weights


def flip_in_both(files: Files, rng: random.Random) -> Files:
    return flip_in_config(flip_anywhere(files, rng), rng)


def truncate(files: Files, rng: random.Random) -> Files:
    config, weights = files
    if rng.random() < 0.2:
        return config[: rng.randrange(len(config))], weights
    return config, weights[: rng.randrange(len(weights))]


def append(files: Files, rng: random.Random) -> Files:
    config, weights = files
    return config, weights + rng.randbytes(rng.randint(1, 64))


def overwrite_range(files: Files, rng: random.Random) -> Files:
    """A page of zeros or of another file, as a crashed file system leaves."""
    config, weights = files
    start, size = rng.randrange(len(weights)), rng.choice([1, 16, 512])
    new = bytes(size) if rng.random() < 0.5 else rng.randbytes(size)
    return config, (weights[:start] + new + weights[start + size :])[: len(weights)]


def swap_tensors(files: Files, rng: random.Random) -> Files:
    """Two names in the header change places: the tensors are whole and in the wrong place."""
    config, weights = files
    names = [f'"svp.inner.{block}.up.bias"'.encode() for block in range(4)]
    first, second = rng.sample(names, 2)
    marked = weights.replace(first, b"\0" * len(first)).replace(second, first)
    return config, marked.replace(b"\0" * len(first), second, 1)


DAMAGES: list[Callable[[Files, random.Random], Files]] = [
    flip_anywhere,
    flip_in_header,
    flip_in_config,
    flip_in_both,
    truncate,
    append,
    overwrite_range,
    swap_tensors,
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = save_adapter(trained(), tmp_path_factory.mktemp("adapter"))
    return (folder / CONFIG_NAME).read_bytes(), (folder / WEIGHTS_NAME).read_bytes()


def same(found: AdapterContents, saved: AdapterContents) -> bool:
    """Equal tensors and an equal config, but for what names the base model."""
    origin = {
        "base_fingerprint": saved.info.base_fingerprint,
        "svp_peft_version": saved.info.svp_peft_version,
        "svp": replace(
            found.info.svp,
            base_model_name_or_path=saved.info.svp.base_model_name_or_path,
            revision=saved.info.svp.revision,
        ),
    }
    return (
        replace(found.info, **origin) == saved.info
        and found.tensors.keys() == saved.tensors.keys()
        and all(torch.equal(found.tensors[key], saved.tensors[key]) for key in saved.tensors)
    )


def test_damaged_files_are_refused_or_are_the_saved_adapter(files):
    rng = random.Random(0)
    saved = decode(*files, where="adapter", one_commit=False)
    refused = harmless = 0
    for number in range(DAMAGED_FILES):
        damaged = DAMAGES[number % len(DAMAGES)](files, rng)
        try:
            found = decode(*damaged, where="adapter", one_commit=number % 3 == 0)
            check_contents(found)
        except SVPError:
            refused += 1
        else:
            assert same(found, saved), f"damage {number}"
            harmless += 1
    # swapping nothing, or a bit in a key that only describes, is harmless; nothing else is
    assert refused + harmless == DAMAGED_FILES
    assert harmless < DAMAGED_FILES / 10
    print(f"{refused} refused, {harmless} harmless")


def test_damaged_files_through_load_adapter_leave_the_model_as_it_was(files, tmp_path):
    rng = random.Random(1)
    saved = decode(*files, where="adapter", one_commit=False).tensors
    model = base()
    before = snapshot(model)
    folder = write_folder(tmp_path / "adapter", *files)
    for number in range(200):
        config, weights = DAMAGES[number % len(DAMAGES)](files, rng)
        (folder / CONFIG_NAME).write_bytes(config)
        (folder / WEIGHTS_NAME).write_bytes(weights)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                load_adapter(model, folder)
        except SVPError:
            assert "svp" not in model._modules
        else:
            state = adapter_state(model, "default")
            assert all(torch.equal(state[key], saved[key]) for key in saved), f"damage {number}"
            remove_svp(model)
    assert_unchanged(model, before)


def test_the_fuzzer_would_notice_a_file_without_hashes(files, tmp_path):
    """The test above can fail: without the hashes a flipped bit in a tensor goes unnoticed."""
    contents = decode(*files, where="adapter", one_commit=False)
    bare = replace(contents.info, weights_sha256=None)
    changed = dict(contents.tensors)
    changed["svp.beta"] = changed["svp.beta"] + 1
    folder = write_folder(tmp_path, *encode(bare, changed))
    assert not same(read_adapter(folder, HubOptions()), contents)


# kill -9 while saving


@pytest.fixture(scope="module")
def generations(files: Files) -> list[Files]:
    """Whole adapters that differ in every tensor and in the config."""
    contents = decode(*files, where="adapter", one_commit=False)
    made = []
    for number in range(4):
        svp = replace(contents.info.svp, dropout=number / 10)
        tensors = {key: torch.full_like(t, number + 1.0) for key, t in contents.tensors.items()}
        made.append(encode(replace(contents.info, svp=svp), tensors))
    return made


def generation_in(folder: Path) -> int:
    """Number of the generation that the folder holds, after checking that it holds all of it."""
    contents = read_adapter(folder, HubOptions())
    check_contents(contents)
    number = round(contents.info.svp.dropout * 10)
    assert all(bool((tensor == number + 1.0).all()) for tensor in contents.tensors.values())
    return number


def in_child(action: Callable[[], object]) -> int:
    """Process id of a fork that runs `action`, which must not use torch."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(1)
    return child


@pytest.mark.parametrize("step", range(6))
def test_killed_at_every_step_of_a_save_the_old_or_the_new_adapter_is_whole(
    tmp_path, generations, step
):
    """Steps: two files are synced, two renamed, the folder is synced, then nothing is left."""
    folder = write_folder(tmp_path / "adapter", *generations[0])

    def save() -> None:
        calls = 0
        for name in ("fsync", "replace"):
            original = getattr(os, name)

            def counted(*args: object, original: Callable[..., object] = original) -> object:
                nonlocal calls
                if calls == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                calls += 1
                return original(*args)

            setattr(os, name, counted)
        write_folder(folder, *generations[1])
        os.kill(os.getpid(), signal.SIGKILL)

    _, status = os.waitpid(in_child(save), 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert generation_in(folder) == (0 if step < 3 else 1)
    # and the next save works, whatever was left lying about
    write_folder(folder, *generations[2])
    assert generation_in(folder) == 2


def test_kills_at_random_moments_lose_nothing(tmp_path, generations):
    rng = random.Random(0)
    folder = write_folder(tmp_path / "adapter", *generations[0])

    def save_for_ever() -> None:
        number = 0
        while True:
            number += 1
            write_folder(folder, *generations[number % len(generations)])

    seen = set()
    for _ in range(KILLS):
        child = in_child(save_for_ever)
        time.sleep(rng.uniform(0.001, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        seen.add(generation_in(folder))
    leftovers = len(list(folder.glob(".adapter_*.tmp")))
    print(f"{leftovers} of {KILLS} kills came in the middle of a write")
    assert len(seen) > 1, "no save ever got through: the test proves nothing"


def test_killed_before_the_first_save_is_complete_there_is_no_adapter(tmp_path, generations):
    write_folder(tmp_path, *generations[0])
    (tmp_path / CONFIG_NAME).unlink()
    with pytest.raises(AdapterNotFoundError, match="save again"):
        read_adapter(tmp_path, HubOptions())


def test_leftovers_of_killed_saves_are_removed_once_they_are_old(tmp_path, generations):
    young = tmp_path / f".{WEIGHTS_NAME}.1.aa.tmp"
    old = tmp_path / f".{WEIGHTS_NAME}.2.bb.tmp"
    for file in (young, old):
        file.write_bytes(b"half")
    os.utime(old, (0, 0))
    write_folder(tmp_path, *generations[0])
    # a young one may belong to a save that is running
    assert young.exists()
    assert not old.exists()
