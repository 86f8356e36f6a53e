"""save_adapter, load_adapter and hotswap_adapter, and what they do with bad input."""

import json
import os
import re
import stat
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, save_file
from torch import nn

from svp_peft.adapter_config import CONFIG_NAME
from svp_peft.adapter_file import hotswap_adapter, load_adapter, save_adapter
from svp_peft.adapter_format import WEIGHTS_NAME
from svp_peft.adapter_tensors import adapter_state
from svp_peft.adapters import add_adapter, disable_adapter, list_adapters, set_adapter
from svp_peft.config import SVPConfig
from svp_peft.errors import (
    AdapterConfigError,
    AdapterKeyError,
    AdapterNameError,
    AdapterNotFoundError,
    AdapterSaveError,
    AdapterShapeError,
    AdapterWeightsError,
    BackboneNotSupportedError,
    BaseModelMismatchError,
    InputError,
    NotAppliedError,
    SVPError,
)
from svp_peft.patch import remove_svp
from tests.tiny import CONFIG, assert_unchanged, base, images, randomise, snapshot, trained


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_adapter(trained(), tmp_path / "adapter")


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / CONFIG_NAME
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def read(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors as the safetensors library reads them, not mapped from the file."""
    return load((folder / WEIGHTS_NAME).read_bytes())


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors as another tool would: the file loses svp_peft's metadata."""
    tensors = read(folder)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_NAME)


# what is written


def test_loaded_adapter_gives_the_saved_logits_bit_for_bit(tmp_path):
    model = trained()
    fresh = base()
    assert load_adapter(fresh, save_adapter(model, tmp_path)) is fresh
    assert torch.equal(fresh(images()), model(images()))


def test_file_holds_the_adapter_and_its_head_and_nothing_else(folder):
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG_NAME, WEIGHTS_NAME]
    with safe_open(folder / WEIGHTS_NAME, "pt") as file:
        keys, metadata = set(file.keys()), file.metadata()
    halves = {f"{half}.{leaf}" for half in ("down", "up") for leaf in ("weight", "bias")}
    expected = {f"svp.inner.{block}.{half}" for block in range(4) for half in halves}
    expected |= {f"svp.cross.{group}.{leaf}" for group in range(2) for leaf in ("weight", "bias")}
    assert keys == expected | {"svp.alpha", "svp.beta", "head.weight", "head.bias"}
    assert metadata["format"] == "pt"
    assert metadata["adapter_config"] == (folder / CONFIG_NAME).read_text()


def test_config_file_has_pefts_keys_and_says_svp(folder):
    config = json.loads((folder / CONFIG_NAME).read_text())
    assert config["peft_type"] == "SVP"
    assert {"auto_mapping", "task_type", "inference_mode", "base_model_name_or_path"} <= set(config)
    assert config["task_type"] is None
    assert config["base_arch"] == {
        "bimamba_type": "v2",
        "block_parameters": 20800,
        "class_tokens": "middle",
        "d_inner": 32,
        "d_model": 16,
        "d_state": 16,
        "depth": 4,
        "dt_rank": 1,
    }


def test_equal_adapters_give_equal_files(tmp_path):
    first, second = (save_adapter(trained(), tmp_path / name) for name in "ab")
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        assert (first / name).read_bytes() == (second / name).read_bytes()


@pytest.mark.parametrize("name", ["a", "aa", "svp", "default", "head", "train", "keys"])
def test_adapter_name_is_not_in_the_file_and_may_change_on_loading(tmp_path, name):
    model = trained(name=name)
    save_adapter(model, tmp_path, name)
    fresh = load_adapter(base(), tmp_path, adapter_name="other")
    assert torch.equal(fresh(images()), model(images()))
    assert set(read(tmp_path)) == set(adapter_state(fresh, "other"))


@pytest.mark.parametrize(
    "config",
    [
        SVPConfig(inner_bottleneck=4, cross_group_size=3, layers=(1, 3)),
        SVPConfig(inner_bottleneck=4, use_cross=False),
        SVPConfig(inner_bottleneck=4, cross_group_size=2, use_inner=False),
        SVPConfig(inner_bottleneck=4, cross_group_size=2, cross_source="released"),
        SVPConfig(inner_bottleneck=4, cross_group_size=2, simam_input=True),
        SVPConfig(inner_bottleneck=4, cross_group_size=2, modules_to_save=("head", "norm_f")),
        SVPConfig(inner_bottleneck=4, cross_group_size=2, modules_to_save=()),
    ],
    ids=["layers", "inner only", "cross only", "released", "simam", "norm too", "no head"],
)
def test_every_kind_of_adapter_survives_the_round_trip(tmp_path, config):
    model = trained(config)
    fresh = load_adapter(base(), save_adapter(model, tmp_path))
    assert fresh.svp.config == config
    assert torch.equal(fresh(images()), model(images()))


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["DataParallel", "compile"])
def test_wrapped_model_saves_the_same_files(tmp_path, folder, wrap):
    wrapped = save_adapter(wrap(trained()), tmp_path / "wrapped")
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        assert (wrapped / name).read_bytes() == (folder / name).read_bytes()


def test_other_processes_write_nothing(tmp_path):
    save_adapter(trained(), tmp_path / "adapter", is_main_process=False)
    assert not (tmp_path / "adapter").exists()


def test_saving_over_the_folder_it_was_loaded_from(folder):
    model = load_adapter(base(), folder)
    randomise(model, "default", 9)
    save_adapter(model, folder)
    assert torch.equal(load_adapter(base(), folder)(images()), model(images()))


def test_path_of_this_machine_is_not_written_as_base_model(tmp_path):
    for name, kept in [("/data/vim", None), (str(tmp_path), None), ("owner/vim", "owner/vim")]:
        config = SVPConfig(inner_bottleneck=4, cross_group_size=2, base_model_name_or_path=name)
        save_adapter(trained(config), tmp_path)
        assert json.loads((tmp_path / CONFIG_NAME).read_text())["base_model_name_or_path"] == kept


def test_files_are_readable_by_others_as_the_umask_says(folder):
    umask = os.umask(0)
    os.umask(umask)
    mode = stat.S_IMODE((folder / WEIGHTS_NAME).stat().st_mode)
    assert mode == 0o666 & ~umask


def test_diverged_adapter_is_not_saved_over_a_good_one(folder):
    model = load_adapter(base(), folder)
    before = (folder / WEIGHTS_NAME).read_bytes()
    with torch.no_grad():
        model.svp.alpha[0, 0] = float("nan")
    with pytest.raises(AdapterWeightsError, match=r"svp\.alpha.*NaN"):
        save_adapter(model, folder)
    assert (folder / WEIGHTS_NAME).read_bytes() == before


def test_saving_names_what_is_missing(tmp_path):
    with pytest.raises(NotAppliedError, match="apply_svp"):
        save_adapter(base(), tmp_path)
    with pytest.raises(AdapterNameError, match="birds"):
        save_adapter(trained(), tmp_path, "birds")
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterSaveError, match="could not be written"):
        save_adapter(trained(), tmp_path / "file" / "adapter")


# what loading does


def test_head_comes_with_the_adapter_and_may_have_other_classes(tmp_path):
    model = trained(model=base(7))
    save_adapter(model, tmp_path)
    fresh = base(5)
    before = fresh(images())
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(images()), model(images()))
    with disable_adapter(fresh):
        assert torch.equal(fresh(images()), before)


def test_load_head_false_keeps_the_base_models_head(tmp_path):
    save_adapter(trained(model=base(7)), tmp_path)
    fresh = base(5)
    head = {key: tensor.clone() for key, tensor in fresh.head.state_dict().items()}
    load_adapter(fresh, tmp_path, load_head=False)
    assert all(torch.equal(fresh.head.state_dict()[key], head[key]) for key in head)
    assert bool(fresh.svp.alpha.any())


def test_loaded_adapter_is_frozen_unless_asked_and_the_mode_stays(folder):
    for trainable in (False, True):
        model = base().train()
        load_adapter(model, folder, is_trainable=trainable)
        wanted = {name for name, p in model.named_parameters() if p.requires_grad}
        adapter = {name for name, _ in model.named_parameters() if name.startswith("svp.adapters")}
        assert wanted == (adapter | {"head.weight", "head.bias"} if trainable else set())
        assert model.training


def test_loading_draws_no_random_numbers(folder):
    model = base()
    before = torch.random.get_rng_state()
    load_adapter(model, folder)
    load_adapter(model, folder, adapter_name="second")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_remove_svp_after_loading_gives_the_base_model_back(folder):
    model = base()
    before = snapshot(model)
    remove_svp(load_adapter(model, folder))
    assert_unchanged(model, before)


def test_second_adapter_is_added_beside_the_active_one(folder, tmp_path):
    other = trained(model=base(3), seed=5)
    save_adapter(other, tmp_path / "other")
    model = load_adapter(base(), folder)
    expected = model(images())
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    load_adapter(model, tmp_path / "other", adapter_name="other")
    assert list_adapters(model) == ["default", "other"]
    assert torch.equal(model(images()), expected)
    assert flags.items() <= {name: p.requires_grad for name, p in model.named_parameters()}.items()
    set_adapter(model, "other")
    assert torch.equal(model(images()), other(images()))


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "base_model.model.", "module._orig_mod."]
)
def test_prefixes_of_wrappers_are_taken_off(folder, prefix):
    expected = load_adapter(base(), folder)(images())

    def add_prefix(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            tensors[prefix + key] = tensors.pop(key)

    rewrite(folder, add_prefix)
    assert torch.equal(load_adapter(base(), folder)(images()), expected)


def test_file_of_another_tool_without_our_metadata_is_read(folder):
    expected = load_adapter(base(), folder)(images())
    rewrite(folder, lambda tensors: None)
    assert torch.equal(load_adapter(base(), folder)(images()), expected)


def test_half_precision_file_is_read_into_single_precision(folder):
    def halve(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({key: tensor.bfloat16() for key, tensor in tensors.items()})

    expected = read(folder)["svp.beta"].bfloat16().float()
    rewrite(folder, halve)
    edit_config(folder, weights_sha256=None)
    model = load_adapter(base(), folder)
    assert torch.equal(model.svp.beta, expected)


def test_describing_keys_of_the_config_may_be_edited(folder):
    edit_config(folder, base_model_name_or_path="owner/vim", revision="v2")
    model = load_adapter(base(), folder)
    assert model.svp.config.base_model_name_or_path == "owner/vim"
    assert model.svp.config.revision == "v2"


def test_strict_false_loads_the_rest_and_names_what_it_left(folder):
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors["extra"] = tensors.pop("svp.inner.3.up.bias")

    expected = read(folder)
    rewrite(folder, damage)
    model = base()
    with pytest.warns(UserWarning, match=r"svp\.inner\.3\.up\.bias.*extra.*strict=False"):
        load_adapter(model, folder, strict=False)
    assert torch.equal(model.svp.beta, expected["svp.beta"])


def test_untrained_adapter_warns_that_it_does_nothing(tmp_path):
    model = trained()
    nn.init.zeros_(model.svp.alpha)
    nn.init.zeros_(model.svp.beta)
    with pytest.warns(UserWarning, match="every learned scale is zero"):
        load_adapter(base(), save_adapter(model, tmp_path))


def test_other_weights_of_the_base_warn_or_raise_as_asked(folder):
    other = base(seed=8)
    with pytest.warns(UserWarning, match=r"other weights.*check_base_model='ignore'"):
        load_adapter(other, folder)
    with pytest.raises(BaseModelMismatchError, match="other weights"):
        load_adapter(base(seed=8), folder, check_base_model="error")
    with pytest.raises(InputError, match="check_base_model='maybe'"):
        load_adapter(base(seed=8), folder, check_base_model="maybe")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(base(seed=8), folder, check_base_model="ignore")
        load_adapter(base(9), folder)
        load_adapter(base().bfloat16(), folder)


def test_overwrite_replaces_an_adapter_of_the_same_name(folder, tmp_path):
    save_adapter(trained(seed=6), tmp_path / "newer")
    model = load_adapter(base(), folder)
    with pytest.raises(AdapterNameError, match=r"already has an adapter 'default'.*overwrite=True"):
        load_adapter(model, tmp_path / "newer")
    load_adapter(model, tmp_path / "newer", overwrite=True)
    assert list_adapters(model) == ["default"]
    assert torch.equal(model(images()), trained(seed=6)(images()))


def test_hotswap_changes_values_and_keeps_every_tensor(folder, tmp_path):
    save_adapter(trained(seed=6), tmp_path / "newer")
    model = load_adapter(base(), folder, is_trainable=True)
    before = {name: (p, p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()}
    hotswap_adapter(model, tmp_path / "newer")
    after = {name: (p, p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()}
    assert all(after[name][0] is before[name][0] for name in before)
    assert {name: rest[1:] for name, rest in after.items()} == {
        name: rest[1:] for name, rest in before.items()
    }
    assert torch.equal(model(images()), trained(seed=6)(images()))


def test_hotswap_of_another_shape_is_refused_and_changes_nothing(folder, tmp_path):
    wider = SVPConfig(inner_bottleneck=8, cross_group_size=2)
    save_adapter(trained(wider), tmp_path / "wider")
    save_adapter(trained(model=base(7)), tmp_path / "more classes")
    model = load_adapter(base(), folder)
    before = snapshot(model)
    with pytest.raises(AdapterConfigError, match="inner_bottleneck"):
        hotswap_adapter(model, tmp_path / "wider")
    with pytest.raises(AdapterShapeError, match="heads differ"):
        hotswap_adapter(model, tmp_path / "more classes")
    with pytest.raises(AdapterNameError, match="cars"):
        hotswap_adapter(model, folder, adapter_name="cars")
    assert_unchanged(model, before)


# the fifteen bad inputs, each with its own message; see `test_bad_input`


def _typo(folder: Path) -> Path:
    return folder.parent / "adaptor"


def _empty_folder(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def _no_weights(folder: Path) -> None:
    (folder / WEIGHTS_NAME).unlink()


def _no_config(folder: Path) -> None:
    (folder / CONFIG_NAME).unlink()


def _in_subfolder(folder: Path) -> Path:
    return folder.parent


def _a_pipe(folder: Path) -> None:
    (folder / CONFIG_NAME).unlink()
    os.mkfifo(folder / CONFIG_NAME)


def _a_file(folder: Path) -> Path:
    return folder / WEIGHTS_NAME


def _config(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / CONFIG_NAME).write_text(text) and None


def _key(**changes: object) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, **changes)


def _whole_model(folder: Path) -> None:
    _empty_folder(folder)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")


def _adapters_library(folder: Path) -> None:
    _empty_folder(folder)
    (folder / "adapter_config.json").write_text('{"config": {}, "hidden_size": 768}')
    (folder / "adapter_model.safetensors").write_bytes(b"x")


def _weights(data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / WEIGHTS_NAME).write_bytes(data) and None


def _truncated(folder: Path) -> None:
    file = folder / WEIGHTS_NAME
    file.write_bytes(file.read_bytes()[:-100])


def _pickle_only(folder: Path) -> None:
    (folder / WEIGHTS_NAME).unlink()
    torch.save({}, folder / "adapter_model.bin")


def _pickle_in_disguise(folder: Path) -> None:
    torch.save({}, folder / WEIGHTS_NAME)


def _tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, change)


def _set(key: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return _tensors(lambda tensors: tensors.update({key: value(tensors[key])}))


def _swap(tensors: dict[str, torch.Tensor]) -> None:
    first, second = "svp.inner.0.up.bias", "svp.inner.1.up.bias"
    tensors[first], tensors[second] = tensors[second], tensors[first]


def _twice(tensors: dict[str, torch.Tensor]) -> None:
    tensors["module.svp.beta"] = tensors["svp.beta"].clone()


def _saved_from(**kwargs: object) -> Callable[[Path], None]:
    return lambda folder: save_adapter(trained(model=base(**kwargs)), folder) and None


def _nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(-1)[3] = float("nan")
    return tensor


def _inf(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(-1)[3] = float("inf")
    return tensor


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
HUGE_HEADER = (1 << 40).to_bytes(8, "little") + b"{}"

BAD_FILES = {
    # 1: nothing there
    "1 typo": (_typo, AdapterNotFoundError, "no folder .*adaptor.*Check the path"),
    "1 empty folder": (_empty_folder, AdapterNotFoundError, r"has no .*found \[\]"),
    "1 no weights": (_no_weights, AdapterNotFoundError, rf"no {WEIGHTS_NAME}.*{CONFIG_NAME}"),
    "1 no config": (_no_config, AdapterNotFoundError, rf"no {CONFIG_NAME}.*save again"),
    "1 subfolder": (_in_subfolder, AdapterNotFoundError, r"\['adapter'\].*pass subfolder="),
    "1 pipe": (_a_pipe, AdapterNotFoundError, "is not a regular file"),
    "1 a file": (_a_file, AdapterNotFoundError, "is a file; an adapter is a folder"),
    # 2: not a config
    "2 not JSON": (_config('{\n "peft_type" "SVP"}'), AdapterConfigError, "line 2, column 14"),
    "2 not an object": (_config("[1]"), AdapterConfigError, "JSON list, not an object"),
    "2 empty": (_config(" "), AdapterConfigError, r"is empty \(1 bytes\)"),
    "2 not text": (_config("\udcff".encode("utf-8", "surrogateescape").decode("latin1")),
                   AdapterConfigError, "not valid JSON"),
    "2 key twice": (_config('{"peft_type": "SVP", "peft_type": "SVP"}'),
                    AdapterConfigError, "stands twice"),
    "2 deep": (_config("[" * 100_000), AdapterConfigError, "not valid JSON"),
    "2 no peft_type": (_config('{"a": 1}'), AdapterConfigError, r"no peft_type.*\['a'\]"),
    "2 odd peft_type": (_config('{"peft_type": 3}'), AdapterConfigError, "has peft_type 3"),
    # 3: of another kind
    "3 LoRA": (_key(peft_type="LORA"), AdapterConfigError, "a LORA adapter, not an SVP adapter"),
    "3 model": (_whole_model, AdapterNotFoundError, "a whole model, not an adapter.*load_vim"),
    "3 model config": (_config('{"architectures": ["Vim"]}'), AdapterConfigError,
                       "describes a whole model"),
    "3 adapters": (_adapters_library, AdapterConfigError, "adapters library"),
    # 4: wrong values
    "4 newer": (_key(format_version=2), AdapterConfigError, "format_version 2.*pip install -U"),
    "4 version": (_key(format_version="1"), AdapterConfigError, "format_version is '1'"),
    "4 unknown key": (_key(inner_botleneck=64), AdapterConfigError,
                      "did you mean 'inner_bottleneck'"),
    "4 dropout type": (_key(dropout="a"), AdapterConfigError, "dropout='a'"),
    "4 dropout range": (_key(dropout=1.0), AdapterConfigError, r"dropout=1\.0"),
    "4 dropout NaN": (_key(dropout=float("nan")), AdapterConfigError, "NaN is not JSON"),
    "4 depth": (_key(base_arch={"depth": -1, "d_model": 16}), AdapterConfigError,
                r"base_arch\.depth is -1"),
    "4 endless": (_key(base_arch={"depth": 1_000_000, "d_model": 16}), AdapterConfigError,
                  r"base_arch\.depth is 1000000"),
    "4 width": (_key(inner_bottleneck=10**30), AdapterConfigError, "from 1 to 1000000"),
    "4 no arch": (_key(base_arch=None), AdapterConfigError, "base_arch is None"),
    "4 layers": (_key(layers=[99]), AdapterConfigError, "block 99.*4 blocks"),
    "4 classes": (_key(num_classes=0), AdapterConfigError, "num_classes is 0"),
    "4 hash": (_key(weights_sha256=7), AdapterConfigError, "weights_sha256 is 7, not a string"),
    "4 edited": (_key(simam_input=True), AdapterConfigError, r"\['simam_input'\] were changed"),
    # 5: not a weights file
    "5 empty": (_weights(b""), AdapterWeightsError, r"is empty \(0 bytes\)"),
    "5 truncated": (_truncated, AdapterWeightsError, "truncated.*100 fewer"),
    "5 stump": (_weights(b"\x10\0\0"), AdapterWeightsError, "truncated: 3 bytes"),
    "5 LFS": (_weights(LFS), AdapterWeightsError, "Git-LFS pointer.*git lfs pull"),
    "5 LFS config": (_config(LFS.decode()), AdapterConfigError, "Git-LFS pointer.*git lfs pull"),
    "5 web page": (_weights(b"<!DOCTYPE html><html>"), AdapterWeightsError, "is a web page"),
    "5 header size": (_weights(HUGE_HEADER), AdapterWeightsError, "announce a header of 1099511"),
    "5 header": (_weights(b"\x08\0\0\0\0\0\0\0notJSON!"), AdapterWeightsError, "cannot be read"),
    "5 damaged": (_set("svp.beta", lambda t: t + 1), AdapterWeightsError,
                  "not those that were saved"),
    "5 swapped": (_tensors(_swap), AdapterWeightsError, "not those that were saved"),
    # 6: pickles
    "6 .bin": (_pickle_only, AdapterNotFoundError, "adapter_model.bin is a pickle.*convert_svp"),
    "6 disguised": (_pickle_in_disguise, AdapterWeightsError, "is a pickle.*convert_svp"),
    # 7 and 8: keys
    "7 missing": (_tensors(lambda t: t.pop("svp.inner.2.up.bias")), AdapterKeyError,
                  r"lacks 1 of 24 tensors.*svp\.inner\.2\.up\.bias"),
    "7 nothing": (_tensors(lambda t: t.clear()), AdapterKeyError, "lacks|no tensors for the head"),
    "7 no head": (_tensors(lambda t: (t.pop("head.weight"), t.pop("head.bias"))), AdapterKeyError,
                  "no tensors for the head.*load_head=False"),
    "8 extra": (_tensors(lambda t: t.update({"svp.inner.9.up.bias": torch.ones(16)})),
                AdapterKeyError, r"holds 1.*svp\.inner\.9\.up\.bias"),
    "8 named": (_tensors(lambda t: t.update({"svp.beta.default": t.pop("svp.beta")})),
                AdapterKeyError, r"svp\.beta.*svp\.beta\.default"),
    "8 twice": (_tensors(_twice), AdapterKeyError, r"tensors twice.*module\.svp\.beta"),
    # 9: shapes
    "9 shape": (_set("svp.beta", lambda t: t[:, :8].clone()), AdapterShapeError,
                r"svp\.beta is \(4, 8\), expected \(4, 16\)"),
    "9 config": (_key(inner_bottleneck=8), AdapterShapeError, r"\(4, 16\), expected \(8, 16\)"),
    # 10: another base
    "10 depth": (_saved_from(depth=6), BaseModelMismatchError, r"depth 4 .*needs 6"),
    "10 width": (_saved_from(embed_dim=32), BaseModelMismatchError, r"d_model 16 .*needs 32"),
    "10 class token": (_saved_from(use_middle_cls_token=False), BaseModelMismatchError,
                       "class_tokens 'middle' .*needs 'head'"),
    "10 bimamba": (_saved_from(bimamba_type="none"), BaseModelMismatchError, "bimamba_type 'v2'"),
    # 11: heads
    "11 features": (_set("head.weight", lambda t: t[:, :8].clone()), AdapterShapeError,
                    r"head's first weight has shape \(5, 8\).*16 features"),
    "11 odd head": (_tensors(lambda t: t.update({"head.norm.weight": torch.ones(16)})),
                    AdapterKeyError, "no linear head, no two-layer head"),
    # 12: values
    "12 NaN": (_set("svp.beta", _nan), AdapterWeightsError, r"svp\.beta holds 1 NaN"),
    "12 Inf": (_set("head.weight", _inf), AdapterWeightsError, r"head\.weight holds 1 NaN or inf"),
    "12 integers": (_set("svp.beta", lambda t: t.int()), AdapterWeightsError, "dtype I32"),
    "12 fp8": (_set("svp.beta", lambda t: t.to(torch.float8_e4m3fn)), AdapterWeightsError,
               "dtype F8_E4M3"),
    "12 no numbers": (_set("svp.beta", lambda t: t[:0]), AdapterWeightsError, "empty.*ZeRO-3"),
}  # fmt: skip


FIRST_OF_EACH = {case.split()[0]: case for case in reversed(BAD_FILES)}.values()


@pytest.mark.parametrize(
    ("case", "patched"),
    [*((case, False) for case in BAD_FILES), *((case, True) for case in FIRST_OF_EACH)],
)
def test_bad_input_is_named_and_leaves_the_model_as_it_was(folder, case, patched):
    damage, error, message = BAD_FILES[case]
    model = trained(seed=4) if patched else base()
    path = damage(folder) or folder
    before = snapshot(model)
    with pytest.raises(error, match=f"(?s){message}") as raised:
        load_adapter(model, path, adapter_name="new")
    assert isinstance(raised.value, SVPError)
    # what, where and what to do
    assert str(folder.parent) in str(raised.value)
    assert len(str(raised.value).split(". ")) + str(raised.value).count(": ") >= 2
    assert_unchanged(model, before)


@pytest.mark.parametrize("subfolder", ["../adapter", "a/../../adapter", "/adapter"])
def test_subfolder_may_not_lead_out_of_the_folder(folder, subfolder):
    with pytest.raises(InputError, match="leads out of"):
        load_adapter(base(), folder, subfolder=subfolder)
    # in a repository too, before the Hub or its cache are asked
    with pytest.raises(InputError, match="leads out of"):
        load_adapter(base(), "owner/name", subfolder=subfolder, local_files_only=True)


def test_a_path_longer_than_any_folders_is_not_found():
    with pytest.raises(AdapterNotFoundError, match="no folder"):
        load_adapter(base(), "x" * 5000)


def test_every_kind_of_bad_input_has_a_wording_of_its_own(tmp_path):
    wordings: dict[str, str] = {}
    model, saved = base(), trained()
    for index, (case, (damage, _, _)) in enumerate(BAD_FILES.items()):
        folder = save_adapter(saved, tmp_path / str(index) / "adapter")
        path = damage(folder) or folder
        with pytest.raises(SVPError) as raised:
            load_adapter(model, path)
        wording = re.sub(r"[\d()]+", "", str(raised.value).replace(str(folder.parent), ""))
        kind = case.split()[0]
        assert wordings.setdefault(wording, kind) == kind, case


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "..", "__base__", 3, "ä"])
def test_bad_adapter_names_are_refused(folder, name):
    model = base()
    before = snapshot(model)
    with pytest.raises(AdapterNameError, match="adapter name"):
        load_adapter(model, folder, adapter_name=name)
    assert_unchanged(model, before)


def test_adapter_with_a_head_asks_before_it_changes_a_headless_model(folder):
    model = base(0)
    before = snapshot(model)
    with pytest.raises(BaseModelMismatchError, match=r"for 5 classes.*load_head=False"):
        load_adapter(model, folder)
    assert_unchanged(model, before)
    load_adapter(model, folder, load_head=False)
    assert model(images()).shape == (2, 16)


def test_models_that_cannot_take_an_adapter_are_named(folder):
    with pytest.raises(BackboneNotSupportedError, match="Sequential is not a supported"):
        load_adapter(nn.Sequential(nn.Linear(3, 3)), folder)
    with pytest.raises(BackboneNotSupportedError, match=r"before torch\.compile"):
        load_adapter(torch.compile(base()), folder)
    with pytest.raises(BackboneNotSupportedError, match="meta"):
        load_adapter(base().to("meta"), folder)


def test_pickles_are_never_opened(folder, monkeypatch):
    import pickle

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a pickle was opened")

    for module, name in [(torch, "load"), (pickle, "load"), (pickle, "loads")]:
        monkeypatch.setattr(module, name, refuse)
    load_adapter(base(), folder)
    (folder / WEIGHTS_NAME).write_bytes(b"\x80\x04\x95\x0f\x00\x00\x00\x00\x00\x00\x00.")
    with pytest.raises(AdapterWeightsError, match="is a pickle"):
        load_adapter(base(), folder)


def test_two_saves_that_cross_leave_a_whole_adapter(tmp_path, caplog):
    """The state a crash between the two renames leaves, or two savers at once."""
    old, new = (save_adapter(trained(seed=seed), tmp_path / str(seed)) for seed in (1, 2))
    (old / WEIGHTS_NAME).write_bytes((new / WEIGHTS_NAME).read_bytes())
    model = load_adapter(base(), old)
    assert torch.equal(model(images()), trained(seed=2)(images()))
    assert "another save" in caplog.text


def test_config_inside_the_weights_file_is_checked_too(folder):
    file = folder / WEIGHTS_NAME
    data = file.read_bytes()
    assert data.count(b'\\"cross_group_size\\": 2') == 1
    file.write_bytes(data.replace(b'\\"cross_group_size\\": 2', b'\\"cross_group_size\\": 4'))
    with pytest.raises(AdapterWeightsError, match="does not have the hash stored beside it"):
        load_adapter(base(), folder)


def test_add_adapter_and_file_agree_on_a_second_head(tmp_path):
    model = trained()
    add_adapter(model, "cars", CONFIG, num_classes=3)
    randomise(model, "cars", 7)
    save_adapter(model, tmp_path, "cars")
    fresh = load_adapter(base(), tmp_path)
    set_adapter(model, "cars")
    assert torch.equal(fresh(images()), model(images()))
    assert json.loads((tmp_path / CONFIG_NAME).read_text())["num_classes"] == 3


def test_views_and_shared_memory_are_saved_by_value(tmp_path):
    """Tensors that share memory or are not contiguous, which safetensors itself refuses."""
    model = trained()
    with torch.no_grad():
        shared = torch.randn(5, 16)
        model.head.weight = nn.Parameter(shared.t().contiguous().t())
        model.head.bias = nn.Parameter(shared[:, 0])
    save_adapter(model, tmp_path)
    loaded = read(tmp_path)
    assert torch.equal(loaded["head.weight"], shared)
    assert torch.equal(loaded["head.bias"], shared[:, 0])


@pytest.mark.gpu
def test_file_of_a_gpu_model_is_that_of_a_cpu_model_and_loads_on_both(tmp_path, folder):
    save_adapter(trained().cuda(), tmp_path / "gpu")
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        assert (tmp_path / "gpu" / name).read_bytes() == (folder / name).read_bytes()
    expected = read(folder)
    for model in (base(), base().cuda()):
        load_adapter(model, tmp_path / "gpu", check_base_model="error")
        for key, tensor in adapter_state(model, "default").items():
            assert tensor.device == model.cls_token.device
            assert torch.equal(tensor.cpu(), expected[key]), key


@pytest.mark.gpu
def test_hotswap_is_seen_by_a_captured_graph(tmp_path, folder):
    save_adapter(trained(seed=6), tmp_path / "newer")
    model, x = load_adapter(base().cuda(), folder), images().cuda()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side):
        for _ in range(3):
            model(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        logits = model(x)
    hotswap_adapter(model, tmp_path / "newer")
    graph.replay()
    with torch.no_grad():
        expected = trained(seed=6).cuda()(x)
    # the same kernels on the same numbers; the order of their sums may differ between launches
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
