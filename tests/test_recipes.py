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
