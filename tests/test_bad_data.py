"""Damaged data sets and wrong options: one clear error each, and what it does not touch."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError

import engine
import images
import numpy as np
import pytest
import torch
import torchvision
import train_hta
import train_vtab1k
from datasets import load_hta, load_vtab
from images import Order, Transformed, batches, build_loader, build_transform, read_image, resident
from PIL import Image
from recipes import HTA, VTAB
from run_folder import RunError
from scipy.io import savemat
from splits import DataError, Split
from torchvision.datasets import cifar

from tests.miniatures import (
    HTA_WRITERS,
    write_cub,
    write_dtd,
    write_flowers_torchvision,
    write_food101,
    write_gtsrb,
    write_picture,
    write_svhn,
    write_vtab,
)


@pytest.fixture(autouse=True)
def _no_checksums(monkeypatch: pytest.MonkeyPatch) -> None:
    # torchvision knows the checksums of the real CIFAR files; a miniature has others
    monkeypatch.setattr(cifar, "check_integrity", lambda *_: True)


# ---- lists ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", "not a table of images"),
        (b"{}", "not a table of images"),
        (b'{"a.jpg": "001", "b.jpg": 2}', "not a table of images"),
        (b'{"a.jpg": 1.5}', "not a table of images"),
        (b'{"a.jpg": "001"', "not valid JSON"),
        ('{"a.jpg": "001"}'.encode("utf-16"), "not UTF-8"),
    ],
)
def test_a_damaged_json_list_is_named(content: bytes, message: str, tmp_path: Path):
    write_cub(tmp_path)
    (tmp_path / "FGVC/CUB_200_2011/test.json").write_bytes(content)
    with pytest.raises(DataError, match=rf"test\.json.*{message}"):
        load_hta("cub", tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.splitlines()[0], "names no image at all"),
        (lambda text: text.replace(";0\n", ";\n"), None),
        (lambda text: text.replace(";1\n", ";dog\n"), "class 'dog' is out of range"),
        (lambda text: text.replace(";2\n", ";43\n"), "class '43' is out of range"),
        (lambda text: text + "00009.ppm\n", "1 of 7 images are missing"),
    ],
)
def test_a_damaged_table_of_gtsrb_is_named(
    change: Callable[[str], str], message: str | None, tmp_path: Path
):
    write_gtsrb(tmp_path)
    file = tmp_path / "gtsrb/GT-final_test.csv"
    file.write_text(change(file.read_text()))
    if message is None:
        # nothing but zeros is the class 0, and so is nothing at all
        assert load_hta("gtsrb", tmp_path).test.labels == [0, 1, 2, 0, 1, 2]
        return
    with pytest.raises(DataError, match=message):
        load_hta("gtsrb", tmp_path)


def test_a_damaged_matlab_file_is_named(tmp_path: Path):
    write_svhn(tmp_path)
    file = tmp_path / "train_32x32.mat"
    whole = file.read_bytes()
    for content in (whole[:1000], b"", b"not Matlab"):
        file.write_bytes(content)
        with pytest.raises(DataError, match=r"train_32x32\.mat is not a whole Matlab file"):
            load_hta("svhn", tmp_path)
    for arrays, message in (
        ({"X": np.zeros((32, 32, 3, 2))}, "not a whole Matlab file with X, y"),
        ({"X": np.zeros((32, 32, 3, 2)), "y": np.ones((3, 1))}, "do not fit 3 labels"),
        ({"X": np.zeros((32, 32, 3, 1)), "y": np.array([[11]])}, "label 11 is out of range"),
    ):
        savemat(file, arrays)
        with pytest.raises(DataError, match=message):
            load_hta("svhn", tmp_path)
    write_flowers_torchvision(tmp_path)
    savemat(tmp_path / "flowers-102/imagelabels.mat", {"labels": np.array([1, 2, 3])})
    with pytest.raises(DataError, match=r"names images 1 to \d+, but imagelabels.mat has 3"):
        load_hta("flowers", tmp_path)


@pytest.mark.parametrize("file", ["data_batch_2", "test_batch"])
def test_a_label_of_cifar_that_is_out_of_range_is_an_error(file: str, tmp_path: Path):
    HTA_WRITERS["cifar10"](tmp_path)
    path = tmp_path / "cifar-10-batches-py" / file
    content = pickle.loads(path.read_bytes())
    content["labels"][0] = 10
    path.write_bytes(pickle.dumps(content))
    part = "test" if file == "test_batch" else "train"
    with pytest.raises(DataError, match=f"label 10 of the {part} split is out of range"):
        load_hta("cifar10", tmp_path)


def test_an_empty_list_is_named(tmp_path: Path):
    write_vtab(tmp_path, "kitti", 4)
    file = tmp_path / "VTAB/vtab-1k/kitti/val200.txt"
    file.write_text("\n")
    with pytest.raises(DataError, match=r"val200\.txt names no image at all"):
        load_vtab("kitti", tmp_path, 4)
    file.write_bytes("images/ü.jpg 0".encode("latin-1"))
    with pytest.raises(DataError, match=r"val200\.txt is not UTF-8"):
        load_vtab("kitti", tmp_path, 4)


@pytest.mark.parametrize("error", [URLError("no route to host"), RuntimeError("not downloaded")])
def test_a_download_that_fails_says_so(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(torchvision.datasets, "DTD", fail)
    with pytest.raises(DataError, match=f"dtd: the download to {tmp_path} failed .*again"):
        load_hta("dtd", tmp_path, download=True)


# ---- images --------------------------------------------------------------------------------------


def test_more_kinds_of_image_become_rgb(tmp_path: Path):
    ramp = np.arange(256).reshape(16, 16)
    Image.fromarray((ramp * 257).astype(np.int32)).save(tmp_path / "32 bits.tif")
    Image.fromarray((ramp * 257).astype(np.uint16)).save(tmp_path / "16 bits.tif")
    Image.fromarray(ramp.astype(np.uint8)).convert("LA").save(tmp_path / "alpha.png")
    expected = np.repeat(ramp[..., None], 3, axis=2)
    for file in tmp_path.iterdir():
        assert np.array_equal(np.asarray(read_image(file)), expected), file.name
    Image.fromarray(np.full((2, 2), 2**31 - 1, dtype=np.int32)).save(tmp_path / "bright.tif")
    assert (np.asarray(read_image(tmp_path / "bright.tif")) == 255).all()


def test_an_image_of_absurd_size_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_picture(tmp_path / "bomb.png", 0, 0)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match=r"bomb\.png: .*exceeds limit"):
        read_image(tmp_path / "bomb.png")


def test_what_a_worker_finds_wrong_is_said_without_its_traceback(tmp_path: Path):
    write_picture(tmp_path / "0.jpg", 0, 0)
    (tmp_path / "0.jpg").write_bytes((tmp_path / "0.jpg").read_bytes()[:300])
    split = Split([tmp_path / "0.jpg"], [0], ["0.jpg"])
    data = Transformed(split, build_transform("resize", 16, training=False))
    for workers in (0, 1):
        loader = build_loader(data, Order(1, None), 1, workers, drop_last=False)
        with pytest.raises(DataError) as caught:
            list(batches(loader))
        assert str(caught.value).startswith(f"{tmp_path / '0.jpg'}: not a readable image")
        assert "\n" not in str(caught.value)


def test_a_split_is_put_on_the_device_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(images, "PART", 4)
    for i in range(10):
        write_picture(tmp_path / f"{i}.png", i, i)
    split = Split([tmp_path / f"{i}.png" for i in range(10)], list(range(10)), list("0123456789"))
    transform = build_transform("resize", 16, training=False)
    data = resident(split, transform, 16, torch.device("cpu"))
    assert data is not None
    for i in range(10):
        assert torch.equal(data.images[i], transform(read_image(split.images[i])))


def test_processes_on_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch):
    class Memory:
        available = 1000

    monkeypatch.setattr(images.psutil, "virtual_memory", Memory)
    assert images.free_memory(torch.device("cpu")) == 1000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert images.free_memory(torch.device("cpu")) == 250


# ---- options and suites --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option",
    [
        *("--epochs=0", "--steps=0", "--batch-size=0", "--accumulate=0", "--inner-bottleneck=-1"),
        *("--lr=-1", "--lr=nan", "--lr=inf", "--workers=-1", "--seeds=-1", "--seeds=4294967296"),
        *("--ema=2", "--cross-group-size=two", "--checkpoint-seconds=-5", "--epochs=1.5"),
    ],
)
def test_a_number_that_cannot_work_is_refused_at_once(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as stopped:
        train_hta.main(["--dataset", "dtd", "--data-root", str(tmp_path), option])
    assert stopped.value.code == 2
    assert f"argument {option.partition('=')[0]}" in capsys.readouterr().err


def small(dataset: str, root: Path, backbone: Path, *options: str) -> list[str]:
    return [
        *("--dataset", dataset, "--data-root", str(root), "--backbone", str(backbone)),
        *("--output", str(root / "out"), "--cpu", "--workers", "0", "--batch-size", "4"),
        *("--cross-group-size", "2", "--epochs", "1", "--steps", "1", *options),
    ]


def test_an_odd_step_is_refused_where_images_are_mixed_in_pairs(
    tiny_backbone: Path, tmp_path: Path
):
    write_dtd(tmp_path)
    with pytest.raises(RunError, match="a step of a process has 3 images, but Mixup"):
        train_hta.main(small("dtd", tmp_path, tiny_backbone, "--batch-size", "3"))
    # the settings of a run that trained nothing bind nobody
    [result] = train_hta.main(small("dtd", tmp_path, tiny_backbone))
    assert result["variant"] == "group size 2"
    with pytest.raises(RunError, match="other settings"):
        train_hta.main(small("dtd", tmp_path, tiny_backbone, "--batch-size", "2"))


@pytest.mark.parametrize("seed", [4_294_967_295, 12_345])
def test_any_seed_can_be_run(seed: int, tiny_backbone: Path, tmp_path: Path):
    write_vtab(tmp_path, "kitti", 4)
    command = small("kitti", tmp_path, tiny_backbone, "--seeds", str(seed), "--method", "linear")
    [result] = train_vtab1k.main(command)
    assert result["seed"] == seed


def test_a_suite_goes_on_after_a_data_set_that_cannot_be_used(
    tiny_backbone: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    monkeypatch.setattr(train_hta, "HTA", {name: HTA[name] for name in ("cub", "food101", "dtd")})
    write_food101(tmp_path)
    broken = tmp_path / "food-101/images/waffles/2100000.jpg"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:200])
    write_dtd(tmp_path)
    command = small("all", tmp_path, tiny_backbone, "--method", "linear", "--seeds", "0")
    with pytest.raises(DataError, match=r"2 of 3 data sets left out.*: cub, food101\. Put"):
        train_hta.main(command)
    assert "cub is left out: cub: not found under" in caplog.text
    assert f"food101 is left out: {broken}: not a readable image" in caplog.text
    assert "dtd: 3 classes found, the whole data set has 47" in caplog.text
    assert (tmp_path / "out/dtd/linear/seed0/result.json").is_file()
    broken.write_bytes(whole)
    write_cub(tmp_path)
    assert [result["dataset"] for result in train_hta.main(command)] == ["cub", "food101", "dtd"]


def test_vtab_prints_no_score_of_an_incomplete_suite(
    tiny_backbone: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(train_vtab1k, "VTAB", {name: VTAB[name] for name in ("kitti", "svhn")})
    write_vtab(tmp_path, "kitti", 4)
    with pytest.raises(DataError, match=r"left out.*: svhn\."):
        train_vtab1k.main(small("all", tmp_path, tiny_backbone, "--method", "linear"))
    assert "mean of the three groups" not in capsys.readouterr().out


def test_all_processes_take_the_main_ones_word_for_when_a_checkpoint_is_due(
    tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[bool] = []

    def not_yet(answer: list[bool]) -> None:
        asked.append(answer[0])
        answer[0] = False

    saved: list[int] = []
    monkeypatch.setattr(engine, "broadcast_object_list", not_yet)
    monkeypatch.setattr(engine, "save_checkpoint", lambda *arguments: saved.append(arguments[3]))
    write_vtab(tmp_path, "kitti", 4)
    command = small("kitti", tmp_path, tiny_backbone, "--method", "linear", "--epochs", "3")
    train_vtab1k.main([*command, "--checkpoint-seconds", "0"])
    assert asked == [True] * 3
    # the last epoch's is made whatever the time
    assert saved == [2]


def test_run_json_and_result_say_what_was_run(tiny_backbone: Path, tmp_path: Path):
    write_vtab(tmp_path, "kitti", 4)
    [result] = train_vtab1k.main(
        small("kitti", tmp_path, tiny_backbone, "--inner-bottleneck", "8", "--lr", "0")
    )
    assert result["variant"] == "group size 2, bottleneck 8"
    assert result["lr"] == 0
    settings = json.loads((tmp_path / "out/kitti/svp/seed0/run.json").read_text())
    assert settings["recipe"]["inner_bottleneck"] == 8
