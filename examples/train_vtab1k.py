"""Fine-tune Vim-Small on one or all tasks of VTAB-1k (paper, Table 2).

    python examples/train_vtab1k.py --dataset clevr_count --data-root ~/data
    python examples/train_vtab1k.py --dataset all --data-root ~/data --seeds 0 1 2

Each task has 1,000 training images. By default they are all trained on and the accuracy after the
last epoch counts; `--select val` trains on 800 and chooses the epoch on the other 200, which is
for choosing hyperparameters. A stopped run goes on when the same command is given again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import load_vtab
from engine import new_parser, run_suite
from recipes import VTAB, VTAB_GROUPS, Recipe
from run_folder import RunError
from splits import DataError, Splits

import svp_peft as sp


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = new_parser(__doc__.splitlines()[0], list(VTAB))
    parser.set_defaults(output=Path("runs/vtab1k"))
    options = parser.parse_args(arguments)

    def load(dataset: str, recipe: Recipe) -> Splits:
        honest = recipe.select == "val"
        return load_vtab(dataset, options.data_root, recipe.num_classes, honest=honest)

    results = run_suite(VTAB, load, options)
    if options.dataset == "all":
        print_score(results)
    return results


def print_score(results: list[dict[str, Any]]) -> None:
    """Means over the tasks of each group, and VTAB's score: the mean of the three."""
    means = []
    for group in dict.fromkeys(VTAB_GROUPS.values()):
        scores = [r["test_accuracy"] for r in results if VTAB_GROUPS[r["dataset"]] == group]
        means.append(sum(scores) / len(scores))
        print(f"{group:<12} {means[-1]:.2%}  ({len(scores)} runs)")
    tasks = sum(r["test_accuracy"] for r in results) / len(results)
    print(f"mean of the three groups {sum(means) / 3:.2%}, mean of the runs {tasks:.2%}")


if __name__ == "__main__":
    try:
        main()
    except (DataError, RunError, sp.SVPError) as error:
        raise SystemExit(f"error: {error}") from error
