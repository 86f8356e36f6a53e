"""The numbers behind the pictures, on inputs where the answer is known; then the pictures."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import svp_peft as sp
from svp_peft.errors import BackboneNotSupportedError, InputError, NotAppliedError
from svp_peft.visualize import (
    gate_maps,
    plot_gate_maps,
    plot_receptive_field,
    plot_scales,
    plot_training,
    read_metrics,
    receptive_field,
    scale_profile,
)
from svp_peft.visualize.gates import mixer_gates
from tests.test_vim_adopt import fork_of

CLASS_TOKENS = {
    "none": {"if_cls_token": False, "final_pool_type": "mean"},
    "head": {"if_cls_token": True, "use_middle_cls_token": False},
    "middle": {"if_cls_token": True, "use_middle_cls_token": True},
    "double": {
        "if_cls_token": True,
        "use_double_cls_token": True,
        "use_middle_cls_token": False,
    },
}
CONFIG = sp.SVPConfig(inner_bottleneck=4, cross_group_size=2)


def vim(**changes: object) -> sp.VisionMamba:
    """A tiny Vim on a grid of 3 x 5 patches."""
    arguments: dict[str, object] = {
        "img_size": (12, 20),
        "patch_size": 4,
        "stride": 4,
        "depth": 3,
        "embed_dim": 16,
        "d_state": 4,
        "num_classes": 3,
        "bimamba_type": "v2",
        "rms_norm": True,
        "fused_add_norm": True,
        "residual_in_fp32": True,
        **CLASS_TOKENS["middle"],
        **changes,
    }
    return sp.VisionMamba(**arguments).eval()  # type: ignore[arg-type]


def patched(model: nn.Module, config: sp.SVPConfig = CONFIG) -> nn.Module:
    """The model with an adapter whose scales are not zero."""
    sp.apply_svp(model, config)
    with torch.no_grad():
        for scale in (model.svp.alpha, model.svp.beta):
            if scale is not None:
                nn.init.normal_(scale, std=0.3)
    return model


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 12, 20)


def show_only_patches(model: sp.VisionMamba) -> None:
    """Make block 0 see tokens that are zero except where the image is not."""
    with torch.no_grad():
        model.patch_embed.proj.bias.zero_()
        model.pos_embed.zero_()
        for name, parameter in model.named_parameters():
            if name.startswith("cls_token"):
                parameter.zero_()


@pytest.mark.parametrize("class_tokens", CLASS_TOKENS)
def test_gates_change_at_the_lit_patch_and_nowhere_before_it(class_tokens):
    model = patched(vim(**CLASS_TOKENS[class_tokens]))
    show_only_patches(model)
    images = torch.zeros(1, 3, 12, 20)
    images[:, :, 4:8, 8:12] = 1.0  # the patch in row 1, column 2: number 7 of 15
    update = gate_maps(model, images, blocks=[0]).before.update[0, :, 0]
    dark = gate_maps(model, torch.zeros_like(images), blocks=[0]).before.update[0, :, 0]
    changed = (update - dark).abs().flatten(1) > 1e-9
    forward, backward = (torch.nonzero(row).flatten().tolist() for row in changed)
    # the convolution of width 4 carries the patch three tokens on in scan order; a class token in
    # the middle stands right before this patch and is one of those three on the way back
    assert forward == [7, 8, 9, 10]
    assert backward == ([5, 6, 7] if class_tokens == "middle" else [4, 5, 6, 7])


def test_constant_time_step_gives_known_gates_everywhere(images):
    model = patched(vim())
    bias = 0.7
    with torch.no_grad():
        for block in model.layers:
            for suffix in ("", "_b"):
                getattr(block.mixer, f"dt_proj{suffix}").weight.zero_()
                getattr(block.mixer, f"dt_proj{suffix}").bias.fill_(bias)
    maps = gate_maps(model, images)
    delta = math.log1p(math.exp(bias))
    forget = sum(math.exp(-delta * n) for n in range(1, 5)) / 4  # A = -(1, 2, 3, 4) at first
    for gates in (maps.before, maps.after):
        torch.testing.assert_close(gates.update, torch.full((3, 2, 2, 3, 5), delta))
        torch.testing.assert_close(gates.forget, torch.full((3, 2, 2, 3, 5), forget))


@pytest.mark.parametrize("bimamba_type", ["none", "v1", "v2"])
def test_mixer_gates_equal_the_formula_token_by_token(bimamba_type):
    mixer = vim(bimamba_type=bimamba_type).double().layers[0].mixer
    hidden = torch.randn(2, 7, 16, dtype=torch.float64)
    directions = 1 if bimamba_type == "none" else 2
    found = mixer_gates(mixer, hidden)
    assert found.shape == (3, directions, 2, 7)
    x = F.linear(hidden, mixer.in_proj.weight)[..., :32]
    for k in range(directions):
        suffix = "_b" if k == 1 and bimamba_type == "v2" else ""
        conv, x_proj = getattr(mixer, f"conv1d{suffix}"), getattr(mixer, f"x_proj{suffix}")
        dt_proj = getattr(mixer, f"dt_proj{suffix}")
        A = -torch.exp(mixer.A_b_log if k else mixer.A_log)
        for t in range(7):
            taps = torch.zeros(2, 32, dtype=torch.float64)
            for j in range(4):
                source = t + 3 - j if suffix else t - 3 + j
                if 0 <= source < 7:
                    taps += conv.weight[:, 0, j] * x[:, source]
            low = F.silu(taps + conv.bias) @ x_proj.weight.T
            dt, B, _ = low.split((1, 4, 4), dim=-1)
            delta = F.softplus(dt @ dt_proj.weight.T + dt_proj.bias)
            expected = (
                delta.mean(-1),
                (delta[..., None] * B[:, None]).abs().mean((1, 2)),
                torch.exp(delta[..., None] * A).mean((1, 2)),
            )
            torch.testing.assert_close(found[:, k, :, t], torch.stack(expected))


def test_prompt_lengths_are_the_norms_of_constant_prompts(images):
    model = patched(vim())
    with torch.no_grad():
        for cross in model.svp.cross:
            cross.weight.zero_()
            cross.bias.fill_(1.0)
        for inner in model.svp.inner:
            inner.up.weight.zero_()
            inner.up.bias.fill_(2.0)
        model.svp.alpha.fill_(0.5)
        model.svp.beta.copy_(torch.tensor([0.0, 1.0, 2.0])[:, None].expand(3, 16))
    maps = gate_maps(model, images)
    silu_1, silu_2 = F.silu(torch.tensor([1.0, 2.0])).tolist()
    torch.testing.assert_close(maps.cross, torch.full((3, 2, 3, 5), 0.5 * silu_1 * 4))
    for block, beta in enumerate((0.0, 1.0, 2.0)):
        torch.testing.assert_close(maps.inner[block], torch.full((2, 3, 5), beta * silu_2 * 4))


@pytest.mark.parametrize("cross_source", ["token", "released"])
def test_cross_and_inner_prompt_add_up_to_what_the_adapter_adds(cross_source, images):
    config = sp.SVPConfig(inner_bottleneck=4, cross_group_size=3, cross_source=cross_source)
    # an even number of patches, so that both halves are equal
    model = patched(vim(img_size=(8, 20)), config)
    from svp_peft.visualize.gates import prompt_parts

    x = torch.randn(2, 11, 16)
    cross, inner = prompt_parts(model.svp.adapter, x, 1, (5,))
    # the sum is formed in another order: float32 rounding
    torch.testing.assert_close(x + cross + inner, model.svp.adapter(x, 1, (5,)))
    assert cross[:, 5].abs().max() == inner[:, 5].abs().max() == 0


@pytest.mark.parametrize("class_tokens", CLASS_TOKENS)
def test_gate_maps_have_the_documented_shapes(class_tokens, images):
    maps = gate_maps(patched(vim(**CLASS_TOKENS[class_tokens])), images, blocks=[2, -3])
    assert maps.blocks == (2, 0)
    assert maps.grid == (3, 5)
    for gate in (*maps.before, *maps.after):
        assert gate.shape == (2, 2, 2, 3, 5)
    assert maps.cross.shape == maps.inner.shape == (2, 2, 3, 5)
    assert maps.cross.dtype == maps.after.update.dtype == torch.float32
    every = gate_maps(model=patched(vim(depth=1, bimamba_type="none")), images=images)
    assert every.after.forget.shape == (1, 1, 2, 3, 5)


def test_blocks_come_in_the_order_asked_for(images):
    model = patched(vim())
    all_blocks = gate_maps(model, images)
    chosen = gate_maps(model, images, blocks=(2, 0))
    assert torch.equal(chosen.after.update, all_blocks.after.update[[2, 0]])
    assert torch.equal(chosen.inner, all_blocks.inner[[2, 0]])


def test_an_untrained_adapter_changes_no_gate(images):
    model = sp.apply_svp(vim(), CONFIG)
    maps = gate_maps(model, images)
    assert all(torch.equal(a, b) for a, b in zip(maps.before, maps.after, strict=True))
    assert maps.cross.abs().max() == maps.inner.abs().max() == 0


def test_before_is_the_base_model_and_after_the_prompted_one(images):
    model = patched(vim())
    maps = gate_maps(model, images, blocks=[1])
    base = gate_maps(sp.apply_svp(copy.deepcopy(sp.remove_svp(model)), CONFIG), images, blocks=[1])
    assert torch.equal(maps.before.update, base.after.update)
    assert not torch.equal(maps.before.update, maps.after.update)


def test_reversed_blocks_are_turned_back_to_image_order():
    model = patched(vim(if_bidirectional=True, bimamba_type="none", depth=2))
    show_only_patches(model)
    with torch.no_grad():
        model.layers[1].load_state_dict(model.layers[0].state_dict())
    images = torch.zeros(1, 3, 12, 20)
    images[:, :, 0:4, 0:4] = 1.0  # the first patch
    dark = gate_maps(model, torch.zeros_like(images)).before.update
    changed = (gate_maps(model, images).before.update - dark)[:, 0, 0].flatten(1).abs() > 1e-9
    assert torch.nonzero(changed[0]).flatten().tolist() == [0, 1, 2, 3]
    assert torch.nonzero(changed[1]).flatten().tolist() == [0]  # the last token of that scan


def test_looking_leaves_the_model_as_it_was(images):
    model = patched(vim(drop_path_rate=0.5)).train()
    model.layers[0].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    gate_maps(model, images)
    receptive_field(model, images, probes=2)
    assert [m.training for m in model.modules()] == modes
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_compiled_or_wrapped_model_gives_the_maps_of_the_plain_one(images):
    model = patched(vim(depth=1))
    expected = gate_maps(model, images).after.update
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(gate_maps(compiled, images).after.update, expected)
    model.compile(backend="eager")
    assert torch.equal(gate_maps(model, images).after.update, expected)
    assert model._compiled_call_impl is not None


def test_an_adopted_fork_model_gives_the_same_maps(images):
    model = vim()
    adopted = sp.VisionMamba.from_model(fork_of(model)).eval()
    torch.manual_seed(1)
    expected = gate_maps(patched(model), images)
    torch.manual_seed(1)
    found = gate_maps(patched(adopted), images)
    assert torch.equal(found.after.forget, expected.after.forget)
    assert torch.equal(found.cross, expected.cross)


@pytest.mark.gpu
def test_maps_of_a_model_on_a_gpu_are_those_of_the_cpu(images):
    model = patched(vim())
    maps, field = gate_maps(model, images), receptive_field(model, images)
    model.cuda()
    on_gpu = gate_maps(model, images.cuda())
    # cuDNN may embed the patches in TF32, which keeps 10 bits
    tolerance = {"rtol": 1e-2, "atol": 1e-4}
    for expected, found in zip(maps.after, on_gpu.after, strict=True):
        torch.testing.assert_close(found.cpu(), expected, **tolerance)
    torch.testing.assert_close(on_gpu.inner.cpu(), maps.inner, **tolerance)
    found = receptive_field(model, images.cuda()).after
    torch.testing.assert_close(found.cpu(), field.after, **tolerance)
    plot_gate_maps(on_gpu, images.cuda())


def test_receptive_field_is_the_norm_of_the_whole_jacobian(images):
    model = patched(vim(depth=2)).double()
    images = images.double()
    field = receptive_field(model, images, probes=99)  # more than d_model: exact

    def features(patches: Tensor) -> Tensor:
        handle = model.patch_embed.register_forward_hook(lambda *_: patches)
        try:
            return model.forward_features(images[:1])
        finally:
            handle.remove()

    jacobian = torch.autograd.functional.jacobian(features, model.patch_embed(images[:1]))
    expected = jacobian[0, :, 0].square().sum((0, 2)).sqrt()  # (16, 15, 16) -> (15,)
    # the maps are float32
    torch.testing.assert_close(field.after[0].flatten(), expected.float())


def test_few_probes_estimate_the_receptive_field(images):
    model = patched(vim())
    exact = receptive_field(model, images, probes=16).after
    rough = receptive_field(model, images, probes=8).after
    # half of the directions: the mean over 30 patches is within a few percent
    assert (rough.mean() / exact.mean() - 1).abs() < 0.1
    assert not torch.equal(rough, exact)
    assert torch.equal(rough, receptive_field(model, images, probes=8).after)


def test_a_forward_scan_sees_only_the_patches_before_the_class_token(images):
    model = patched(vim(bimamba_type="none"))
    field = receptive_field(model, images)
    for maps in (field.before, field.after):
        assert (maps.flatten(1)[:, :7] > 0).all()
        assert (maps.flatten(1)[:, 7:] == 0).all()


def test_a_mixer_that_writes_nothing_leaves_no_receptive_field(images):
    model = patched(vim())
    with torch.no_grad():
        for block in model.layers:
            block.mixer.out_proj.weight.zero_()
    field = receptive_field(model, images)
    assert field.before.abs().max() == 0
    assert field.change.abs().max() == 0


def test_change_of_the_receptive_field_sums_to_zero(images):
    field = receptive_field(patched(vim()), images)
    change = field.change
    # 15 shares of order 0.1 in float32
    torch.testing.assert_close(change.sum((-2, -1)), torch.zeros(2), atol=1e-6, rtol=0)
    assert change.abs().max() > 1e-4


def test_scale_profile_gives_the_quantiles_of_each_block(images):
    model = sp.apply_svp(vim(), sp.SVPConfig(inner_bottleneck=4, cross_group_size=2, layers=(0, 2)))
    with torch.no_grad():
        model.svp.alpha[0] = torch.linspace(-1, 0, 16)
        model.svp.alpha[1] = 3.0
        model.svp.beta[2] = -2.0
    profile = scale_profile(model)
    assert profile.alpha.shape == profile.beta.shape == (3, 3)
    torch.testing.assert_close(profile.alpha[0], torch.tensor([0.1, 0.5, 0.9]))
    assert profile.alpha[1].tolist() == [0, 0, 0]  # block 1 has no prompt
    assert profile.alpha[2].tolist() == [3, 3, 3]
    assert profile.beta[2].tolist() == [2, 2, 2]
    without = sp.apply_svp(vim(), sp.SVPConfig(use_cross=False))
    assert scale_profile(without).alpha is None


@pytest.mark.parametrize("blocks", [[], [3], [-4]])
def test_blocks_that_do_not_exist_are_refused(blocks, images):
    with pytest.raises(InputError, match=r"3 blocks, 0\.\.2"):
        gate_maps(patched(vim()), images, blocks=blocks)


def test_misuse_is_refused_with_a_reason(images):
    with pytest.raises(NotAppliedError):
        gate_maps(vim(), images)
    model = patched(vim())
    with pytest.raises(InputError, match=r"images\[None\]"):
        gate_maps(model, images[0])
    with sp.disable_adapter(model), pytest.raises(InputError, match="inside disable_adapter"):
        gate_maps(model, images)
    with pytest.raises(InputError, match="probes=0"):
        receptive_field(model, images, probes=0)


def test_blocks_without_a_vim_mixer_are_refused(images):
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    spec = sp.BackboneSpec(blocks="layers", d_model=16, head=None, input_name="input")
    model = sp.apply_svp(Other(), CONFIG, backbone=spec)
    with pytest.raises(BackboneNotSupportedError, match=r"no `mixer`.*from_model"):
        gate_maps(model, images)


def panels(figure: object) -> list[object]:
    """The axes that show an image, without colour bars."""
    return [axis for axis in figure.axes if axis.images]


def drawn(image: object) -> Tensor:
    """What an axes image shows."""
    return torch.tensor(image.get_array(), dtype=torch.float32)


def test_plot_gate_maps_draws_the_numbers_with_titles_and_colour_bars(images, tmp_path):
    maps = gate_maps(patched(vim()), images)
    figure = plot_gate_maps(maps, images, index=1, quantity="forget", direction=1)
    assert len(panels(figure)) == 3 * 6
    assert len(figure.axes) == 3 * 6 + 3 * 5  # five maps in a row have a colour bar
    before, after = (panels(figure)[i].images[-1] for i in (1, 2))
    torch.testing.assert_close(drawn(before), maps.before.forget[0, 1, 1])
    assert before.get_clim() == after.get_clim()
    change = panels(figure)[3].images[-1]
    assert change.get_clim()[0] == -change.get_clim()[1]
    assert change.get_cmap().name == "PuOr_r"
    assert change.get_extent() == [0, 20, 12, 0]
    assert "backward" in figure.get_suptitle()
    assert panels(figure)[6].get_ylabel() == "block 1"
    figure.savefig(tmp_path / "gates.png", dpi=40)
    assert (tmp_path / "gates.png").stat().st_size > 1000


def test_plot_receptive_field_draws_shares(images):
    field = receptive_field(patched(vim()), images, probes=2)
    figure = plot_receptive_field(field, images)
    _, before, after, change = panels(figure)
    assert before.images[-1].get_array().sum() == pytest.approx(1, abs=1e-5)
    assert after.get_title() == "share after"
    torch.testing.assert_close(drawn(change.images[-1]), field.change[0])


def test_plot_scales_draws_the_medians_of_each_kind_of_prompt():
    model = patched(vim())
    figure = plot_scales(model)
    for axis, values in zip(figure.axes, scale_profile(model), strict=True):
        drawn_medians = torch.tensor(axis.lines[0].get_ydata(), dtype=torch.float32)
        torch.testing.assert_close(drawn_medians, values[:, 1])
    (only,) = plot_scales(sp.apply_svp(vim(), sp.SVPConfig(use_inner=False))).axes
    assert only.get_title().startswith("alpha")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quantity": "delta"}, "quantity='delta'"),
        ({"direction": 2}, "direction=2"),
        ({"index": 2}, "index=2"),
    ],
)
def test_plots_refuse_what_is_not_there(arguments, message, images):
    maps = gate_maps(patched(vim(depth=1)), images)
    with pytest.raises(InputError, match=message):
        plot_gate_maps(maps, images, **arguments)
    with pytest.raises(InputError, match="1 images were given for maps of 2"):
        plot_gate_maps(maps, images[:1])


def write_lines(folder: Path, *lines: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    return folder


def test_metrics_of_a_resumed_run_keep_the_last_word_on_each_epoch(tmp_path):
    epochs = [{"epoch": e, "train_loss": 1.0 / e} for e in (1, 2, 3)]
    again = {"epoch": 2, "train_loss": 0.4}
    lines = [json.dumps(e) for e in (*epochs[:2], again, epochs[2])]
    run = write_lines(tmp_path / "run", *lines, '{"epoch": 4, "tra')
    assert read_metrics(run) == [epochs[0], again, epochs[2]]
    assert read_metrics(run / "metrics.jsonl") == read_metrics(run)


def test_plot_training_draws_what_the_epochs_have(tmp_path):
    rows = [
        {"epoch": e, "loss": 2.0 - e, "train_accuracy": 0.1 * e, "val_accuracy": 0.2 * e, "lr": 0.1}
        for e in range(3)
    ]
    figure = plot_training(write_lines(tmp_path / "run", *map(json.dumps, rows)))
    loss, accuracy, lr, speed = figure.axes
    assert loss.lines[0].get_xydata().tolist() == [[0, 2], [1, 1], [2, 0]]
    labels = [text.get_text() for text in accuracy.get_legend().get_texts()]
    assert labels == ["training", "validation"]
    assert accuracy.lines[1].get_ydata().tolist() == pytest.approx([0, 0.2, 0.4])
    assert len(lr.lines) == 1
    assert not speed.lines


def test_damaged_metrics_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"line 1 of .*metrics\.jsonl"):
        read_metrics(write_lines(tmp_path / "a", "not json", '{"epoch": 1}'))
    with pytest.raises(InputError, match="no complete epoch"):
        read_metrics(write_lines(tmp_path / "b", '{"epo'))
    with pytest.raises(InputError, match="does not exist"):
        read_metrics(tmp_path / "c")
