"""Recipes against the numbers that the released script gives, worked out by hand."""

from dataclasses import fields

import pytest
from methods import METHODS, SVP_METHODS
from recipes import HTA, METHOD_LR, QUIRKS, VTAB, VTAB_GROUPS, Recipe, paper_faithful


@pytest.mark.parametrize(
    ("dataset", "lr"),
    [
        ("cub", 1.125e-3),
        ("cifar100", 9.375e-4),
        ("cifar10", 9.375e-4),
        ("dtd", 1.21875e-3),
        ("dogs", 9.375e-5),
        ("gtsrb", 1.875e-3),
        ("nabirds", 1.875e-3),
        ("svhn", 2.8125e-3),
        ("flowers", 2.8125e-3),
        ("food101", 9.375e-4),
    ],
)
def test_released_rows_train_at_the_released_rate(dataset: str, lr: float):
    assert HTA[dataset].source == "released"
    assert HTA[dataset].lr == pytest.approx(lr, rel=1e-12)


def test_released_rows_have_the_released_decay_and_group_size():
    columns = {name: (row.weight_decay, row.cross_group_size) for name, row in HTA.items()}
    assert columns.pop("cars") == columns["cub"]
    assert columns == {
        "cub": (1e-4, 8),
        "cifar100": (1e-5, 12),
        "cifar10": (1e-4, 8),
        "dtd": (1e-4, 4),
        "dogs": (1e-8, 12),
        "gtsrb": (1e-6, 6),
        "nabirds": (0.0, 8),
        "svhn": (1e-3, 12),
        "flowers": (1e-4, 8),
        "food101": (1e-4, 8),
    }


def test_what_all_released_runs_share():
    for row in HTA.values():
        assert (row.batch_size, row.epochs, row.warmup_epochs) == (96, 100, 5)
        assert (row.warmup_lr, row.min_lr, row.drop_path) == (1e-5, 1e-5, 0.1)
        assert (row.label_smoothing, row.erase, row.clip_norm) == (0.1, 0.25, None)
        assert (row.inner_bottleneck, row.augment, row.select) == (64, "reference", "test")
        assert (row.mixup, row.cutmix) in ((0.8, 1.0), (0.0, 0.0))


def test_vtab_rows_are_those_of_mambapeft():
    for row in VTAB.values():
        assert (row.batch_size, row.epochs, row.warmup_epochs) == (32, 100, 10)
        assert (row.warmup_lr, row.min_lr, row.weight_decay) == (1e-6, 1e-5, 1e-4)
        assert (row.clip_norm, row.drop_path, row.augment) == (5.0, 0.1, "resize")
        assert (row.label_smoothing, row.mixup, row.cutmix) == (0.0, 0.0, 0.0)


def test_the_quirks_are_those_of_the_released_runs():
    def having(quirk: str) -> set[str]:
        return {name for name, row in HTA.items() if getattr(row, quirk)}

    assert having("simam_input") == {"cifar10", "cifar100", "flowers"}
    assert having("factorised_head") == {"cub", "nabirds", "flowers"}
    assert having("schedule_lag") == set(HTA)
    assert {name for name, row in HTA.items() if not row.mixup} == {"svhn", "flowers"}
    assert HTA["dtd"].seed == 3407
    assert QUIRKS.keys() <= {field.name for field in fields(Recipe)}


def test_paper_faithful_changes_the_quirks_and_nothing_else():
    for row in HTA.values():
        plain = paper_faithful(row)
        changed = {f.name for f in fields(row) if getattr(row, f.name) != getattr(plain, f.name)}
        assert changed <= QUIRKS.keys()
        assert not any(getattr(plain, quirk) for quirk in QUIRKS.keys() - {"select"})


def test_what_is_not_released_says_so():
    assert HTA["cars"].source.startswith("ours")
    assert all(row.source.startswith("ours") for row in VTAB.values())


def test_vtab_has_seven_natural_four_specialised_and_eight_structured_tasks():
    groups = list(VTAB_GROUPS.values())
    assert [groups.count(g) for g in ("Natural", "Specialized", "Structured")] == [7, 4, 8]
    assert all(row.lr == pytest.approx(1e-3) for row in VTAB.values())


def test_every_other_method_has_a_learning_rate():
    assert METHOD_LR.keys() == set(METHODS) - set(SVP_METHODS)
