"""Rounds of training runs, one after the other in this process or in several processes at once.

One process cannot keep a fast GPU busy with so small a model: it spends its time launching. Every
worker has its own CUDA context and its own benches, which it keeps while it stays with a method,
for recording their graphs takes seconds.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from evidence_bench import BATCH, Bench, capture, new_bench, new_model, run_together
from evidence_tasks import Task
from methods import trained_state

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Round:
    """One run on every task, all with one method."""

    label: str
    """What the rows call the method."""
    method: str
    options: dict[str, int]
    tasks: tuple[str, ...]
    phase: str
    """"anchor", "search" or "test"."""
    seed: int
    rates: tuple[float, ...]
    """Learning rate for each task."""
    val: int = 0
    """Training images to evaluate on; 0 evaluates on the test images."""
    followed_by: int = 0
    """Rounds of the same method that can only begin after this one."""

    @property
    def benches(self) -> tuple[str, tuple[str, ...]]:
        """Equal for rounds that can use the same benches."""
        return self.label, self.tasks


@dataclass(frozen=True)
class Settings:
    """What is the same for every round."""

    devices: list[str]
    epochs: int
    graphs: bool
    half: bool
    processes: int
    until: float
    """No round begins after this time of `time.monotonic`."""


class Runner:
    """Runs rounds on one device, and keeps the benches of the last one."""

    def __init__(self, tasks: dict[str, Task], device: str, settings: Settings) -> None:
        self.tasks, self.settings = tasks, settings
        self.device = torch.device(device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
        self.kept: tuple[str, tuple[str, ...]] | None = None
        self.benches: list[Bench] = []
        self.starts: dict[int, list[dict]] = {}

    def run(self, asked: Round) -> tuple[Rows, float]:
        """A row per task, and the seconds that the round took."""
        begun = time.perf_counter()
        if asked.benches != self.kept:
            self.benches, self.starts = [], {}
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # the graphs' memory, which other processes may need
            self.benches, self.kept = self._new_benches(asked), asked.benches
        if asked.seed not in self.starts:
            self.starts[asked.seed] = self._initial_states(asked)
        # what drop path leaves out must not depend on the rounds before
        torch.manual_seed(asked.seed)
        accuracies = run_together(
            self.benches,
            self.starts[asked.seed],
            asked.seed,
            list(asked.rates),
            self.settings.epochs,
            asked.val,
        )
        rows = [
            {
                "task": bench.task.name,
                "method": asked.label,
                "phase": asked.phase,
                "seed": asked.seed,
                "lr": lr,
                "accuracy": accuracy,
                "train_images": len(bench.task.train_labels) - asked.val,
                "trained_parameters": sum(p.numel() for p in bench.trained),
                "head_parameters": sum(p.numel() for p in bench.model.head.parameters()),
            }
            for bench, lr, accuracy in zip(self.benches, asked.rates, accuracies, strict=True)
        ]
        return rows, time.perf_counter() - begun

    def _new_benches(self, asked: Round) -> list[Bench]:
        tasks = [self.tasks[name] for name in asked.tasks]
        steps = max(self.settings.epochs * len(task.train_labels) // BATCH for task in tasks)
        half = self.settings.half
        benches = [
            new_bench(t, asked.method, asked.options, steps, self.device, half) for t in tasks
        ]
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            for bench in benches if self.settings.graphs else ():
                capture(bench)
        return benches

    def _initial_states(self, asked: Round) -> list[dict]:
        """What every bench starts from; tasks of as many classes start alike."""
        by_classes = {}
        for classes in {bench.task.num_classes for bench in self.benches}:
            model = new_model(asked.method, classes, asked.seed, asked.options)
            by_classes[classes] = {n: p.clone() for n, p in trained_state(model).items()}
        return [by_classes[bench.task.num_classes] for bench in self.benches]


def choose(
    ready: list[Round],
    kept: tuple[str, tuple[str, ...]] | None,
    running: Collection[Round],
    fresh: Iterable[tuple[str, tuple[str, ...]] | None] = (),
) -> Round:
    """What a worker does next: its benches' rounds, else those of the most work per worker.

    `kept` says which benches the worker has, `fresh` which ones the other workers have.
    """
    for candidate in ready:
        if candidate.benches == kept:
            return candidate
    work: Counter = Counter()
    for candidate in (*ready, *running):
        work[candidate.benches] += 1
    for benches in work:
        # rounds that wait for a search wait for all of its rounds
        work[benches] += max(r.followed_by for r in (*ready, *running) if r.benches == benches)
    holders = Counter(fresh)
    # anchors first: they were asked for first; then methods before ablations; then the longest, and
    # of equals the first
    return max(
        ready,
        key=lambda r: (
            r.phase == "anchor",
            r.method == r.label,
            work[r.benches] / (1 + holders[r.benches]),
        ),
    )


def run_rounds(
    ready: Callable[[], list[Round]],
    finished: Callable[[Round, Rows, float], None],
    load: Callable[[], dict[str, Task]],
    settings: Settings,
) -> None:
    """Run what is ready, and what becomes ready by it, until nothing is or the time is over.

    `finished` is called in this process, after every round. `load` gives the tasks by the names
    that rounds use.
    """
    if settings.processes > 1:
        _run_in_workers(ready, finished, load, settings)
        return
    runner = Runner(load(), settings.devices[0], settings)
    while time.monotonic() < settings.until and (rounds := ready()):
        chosen = choose(rounds, runner.kept, ())
        finished(chosen, *runner.run(chosen))


def _run_in_workers(
    ready: Callable[[], list[Round]],
    finished: Callable[[Round, Rows, float], None],
    load: Callable[[], dict[str, Task]],
    settings: Settings,
) -> None:
    workers = [
        _start(settings.devices[i % len(settings.devices)], settings)
        for i in range(settings.processes)
    ]
    kept: dict[Connection, Any] = dict.fromkeys(workers)
    running: dict[Connection, Round] = {}
    with tempfile.TemporaryDirectory() as folder:
        # a file is read by all of them without a copy for each
        file = Path(folder) / "tasks.pt"
        # the workers import while this process loads
        torch.save(load(), file)
        try:
            for worker in workers:
                worker.send(file)
            while True:
                for worker in workers:
                    rounds = [r for r in ready() if r not in running.values()]
                    if worker in running or not rounds or time.monotonic() >= settings.until:
                        continue
                    others = [kept[other] for other in running]
                    running[worker] = choose(rounds, kept[worker], running.values(), others)
                    kept[worker] = running[worker].benches
                    worker.send(running[worker])
                if not running:
                    break
                for worker in wait(list(running)):
                    answer = worker.recv()
                    finished(running.pop(worker), *answer)
            for worker in workers:
                worker.send(None)
        except (EOFError, ConnectionError):
            names = ", ".join(f"{r.label} {r.phase}" for r in running.values())
            raise SystemExit(
                f"error: a worker ended, its own message is above; in progress: {names}. What was "
                "finished is kept: give the same command again, with fewer --processes if memory "
                "was short."
            ) from None


def _start(device: str, settings: Settings) -> Connection:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    # a daemon: it ends with this process
    context.Process(target=_serve, args=(there, device, settings), daemon=True).start()
    # or the end of the worker would not be seen
    there.close()
    return here


def _serve(connection: Connection, device: str, settings: Settings) -> None:
    """A worker: rounds come and rows go until None comes, or the process that asks is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // settings.processes))
    try:
        tasks = torch.load(connection.recv(), mmap=True, weights_only=False)
        runner = Runner(tasks, device, settings)
        while (asked := connection.recv()) is not None:
            connection.send(runner.run(asked))
    except (EOFError, BrokenPipeError):
        return
