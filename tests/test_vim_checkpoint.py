"""`load_vim` on local files: geometry from tensors, heads, position embeddings."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from svp_peft import VisionMamba, load_vim
from svp_peft.errors import CheckpointError, InputError
from svp_peft.vim import vim_base, vim_small, vim_tiny
from svp_peft.vim.files import CONFIG_KEY, read_checkpoint, write_checkpoint
from tests import vim_oracle
from tests.vim_files import tiny_vim, write_official

NANO = Path(__file__).parent.parent / "examples" / "assets" / "vim_nano_tin"


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def image_for(model: VisionMamba) -> Tensor:
    return torch.randn(1, model.patch_embed.proj.in_channels, *model.img_size)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"stride": 8},
        {"patch_size": 32, "stride": 32},
        {"img_size": 384},
        {"img_size": 64, "patch_size": 8, "stride": 8},
        {"channels": 1},
        {"use_double_cls_token": True},
        {"if_cls_token": False, "final_pool_type": "mean"},
        {"if_cls_token": False, "final_pool_type": "mean", "if_abs_pos_embed": False},
        {"bimamba_type": "v1"},
        {"bimamba_type": "none", "depth": 3},
        {"rms_norm": False, "d_state": 7},
        {"init_layer_scale": 0.3},
        {"ssm_cfg": {"d_conv": 3, "expand": 1, "dt_rank": 5, "bias": True, "conv_bias": False}},
        # 15 / 11 is rounded down, and 11 times that is just below 15
        {"embed_dim": 11, "ssm_cfg": {"expand": 1.4}},
        {"if_rope": True},
        {"num_classes": 0},
    ],
    ids=str,
)
def test_the_geometry_is_read_from_the_tensors(arguments: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_vim(**arguments)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    loaded = load_vim(tmp_path / "weights.safetensors").eval()
    assert same_weights(loaded, model)
    image = image_for(model)
    assert torch.equal(loaded(image), model(image))


def test_an_official_file_is_read_with_its_optimiser_and_namespace(tmp_path: Path) -> None:
    model = tiny_vim()
    loaded = load_vim(write_official(tmp_path / "vim.pth", model))
    assert same_weights(loaded, model)


def test_the_legacy_format_of_torch_save_is_read(tmp_path: Path) -> None:
    model = tiny_vim()
    path = tmp_path / "vim.pth"
    torch.save({"model": model.state_dict()}, path, _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(path)
    assert same_weights(load_vim(path), model)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model."])
@pytest.mark.parametrize("key", [None, "model", "state_dict"])
def test_wrappers_around_a_state_dict_are_taken_off(
    prefix: str, key: str | None, tmp_path: Path
) -> None:
    model = tiny_vim()
    state: Any = {prefix + name: value for name, value in model.state_dict().items()}
    torch.save(state if key is None else {key: state, "epoch": 3}, tmp_path / "vim.pth")
    assert same_weights(load_vim(tmp_path / "vim.pth"), model)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2",
         {"if_divide_out": True, "use_middle_cls_token": True}),
        ("vim_base_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_middle_cls_token_div2",
         {"if_divide_out": True, "use_middle_cls_token": True}),
        ("vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_noclstok",
         {"if_divide_out": False, "use_middle_cls_token": False}),
        ("deit_small", {"if_divide_out": True, "use_middle_cls_token": True}),
    ],
)  # fmt: skip
def test_what_tensors_do_not_tell_comes_from_the_official_models_name(
    name: str, expected: dict[str, bool], tmp_path: Path
) -> None:
    model = load_vim(write_official(tmp_path / "vim.pth", tiny_vim(), name))
    assert model.layers[0].mixer.if_divide_out is expected["if_divide_out"]
    assert model.use_middle_cls_token is expected["use_middle_cls_token"]


def test_a_constructor_argument_passed_to_load_vim_wins(tmp_path: Path) -> None:
    path = write_official(tmp_path / "vim.pth", tiny_vim())
    model = load_vim(path, use_middle_cls_token=False, if_devide_out=False, drop_path_rate=0.0)
    assert model.use_middle_cls_token is False
    assert model.layers[0].mixer.if_divide_out is False
    assert isinstance(model.drop_path, nn.Identity)
    with pytest.raises(InputError, match="drop_path_rat'"):
        load_vim(path, drop_path_rat=0.0)


def test_a_new_head_replaces_the_old_one_only_where_classes_differ(tmp_path: Path) -> None:
    model = tiny_vim()
    path = write_official(tmp_path / "vim.pth", model)
    assert same_weights(load_vim(path, num_classes=5), model)
    other = load_vim(path, num_classes=7)
    assert other.head.weight.shape == (7, 16)
    assert other.num_classes == 7
    headless = load_vim(path, num_classes=0)
    assert isinstance(headless.head, nn.Identity)
    for changed in (other, headless):
        changed.head = model.head
        assert same_weights(changed, model)


def test_half_precision_files_give_single_precision_models(tmp_path: Path) -> None:
    model = tiny_vim()
    half = {name: value.half() for name, value in model.state_dict().items()}
    save_file(half, tmp_path / "half.safetensors")
    loaded = load_vim(tmp_path / "half.safetensors")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.head.weight, half["head.weight"].float())


def test_a_loaded_model_does_not_depend_on_its_file(tmp_path: Path) -> None:
    model = tiny_vim()
    path = tmp_path / "vim.safetensors"
    save_file(model.state_dict(), path)
    loaded = load_vim(path)
    path.write_bytes(bytes(path.stat().st_size))
    assert same_weights(loaded, model)


SLOTS = {
    "middle": ({}, lambda count: [count // 2]),
    "head": ({"use_middle_cls_token": False}, lambda count: [0]),
    "double": ({"use_double_cls_token": True}, lambda count: [0, count + 1]),
    "none": ({"if_cls_token": False}, lambda count: []),
}


@pytest.mark.parametrize("kind", SLOTS)
@pytest.mark.parametrize("new_size", [(8, 8), (16, 12), (20, 28)])
def test_position_embeddings_are_interpolated_around_the_class_tokens_slot(
    kind: str, new_size: tuple[int, int], tmp_path: Path
) -> None:
    arguments, slots = SLOTS[kind]
    model = tiny_vim(img_size=(12, 20), patch_size=4, stride=4, **arguments)
    save_file(model.state_dict(), tmp_path / "vim.safetensors")
    loaded = load_vim(
        tmp_path / "vim.safetensors", img_size=new_size, base_img_size=(12, 20), **arguments
    )
    old, new = (list(m.pos_embed[0].detach().unbind(0)) for m in (model, loaded))
    grid = (new_size[0] // 4, new_size[1] // 4)
    for index in reversed(range(len(old))):
        if index in slots(15):
            token = old.pop(index)
            position = slots(15).index(index)
            assert torch.equal(new.pop(slots(grid[0] * grid[1])[position]), token)
    expected = F.interpolate(
        torch.stack(old).T.reshape(1, 16, 3, 5), size=grid, mode="bicubic", align_corners=False
    )
    torch.testing.assert_close(torch.stack(new), expected[0].flatten(1).T)
    assert loaded.eval()(image_for(loaded)).isfinite().all()


def test_the_same_image_size_leaves_position_embeddings_alone(tmp_path: Path) -> None:
    model = tiny_vim()
    path = write_official(tmp_path / "vim.pth", model)
    assert same_weights(load_vim(path, img_size=224), model)


def test_rotary_tables_are_made_anew_for_another_image_size(tmp_path: Path) -> None:
    model = tiny_vim(if_rope=True, img_size=64)
    save_file(model.state_dict(), tmp_path / "vim.safetensors")
    loaded = load_vim(tmp_path / "vim.safetensors", img_size=96)
    fresh = tiny_vim(if_rope=True, img_size=96)
    assert torch.equal(loaded.rope.freqs_cos, fresh.rope.freqs_cos)
    assert loaded.eval()(image_for(loaded)).isfinite().all()


def test_an_image_that_is_not_square_is_recognised_when_it_is_asked_for(tmp_path: Path) -> None:
    model = tiny_vim(img_size=(64, 96))
    path = tmp_path / "vim.safetensors"
    save_file(model.state_dict(), path)
    assert same_weights(load_vim(path, img_size=(64, 96)), model)
    with pytest.raises(CheckpointError, match=r"24 patches.*base_img_size"):
        load_vim(path)


def test_the_config_in_a_files_metadata_is_used_and_checked(tmp_path: Path) -> None:
    model = tiny_vim(img_size=(64, 96), use_middle_cls_token=False, if_divide_out=False)
    config = {"img_size": [64, 96], "use_middle_cls_token": False, "if_devide_out": False}
    path = tmp_path / "vim.safetensors"
    save_file(model.state_dict(), path, {CONFIG_KEY: json.dumps(config)})
    loaded = load_vim(path).eval()
    image = image_for(model)
    assert torch.equal(loaded(image), model(image))
    save_file(model.state_dict(), path, {CONFIG_KEY: json.dumps({"depth": 24})})
    with pytest.raises(CheckpointError, match="depth=24, but the tensors have 2"):
        load_vim(path)
    save_file(model.state_dict(), path, {CONFIG_KEY: "{"})
    with pytest.raises(CheckpointError, match="is not JSON"):
        load_vim(path)


def test_a_folder_with_config_json_is_loaded(tmp_path: Path) -> None:
    model = tiny_vim(img_size=(64, 96))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"img_size": [64, 96], "model_type": "vim"}))
    assert same_weights(load_vim(tmp_path), model)
    config.write_text("[]")
    with pytest.raises(CheckpointError, match="holds a list"):
        load_vim(tmp_path)
    config.write_text("{")
    with pytest.raises(CheckpointError, match="not readable JSON"):
        load_vim(tmp_path)


def test_the_plain_file_of_a_folder_is_the_default(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        load_vim(tmp_path)
    plain, tuned = tiny_vim(), tiny_vim(stride=8)
    write_official(tmp_path / "vim_t_midclstok_76p1acc.pth", plain)
    write_official(tmp_path / "vim_t_midclstok_ft_78p3acc.pth", tuned)
    assert same_weights(load_vim(tmp_path), plain)
    assert same_weights(load_vim(tmp_path, filename="vim_t_midclstok_ft_78p3acc.pth"), tuned)
    with pytest.raises(CheckpointError, match=r"no file 'x\.pth'.*vim_t_midclstok_76p1acc"):
        load_vim(tmp_path, filename="x.pth")
    write_official(tmp_path / "another.pth", plain)
    with pytest.raises(CheckpointError, match=r"several checkpoints.*filename="):
        load_vim(tmp_path)


def test_a_checkpoint_can_be_written_and_read_again(tmp_path: Path) -> None:
    read = read_checkpoint(write_official(tmp_path / "vim.pth", tiny_vim()))
    write_checkpoint(tmp_path / "slim.safetensors", read)
    again = read_checkpoint(tmp_path / "slim.safetensors")
    assert again.entry_name == read.entry_name
    assert again.config == read.config
    assert all(torch.equal(again.state[k], v) for k, v in read.state.items())
    assert sorted(os.listdir(tmp_path)) == ["slim.safetensors", "vim.pth"]


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "nowhere.pth", "a/b/c"])
def test_a_path_that_does_not_exist_is_a_clear_error(name: str) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        load_vim(name)


def test_filename_with_a_single_file_is_refused(tmp_path: Path) -> None:
    path = write_official(tmp_path / "vim.pth", tiny_vim())
    with pytest.raises(CheckpointError, match="leave filename out"):
        load_vim(path, filename="vim.pth")


@pytest.mark.parametrize(
    ("build", "width", "millions"),
    [(vim_tiny, 192, 7.1), (vim_small, 384, 25.8), (vim_base, 768, 97.6)],
)
def test_the_published_sizes(build: Any, width: int, millions: float) -> None:
    model = build(device="meta")
    assert model.d_model == width
    assert len(model.layers) == 24
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert count == pytest.approx(millions, abs=0.06)
    assert build(num_classes=0, device="meta").num_classes == 0
    with pytest.raises(InputError, match="pretrained=True"):
        build(filename="x.pth")


@pytest.fixture(scope="module")
def nano() -> VisionMamba:
    return load_vim(NANO).eval()


def test_the_nano_asset_is_a_plain_checkpoint_of_its_stated_size(nano: VisionMamba) -> None:
    assert nano.img_size == (64, 64)
    assert nano.num_classes == 200
    assert sum(p.numel() for p in nano.parameters()) == 1_676_488
    assert (NANO / "model.safetensors").stat().st_size < 3_500_000


def test_the_nano_asset_agrees_with_the_plain_implementation(nano: VisionMamba) -> None:
    rows, columns = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    waves = [torch.sin(rows / (3 + k) + columns / (5 - k)) for k in range(3)]
    image = torch.stack(waves).unsqueeze(0)
    state = {name: value.double() for name, value in nano.state_dict().items()}
    expected = vim_oracle.logits(state, image.double(), {"depth": 12, "stride": 8})
    found = nano(image)
    # single against double precision over twelve blocks; the official code's own noise is 1.6e-6
    error = (found.double() - expected).norm() / expected.norm()
    assert error < 2e-5
