"""The authors' checkpoints: their numbers through our files, and the way back bit for bit.

Tolerances of the golden cases are those of tests/golden/README.md: in single precision 20 times the
noise of the official single-precision run and at least 2e-5; in double precision 1e-10 for outputs,
and 2e-7 for gradients, which are stored rounded to single precision.
"""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from svp_peft.adapter_file import load_adapter, save_adapter
from svp_peft.adapter_format import UNUSED_SCALE_ROWS
from svp_peft.adapter_store import HubOptions, read_adapter
from svp_peft.cli import main
from svp_peft.convert import convert_svp_checkpoint, export_svp_checkpoint
from svp_peft.errors import (
    AdapterNotFoundError,
    BaseModelMismatchError,
    CheckpointError,
    InputError,
    SVPError,
)
from svp_peft.vim import VisionMamba, vim_small
from svp_peft.vim.files import load_pickle
from tests.golden.golden_io import Case, ids, load_case
from tests.tiny import base, trained

SVP = ids("svp")
RELEASED_ONLY = {
    "transfer_type",
    "prompt_type",
    "shared_layers",
    "prompt_add_gen",
    "dataset",
    "input_relu",
}


def is_trained(name: str) -> bool:
    return name.startswith(("prompt_", "head."))


def backbone(case: Case) -> VisionMamba:
    """The base model of a golden case, without what SVP trains."""
    kwargs = {key: value for key, value in case.meta["kwargs"].items() if key not in RELEASED_ONLY}
    if case.meta["family"] == "svp_full":
        model = vim_small(num_classes=kwargs.pop("num_classes"), **kwargs)
    else:
        # the released constructor has no argument for these
        model = VisionMamba(final_pool_type="mean", if_cls_token=True, use_middle_cls_token=True,
                            **kwargs)  # fmt: skip
    state = {key: tensor for key, tensor in case.state.items() if not is_trained(key)}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) == {"head.weight", "head.bias"}
    assert not unexpected
    return model.eval()


def checkpoint(case: Case, path: Path) -> Path:
    """What the released main.py saves, optimizer and all."""
    kwargs = case.meta["kwargs"]
    args = argparse.Namespace(
        shared_layers=kwargs["shared_layers"],
        prompt_add_gen=kwargs["prompt_add_gen"],
        input_relu=kwargs.get("input_relu", False),
        data_set=kwargs.get("dataset", "CIFAR"),
        nb_classes=kwargs["num_classes"],
        lr=5e-4,
    )
    state = {f"module.{key}": tensor for key, tensor in case.state.items()}
    torch.save({"model": state, "optimizer": {"state": {}}, "epoch": 3, "args": args}, path)
    return path


def our_name(name: str) -> str:
    """The parameter of the patched model for an official name."""
    parts = name.split(".")
    prefix = "svp.adapters.default"
    if parts[0] == "prompt_generator":
        return f"{prefix}.inner.{parts[1]}.{'down' if parts[2] == '0' else 'up'}.{parts[3]}"
    if parts[0] == "prompt_generator_shared":
        return f"{prefix}.cross.{parts[1]}.{parts[3]}"
    return {"prompt_scale": f"{prefix}.beta", "prompt_shared_scale": f"{prefix}.alpha"}.get(
        name, name
    )


def run(case: Case, folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    out = convert_svp_checkpoint(checkpoint(case, folder / "checkpoint.pth"), folder / "adapter")
    model = load_adapter(backbone(case).to(dtype), out, is_trainable=True)
    # the file holds single precision, so the values are those of the case in any precision
    model = model.to(dtype)
    image = case.input.to(dtype).requires_grad_()
    logits = model(image)
    (logits * case["cotangent.logits"].to(dtype)).sum().backward()
    parameters = dict(model.named_parameters())
    got = {"out.logits": logits.detach(), "grad.input": image.grad}
    for name in case.meta["trainable"]:
        gradient = parameters[our_name(name)].grad
        if name == "prompt_scale" and gradient.shape[0] < 24:
            # rows beyond the depth are not in our model; the released code never uses them
            gradient = torch.cat(
                [gradient, gradient.new_zeros(24 - len(gradient), gradient.shape[1])]
            )
        got[f"grad.{name}"] = gradient
    return got


@pytest.mark.parametrize("name", SVP)
def test_released_numbers_in_single_precision(name, tmp_path):
    case = load_case(name)
    case.compare(run(case, tmp_path, torch.float32))


@pytest.mark.parametrize("name", SVP)
def test_released_numbers_in_double_precision(name, tmp_path):
    case = load_case(name)
    for key, tensor in run(case, tmp_path, torch.float64).items():
        limit = 2e-7 if key.startswith("grad.") else 1e-10
        assert case.error(key, tensor) <= (1e-6 if key in case.meta.get("zero", ()) else limit), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_released_numbers_of_the_full_size_recipe(dtype, tmp_path):
    case = load_case("svp_small_full_sl8")
    got = run(case, tmp_path, dtype)
    logits = got.pop("out.logits")
    case.compare({"out.logits": logits})
    assert dtype == torch.float32 or case.error("out.logits", logits) <= 1e-10
    gradients = {key.removeprefix("grad."): tensor for key, tensor in got.items()}
    assert gradients.keys() == set(case.meta["grad_names"])
    case.compare_full(gradients)


@pytest.mark.parametrize("name", SVP)
def test_way_back_gives_every_trained_tensor_bit_for_bit(name, tmp_path):
    case = load_case(name)
    source = checkpoint(case, tmp_path / "checkpoint.pth")
    folder = convert_svp_checkpoint(source, tmp_path / "adapter")
    target = export_svp_checkpoint(folder, tmp_path / "back.pth", base=backbone(case))
    back = load_pickle(target)
    assert back["model"].keys() == case.state.keys()
    for key, tensor in case.state.items():
        assert torch.equal(back["model"][key], tensor), key
    kwargs = case.meta["kwargs"]
    assert back["args"].shared_layers == kwargs["shared_layers"]
    assert back["args"].prompt_add_gen == kwargs["prompt_add_gen"]
    assert back["args"].input_relu == kwargs.get("input_relu", False)


def test_the_base_of_the_way_back_may_be_patched_or_wrapped(tmp_path):
    case = load_case("svp_d4_sl2_acts")
    folder = convert_svp_checkpoint(checkpoint(case, tmp_path / "c.pth"), tmp_path / "adapter")
    patched = load_adapter(backbone(case), folder)
    for model in (patched, nn.DataParallel(patched), torch.compile(patched)):
        target = export_svp_checkpoint(folder, tmp_path / "back.pth", base=model)
        back = load_pickle(target)["model"]
        assert back.keys() == case.state.keys()
        assert all(torch.equal(back[key], tensor) for key, tensor in case.state.items())


def test_another_base_is_no_way_back(tmp_path):
    case = load_case("svp_d4_sl2_acts")
    folder = convert_svp_checkpoint(checkpoint(case, tmp_path / "c.pth"), tmp_path / "adapter")
    for other in (base(), {"layers.0.norm.weight": torch.ones(32)}):
        with pytest.raises(BaseModelMismatchError, match=r"block_parameters \d+ \(the adapter"):
            export_svp_checkpoint(folder, tmp_path / "back.pth", base=other)
    assert not (tmp_path / "back.pth").exists()


@pytest.mark.parametrize("backwards", [False, True])
def test_classes_of_a_two_layer_head_do_not_depend_on_the_order_of_its_tensors(
    backwards, tmp_path, capsys
):
    loaded = load_pickle(checkpoint(load_case("svp_sl4_cub"), tmp_path / "checkpoint.pth"))
    loaded["model"] = dict(sorted(loaded["model"].items(), reverse=backwards))
    source = tmp_path / "ordered.pth"
    torch.save(loaded, source)
    folder = convert_svp_checkpoint(source, tmp_path / "adapter")
    classes = loaded["args"].nb_classes
    assert read_adapter(folder, HubOptions()).info.num_classes == classes
    target = export_svp_checkpoint(folder, tmp_path / "back.pth")
    assert load_pickle(target)["args"].nb_classes == classes
    assert main(["inspect", str(folder)]) == 0
    health = capsys.readouterr().out.partition("\nhealth: ")[2]
    assert health.startswith("good")
    assert "outputs" not in health


def test_way_back_without_a_base_holds_the_trained_tensors_alone(tmp_path):
    case = load_case("svp_d4_sl2_acts")
    folder = convert_svp_checkpoint(checkpoint(case, tmp_path / "c.pth"), tmp_path / "adapter")
    target = export_svp_checkpoint(folder, tmp_path / "back.pth")
    state = load_pickle(target)["model"]
    assert set(state) == {key for key in case.state if is_trained(key)}


def test_scale_rows_beyond_the_depth_are_kept_for_the_way_back_only(tmp_path):
    case = load_case("svp_d4_sl2_acts")
    folder = convert_svp_checkpoint(checkpoint(case, tmp_path / "c.pth"), tmp_path / "adapter")
    tensors = read_adapter(folder, HubOptions()).tensors
    assert tensors["svp.beta"].shape == (4, 32)
    assert torch.equal(tensors[UNUSED_SCALE_ROWS], case.state["prompt_scale"][4:])
    # a model has no place for them: saved from one, the way back fills in zeros
    save_adapter(load_adapter(backbone(case), folder), tmp_path / "again")
    path = export_svp_checkpoint(tmp_path / "again", tmp_path / "b.pth")
    scale = load_pickle(path)["model"]["prompt_scale"]
    assert torch.equal(scale[:4], tensors["svp.beta"])
    assert scale.shape == (24, 32)
    assert not bool(scale[4:].any())


# what is asked for, and what is refused


def altered(tmp_path: Path, change, *, args: argparse.Namespace | None = None) -> Path:
    state = dict(load_case("svp_d4_sl2_acts").state)
    change(state)
    saved: dict[str, object] = {"model": state}
    if args is not None:
        saved["args"] = args
    torch.save(saved, tmp_path / "checkpoint.pth")
    return tmp_path / "checkpoint.pth"


def keep(_: dict[str, Tensor]) -> None:
    pass


def test_simam_is_asked_for_where_the_file_does_not_say(tmp_path):
    path = altered(tmp_path, keep)
    with pytest.raises(InputError, match=r"does not say.*simam_input=True or simam_input=False"):
        convert_svp_checkpoint(path, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    for simam in (True, False):
        folder = convert_svp_checkpoint(path, tmp_path / "adapter", simam_input=simam)
        assert read_adapter(folder, HubOptions()).info.svp.simam_input is simam
    path = altered(tmp_path, keep, args=argparse.Namespace(input_relu=True))
    with pytest.raises(InputError, match="simam_input=False contradicts"):
        convert_svp_checkpoint(path, tmp_path / "adapter", simam_input=False)


def test_average_is_taken_if_asked(tmp_path):
    state = load_case("svp_d4_sl2_acts").state
    average = {key: tensor + 1 for key, tensor in state.items()}
    torch.save({"model": state, "model_ema": average}, tmp_path / "c.pth")
    folder = convert_svp_checkpoint(tmp_path / "c.pth", tmp_path, simam_input=False, use_ema=True)
    tensors = read_adapter(folder, HubOptions()).tensors
    assert torch.equal(tensors["svp.alpha"], average["prompt_shared_scale"])
    torch.save({"model": state}, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match=r"holds no 'model_ema'; found \['model'\]"):
        convert_svp_checkpoint(tmp_path / "c.pth", tmp_path, simam_input=False, use_ema=True)


def narrow(state: dict[str, Tensor]) -> None:
    for index in range(4):
        state[f"prompt_generator.{index}.0.weight"] = torch.zeros(32, 32)
        state[f"prompt_generator.{index}.0.bias"] = torch.zeros(32)


def drop(*names: str):
    def change(state: dict[str, Tensor]) -> None:
        for key in [key for key in state if key.startswith(names)]:
            del state[key]

    return change


def put(name: str, value: Tensor):
    return lambda state: state.update({name: value})


REFUSED = {
    "mlp384*32": (narrow, r"narrow to 32 and widen from 64.*mlp384\*32.*fails in its first"),
    "a plain Vim": (drop("prompt_"), "not a checkpoint of the released SVP code.*load_vim"),
    "a cut file": (drop("prompt_generator.2."), r"prompt_generator\.2\.0\.weight is missing"),
    "too few rows": (
        lambda state: state.update(prompt_scale=state["prompt_scale"][:3]),
        "3 scale rows and 2 groups for 4 blocks",
    ),
    "another width": (
        lambda state: state.update(prompt_shared_scale=torch.zeros(2, 16)),
        r"prompt_shared_scale is \(2, 16\), expected \(2, 32\)",
    ),
    "a flat scale": (put("prompt_scale", torch.zeros(24)), r"prompt_scale has shape \(24,\)"),
    "a scalar": (put("prompt_generator.0.1.weight", torch.zeros(())), r"float32 \(\)"),
    "a stray block": (
        put("prompt_generator.99999999.0.weight", torch.zeros(1)),
        r"prompt_generator\.4\.0\.weight is missing",
    ),
    "integers": (put("head.bias", torch.zeros(5, dtype=torch.int32)), "head.bias is torch.int32"),
    "no values": (put("head.bias", torch.zeros(5, device="meta")), r"\(5,\) \(meta"),
    "sparse": (put("head.weight", torch.eye(5, 32).to_sparse()), "torch.sparse_coo"),
}


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
@pytest.mark.parametrize("case", REFUSED)
def test_checkpoints_that_cannot_be_an_adapter_are_named(tmp_path, case):
    change, message = REFUSED[case]
    path = altered(tmp_path, change)
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        convert_svp_checkpoint(path, tmp_path / "adapter", simam_input=False)
    assert not (tmp_path / "adapter").exists()


def test_args_that_contradict_the_weights_are_named(tmp_path):
    path = altered(tmp_path, keep, args=argparse.Namespace(input_relu=False, shared_layers=4))
    with pytest.raises(CheckpointError, match=r"shared_layers=4.*make it 2"):
        convert_svp_checkpoint(path, tmp_path / "adapter")


class Bomb:
    """A pickle that would write a file when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_in_a_checkpoint_is_never_run(tmp_path):
    with open(tmp_path / "checkpoint.pth", "wb") as file:
        pickle.dump({"model": Bomb(tmp_path / "ran")}, file, protocol=2)
    with pytest.raises(CheckpointError, match="can run code"):
        convert_svp_checkpoint(tmp_path / "checkpoint.pth", tmp_path / "adapter")
    torch.save({"model": {}, "args": Bomb(tmp_path / "ran")}, tmp_path / "checkpoint.pth")
    with pytest.raises(CheckpointError, match="can run code"):
        convert_svp_checkpoint(tmp_path / "checkpoint.pth", tmp_path / "adapter")
    assert not (tmp_path / "ran").exists()
    with pytest.raises(CheckpointError, match="is not a file"):
        convert_svp_checkpoint(tmp_path / "nothing.pth", tmp_path / "adapter")


def test_converted_adapter_knows_its_base(tmp_path):
    case = load_case("svp_d4_sl2_acts")
    folder = convert_svp_checkpoint(checkpoint(case, tmp_path / "c.pth"), tmp_path / "adapter")
    other = backbone(case)
    with torch.no_grad():
        other.layers[0].mixer.in_proj.weight.mul_(2)
    with pytest.raises(BaseModelMismatchError, match="other weights"):
        load_adapter(other, folder, check_base_model="error")
    load_adapter(backbone(case), folder, check_base_model="error")
    with pytest.raises(BaseModelMismatchError, match="d_model 16"):
        load_adapter(base(), folder)


def test_checkpoint_of_the_prompts_alone_is_converted_too(tmp_path):
    path = altered(tmp_path, drop("layers.", "patch_embed", "pos_embed", "cls_token", "norm_f"))
    folder = convert_svp_checkpoint(path, tmp_path / "adapter", simam_input=False)
    model = load_adapter(backbone(load_case("svp_d4_sl2_acts")), folder)
    assert isinstance(model, nn.Module)


def test_only_what_the_released_code_can_compute_is_exported(tmp_path):
    save_adapter(trained(), tmp_path / "token")
    with pytest.raises(InputError, match="cross_source='token'"):
        export_svp_checkpoint(tmp_path / "token", tmp_path / "x.pth")
    with pytest.raises(AdapterNotFoundError):
        export_svp_checkpoint(tmp_path / "nothing", tmp_path / "x.pth")
    case = load_case("svp_d4_sl2_acts")
    folder = convert_svp_checkpoint(checkpoint(case, tmp_path / "c.pth"), tmp_path / "adapter")
    with pytest.raises(SVPError, match="could not be written"):
        export_svp_checkpoint(folder, tmp_path / "no folder" / "x.pth")
