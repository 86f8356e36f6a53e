"""What the loop promises: resuming, clear errors, accumulation, several processes, the methods."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import train_hta
import train_vtab1k
from accelerate import Accelerator
from datasets import load_vtab
from engine import chosen_recipe, new_parser
from epochs import evaluate, per_step_batch
from images import Normalise, Order, build_data, build_loader
from methods import METHODS, apply_method, load_trained, save_trained, trained_state
from recipes import HTA, QUIRKS, VTAB
from run_folder import RunError, latest_checkpoint, read_metrics, save_checkpoint
from safetensors.torch import load_file
from timm.scheduler import CosineLRScheduler

import svp_peft as sp
from tests.miniatures import write_dtd, write_vtab

EXAMPLES = Path(train_hta.__file__).parent
TIMES = {"seconds", "images_per_second", "data_wait"}


def command(backbone: Path, root: Path, output: Path, epochs: int = 3) -> list[str]:
    """train_hta.py with everything random switched on: RandAugment, erasing, Mixup, drop path."""
    return [
        *("--dataset", "dtd", "--data-root", str(root), "--backbone", str(backbone)),
        *("--output", str(output), "--cpu", "--workers", "2", "--batch-size", "6"),
        *("--epochs", str(epochs), "--cross-group-size", "2", "--checkpoint-seconds", "0"),
        *("--select", "val", "--seeds", "0", "--lr", "3e-3"),
    ]


def without_times(row: dict) -> dict:
    return {key: value for key, value in row.items() if key not in TIMES}


def assert_same_run(one: Path, other: Path) -> None:
    rows = [[without_times(row) for row in read_metrics(folder)] for folder in (one, other)]
    assert rows[0] == rows[1]
    results = [json.loads((folder / "result.json").read_text()) for folder in (one, other)]
    assert without_times(results[0]) == without_times(results[1])
    for place in ("best", "last"):
        tensors = [load_file(f / place / "adapter_model.safetensors") for f in (one, other)]
        assert tensors[0].keys() == tensors[1].keys()
        assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0])


@pytest.fixture(scope="module")
def uninterrupted(tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tmp path with data/ and the folder out/ of a run of four epochs."""
    root = tmp_path_factory.mktemp("uninterrupted")
    write_dtd(root / "data")
    train_hta.main(command(tiny_backbone, root / "data", root / "out", epochs=4))
    return root


def test_a_run_killed_with_kill_9_resumes_to_the_same_bits(
    uninterrupted: Path, tiny_backbone: Path, tmp_path: Path
):
    arguments = command(tiny_backbone, uninterrupted / "data", tmp_path, epochs=4)
    process = subprocess.Popen(
        [sys.executable, str(EXAMPLES / "train_hta.py"), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    folder = tmp_path / "dtd/svp/seed0"
    deadline = time.monotonic() + 120
    while not (folder / "checkpoints/epoch_0001").is_dir():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    # the whole group: the workers of the loader too
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folder / "result.json").exists()
    train_hta.main(arguments)
    assert_same_run(folder, uninterrupted / "out/dtd/svp/seed0")


def test_what_a_kill_leaves_half_written_is_written_again(
    uninterrupted: Path, tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    done = uninterrupted / "out/dtd/svp/seed0"
    arguments = command(tiny_backbone, uninterrupted / "data", tmp_path, epochs=4)

    class Killed(BaseException):
        pass

    def kill(*_: object) -> None:
        raise Killed

    # stop in the middle of the second checkpoint
    folder = tmp_path / "dtd/svp/seed0"
    saved = Accelerator.save_state

    def save_state(accelerator: Accelerator, output: str) -> str:
        if (folder / "checkpoints/epoch_0000").exists():
            (Path(output)).mkdir(parents=True)
            (Path(output) / "model.safetensors").write_bytes(b"half")
            raise Killed
        return saved(accelerator, output)

    monkeypatch.setattr(Accelerator, "save_state", save_state)
    with pytest.raises(Killed):
        train_hta.main(arguments)
    monkeypatch.undo()
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 2, "lo')
    train_hta.main(arguments)
    assert_same_run(folder, done)


def test_a_run_stopped_before_its_first_checkpoint_starts_anew(
    uninterrupted: Path, tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    arguments = command(tiny_backbone, uninterrupted / "data", tmp_path, epochs=4)

    def full(*_: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Accelerator, "save_state", full)
    with pytest.raises(RunError, match="Make room"):
        train_hta.main(arguments)
    monkeypatch.undo()
    folder = tmp_path / "dtd/svp/seed0"
    # the epoch is written down, but nothing can go on from it
    assert len(read_metrics(folder)) == 1
    train_hta.main(arguments)
    assert_same_run(folder, uninterrupted / "out/dtd/svp/seed0")


def test_another_run_is_refused_the_folder(uninterrupted: Path, tiny_backbone: Path):
    arguments = command(tiny_backbone, uninterrupted / "data", uninterrupted / "out", epochs=4)
    # complete or not: else a new learning rate would get the old result
    with pytest.raises(RunError, match=r"other settings: lr \(0\.003, now 0\.001\)"):
        train_hta.main([*arguments, "--lr", "1e-3"])


def test_changed_images_are_another_run(tiny_backbone: Path, tmp_path: Path):
    write_dtd(tmp_path / "data")
    arguments = [*command(tiny_backbone, tmp_path / "data", tmp_path / "out"), "--steps", "1"]
    train_hta.main(arguments)
    (tmp_path / "out/dtd/svp/seed0/result.json").unlink()
    listing = tmp_path / "data/dtd/dtd/labels/train1.txt"
    listing.write_text("\n".join(listing.read_text().split()[1:]))
    with pytest.raises(RunError, match="other settings: train"):
        train_hta.main(arguments)


def test_a_full_disk_keeps_the_checkpoint_before(tiny_backbone: Path, tmp_path: Path):
    model = sp.load_vim(tiny_backbone, num_classes=3)
    apply_method(model, "full", cross_group_size=2)
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(model.parameters())
    model, optimizer = accelerator.prepare(model, optimizer)
    progress = {"epochs_done": 1}
    save_checkpoint(accelerator, model, tmp_path, 0, progress, {})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # the kernel refuses to let a file grow beyond this, as it would on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(RunError, match=r"could not be written .* MB are free. Make room"):
            save_checkpoint(accelerator, model, tmp_path, 1, progress, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    accelerator.free_memory()
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == ["epoch_0000"]
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints/epoch_0000"


def test_a_checkpoint_holds_trained_tensors_only(uninterrupted: Path, tiny_backbone: Path):
    checkpoint = latest_checkpoint(uninterrupted / "out/dtd/svp/seed0")
    names = load_file(checkpoint / "model.safetensors").keys()
    model = apply_method(sp.load_vim(tiny_backbone, num_classes=3), "svp", cross_group_size=2)
    assert names == trained_state(model).keys()


# ---- the loop ------------------------------------------------------------------------------------


def vtab_losses(
    tiny_backbone: Path, root: Path, output: Path, *options: str, monkeypatch: pytest.MonkeyPatch
) -> list[float]:
    # no drop path: its draws depend on how images are divided into steps
    row = replace(VTAB["clevr_count"], drop_path=0.0)
    monkeypatch.setitem(train_vtab1k.VTAB, "clevr_count", row)
    if not (root / "VTAB").exists():
        write_vtab(root, "clevr_count", 8)
    train_vtab1k.main(
        [
            *("--dataset", "clevr_count", "--data-root", str(root), "--output", str(output)),
            *("--backbone", str(tiny_backbone), "--cpu", "--batch-size", "4", "--epochs", "3"),
            *("--cross-group-size", "2", *options),
        ]
    )
    folder = next(output.glob("clevr_count/*/seed0"))
    return [row["loss"] for row in read_metrics(folder)]


def test_accumulated_steps_make_the_same_batch(
    tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    losses = [
        vtab_losses(
            tiny_backbone, tmp_path, tmp_path / n, "--accumulate", n, monkeypatch=monkeypatch
        )
        for n in ("1", "2")
    ]
    # single precision, another order of summation
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_ema_is_kept_evaluated_and_resumed(
    tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    options = ("--ema", "0.5", "--checkpoint-seconds", "0")
    vtab_losses(tiny_backbone, tmp_path, tmp_path / "out", *options, monkeypatch=monkeypatch)
    folder = tmp_path / "out/clevr_count/svp/seed0"
    first = json.loads((folder / "result.json").read_text())
    assert 0 <= first["ema_test_accuracy"] <= 1
    (folder / "result.json").unlink()
    vtab_losses(tiny_backbone, tmp_path, tmp_path / "out", *options, monkeypatch=monkeypatch)
    again = json.loads((folder / "result.json").read_text())
    assert without_times(first) == without_times(again)


@pytest.mark.slow
def test_two_processes_under_torchrun_train_and_count_every_test_image_once(
    tiny_backbone: Path, tmp_path: Path
):
    write_vtab(tmp_path, "clevr_count", 8)
    arguments = [
        *("--dataset", "clevr_count", "--data-root", str(tmp_path), "--backbone"),
        *(str(tiny_backbone), "--output", str(tmp_path / "out"), "--cpu", "--batch-size", "4"),
        *("--epochs", "2", "--cross-group-size", "2", "--method", "linear"),
    ]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, str(EXAMPLES / "train_vtab1k.py"), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    folder = tmp_path / "out/clevr_count/linear/seed0"
    result = json.loads((folder / "result.json").read_text())
    assert len(read_metrics(folder)) == 2
    model = sp.load_vim(tiny_backbone, num_classes=8)
    apply_method(model, "linear", cross_group_size=2)
    load_trained(model, "linear", folder / "best")
    test = load_vtab("clevr_count", tmp_path, 8).test
    device = torch.device("cpu")
    loader = build_loader(
        build_data(test, "resize", 32, device, training=False),
        Order(4, None),
        4,
        0,
        drop_last=False,
    )
    # one process over all four images
    alone = evaluate(Accelerator(cpu=True), model, loader, Normalise(device))
    assert result["test_accuracy"] == alone


def test_a_loss_that_is_not_finite_stops_the_run(
    tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(RunError, match=r"the loss is nan in epoch .* Lower --lr"):
        vtab_losses(
            tiny_backbone, tmp_path, tmp_path / "out", "--lr", "1e30", monkeypatch=monkeypatch
        )


def test_batches_that_cannot_be_divided_or_filled_are_refused():
    assert per_step_batch(HTA["cub"], 4, 1000) == 24
    with pytest.raises(RunError, match="a batch of 96 cannot be divided among 5"):
        per_step_batch(HTA["cub"], 5, 1000)
    with pytest.raises(RunError, match="20 training images do not fill one batch of 96"):
        per_step_batch(HTA["cub"], 1, 20)
    with pytest.raises(RunError, match="3 images, but Mixup"):
        per_step_batch(HTA["cub"], 32, 1000)
    # no Mixup there
    assert per_step_batch(HTA["svhn"], 32, 1000) == 3


def test_the_command_line_changes_the_recipe():
    parser = new_parser("", list(HTA))
    base = ["--dataset", "flowers", "--data-root", "x"]
    assert chosen_recipe(HTA["flowers"], parser.parse_args(base)) == HTA["flowers"]
    paper = chosen_recipe(HTA["flowers"], parser.parse_args([*base, "--recipe", "paper"]))
    assert {quirk: getattr(paper, quirk) for quirk in QUIRKS} == {
        "select": "val",
        "simam_input": False,
        "factorised_head": False,
        "schedule_lag": False,
    }
    changed = chosen_recipe(HTA["cub"], parser.parse_args([*base, "--epochs", "7"]))
    assert changed == replace(HTA["cub"], epochs=7)


def test_the_released_schedule_is_one_epoch_late():
    parameter = torch.nn.Parameter(torch.zeros(1))
    row = HTA["cub"]
    schedule = CosineLRScheduler(
        torch.optim.AdamW([parameter], lr=row.lr),
        t_initial=row.epochs,
        lr_min=row.min_lr,
        warmup_t=row.warmup_epochs,
        warmup_lr_init=row.warmup_lr,
    )
    rates = []
    for epoch in range(row.epochs):
        schedule.step(max(epoch - row.schedule_lag, 0))
        rates.append(schedule.optimizer.param_groups[0]["lr"])
    assert rates[0] == rates[1] == row.warmup_lr
    assert rates[2] == pytest.approx(row.warmup_lr + (row.lr - row.warmup_lr) / 5)
    assert max(rates) == pytest.approx(row.lr, rel=0.01)


# ---- methods -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_what_it_says_and_comes_back_from_disk(
    method: str, tiny_backbone: Path, tmp_path: Path
):
    def new_model() -> sp.VisionMamba:
        torch.manual_seed(7)
        model = sp.load_vim(tiny_backbone, num_classes=5)
        return apply_method(model, method, cross_group_size=2, prompt_tokens=3, lora_rank=4)

    model, images = new_model().train(), torch.randn(4, 3, 32, 32)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    before = {n: p.clone() for n, p in trained_state(model).items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    # twice: LoRA's A and SVP's prompters have no gradient while B and the scales are zero
    for _ in range(2):
        torch.nn.functional.cross_entropy(model(images), torch.arange(4)).backward()
        optimizer.step()
        optimizer.zero_grad()
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in frozen.items())
    unchanged = [n for n, p in trained_state(model).items() if torch.equal(p, before[n])]
    assert unchanged == []
    assert {"head.weight", "head.bias"} <= before.keys()

    model.eval()
    save_trained(model, method, tmp_path / "saved")
    fresh = new_model().eval()
    load_trained(fresh, method, tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(fresh(images), model(images))


@pytest.mark.parametrize("method", ["vpt-shallow", "vpt-deep"])
def test_prompt_tokens_are_seen_by_every_image_and_leave_before_the_class_token_is_read(
    method: str, tiny_backbone: Path
):
    model = sp.load_vim(tiny_backbone, num_classes=5).eval()
    images = torch.randn(2, 3, 32, 32)
    lengths: list[int] = []
    for block in model.layers:
        block.mixer.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    with torch.no_grad():
        model(images)
        apply_method(model, method, cross_group_size=2, prompt_tokens=3)
        first = model(images)
        model.vpt.prompts[-1] += 1.0
        assert not torch.allclose(first, model(images))
    assert lengths[:4] == [17] * 4
    assert lengths[4:8] == [20] * 4


def test_lora_changes_the_output_of_the_fused_mixer(tiny_backbone: Path):
    model = sp.load_vim(tiny_backbone, num_classes=5).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = model(images)
        apply_method(model, "lora", cross_group_size=2, lora_rank=4)
        # single precision: the projections are called one by one now
        torch.testing.assert_close(model(images), before, rtol=1e-4, atol=1e-5)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
        assert not torch.allclose(model(images), before, atol=1e-3)


def test_the_two_layer_head_of_the_released_runs_is_trained(tiny_backbone: Path, tmp_path: Path):
    model = sp.load_vim(tiny_backbone, num_classes=5)
    apply_method(model, "svp", cross_group_size=2, factorised_head=True)
    assert {"head.0.weight", "head.1.weight"} <= trained_state(model).keys()
    torch.nn.init.constant_(model.svp.alpha, 0.1)
    save_trained(model, "svp", tmp_path)
    shutil.copytree(tmp_path, tmp_path / "copy", dirs_exist_ok=True)
    load_trained(model, "svp", tmp_path / "copy")


def test_an_unknown_method_lists_the_known_ones(tiny_backbone: Path):
    with pytest.raises(ValueError, match="svp-released, inner-only"):
        apply_method(sp.load_vim(tiny_backbone), "adapters", cross_group_size=2)
