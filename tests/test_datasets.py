"""Every loader on a miniature of its data set, and what happens when files are wrong."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from accelerate.utils import set_seed
from datasets import FOLDERS, load_hta, load_vtab
from images import (
    Order,
    Transformed,
    build_data,
    build_loader,
    build_transform,
    decoded,
    read_image,
)
from PIL import Image, ImageFilter
from recipes import HTA, VTAB
from sources import DOWNLOADS
from splits import DataError, Split, hold_out
from timm.data.auto_augment import RandAugment
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.datasets import cifar

from tests.miniatures import (
    HTA_WRITERS,
    picture,
    write_cub,
    write_flowers_torchvision,
    write_gtsrb,
    write_picture,
    write_vtab,
)


@pytest.fixture(autouse=True)
def _no_checksums(monkeypatch: pytest.MonkeyPatch) -> None:
    # torchvision knows the checksums of the real CIFAR files; a miniature has others
    monkeypatch.setattr(cifar, "check_integrity", lambda *_: True)


# released: train, test; honest: train, val
COUNTS = {
    "cub": (15, 9, 15, 6),
    "nabirds": (15, 9, 15, 4),
    "flowers": (15, 9, 15, 6),
    "dogs": (15, 9, 15, 6),
    "cars": (21, 9, 15, 6),
    "cifar10": (50, 10, 45, 5),
    "cifar100": (12, 3, 10, 2),
    "dtd": (15, 9, 15, 6),
    "gtsrb": (24, 6, 24, 6),
    "svhn": (40, 10, 40, 10),
    "food101": (14, 6, 14, 4),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_every_data_set_of_hta_is_read_from_its_own_format(name: str, tmp_path: Path):
    HTA_WRITERS[name](tmp_path)
    released = load_hta(name, tmp_path, honest=False)
    honest = load_hta(name, tmp_path, honest=True)
    assert released.val is None
    assert honest.val is not None
    found = (len(released.train), len(released.test), len(honest.train), len(honest.val))
    assert found == COUNTS[name]
    assert honest.test.fingerprint() == released.test.fingerprint()
    for split in (released.train, released.test, honest.train, honest.val):
        assert set(split.labels) <= set(range(released.num_classes))
        data = Transformed(split, build_transform("resize", 16, training=False))
        assert data[0][0].shape == (3, 16, 16)
    assert not set(honest.train.names) & set(honest.val.names)


@pytest.mark.parametrize("name", FOLDERS)
def test_the_labels_belong_to_the_images(name: str, tmp_path: Path):
    HTA_WRITERS[name](tmp_path)
    splits = load_hta(name, tmp_path)
    colours: dict[int, np.ndarray] = {}
    for split in (splits.train, splits.val, splits.test):
        for image, label in zip(split.images, split.labels, strict=True):
            array = image if isinstance(image, np.ndarray) else np.asarray(read_image(image))
            mean = array.reshape(-1, 3).mean(0)
            # noise of +-20 and JPEG shift a mean by a few levels, classes differ by tens
            assert np.abs(colours.setdefault(label, mean) - mean).max() < 15


def test_flowers_are_also_read_as_torchvision_stores_them(tmp_path: Path):
    write_flowers_torchvision(tmp_path)
    splits = load_hta("flowers", tmp_path)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (15, 6, 9)
    assert splits.train.labels == [0] * 5 + [1] * 5 + [2] * 5


@pytest.mark.parametrize(
    "spelling", ["FGVC/cub_200_2011", "CUB_200_2011", "fgvc/CUB", "cub200", "."]
)
def test_folders_may_be_spelled_as_any_peer_spells_them(spelling: str, tmp_path: Path):
    write_cub(tmp_path / "written")
    target = tmp_path / "data set" / spelling
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(tmp_path / "written/FGVC/CUB_200_2011", target, dirs_exist_ok=True)
    (target / "images").rename(target / "Images")
    assert len(load_hta("cub", tmp_path / "data set").train) == 15


@pytest.mark.parametrize("name", FOLDERS)
def test_a_missing_data_set_says_where_it_should_be_and_where_it_comes_from(
    name: str, tmp_path: Path
):
    with pytest.raises(DataError) as caught:
        load_hta(name, tmp_path)
    message = str(caught.value)
    assert str(tmp_path) in message
    assert FOLDERS[name][-1] in message
    assert "--download" in message or "http" in message


def test_a_missing_list_or_image_is_named(tmp_path: Path):
    write_cub(tmp_path)
    folder = tmp_path / "FGVC/CUB_200_2011"
    image = next(iter(json.loads((folder / "test.json").read_text())))
    (folder / "images" / image).unlink()
    with pytest.raises(DataError, match=f"1 of 9 images are missing, the first is .*{image}"):
        load_hta("cub", tmp_path)
    (folder / "test.json").unlink()
    with pytest.raises(DataError, match=r"test\.json is missing"):
        load_hta("cub", tmp_path)


@pytest.mark.parametrize("name", DOWNLOADS)
def test_what_torchvision_can_download_is_found_where_it_puts_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write = write_flowers_torchvision if name == "flowers" else HTA_WRITERS[name]
    kind, splits = DOWNLOADS[name]
    asked: list[str | None] = []

    class Fake(getattr(torchvision.datasets, kind)):
        def __init__(self, root, *, download=False, **kwargs):
            if download:
                asked.append(kwargs.get("split"))
                if len(asked) == 1:
                    write(Path(root))
            else:
                super().__init__(root, **kwargs)

    monkeypatch.setattr(torchvision.datasets, kind, Fake)
    assert len(load_hta(name, tmp_path / "new folder", download=True).train) > 0
    assert asked == (list(splits) or [None])


def test_what_torchvision_cannot_download_says_so(tmp_path: Path):
    with pytest.raises(DataError, match="cub: torchvision cannot download it"):
        load_hta("cub", tmp_path, download=True)


def test_an_unknown_name_lists_the_known_ones(tmp_path: Path):
    with pytest.raises(DataError, match="cub, nabirds"):
        load_hta("imagenet", tmp_path)


def test_an_empty_class_is_an_error_that_names_it(tmp_path: Path):
    write_gtsrb(tmp_path)
    for file in (tmp_path / "gtsrb/GTSRB/Training/00001").iterdir():
        file.unlink()
    with pytest.raises(DataError, match="no training image of class 1"):
        load_hta("gtsrb", tmp_path)


def test_a_class_that_training_does_not_have_is_an_error(tmp_path: Path):
    write_cub(tmp_path)
    file = tmp_path / "FGVC/CUB_200_2011/test.json"
    table = json.loads(file.read_text())
    file.write_text(json.dumps(dict.fromkeys(table, "200")))
    with pytest.raises(DataError, match=r"test\.json: class '200' is out of range"):
        load_hta("cub", tmp_path)


def test_a_byte_order_mark_in_the_csv_changes_nothing(tmp_path: Path):
    write_gtsrb(tmp_path)
    expected = load_hta("gtsrb", tmp_path).test
    file = tmp_path / "gtsrb/GT-final_test.csv"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert load_hta("gtsrb", tmp_path).test == expected
    file.write_text(file.read_text("utf-8-sig").replace(";", ","))
    with pytest.raises(DataError, match="Filename and ClassId expected"):
        load_hta("gtsrb", tmp_path)


def test_gtsrb_validates_on_whole_tracks(tmp_path: Path):
    write_gtsrb(tmp_path)
    splits = load_hta("gtsrb", tmp_path)
    tracks = [
        {name.rsplit("_", 1)[0] for name in split.names} for split in (splits.train, splits.val)
    ]
    assert not tracks[0] & tracks[1]


def test_hold_out_depends_on_the_names_alone():
    names = [f"image_{i}" for i in range(1000)]
    kept, held = hold_out(names, 0.8)
    assert (len(kept), len(held)) == (800, 200)
    again, _ = hold_out(names[::-1], 0.8)
    assert {names[::-1][i] for i in again} == {names[i] for i in kept}
    # written down: whoever changes the rule changes published splits
    assert held[:5] == [5, 10, 15, 20, 21]


@pytest.mark.parametrize("name", VTAB)
def test_every_task_of_vtab_is_read_from_its_own_format(name: str, tmp_path: Path):
    classes = VTAB[name].num_classes
    write_vtab(tmp_path, name, classes)
    honest = load_vtab(name, tmp_path, classes, honest=True)
    released = load_vtab(name, tmp_path, classes, honest=False)
    assert len(honest.val) == 3
    assert len(released.train) == len(honest.train) + 3 == max(classes, 10) + 3
    assert released.test.labels == [0, 1, 2 % classes, 3 % classes]
    assert released.num_classes == classes


def test_vtab_accepts_blanks_in_paths_a_byte_order_mark_and_other_roots(tmp_path: Path):
    write_vtab(tmp_path, "clevr_count", 8)
    folder = tmp_path / "VTAB/vtab-1k/clevr_count"
    write_picture(folder / "images/test/with two blanks.png", 3, 0)
    with open(folder / "test.txt", "a") as file:
        file.write("images/test/with two blanks.png 3\n\n")
    (folder / "test.txt").write_bytes(b"\xef\xbb\xbf" + (folder / "test.txt").read_bytes())
    shutil.move(folder, tmp_path / "Clever_Count")
    for root in (tmp_path, tmp_path / "Clever_Count"):
        test = load_vtab("clevr_count", root, 8).test
        assert test.labels[-1] == 3
        assert read_image(test.images[-1]).size == (24, 20)


@pytest.mark.parametrize("line", ["images/train/a.jpg 8", "images/train/a.jpg -1", "a.jpg", "a b"])
def test_vtab_refuses_a_line_without_a_valid_label(line: str, tmp_path: Path):
    write_vtab(tmp_path, "clevr_count", 8)
    file = tmp_path / "VTAB/vtab-1k/clevr_count/val200.txt"
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(DataError, match=r"val200\.txt, line 4: .*from 0 to 7"):
        load_vtab("clevr_count", tmp_path, 8)


def test_vtab_warns_of_classes_without_training_images(tmp_path: Path, caplog):
    write_vtab(tmp_path, "sun397", 300)
    load_vtab("sun397", tmp_path, 397)
    assert "300, 301, 302, 303, 304 and 92 more" in caplog.text


def test_vtab_says_what_is_missing(tmp_path: Path):
    with pytest.raises(DataError, match=r"vtab-1k/clevr_count/test\.txt.*http"):
        load_vtab("clevr_count", tmp_path, 8)


def test_the_recipes_agree_with_the_loaders():
    assert set(HTA) == set(FOLDERS)
    assert len(VTAB) == 19


# ---- images --------------------------------------------------------------------------------------


def test_any_kind_of_image_becomes_rgb(tmp_path: Path):
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    grey = Image.fromarray(ramp)
    grey.save(tmp_path / "grey.png")
    Image.fromarray(ramp.astype(np.uint16) * 257).save(tmp_path / "sixteen bits.png")
    grey.convert("RGB").convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    grey.convert("RGBA").save(tmp_path / "alpha.png")
    grey.convert("P").save(tmp_path / "palette.png")
    grey.convert("1").save(tmp_path / "one bit.png")
    expected = np.repeat(ramp[..., None], 3, axis=2)
    for file in tmp_path.iterdir():
        array = np.asarray(read_image(file))
        assert array.shape == (16, 16, 3)
        if file.name == "cmyk.jpg":
            # CMYK and JPEG round, by a level or two each
            assert np.abs(array.astype(int) - expected).max() <= 4
        elif file.name != "one bit.png":
            assert np.array_equal(array, expected), file.name


def test_a_truncated_image_is_named(tmp_path: Path):
    write_picture(tmp_path / "a b.jpg", 0, 0)
    whole = (tmp_path / "a b.jpg").read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"not an image"):
        (tmp_path / "a b.jpg").write_bytes(damaged)
        with pytest.raises(DataError, match=r"a b\.jpg: not a readable image"):
            read_image(tmp_path / "a b.jpg")


def _split_of_files(folder: Path, count: int) -> Split:
    for i in range(count):
        write_picture(folder / f"{i}.jpg", i % 3, i)
    names = [f"{i}.jpg" for i in range(count)]
    return Split([folder / name for name in names], [i % 3 for i in range(count)], names)


def test_a_resident_split_gives_the_batches_that_workers_give(tmp_path: Path):
    split = _split_of_files(tmp_path, 10)
    device = torch.device("cpu")
    transform = build_transform("resize", 16, training=True)
    batches = []
    for data, workers in (
        (build_data(split, "resize", 16, device, training=True), 0),
        (Transformed(split, transform), 2),
    ):
        loader = build_loader(data, Order(10, seed=3), 4, workers, drop_last=False)
        batches.append(list(loader))
    for (images, labels), (other_images, other_labels) in zip(*batches, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)


def test_decoding_ahead_gives_the_same_images_and_stops_at_the_memory(tmp_path: Path):
    split = _split_of_files(tmp_path, 4)
    ahead = decoded(split, free_bytes=10**9)
    assert all(
        np.array_equal(array, np.asarray(read_image(path)))
        for array, path in zip(ahead.images, split.images, strict=True)
    )
    assert decoded(split, free_bytes=1000) is split


def test_every_process_sees_its_own_part_of_one_permutation():
    parts = [list(Order(11, seed=5, rank=rank, world=3)) for rank in range(3)]
    assert sorted(index for part in parts for index in part) == list(range(11))
    assert [len(part) for part in parts] == [4, 4, 3]
    first, second = Order(11, seed=5), Order(11, seed=5)
    second.epoch = 1
    assert list(first) == list(Order(11, seed=5)) != list(second)


def test_random_augmentation_follows_the_seed(tmp_path: Path):
    split = _split_of_files(tmp_path, 6)
    data = build_data(split, "reference", 16, torch.device("cpu"), training=True)
    assert isinstance(data, Transformed)
    for workers in (0, 2):
        runs = []
        for seed in (1, 1, 2):
            set_seed(seed)
            loader = build_loader(data, Order(6, seed=0), 6, workers, drop_last=True)
            runs.append(next(iter(loader))[0])
        assert torch.equal(runs[0], runs[1])
        assert not torch.equal(runs[0], runs[2])


def test_what_is_drawn_for_an_image_does_not_depend_on_the_number_of_workers(tmp_path: Path):
    split = _split_of_files(tmp_path, 12)
    data = build_data(split, "reference", 16, torch.device("cpu"), training=True)
    order = Order(12, seed=0)
    runs = []
    for workers in (1, 2):
        loader = build_loader(data, order, 4, workers, drop_last=True)
        for order.epoch in (0, 1):
            set_seed(order.epoch)
            runs.append(torch.cat([images for images, _ in loader]))
            if order.epoch == 0:
                # what was read ahead of an epoch that ended early is not the next one's
                next(iter(loader))
    assert torch.equal(runs[0], runs[2])
    assert torch.equal(runs[1], runs[3])


@pytest.mark.parametrize("as_array", [True, False])
def test_a_random_crop_is_the_one_that_timm_cuts_and_pillow_resizes(as_array: bool):
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (375, 500, 3), dtype=np.uint8))
    # blurred, so that no value leaves 0..255 between the two passes: what is cut off there depends
    # on which pass comes first, and newer Pillow takes the columns first where that is less work
    image = noise.filter(ImageFilter.GaussianBlur(1.5))
    ours = build_transform("reference", 224, training=True).transforms[0]
    timms = RandomResizedCropAndInterpolation(224, interpolation="bicubic")
    assert (ours.scale, ours.ratio) == (timms.scale, pytest.approx(timms.ratio, abs=1e-4))
    ours.ratio = timms.ratio
    for seed in range(20):
        cuts = []
        for crop, source in ((ours, np.asarray(image) if as_array else image), (timms, image)):
            random.seed(seed)
            cuts.append(np.asarray(crop(source)).astype(int))
        # both round after each of two passes, with weights of another precision
        assert np.abs(cuts[0] - cuts[1]).max() <= 2
        assert np.abs(cuts[0] - cuts[1]).mean() < 0.2


def test_every_random_augmentation_works_at_full_strength():
    pipeline = build_transform("reference", 16, training=True)
    [augment] = [step for step in pipeline.transforms if isinstance(step, RandAugment)]
    image = Image.fromarray(picture(0, 0))
    for op in augment.ops:
        op.prob, op.magnitude, op.magnitude_std = 1.0, 10, 0.0
        assert op(image).size == image.size
