"""Fine-tune Vim-Small on one or all data sets of HTA (paper, Table 1).

    python examples/train_hta.py --dataset cub --data-root ~/data
    python examples/train_hta.py --dataset all --data-root ~/data --method linear --seeds 0 1 2
    torchrun --nproc_per_node 4 examples/train_hta.py --dataset food101 --data-root ~/data

Hyperparameters are the rows of recipes.py, splits and folders those of datasets.py. A run that
was stopped, in whatever way, goes on when the same command is given again; complete runs are
skipped. `python examples/report.py runs` makes the table.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import load_hta
from engine import new_parser, run_suite
from recipes import HTA, Recipe
from run_folder import RunError
from splits import DataError, Splits

import svp_peft as sp


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = new_parser(__doc__.splitlines()[0], list(HTA))
    parser.set_defaults(output=Path("runs/hta"))
    parser.add_argument("--download", action="store_true", help="fetch it with torchvision")
    options = parser.parse_args(arguments)

    def load(dataset: str, recipe: Recipe) -> Splits:
        honest = recipe.select == "val"
        return load_hta(dataset, options.data_root, honest=honest, download=options.download)

    return run_suite(HTA, load, options)


if __name__ == "__main__":
    try:
        main()
    except (DataError, RunError, sp.SVPError) as error:
        raise SystemExit(f"error: {error}") from error
