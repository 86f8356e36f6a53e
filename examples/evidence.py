"""Measure SVP against nine other methods on seven small tasks: the numbers of docs/results.md.

    python examples/evidence.py --data-root ~/data --output runs/evidence.json      # one GPU
    python examples/evidence.py --data-root ~/data --tasks digits --methods svp linear \
        --seeds 0 --epochs 10 --rates 1 --no-ablations                              # a CPU

Every method gets the same: 1,000 training images, the same four-step budget of learning rates
(each three times the one before), the best of them chosen by one run on 800 images validated on
the other 200, then one run on all 1,000 per seed, tested once after its last epoch. AdamW, weight
decay 1e-4, batch 64, 40 epochs, 10% warm-up then a cosine to zero, label smoothing 0.1, drop path
0.05, shifts of up to 4 pixels where the task allows them.

The JSON file is rewritten after every method; the same command goes on from there. report.py turns
it into the table and the plot.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
from evidence_bench import BATCH, VALIDATION, Bench, capture, new_bench, new_model, run_together
from evidence_tasks import TASKS, Task, load_task
from methods import METHODS, SVP_METHODS, trained_state

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


def make_benches(
    tasks: list[Task], method: str, options: dict[str, int], epochs: int, arguments: Any
) -> list[Bench]:
    device = torch.device(arguments.device)
    steps = max(epochs * len(task.train_labels) // BATCH for task in tasks)
    benches = [new_bench(task, method, options, steps, device) for task in tasks]
    if device.type == "cuda":
        torch.cuda.synchronize()
        if not arguments.no_graphs:
            for bench in benches:
                capture(bench)
    return benches


def initial_states(benches: list[Bench], method: str, options: dict, seed: int) -> list[dict]:
    """What every bench starts from with this seed; tasks of as many classes start alike."""
    by_classes = {
        classes: {
            n: p.clone()
            for n, p in trained_state(new_model(method, classes, seed, options)).items()
        }
        for classes in {bench.task.num_classes for bench in benches}
    }
    return [by_classes[bench.task.num_classes] for bench in benches]


def measure(
    tasks: list[Task],
    label: str,
    method: str,
    options: dict[str, int],
    rates: dict[str, float] | None,
    arguments: Any,
) -> list[dict[str, Any]]:
    """Rows for one method: the search for learning rates, unless given, and one run per seed."""
    benches = make_benches(tasks, method, options, arguments.epochs, arguments)
    names = [task.name for task in tasks]
    rows: list[dict[str, Any]] = []
    starts = cache(lambda seed: initial_states(benches, method, options, seed))

    def together(seed: int, lrs: list[float], val: int, phase: str) -> list[float]:
        states = starts(seed)
        started = time.perf_counter()
        accuracies = run_together(benches, states, seed, lrs, arguments.epochs, val)
        seconds = time.perf_counter() - started
        for bench, lr, accuracy in zip(benches, lrs, accuracies, strict=True):
            rows.append(
                {
                    "task": bench.task.name,
                    "method": label,
                    "phase": phase,
                    "seed": seed,
                    "lr": lr,
                    "accuracy": accuracy,
                    "trained_parameters": sum(p.numel() for p in bench.trained),
                    "head_parameters": sum(p.numel() for p in bench.model.head.parameters()),
                }
            )
        shown = "  ".join(f"{a:6.1%}" for a in accuracies)
        print(f"{label:<14} {phase:<6} seed {seed}  {shown}  {seconds:6.1f} s", flush=True)
        return accuracies

    if rates is None:
        grid = RATES[method]
        # one rate asked for: the second, which is the middle one rounded down
        grid = grid if arguments.rates >= len(grid) else grid[1 : 1 + arguments.rates]
        if len(grid) == 1:
            rates = dict.fromkeys(names, grid[0])
        else:
            found = [together(0, [lr] * len(tasks), VALIDATION, "search") for lr in grid]
            rates = {}
            for place, name in enumerate(names):
                scores = [accuracies[place] for accuracies in found]
                rates[name] = grid[scores.index(max(scores))]
    for seed in arguments.seeds:
        together(seed, [rates[name] for name in names], 0, "test")
    return rows


def measure_anchors(tasks: dict[str, Task], arguments: Any) -> list[dict[str, Any]]:
    """The settings that the authors' code was measured with, seed 0."""
    rows = []
    for method in dict.fromkeys(method for method, _ in ANCHORS):
        benches = make_benches(list(tasks.values()), method, {}, arguments.epochs, arguments)
        states = initial_states(benches, method, {}, 0)
        for lr in [lr for name, lr in ANCHORS if name == method]:
            found = run_together(benches, states, 0, [lr] * len(tasks), arguments.epochs, 0)
            for task, accuracy in zip(tasks.values(), found, strict=True):
                rows.append(
                    {"task": task.name, "method": method, "phase": "anchor", "seed": 0, "lr": lr}
                    | {"accuracy": accuracy, "train_images": len(task.train_labels)}
                )
            print(f"anchor {method} {lr:g}  " + "  ".join(f"{a:6.1%}" for a in found), flush=True)
    return rows


def main(command: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data-root", type=Path, required=True, help="see evidence_tasks.py")
    add("--output", type=Path, default=Path("runs/evidence.json"))
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--tasks", nargs="+", choices=TASKS, default=TASKS)
    add("--methods", nargs="+", choices=METHODS, default=METHODS)
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--epochs", type=int, default=40)
    add("--rates", type=int, choices=[1, 2, 3, 4], default=4, help="to try; 1: no search")
    add("--no-ablations", action="store_true")
    add("--anchors", choices=["none", "first", "only"], default="none")
    add("--no-graphs", action="store_true", help="no CUDA graphs")
    add("--limit-seconds", type=float, default=math.inf, help="begin no method after so long")
    arguments = parser.parse_args(command)
    on_gpu = torch.device(arguments.device).type == "cuda"
    if on_gpu:
        torch.set_float32_matmul_precision("high")

    output: dict[str, Any] = {"rows": [], "complete": [], "seconds": 0.0}
    settings = {
        key: list(getattr(arguments, key)) if key in ("tasks", "seeds") else getattr(arguments, key)
        for key in ("tasks", "seeds", "epochs", "rates")
    }
    if arguments.output.is_file():
        output = json.loads(arguments.output.read_text())
        if output["settings"] != settings:
            raise SystemExit(
                f"{arguments.output} was measured with {output['settings']}, now asked for "
                f"{settings}. Use another --output."
            )
    output["settings"] = settings
    output["torch"] = torch.__version__
    output["device"] = torch.cuda.get_device_name(arguments.device) if on_gpu else "CPU"
    started = time.perf_counter()

    def finish(label: str, rows: list[dict[str, Any]], begun: float) -> None:
        output["rows"] += rows
        output["complete"].append(label)
        output["seconds"] += time.perf_counter() - begun
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        partial = arguments.output.with_suffix(".partial")
        partial.write_text(json.dumps(output, indent=0))
        os.replace(partial, arguments.output)

    def pending(label: str) -> bool:
        late = time.perf_counter() - started > arguments.limit_seconds
        if late and label not in output["complete"]:
            print(f"{label}: not begun, {arguments.limit_seconds:.0f} s are over", flush=True)
        return label not in output["complete"] and not late

    known = [name for name in ANCHOR_TASKS if name in arguments.tasks]
    if arguments.anchors != "none" and known and pending("anchors"):
        begun = time.perf_counter()
        anchors = {name: load_task(name, arguments.data_root, ANCHOR_TASKS[name]) for name in known}
        finish("anchors", measure_anchors(anchors, arguments), begun)
    if arguments.anchors == "only":
        return output
    tasks = [load_task(name, arguments.data_root) for name in arguments.tasks]
    print(f"{'':<30}" + "  ".join(f"{task.name[:6]:>6}" for task in tasks), flush=True)
    for method in arguments.methods:
        if pending(method):
            begun = time.perf_counter()
            finish(method, measure(tasks, method, method, {}, None, arguments), begun)
    chosen = {
        row["task"]: row["lr"]
        for row in output["rows"]
        if row["method"] == "svp" and row["phase"] == "test"
    }
    ablations = {} if arguments.no_ablations or not chosen else ABLATIONS
    for label, options in ablations.items():
        if pending(label):
            begun = time.perf_counter()
            finish(label, measure(tasks, label, "svp", options, chosen, arguments), begun)
    print(f"{len(output['rows'])} runs, {output['seconds']:.0f} s: {arguments.output}")
    return output


if __name__ == "__main__":
    main()
