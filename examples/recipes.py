"""One row per data set: how it is trained, and where the numbers come from.

Sources.

released   the authors' training script svp/scripts/train.sh and its defaults in
           svp/utils/options.py
ours       nothing is published: Stanford Cars has a loader but no line in train.sh, VTAB-1k has
           loaders only. `source` says where the numbers were taken from instead.

The rows are as released, with the quirks of the released runs listed in `QUIRKS`;
`paper_faithful(row)` leaves the quirks out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train on one data set. The defaults are those of the released code."""

    dataset: str
    num_classes: int
    base_lr: float
    """Learning rate of SVP for a batch of 512; the one in use is base_lr * batch_size / 512."""
    weight_decay: float
    """Of matrices; vectors and biases are not decayed."""
    cross_group_size: int
    source: str

    inner_bottleneck: int = 64
    batch_size: int = 96
    seed: int = 0
    mixup: float = 0.8
    cutmix: float = 1.0
    label_smoothing: float = 0.1
    drop_path: float = 0.1
    epochs: int = 100
    warmup_epochs: int = 5
    warmup_lr: float = 1e-5
    min_lr: float = 1e-5
    clip_norm: float | None = None
    augment: str = "reference"
    """"reference" or "resize": see `images.build_transform`."""
    erase: float = 0.25
    """Probability of random erasing, with "reference" only."""

    select: str = "test"
    """What chooses the best epoch: "test", as released, "val" or "last"."""
    simam_input: bool = False
    factorised_head: bool = False
    schedule_lag: bool = False

    @property
    def lr(self) -> float:
        """Learning rate of SVP after the released scaling by the batch."""
        return self.base_lr * self.batch_size / 512


QUIRKS: dict[str, str] = {
    "select": "the best epoch is chosen by the accuracy on the test split",
    "simam_input": "CIFAR-10, CIFAR-100 and Flowers: a parameter-free SimAM on the input image",
    "factorised_head": "CUB-200, NABirds and Flowers: a head of two linear layers, nothing between",
    "schedule_lag": "the schedule is one epoch late: epochs 0 and 1 both train at warmup_lr",
}


def paper_faithful(recipe: Recipe) -> Recipe:
    """The row without the quirks of the released runs; the best epoch is chosen on validation."""
    return replace(
        recipe, select="val", simam_input=False, factorised_head=False, schedule_lag=False
    )


_COLUMNS = ("dataset", "num_classes", "base_lr", "weight_decay", "cross_group_size")
_PLAIN: dict[str, Any] = {}
_NO_MIXUP: dict[str, Any] = {"mixup": 0.0, "cutmix": 0.0}
_TWO_LAYERS: dict[str, Any] = {"factorised_head": True}
_SIMAM: dict[str, Any] = {"simam_input": True}

# data set, classes, base lr, weight decay, cross_group_size, what differs from the defaults
_RELEASED: tuple[tuple[str, int, float, float, int, dict[str, Any]], ...] = (
    ("cub", 200, 6e-3, 1e-4, 8, _TWO_LAYERS),
    ("nabirds", 555, 1e-2, 0.0, 8, _TWO_LAYERS),
    ("flowers", 102, 1.5e-2, 1e-4, 8, _TWO_LAYERS | _SIMAM | _NO_MIXUP),
    ("dogs", 120, 5e-4, 1e-8, 12, _PLAIN),
    ("cifar10", 10, 5e-3, 1e-4, 8, _SIMAM),
    ("cifar100", 100, 5e-3, 1e-5, 12, _SIMAM),
    ("dtd", 47, 6.5e-3, 1e-4, 4, {"seed": 3407}),
    ("gtsrb", 43, 1e-2, 1e-6, 6, _PLAIN),
    ("svhn", 10, 1.5e-2, 1e-3, 12, _NO_MIXUP),
    ("food101", 101, 5e-3, 1e-4, 8, _PLAIN),
)

HTA: dict[str, Recipe] = {
    row[0]: Recipe(
        **dict(zip(_COLUMNS, row[:5], strict=True)), **row[5], source="released", schedule_lag=True
    )
    for row in _RELEASED
} | {
    "cars": Recipe(
        dataset="cars",
        num_classes=196,
        base_lr=6e-3,
        weight_decay=1e-4,
        cross_group_size=8,
        schedule_lag=True,
        source="ours: the row of cub, with one linear layer as head",
    )
}

# name of the folder, classes, and the group that VTAB averages over
_VTAB_TASKS: tuple[tuple[str, int, str], ...] = (
    ("cifar", 100, "Natural"),
    ("caltech101", 102, "Natural"),
    ("dtd", 47, "Natural"),
    ("oxford_flowers102", 102, "Natural"),
    ("oxford_iiit_pet", 37, "Natural"),
    ("svhn", 10, "Natural"),
    ("sun397", 397, "Natural"),
    ("patch_camelyon", 2, "Specialized"),
    ("eurosat", 10, "Specialized"),
    ("resisc45", 45, "Specialized"),
    ("diabetic_retinopathy", 5, "Specialized"),
    ("clevr_count", 8, "Structured"),
    ("clevr_dist", 6, "Structured"),
    ("dmlab", 6, "Structured"),
    ("kitti", 4, "Structured"),
    ("dsprites_loc", 16, "Structured"),
    ("dsprites_ori", 16, "Structured"),
    ("smallnorb_azi", 18, "Structured"),
    ("smallnorb_ele", 9, "Structured"),
)
VTAB_GROUPS: dict[str, str] = {name: group for name, _, group in _VTAB_TASKS}

VTAB: dict[str, Recipe] = {
    name: Recipe(
        dataset=name,
        num_classes=classes,
        # lr 1e-3 in use, as in MambaPEFT
        base_lr=1e-3 * 512 / 32,
        batch_size=32,
        weight_decay=1e-4,
        cross_group_size=8,
        warmup_epochs=10,
        warmup_lr=1e-6,
        clip_norm=5.0,
        mixup=0.0,
        cutmix=0.0,
        label_smoothing=0.0,
        augment="resize",
        select="last",
        source="ours: MambaPEFT's recipe for Vim-S on VTAB-1k (vtab1k_bs32_adamw.py)",
    )
    for name, classes, _ in _VTAB_TASKS
}

# Learning rates in use for the methods that SVP is compared with, at any batch size. The paper
# does not publish its own; these are ours, starting points that no one tuned on these data sets.
# SVP and its ablations take the recipe's.
METHOD_LR: dict[str, float] = {
    "linear": 1e-2,
    "full": 5e-4,
    "bitfit": 5e-3,
    "vpt-shallow": 1e-2,
    "vpt-deep": 1e-2,
    "lora": 2e-3,
}
