"""Eight processes at once, full disks, vanishing folders, threads, and a thousand cycles."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from svp_peft import adapter_store
from svp_peft.adapter_build import check_contents
from svp_peft.adapter_config import CONFIG_NAME
from svp_peft.adapter_file import load_adapter, save_adapter
from svp_peft.adapter_format import WEIGHTS_NAME, decode
from svp_peft.adapter_store import HubOptions, read_adapter
from svp_peft.adapter_tensors import adapter_state
from svp_peft.adapters import delete_adapter, list_adapters
from svp_peft.errors import AdapterNotFoundError, AdapterSaveError
from svp_peft.hub import push_folder
from tests.fakehub import FakeHub
from tests.processes import Processes
from tests.tiny import base, images, randomise, trained

SEEDS = (1, 2, 3)


def fingerprint(tensors: dict[str, torch.Tensor]) -> float:
    """Tells the adapters of the seeds apart, and mixtures of them from all."""
    return sum(float(tensor.double().sum()) for _, tensor in sorted(tensors.items()))


def fingerprints() -> dict[float, int]:
    return {fingerprint(adapter_state(trained(seed=seed))): seed for seed in SEEDS}


# run in other processes


def save_often(folder: str, seed: int, times: int) -> int:
    model = trained(seed=seed)
    for _ in range(times):
        save_adapter(model, folder)
    return times


def load_often(folder: str, times: int) -> list[int]:
    known, seen = fingerprints(), []
    model = base()
    for number in range(times):
        load_adapter(model, folder, adapter_name=f"a{number}")
        seen.append(known[fingerprint(adapter_state(model, f"a{number}"))])
    return seen


def push_often(folder: str, times: int) -> list[str]:
    return [push_folder(folder, "me/birds").oid for _ in range(times)]


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    with Processes() as running:
        yield running


def test_eight_processes_save_load_and_push_one_folder_at_once(processes, tmp_path):
    folder = str(save_adapter(trained(seed=1), tmp_path / "adapter"))
    with FakeHub() as hub:
        answers = processes.call_all(
            [
                *((save_often, (folder, seed, 20), {}) for seed in SEEDS),
                *((load_often, (folder, 20), {}) for _ in range(3)),
                *((push_often, (folder, 3), {}) for _ in range(2)),
            ],
            env=hub.env(tmp_path / "cache"),
        )
        assert [answer.traceback for answer in answers] == [""] * 8
        known = fingerprints()
        # every commit on the Hub is one whole adapter
        commits = hub.repos["me/birds"].commits.values()
        pushed = [tree for tree in commits if WEIGHTS_NAME in tree]
        assert pushed
        for tree in pushed:
            contents = decode(
                tree[CONFIG_NAME], tree[WEIGHTS_NAME], where="pushed", one_commit=True
            )
            check_contents(contents)
            assert fingerprint(contents.tensors) in known
    assert fingerprint(read_adapter(folder, HubOptions()).tensors) in known
    assert sorted(os.listdir(folder)) == [CONFIG_NAME, WEIGHTS_NAME]


# disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs, which this process does not have")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_full_disk_keeps_the_old_adapter_and_says_what_is_needed(small_disk):
    folder = save_adapter(trained(seed=1), small_disk / "adapter")
    with contextlib.suppress(OSError), open(small_disk / "filler", "wb", buffering=0) as filler:
        while True:
            filler.write(bytes(1024))
    with pytest.raises(AdapterSaveError, match=r"No space left.*bytes are needed.*Free some space"):
        save_adapter(trained(seed=2), folder)
    assert sorted(os.listdir(folder)) == [CONFIG_NAME, WEIGHTS_NAME]
    model = load_adapter(base(), folder)
    assert torch.equal(model(images()), trained(seed=1)(images()))
    (small_disk / "filler").unlink()
    save_adapter(trained(seed=2), folder)
    assert torch.equal(load_adapter(base(), folder)(images()), trained(seed=2)(images()))


def save_limited(folder: str) -> None:
    """With files of at most 4 KiB, which fails in the middle of a write."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    save_adapter(trained(seed=2), folder)


def test_write_that_fails_half_way_keeps_the_old_adapter(processes, tmp_path):
    folder = save_adapter(trained(seed=1), tmp_path / "adapter")
    answer = processes.call(save_limited, str(folder))
    assert answer.error == "AdapterSaveError"
    assert "File too large" in answer.message
    assert sorted(os.listdir(folder)) == [CONFIG_NAME, WEIGHTS_NAME]
    assert torch.equal(load_adapter(base(), folder)(images()), trained(seed=1)(images()))


def save_as_nobody(folder: str) -> None:
    if os.geteuid() == 0:
        os.setuid(65534)
    save_adapter(trained(), folder)


def test_read_only_folder_is_named(processes):
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        folder = Path(place) / "adapter"
        folder.mkdir()
        folder.chmod(0o555)
        answer = processes.call(save_as_nobody, str(folder))
        assert answer.error == "AdapterSaveError"
        assert f"could not be written to {folder}: Permission denied" in answer.message
        assert "choose a folder that may be written" in answer.message
        folder.chmod(0o755)


def test_folder_removed_while_saving_is_made_again(tmp_path, monkeypatch):
    folder = tmp_path / "adapter"
    removals = [2]

    def remove(_: int) -> None:
        if removals[0]:
            removals[0] -= 1
            shutil.rmtree(folder)

    monkeypatch.setattr(adapter_store.os, "fsync", remove)
    save_adapter(trained(), folder)
    assert removals == [0]
    monkeypatch.undo()
    assert torch.equal(load_adapter(base(), folder)(images()), trained()(images()))


def test_folder_that_is_always_removed_is_an_error(tmp_path, monkeypatch):
    folder = tmp_path / "adapter"
    monkeypatch.setattr(adapter_store.os, "fsync", lambda _: shutil.rmtree(folder, True))
    with pytest.raises(AdapterSaveError, match="No such file"):
        save_adapter(trained(), folder)
    with pytest.raises(AdapterNotFoundError):
        load_adapter(base(), folder)


# one process


def train(model: torch.nn.Module, steps: int) -> list[float]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    x, losses = images(), []
    for step in range(steps):
        loss = F.cross_entropy(model(x), torch.tensor([step % 5, 1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_loading_from_another_thread_does_not_disturb_training(tmp_path):
    folder = save_adapter(trained(seed=7), tmp_path)
    expected = train(trained(seed=1), 30)
    model = trained(seed=1)
    failures: list[BaseException] = []
    cycles, done = 0, threading.Event()

    def load_and_delete() -> None:
        nonlocal cycles
        try:
            while not done.is_set():
                load_adapter(model, folder, adapter_name=f"a{cycles}")
                if cycles:
                    delete_adapter(model, f"a{cycles - 1}")
                cycles += 1
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=load_and_delete)
    thread.start()
    try:
        losses = train(model, 30)
    finally:
        done.set()
        thread.join()
    assert not failures
    assert cycles > 1, "the thread never ran beside the training"
    # bit for bit the run without it
    assert losses == expected
    assert list_adapters(model) == ["default", f"a{cycles - 1}"]


def resident() -> int:
    """Bytes of memory this process holds."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_thousand_loads_and_deletes_leave_no_trace(tmp_path):
    folder = save_adapter(trained(seed=7), tmp_path)
    model = trained(seed=1)
    keys = list(model.state_dict())
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
    expected = model(images()).detach()

    def cycle(times: int) -> None:
        for _ in range(times):
            load_adapter(model, folder, adapter_name="other")
            delete_adapter(model, "other")

    cycle(100)
    gc.collect()
    objects, memory = len(gc.get_objects()), resident()
    cycle(900)
    gc.collect()
    # a leaked adapter is 60 objects and 5 kB; the interpreter's own caches move by a few objects
    assert len(gc.get_objects()) - objects < 100
    if Path("/proc/self/statm").exists():
        assert resident() - memory < 2**21
    assert list(model.state_dict()) == keys
    assert hooks == sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
    assert torch.equal(model(images()), expected)


def test_the_check_above_would_notice_adapters_that_stay(tmp_path):
    folder = save_adapter(trained(seed=7), tmp_path)
    model = trained(seed=1)
    gc.collect()
    objects = len(gc.get_objects())
    for number in range(20):
        load_adapter(model, folder, adapter_name=f"a{number}")
    gc.collect()
    assert len(gc.get_objects()) - objects > 100


def test_adapters_of_one_model_are_saved_while_it_trains(tmp_path):
    """A checkpoint thread: every file it writes is whole, whatever step the training is at."""
    model = trained(seed=1)
    seen = set()
    done = threading.Event()

    def save() -> None:
        while not done.is_set():
            save_adapter(model, tmp_path)
            seen.add(read_adapter(tmp_path, HubOptions()).digest)

    thread = threading.Thread(target=save)
    thread.start()
    try:
        train(model, 20)
    finally:
        done.set()
        thread.join()
    assert seen
    check_contents(read_adapter(tmp_path, HubOptions()))
    randomise(model, "default", 3)
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(base(), tmp_path)(images()), model(images()))
