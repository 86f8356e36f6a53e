"""Measure SVP against nine other methods on seven small tasks: the numbers of docs/results.md.

    python examples/evidence.py --data-root ~/data --output runs/evidence.json      # one GPU
    python examples/evidence.py --data-root ~/data --output runs/evidence.json \
        --processes 6 --devices cuda:0 cuda:1                             # three on each of two
    python examples/evidence.py --data-root ~/data --tasks digits --methods svp linear \
        --seeds 0 --epochs 10 --rates 1 --no-ablations                              # a CPU

Every method gets the same: 1,000 training images, the same four-step budget of learning rates
(each three times the one before), the best of them chosen by one run on 800 images validated on
the other 200, then one run on all 1,000 per seed, tested once after its last epoch. AdamW, weight
decay 1e-4, batch 64, 40 epochs, 10% warm-up then a cosine to zero, label smoothing 0.1, drop path
0.05, shifts of up to 4 pixels where the task allows them.

A round is one run on every task: a method at one learning rate, or with one seed. The JSON file is
rewritten after every round; the same command goes on from there, with as many processes as it
likes. They compute the same, but for what evidence_bench.py says about drop path. report.py turns
the file into the table and the plot.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from evidence_bench import VALIDATION
from evidence_tasks import TASKS, Task, load_task
from evidence_workers import Round, Rows, Settings, run_rounds
from methods import METHODS, SVP_METHODS

_SVP_RATES = (7e-4, 2e-3, 6e-3, 1.8e-2)
RATES: dict[str, tuple[float, ...]] = {
    **dict.fromkeys(SVP_METHODS, _SVP_RATES),
    "linear": (1e-3, 3e-3, 1e-2, 3e-2),
    "full": (6e-5, 2e-4, 6e-4, 2e-3),
    "bitfit": (1e-3, 3e-3, 1e-2, 3e-2),
    "vpt-shallow": (1e-3, 3e-3, 1e-2, 3e-2),
    "vpt-deep": (1e-3, 3e-3, 1e-2, 3e-2),
    "lora": (5e-4, 1.5e-3, 5e-3, 1.5e-2),
}
# the paper's ablations, at the learning rates chosen for svp
ABLATIONS: dict[str, dict[str, int]] = {
    **{f"group size {size}": {"cross_group_size": size} for size in (1, 2, 3, 6, 12)},
    **{f"bottleneck {width}": {"inner_bottleneck": width} for width in (8, 16, 32, 128)},
}
# what the authors' code was measured with: (task, training images), method, learning rate
ANCHORS = (("linear", 1e-2), ("svp", 2e-3), ("svp", 6e-3), ("inner-only", 4e-3), ("full", 5e-4))
ANCHOR_TASKS = {"digits": 300, "signs": 1000, "cifar10": 1000}
PHASES = ("anchor", "search", "test")
LABELS = (*METHODS, *ABLATIONS)


# ---- what is to be run ---------------------------------------------------------------------------


def ready(rows: Rows, arguments: argparse.Namespace) -> list[Round]:
    """The rounds that have no rows yet and whose learning rates are known."""
    rounds = []
    if arguments.anchors != "none":
        rounds += anchors(arguments.tasks)
    if arguments.anchors != "only":
        for method in arguments.methods:
            rounds += rounds_of(rows, method, arguments)
        # known once svp was tested, perhaps by an earlier command
        rates = {r["task"]: r["lr"] for r in rows if (r["method"], r["phase"]) == ("svp", "test")}
        for label, options in ABLATIONS.items():
            if rates and not arguments.no_ablations:
                rounds += tests(label, "svp", options, rates, arguments)
    known = {(r["method"], r["phase"], r["seed"], r["task"], r["lr"]) for r in rows}
    return [
        r
        for r in rounds
        if not known.issuperset(
            (r.label, r.phase, r.seed, task.split()[0], lr)
            for task, lr in zip(r.tasks, r.rates, strict=True)
        )
    ]


def anchors(tasks: list[str]) -> list[Round]:
    """The settings that the authors' code was measured with, seed 0."""
    names = tuple(f"{name} {count}" for name, count in ANCHOR_TASKS.items() if name in tasks)
    return [
        Round(method, method, {}, names, "anchor", 0, (lr,) * len(names))
        for method, lr in ANCHORS
        if names
    ]


def rounds_of(rows: Rows, method: str, arguments: argparse.Namespace) -> list[Round]:
    """The search for learning rates and, once it is complete, one run per seed."""
    tasks, grid = tuple(arguments.tasks), RATES[method]
    # one rate asked for: the second, which is the middle one rounded down
    grid = grid if arguments.rates >= len(grid) else grid[1 : 1 + arguments.rates]
    if len(grid) == 1:
        return tests(method, method, {}, dict.fromkeys(tasks, grid[0]), arguments)
    found = {
        (r["task"], r["lr"]): r["accuracy"]
        for r in rows
        if (r["method"], r["phase"]) == (method, "search")
    }
    search = [
        Round(
            *(method, method, {}, tasks, "search", 0, (lr,) * len(tasks)),
            val=VALIDATION,
            followed_by=len(arguments.seeds),
        )
        for lr in grid
    ]
    if not found.keys() >= {(task, lr) for task in tasks for lr in grid}:
        return search
    rates = {task: max(grid, key=lambda lr, task=task: found[task, lr]) for task in tasks}
    return search + tests(method, method, {}, rates, arguments)


def tests(
    label: str,
    method: str,
    options: dict[str, int],
    rates: dict[str, float],
    arguments: argparse.Namespace,
) -> list[Round]:
    tasks = tuple(arguments.tasks)
    chosen = tuple(rates[task] for task in tasks)
    return [Round(label, method, options, tasks, "test", seed, chosen) for seed in arguments.seeds]


def load(arguments: argparse.Namespace) -> dict[str, Task]:
    """Every task by the name that rounds use: those of the anchors say how many images."""
    tasks = {}
    if arguments.anchors != "none":
        for name, count in ANCHOR_TASKS.items():
            if name in arguments.tasks:
                tasks[f"{name} {count}"] = load_task(name, arguments.data_root, count)
    if arguments.anchors != "only":
        tasks |= {name: load_task(name, arguments.data_root) for name in arguments.tasks}
    return tasks


# ---- the file ------------------------------------------------------------------------------------


def place(row: dict[str, Any]) -> tuple:
    """Sorts rows: anchors, then method by method, whatever was finished first."""
    phase = PHASES.index(row["phase"])
    if row["phase"] == "anchor":
        return 0, ANCHORS.index((row["method"], row["lr"]))
    # within a test every task has its own rate
    lr = 0.0 if row["phase"] == "test" else row["lr"]
    return 1, LABELS.index(row["method"]), phase, row["seed"], lr


def write(output: dict[str, Any], path: Path) -> None:
    """A crash leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(output, indent=0))
    os.replace(partial, path)


def main(command: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data-root", type=Path, required=True, help="see evidence_tasks.py")
    add("--output", type=Path, default=Path("runs/evidence.json"))
    add("--devices", nargs="+", default=["cuda:0" if torch.cuda.is_available() else "cpu"])
    add("--processes", type=int, default=1, help="at once, each with its own context")
    add("--tasks", nargs="+", choices=TASKS, default=TASKS)
    add("--methods", nargs="+", choices=METHODS, default=METHODS)
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--epochs", type=int, default=40)
    add("--precision", choices=["float32", "bf16"], default="float32", help="of the products")
    add("--rates", type=int, choices=[1, 2, 3, 4], default=4, help="to try; 1: no search")
    add("--no-ablations", action="store_true")
    add("--anchors", choices=["none", "first", "only"], default="none")
    add("--no-graphs", action="store_true", help="no CUDA graphs")
    add("--limit-seconds", type=float, default=math.inf, help="begin no round after so long")
    arguments = parser.parse_args(command)
    if not 1 <= len(arguments.devices) <= arguments.processes:
        parser.error(
            f"{len(arguments.devices)} --devices need as many --processes, got "
            f"{arguments.processes}: a process uses one device"
        )
    begun = time.monotonic()

    output: dict[str, Any] = {"rows": [], "seconds": 0.0}
    settings = {
        key: list(getattr(arguments, key)) if key in ("tasks", "seeds") else getattr(arguments, key)
        for key in ("tasks", "seeds", "epochs", "rates", "precision")
    }
    if arguments.output.is_file():
        output = json.loads(arguments.output.read_text())
        output["settings"].setdefault("precision", "float32")
        if output["settings"] != settings:
            raise SystemExit(
                f"{arguments.output} was measured with {output['settings']}, now asked for "
                f"{settings}. Use another --output."
            )
    on_gpu = torch.device(arguments.devices[0]).type == "cuda"
    output["settings"] = settings
    output["torch"] = torch.__version__
    output["device"] = torch.cuda.get_device_name(arguments.devices[0]) if on_gpu else "CPU"
    earlier = output["seconds"]

    def finished(done: Round, rows: Rows, seconds: float) -> None:
        output["rows"] = sorted([*output["rows"], *rows], key=place)
        output["seconds"] = earlier + time.monotonic() - begun
        write(output, arguments.output)
        what = f"seed {done.seed}" if done.phase == "test" else f"lr {done.rates[0]:g}"
        shown = "  ".join(f"{row['accuracy']:6.1%}" for row in rows)
        print(f"{done.label:<14} {done.phase:<6} {what:<10} {shown}  {seconds:6.1f} s", flush=True)

    def open_rounds() -> list[Round]:
        return ready(output["rows"], arguments)

    if open_rounds():
        print(f"{'':<33}" + "  ".join(f"{name[:6]:>6}" for name in arguments.tasks), flush=True)
        run_rounds(
            open_rounds,
            finished,
            lambda: load(arguments),
            Settings(
                arguments.devices,
                arguments.epochs,
                not arguments.no_graphs,
                arguments.precision == "bf16",
                arguments.processes,
                begun + arguments.limit_seconds,
            ),
        )
    if left := open_rounds():
        names = ", ".join(dict.fromkeys(r.label for r in left))
        print(f"{arguments.limit_seconds:.0f} s are over; the same command goes on with: {names}")
    print(f"{len(output['rows'])} runs, {output['seconds']:.0f} s: {arguments.output}")
    return output


if __name__ == "__main__":
    main()
