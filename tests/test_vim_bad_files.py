"""`load_vim` on files that are damaged, unsafe, or of something else."""

from __future__ import annotations

import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from svp_peft import load_vim
from svp_peft.errors import CheckpointError, InputError
from svp_peft.serialise import pack
from tests.vim_files import tiny_vim, write_official


def changed(state: dict[str, Tensor], **changes: Tensor | None) -> dict[str, Tensor]:
    merged = {**state, **{name.replace("__", "."): value for name, value in changes.items()}}
    return {name: value for name, value in merged.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers__1__mixer__D_b": None}, "missing: layers.1.mixer.D_b"),
        ({"layers__1__mixer__E": torch.zeros(2)}, "unexpected: layers.1.mixer.E"),
        ({"norm_f__weight": torch.zeros(3)}, r"misshapen: norm_f.weight \(3,\) instead of \(16,"),
        ({"cls_token": torch.zeros(1, 1, 16, dtype=torch.int32)}, "not floating point: cls_token"),
        ({"patch_embed__proj__weight": None}, "no tensor 'patch_embed.proj.weight'"),
        ({"patch_embed__proj__weight": torch.zeros(16, 3, 1, 16, 16)}, "has 4 axes"),
        ({"patch_embed__proj__weight": torch.zeros(16, 3, 0, 16)}, "none of length 0"),
        ({"pos_embed": torch.zeros(())}, "pos_embed has shape"),
        ({"pos_embed": torch.zeros(1, 1, 16)}, "none is left for a patch"),
        ({"head__weight": torch.zeros(5)}, "head.weight has shape"),
        ({"layers__0__mixer__dt_proj__weight": torch.zeros(32, 0)}, "none of length 0"),
        ({"layers__99999999__norm__weight": torch.zeros(16)}, "none of layers.2"),
        ({"layers__0__mixer__A_log": None}, "no tensor 'layers.0.mixer.A_log'"),
        ({"prompt_scale": torch.zeros(24, 16)}, "convert_svp_checkpoint"),
        ({"svp.alpha": torch.zeros(3, 16)}, "load_adapter"),
    ],
)
def test_keys_that_do_not_fit_are_named(
    changes: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "vim.safetensors"
    save_file(changed(tiny_vim().state_dict(), **changes), path)
    with pytest.raises(CheckpointError, match=message):
        load_vim(path)


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
def test_a_tensor_without_plain_values_is_named(tmp_path: Path) -> None:
    path = tmp_path / "vim.pth"
    for value in (torch.zeros(16, device="meta"), torch.zeros(16).to_sparse()):
        torch.save(changed(tiny_vim().state_dict(), norm_f__weight=value), path)
        with pytest.raises(CheckpointError, match="without plain values: norm_f"):
            load_vim(path)


def test_weights_are_not_lost_on_the_meta_device(tmp_path: Path) -> None:
    save_file(tiny_vim().state_dict(), tmp_path / "vim.safetensors")
    with pytest.raises(InputError, match="meta device holds no values"):
        load_vim(tmp_path / "vim.safetensors", device="meta")


def test_a_mapping_that_holds_itself_is_refused(tmp_path: Path) -> None:
    endless: dict[str, Any] = {"x": torch.zeros(1)}
    endless["model"] = endless
    torch.save(endless, tmp_path / "vim.pth")
    with pytest.raises(CheckpointError, match="no plain state_dict"):
        load_vim(tmp_path / "vim.pth")


@pytest.mark.parametrize("length", [0x3C20, 0x203C, 0x413C])
def test_a_header_whose_length_spells_a_tag_is_no_web_page(length: int, tmp_path: Path) -> None:
    model = tiny_vim()
    entries, payload = pack(model.state_dict())
    header = json.dumps(entries).encode().ljust(length)
    assert len(header) == length
    path = tmp_path / "vim.safetensors"
    path.write_bytes(struct.pack("<Q", length) + header + payload)
    assert path.read_bytes()[:2].strip().startswith(b"<")
    assert torch.equal(load_vim(path).norm_f.weight, model.norm_f.weight)


def test_a_file_that_may_not_be_read_is_a_clear_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = write_official(tmp_path / "vim.pth", tiny_vim())

    def refuse(self: Path, mode: str) -> None:  # root reads anything, whatever the mode says
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match="Permission denied"):
        load_vim(path)


@pytest.mark.parametrize(
    "config",
    [
        {"img_size": "224"},
        {"img_size": [224]},
        {"img_size": 224.5},
        {"stride": 0},
        {"patch_size": None},
        {"ssm_cfg": 5},
        {"norm_epsilon": "small"},
        {"drop_path_rate": "0.1"},
        {"use_middle_cls_token": "false"},
        {"if_divide_out": "no"},
    ],
    ids=str,
)
def test_a_value_of_the_wrong_kind_in_config_json_is_named(
    config: dict[str, Any], tmp_path: Path
) -> None:
    save_file(tiny_vim().state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=f"{next(iter(config))}="):
        load_vim(tmp_path)


class Malicious:
    """Runs a command when it is unpickled by anything less careful than load_vim."""

    def __init__(self, target: Path) -> None:
        self.command = f"touch {target}"

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize("name", ["vim.pth", "vim.bin", "vim.pt"])
def test_code_in_a_pickle_is_never_run(name: str, archive: bool, tmp_path: Path) -> None:
    path, target = tmp_path / name, tmp_path / "ran"
    state = {"model": tiny_vim().state_dict(), "args": Malicious(target)}
    torch.save(state, path, _use_new_zipfile_serialization=archive)
    with pytest.raises(CheckpointError, match=r"posix.system|GLOBAL"):
        load_vim(path)
    assert not target.exists()
    # the same file does run code where nobody looks: the test above can fail
    torch.load(path, weights_only=False)
    assert target.exists()


def test_reading_a_namespace_does_not_allow_it_for_good(tmp_path: Path) -> None:
    path = write_official(tmp_path / "vim.pth", tiny_vim())
    load_vim(path)
    with pytest.raises(pickle.UnpicklingError, match="Namespace"):
        torch.load(path, weights_only=True)


def damaged_files() -> dict[str, bytes]:
    return {
        "empty.pth": b"",
        "empty.safetensors": b"",
        "page.pth": b"\n<!doctype html><html>404</html>",
        "pointer.safetensors": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
        "noise.pth": bytes(range(256)) * 8,
        "noise.safetensors": bytes(range(256)) * 8,
        "number.pth": b"",
        "list.pth": b"",
    }


@pytest.mark.parametrize("name", damaged_files())
def test_a_damaged_file_is_a_clear_error(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(damaged_files()[name])
    if name in ("number.pth", "list.pth"):
        torch.save(3 if name == "number.pth" else [torch.zeros(2)], path)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load_vim(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_cut_anywhere_is_a_clear_error(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"vim{suffix}"
    if suffix == ".pth":
        write_official(path, tiny_vim())
    else:
        save_file(tiny_vim().state_dict(), path)
    whole = path.read_bytes()
    for part in (0.001, 0.1, 0.5, 0.9, 0.999):
        path.write_bytes(whole[: int(len(whole) * part)])
        with pytest.raises(CheckpointError, match="vim"):
            load_vim(path)
