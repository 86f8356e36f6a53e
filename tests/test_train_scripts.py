"""Both training scripts, two steps of every data set and every method, with a tiny backbone."""

import json
from pathlib import Path

import pytest
import torch
import train_hta
import train_vtab1k
from datasets import load_hta
from images import Normalise, Order, build_data, build_loader
from methods import METHODS, SVP_METHODS
from recipes import HTA, VTAB
from torchvision.datasets import cifar

import svp_peft as sp
from tests.miniatures import HTA_WRITERS, write_vtab


@pytest.fixture(autouse=True)
def _no_checksums(monkeypatch: pytest.MonkeyPatch) -> None:
    # torchvision knows the checksums of the real CIFAR files; a miniature has others
    monkeypatch.setattr(cifar, "check_integrity", lambda *_: True)


def arguments(dataset: str, method: str, root: Path, backbone: Path, output: Path) -> list[str]:
    return [
        *("--dataset", dataset, "--method", method),
        *("--data-root", str(root), "--backbone", str(backbone), "--output", str(output)),
        *("--cpu", "--workers", "0", "--batch-size", "4", "--cross-group-size", "2"),
        *("--epochs", "1", "--steps", "2"),
    ]


def check(result: dict, folder: Path, method: str, backbone: Path, classes: int) -> None:
    assert 0 <= result["test_accuracy"] <= 1
    assert result["trained_parameters"] > result["head_parameters"] or method == "linear"
    row = json.loads((folder / "metrics.jsonl").read_text())
    assert row["loss"] > 0
    assert list((folder / "tensorboard").iterdir())
    if method in SVP_METHODS:
        model = sp.load_vim(backbone, num_classes=classes)
        sp.load_adapter(model, folder / "best")
        scales = [scale for scale in (model.svp.alpha, model.svp.beta) if scale is not None]
        assert all(scale.any() for scale in scales)
    else:
        assert (folder / "best/trained.safetensors").is_file()


# every data set once and every method at least once per script: the product would be 300 runs
@pytest.mark.parametrize(("number", "dataset"), list(enumerate(HTA)))
def test_train_hta_runs(number: int, dataset: str, tiny_backbone: Path, tmp_path: Path):
    method = METHODS[number % len(METHODS)]
    HTA_WRITERS[dataset](tmp_path)
    [result] = train_hta.main(arguments(dataset, method, tmp_path, tiny_backbone, tmp_path / "out"))
    folder = tmp_path / "out" / dataset / method / f"seed{HTA[dataset].seed}"
    check(result, folder, method, tiny_backbone, 3)


@pytest.mark.parametrize(("number", "dataset"), list(enumerate(VTAB)))
def test_train_vtab1k_runs(number: int, dataset: str, tiny_backbone: Path, tmp_path: Path):
    method = METHODS[number % len(METHODS)]
    classes = VTAB[dataset].num_classes
    write_vtab(tmp_path, dataset, classes)
    [result] = train_vtab1k.main(
        arguments(dataset, method, tmp_path, tiny_backbone, tmp_path / "out")
    )
    check(result, tmp_path / "out" / dataset / method / "seed0", method, tiny_backbone, classes)


def test_a_suite_skips_complete_runs_and_prints_the_score(
    tiny_backbone: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    tasks = {name: VTAB[name] for name in ("eurosat", "svhn", "kitti")}
    monkeypatch.setattr(train_vtab1k, "VTAB", tasks)
    for name, recipe in tasks.items():
        write_vtab(tmp_path, name, recipe.num_classes)
    command = arguments("all", "linear", tmp_path, tiny_backbone, tmp_path / "out")
    first = train_vtab1k.main(command)
    assert len(first) == 3
    assert "Structured" in capsys.readouterr().out
    (tmp_path / "out/kitti/linear/seed0/result.json").unlink()
    written = (tmp_path / "out/eurosat/linear/seed0/result.json").stat().st_mtime_ns
    again = train_vtab1k.main(command)
    for one, other in zip(first, again, strict=True):
        assert one | {"seconds": 0} == other | {"seconds": 0}
    assert (tmp_path / "out/eurosat/linear/seed0/result.json").stat().st_mtime_ns == written


@pytest.mark.parametrize("select", ["val", "test", "last"])
def test_the_split_that_chooses_the_epoch_is_the_one_asked_for(
    select: str, tiny_backbone: Path, tmp_path: Path
):
    HTA_WRITERS["dtd"](tmp_path)
    command = arguments("dtd", "svp", tmp_path, tiny_backbone, tmp_path / "out")
    [result] = train_hta.main([*command, "--select", select, "--epochs", "3", "--seeds", "0"])
    folder = tmp_path / "out/dtd/svp/seed0"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    if select == "last":
        assert "test_accuracy" not in rows[0]
        assert result["best_epoch"] == 2
        assert result["test_accuracy"] == result["last_test_accuracy"]
    else:
        scores = [row[f"{select}_accuracy"] for row in rows]
        assert result["best_epoch"] == scores.index(max(scores))
        assert (result["val_accuracy"] == max(scores)) == (select == "val")
        if select == "test":
            assert result["test_accuracy"] == max(scores)


def test_the_saved_adapter_gives_the_accuracy_that_was_reported(
    tiny_backbone: Path, tmp_path: Path
):
    HTA_WRITERS["dtd"](tmp_path)
    command = arguments("dtd", "svp", tmp_path, tiny_backbone, tmp_path / "out")
    [result] = train_hta.main([*command, "--epochs", "4", "--seeds", "0"])
    model = sp.load_vim(tiny_backbone, num_classes=3).eval()
    sp.load_adapter(model, tmp_path / "out/dtd/svp/seed0/best")
    device = torch.device("cpu")
    split = load_hta("dtd", tmp_path).test
    data = build_data(split, "reference", 32, device, training=False)
    [(images, labels)] = build_loader(data, Order(9, None), 9, 0, drop_last=False)
    with torch.no_grad():
        hits = (model(Normalise(device)(images)).argmax(1) == labels).float().mean()
    assert hits.item() == pytest.approx(result["test_accuracy"])
