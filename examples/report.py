"""Run folders, or the JSON of evidence.py, as a Markdown table and plots.

    python examples/report.py runs/hta                               # table on the screen
    python examples/report.py runs/hta runs/vtab1k --plots plots     # and plots/accuracy.svg, ...
    python examples/report.py runs/evidence.json --into docs/results.md --plots docs/images

`--into` replaces what stands between the lines "<!-- report -->" and "<!-- end of report -->".
Accuracies are test accuracies in percent, mean and standard deviation over seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
from methods import METHODS
from run_folder import read_metrics, result_of

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BEGIN, END = "<!-- report -->", "<!-- end of report -->"
BLUE, GREY = "#2a6fb0", "#7a7a7a"
# what svp itself has in evidence.py
GROUP_SIZE, BOTTLENECK = 4, 64
# title, labels of evidence.py, and svp's own
ABLATIONS = (
    ("Blocks that share a cross prompter", "group size ", GROUP_SIZE),
    ("Width of the inner prompter", "bottleneck ", BOTTLENECK),
)


@dataclass(frozen=True)
class Row:
    """One complete run."""

    dataset: str
    method: str
    seed: int
    accuracy: float
    """Test accuracy in percent."""
    trained_parameters: int
    head_parameters: int
    lr: float
    select: str = "last"
    """The split that chose the epoch."""


def read_runs(paths: Iterable[Path]) -> list[Row]:
    """The complete runs under the folders, and the tested ones of evidence files."""
    rows = []
    seen: set[Path] = set()
    for path in paths:
        if path.is_dir():
            # a run that two of the folders hold is one run
            files = [
                file for file in sorted(path.rglob("result.json")) if file.resolve() not in seen
            ]
            seen |= {file.resolve() for file in files}
            found = [json.loads(file.read_text()) for file in files]
            rows += [_row(r, r["dataset"], r["test_accuracy"]) for r in found]
        elif path.is_file():
            found = json.loads(path.read_text())["rows"]
            rows += [_row(r, r["task"], r["accuracy"]) for r in found if r["phase"] == "test"]
        else:
            raise SystemExit(f"error: {path} does not exist. Name run folders or evidence files.")
    if not rows:
        names = ", ".join(str(path) for path in paths)
        raise SystemExit(f"error: no complete run in {names}: a run is complete with result.json.")
    return rows


def _row(raw: dict[str, Any], dataset: str, accuracy: float) -> Row:
    keys = ("seed", "trained_parameters", "head_parameters", "lr")
    known = {key: raw[key] for key in keys}
    return Row(
        dataset=dataset,
        method=label(raw),
        accuracy=100 * accuracy,
        select=raw.get("select", "last"),
        **known,
    )


def label(raw: dict[str, Any]) -> str:
    """The method, and what the command line changed of it."""
    return f"{raw['method']}, {raw['variant']}" if raw.get("variant") else raw["method"]


# ---- tables --------------------------------------------------------------------------------------


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Left-aligned names, right-aligned numbers."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))


def mean_and_deviation(values: Sequence[float]) -> str:
    mean = statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:.1f}"
    return f"{mean:.1f} ± {statistics.stdev(values):.1f}"


def methods_in(rows: Sequence[Row]) -> list[str]:
    """Methods in the order of `METHODS`, then the others as they come."""
    seen = dict.fromkeys(row.method for row in rows)
    return [m for m in METHODS if m in seen] + [m for m in seen if m not in METHODS]


def seed_means(rows: Sequence[Row], method: str) -> list[float]:
    """Mean over the data sets, for each seed that has all of them."""
    datasets = {row.dataset for row in rows}
    by_seed: dict[int, dict[str, float]] = defaultdict(dict)
    for row in rows:
        if row.method == method:
            by_seed[row.seed][row.dataset] = row.accuracy
    return [statistics.fmean(v.values()) for v in by_seed.values() if v.keys() == datasets]


def accuracy_table(rows: Sequence[Row], first: str = "method") -> str:
    """Methods down, data sets across, the mean of the data sets last."""
    datasets = list(dict.fromkeys(row.dataset for row in rows))
    lines = []
    for method in methods_in(rows):
        of_method = [row for row in rows if row.method == method]
        trained = statistics.fmean(r.trained_parameters - r.head_parameters for r in of_method)
        cells = [method, f"{trained / 1000:,.1f}"]
        for dataset in datasets:
            values = [row.accuracy for row in of_method if row.dataset == dataset]
            cells.append(mean_and_deviation(values) if values else "")
        means = seed_means(rows, method)
        lines.append([*cells, mean_and_deviation(means) if means else ""])
    return markdown([first, "trained, thousands", *datasets, "mean"], lines)


def claims_table(rows: Sequence[Row]) -> str:
    """What the paper claims, and what these runs say."""
    by_method = {m: seed_means(rows, m) for m in methods_in(rows)}
    accuracy: dict[tuple[str, str], float] = {}
    for method in by_method:
        for dataset in {row.dataset for row in rows}:
            values = [r.accuracy for r in rows if (r.method, r.dataset) == (method, dataset)]
            if values:
                accuracy[method, dataset] = statistics.fmean(values)
    lines = []
    for other in ("linear", "vpt-shallow", "vpt-deep", "inner-only", "cross-only", "full"):
        if not by_method.get("svp") or not by_method.get(other):
            continue
        difference = statistics.fmean(by_method["svp"]) - statistics.fmean(by_method[other])
        shared = [d for m, d in accuracy if m == other and ("svp", d) in accuracy]
        ahead = sum(accuracy["svp", d] > accuracy[other, d] for d in shared)
        holds = "yes" if difference > 0 else "no"
        cells = [f"svp above {other}", f"{difference:+.1f}", f"{ahead} of {len(shared)}", holds]
        lines.append(cells)
    return markdown(["claim", "difference of the means", "tasks ahead", "holds here"], lines)


def middle_is_best(rows: Sequence[Row]) -> str:
    """Whether neither the smallest nor the largest size has the best mean; methods are sizes."""
    by_size = {size: seed_means(rows, size) for size in methods_in(rows)}
    means = {size: statistics.fmean(found) for size, found in by_size.items() if found}
    best = max(means, key=means.__getitem__)
    ends = (next(iter(means)), list(means)[-1])
    holds = "yes" if best not in ends else "no"
    spread = max(means.values()) - min(means.values())
    return (
        f"The paper finds a middle size best. Best here: {best}; it holds here: {holds}. All sizes "
        f"lie within {spread:.1f} points."
    )


def rates_table(rows: Sequence[Row]) -> str:
    datasets = list(dict.fromkeys(row.dataset for row in rows))
    lines = []
    for method in methods_in(rows):
        rates = {row.dataset: row.lr for row in rows if row.method == method}
        lines.append([method, *(f"{rates[d]:g}" if d in rates else "" for d in datasets)])
    return markdown(["method", *datasets], lines)


def anchors_table(raw: Sequence[dict[str, Any]]) -> str:
    tasks = list(dict.fromkeys((row["task"], row["train_images"]) for row in raw))
    lines = []
    for method, lr in dict.fromkeys((row["method"], row["lr"]) for row in raw):
        found = {r["task"]: r["accuracy"] for r in raw if (r["method"], r["lr"]) == (method, lr)}
        cells = [f"{100 * found[task]:.1f}" if task in found else "" for task, _ in tasks]
        lines.append([f"{method}, lr {lr:g}", *cells])
    return markdown(["", *(f"{task}, {count} images" for task, count in tasks)], lines)


def evidence_report(file: Path) -> str:
    """All tables of one evidence file."""
    raw = json.loads(file.read_text())
    rows = read_runs([file])
    compared = [row for row in rows if row.method in METHODS]
    parts = [
        f"{len(raw['rows'])} runs on {raw['device']} in {raw['seconds'] / 60:.1f} minutes, "
        f"torch {raw['torch']}; seeds {', '.join(map(str, raw['settings']['seeds']))}, "
        f"{raw['settings']['epochs']} epochs.",
        "## Accuracy",
        accuracy_table(compared),
        "## What the paper claims",
        claims_table(compared),
    ]
    own = [row for row in rows if row.method == "svp"]
    for title, prefix, value in ABLATIONS:
        others = [row for row in rows if row.method.startswith(prefix)]
        if own and others:
            numbered = [(value, row) for row in own]
            numbered += [(int(row.method.removeprefix(prefix)), row) for row in others]
            numbered.sort(key=lambda pair: pair[0])
            shown = [replace(row, method=str(number)) for number, row in numbered]
            parts += [f"## {title}", accuracy_table(shown, first="")]
            if value == GROUP_SIZE:
                parts.append(middle_is_best(shown))
    searched = any(row["phase"] == "search" for row in raw["rows"])
    how = "chosen on validation" if searched else "given, not searched for"
    parts += [f"## Learning rates, {how}", rates_table(compared)]
    anchors = [row for row in raw["rows"] if row["phase"] == "anchor"]
    if anchors:
        parts += ["## The authors' settings", anchors_table(anchors)]
    return "\n\n".join(parts)


# ---- plots ---------------------------------------------------------------------------------------


def plot_accuracy(rows: Sequence[Row], file: Path) -> None:
    """Mean accuracy against the number of trained parameters, head included."""
    figure, axis = plt.subplots(figsize=(7.5, 4.6))
    for method in methods_in(rows):
        means = seed_means(rows, method)
        if not means:
            continue
        size = statistics.fmean(row.trained_parameters for row in rows if row.method == method)
        spread = statistics.stdev(means) if len(means) > 1 else 0.0
        own = method.startswith("svp") or method.endswith("-only")
        colour = BLUE if own else GREY
        axis.errorbar(size, statistics.fmean(means), spread, fmt="o", color=colour, capsize=3)
        axis.annotate(
            method,
            (size, statistics.fmean(means)),
            xytext=(6, 5),
            textcoords="offset points",
            color=colour,
            weight="bold" if method == "svp" else "normal",
        )
    axis.set_xscale("log")
    axis.margins(x=0.15, y=0.1)
    axis.set_xlabel("trained parameters, head included")
    axis.set_ylabel(f"test accuracy, mean of {len({row.dataset for row in rows})} data sets (%)")
    _finish(figure, axis, file)


def plot_curves(folders: Iterable[Path], file: Path) -> bool:
    """Training loss of every run under the folders; False if there is none."""
    runs = [run.parent for folder in folders for run in sorted(folder.rglob("metrics.jsonl"))]
    panels: dict[str, dict[str, list[list[float]]]] = defaultdict(lambda: defaultdict(list))
    for run in dict.fromkeys(run.resolve() for run in runs):
        losses = [row["loss"] for row in read_metrics(run)]
        result = result_of(run)
        name = run.parent.name if result is None else label(result)
        panels[run.parent.parent.name][name].append(losses)
    if not panels:
        return False
    columns = min(len(panels), 4)
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(3.4 * columns, 2.6 * lines), squeeze=False, sharex=True
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (dataset, methods) in zip(axes.flat, panels.items(), strict=False):
        for method, seeds in methods.items():
            shortest = min(map(len, seeds))
            mean = [statistics.fmean(run[i] for run in seeds) for i in range(shortest)]
            axis.plot(range(1, shortest + 1), mean, label=method)
        axis.set_title(dataset, fontsize=10)
        axis.legend(fontsize=7, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("epoch", fontsize=10)
    figure.supylabel("training loss", fontsize=10)
    _finish(figure, axes[0, 0], file)
    return True


def _finish(figure: plt.Figure, axis: plt.Axes, file: Path) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    # neither the date nor random names: the same numbers make the same file
    with matplotlib.rc_context({"svg.hashsalt": "svp_peft"}):
        figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def put_into(page: Path, text: str) -> None:
    """Replace what stands between the two markers of the page."""
    old = page.read_text()
    if BEGIN not in old or END not in old:
        raise SystemExit(f"error: {page} has no lines {BEGIN} and {END}. Add them.")
    before, _, rest = old.partition(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}")


def main(command: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", type=Path, nargs="+", help="run folders or evidence files")
    parser.add_argument("--plots", type=Path, default=None, help="folder for the plots")
    parser.add_argument("--into", type=Path, default=None, help="Markdown page with markers")
    options = parser.parse_args(command)
    folders = [path for path in options.paths if not path.is_file()]
    texts = [evidence_report(path) for path in options.paths if path.is_file()]
    if folders:
        rows = read_runs(folders)
        texts.append(accuracy_table(rows))
        if any(row.select == "test" for row in rows):
            texts.append("The best epoch was chosen on the test split, as in the released code.")
    text = "\n\n".join(texts)
    if options.plots:
        compared = [row for row in read_runs(options.paths) if row.method in METHODS]
        plot_accuracy(compared, options.plots / "accuracy.svg")
        drawn = ["accuracy.svg"]
        drawn += ["curves.svg"] * plot_curves(folders, options.plots / "curves.svg")
        if options.into:
            place = os.path.relpath(options.plots, options.into.parent)
            text += "".join(f"\n\n![{plot.partition('.')[0]}]({place}/{plot})" for plot in drawn)
    if options.into:
        put_into(options.into, text)
    else:
        print(text)
    return text


if __name__ == "__main__":
    main()
