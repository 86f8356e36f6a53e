"""apply_svp and remove_svp on Vim look-alikes and on the built-in VisionMamba."""

import copy
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from svp_peft.adapters import add_adapter, delete_adapter, disable_adapter, set_adapter
from svp_peft.config import SVPConfig
from svp_peft.errors import (
    AdapterNameError,
    AlreadyAppliedError,
    BackboneNotSupportedError,
    ConfigError,
    InputError,
    NotAppliedError,
)
from svp_peft.patch import apply_svp, remove_svp
from svp_peft.vim import VisionMamba
from tests.lookalikes import VimLike

CONFIG = SVPConfig(inner_bottleneck=4, cross_group_size=2)


def built_in(**kwargs) -> nn.Module:
    return VisionMamba(
        img_size=16,
        patch_size=4,
        stride=4,
        embed_dim=16,
        depth=4,
        num_classes=5,
        final_pool_type="mean",
        if_cls_token=True,
        use_middle_cls_token=True,
        **kwargs,
    )


@pytest.fixture(params=["look-alike", "built-in"])
def model(request) -> nn.Module:
    torch.manual_seed(1)
    return (VimLike() if request.param == "look-alike" else built_in()).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16)


def randomise(model: nn.Module) -> nn.Module:
    """Give the active adapter's scales values, as training would."""
    with torch.no_grad():
        for scale in (model.svp.alpha, model.svp.beta):
            if scale is not None:
                scale.normal_(std=0.5)
    return model


def snapshot(model: nn.Module) -> dict[str, object]:
    """All that apply_svp could leave behind: tensors, flags, hooks, objects."""
    return {
        "tensors": {key: tensor.clone() for key, tensor in model.state_dict().items()},
        "order": list(model.state_dict()),
        "flags": {key: p.requires_grad for key, p in model.named_parameters()},
        "hooks": {
            path: (dict(m._forward_pre_hooks), dict(m._forward_pre_hooks_with_kwargs))
            for path, m in model.named_modules()
        },
        "objects": {path: id(m) for path, m in model.named_modules()},
        "parameters": {path: id(p) for path, p in model.named_parameters()},
        "attributes": sorted(vars(model)),
        "training": {path: m.training for path, m in model.named_modules()},
    }


def assert_same(before: dict[str, object], after: dict[str, object]) -> None:
    for key in before.keys() - {"tensors"}:
        assert before[key] == after[key], key
    for key, tensor in before["tensors"].items():
        assert torch.equal(tensor, after["tensors"][key]), key


def test_apply_svp_is_identity_before_training(model, images):
    before = model(images)
    assert apply_svp(model, CONFIG) is model
    assert torch.equal(model(images), before)


@pytest.mark.parametrize("source", ["token", "released"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_keep_the_identity_and_adapters_of_float32_at_least(dtype, source, images):
    model = VimLike().eval().to(dtype)
    before = model(images.to(dtype))
    apply_svp(model, SVPConfig(cross_source=source, cross_group_size=2, inner_bottleneck=4))
    assert torch.equal(model(images.to(dtype)), before)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert {p.dtype for p in model.svp.adapter.parameters()} == {expected}
    assert model.head.weight.dtype == dtype
    assert randomise(model)(images.to(dtype)).dtype == dtype


def test_base_state_dict_keys_stay_and_all_new_ones_begin_with_svp(model):
    before = list(model.state_dict())
    apply_svp(model, CONFIG)
    assert [key for key in model.state_dict() if not key.startswith("svp.")] == before


def test_every_tensor_is_registered_once(model):
    apply_svp(model, CONFIG)
    add_adapter(model, "other")
    pointers = [tensor.data_ptr() for tensor in model.state_dict(keep_vars=True).values()]
    assert len(pointers) == len(set(pointers))


def test_only_the_adapter_and_the_head_are_trainable(model):
    apply_svp(model, CONFIG)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    expected = {f"svp.adapters.default.{name}" for name, _ in model.svp.adapter.named_parameters()}
    assert trainable == expected | {"head.weight", "head.bias"}


def test_after_one_training_step_every_trainable_parameter_moves(model, images):
    apply_svp(model, CONFIG).train()
    randomise(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    base = {k: p.clone() for k, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=1.0)
    model(images).square().sum().backward()
    optimizer.step()
    assert [name for name, p in trained.items() if torch.equal(p, before[name])] == []
    assert all(torch.equal(base[k], p) for k, p in model.named_parameters() if k in base)


def test_remove_svp_undoes_everything_bit_for_bit(model, images):
    model.patch_embed.requires_grad_(False)
    before, logits, head = snapshot(model), model(images), model.head
    apply_svp(model, CONFIG).train()
    randomise(model)(images).sum().backward()
    with torch.no_grad():
        model.head.weight.add_(1)
    assert remove_svp(model.eval()) is model
    assert_same(before, snapshot(model))
    assert model.head is head
    assert torch.equal(model(images), logits)
    assert all(p.grad is None for p in model.parameters())


def test_remove_svp_with_several_adapters_restores_the_same(model, images):
    before = snapshot(model)
    apply_svp(model, CONFIG, adapter_name="one")
    add_adapter(model, "two", num_classes=9)
    set_adapter(model, "two")
    with torch.no_grad():
        model.head.weight.fill_(7)
    remove_svp(model)
    assert_same(before, snapshot(model))


def test_remove_svp_inside_disable_adapter_ends_well(model, images):
    logits = model(images)
    apply_svp(model, CONFIG)
    with disable_adapter(model):
        remove_svp(model)
    assert torch.equal(model(images), logits)


def test_a_head_that_the_user_replaced_does_not_survive_remove_svp(model, images):
    before = model(images)
    apply_svp(model, CONFIG)
    model.head = nn.Linear(16, 3)
    assert model(images).shape == (2, 3)
    remove_svp(model)
    assert torch.equal(model(images), before)


@pytest.mark.parametrize("delete", [False, True])
def test_a_head_that_was_rebuilt_in_place_does_not_stop_its_adapter_from_going(
    model, images, delete
):
    before = model(images)
    apply_svp(model, CONFIG)
    # the object of the base model now has other parameters than its copy
    nn.utils.parametrizations.weight_norm(model.head)
    model(images).sum().backward()
    if delete:
        add_adapter(model, "other")
        delete_adapter(model, "default", new_active="other")
    remove_svp(model)
    assert torch.equal(model(images), before)
    assert all(parameter.requires_grad for parameter in model.head.parameters())


def test_prompts_change_the_logits_once_scales_do(model, images):
    before = model(images)
    apply_svp(model, CONFIG)
    assert (randomise(model)(images) - before).abs().max() > 1e-3


@pytest.mark.parametrize("class_token", ["middle", "head", "double", "none"])
def test_class_tokens_enter_the_first_block_unprompted(class_token, images):
    model = VimLike(class_token).eval()
    seen = []
    model.layers[0].register_forward_hook(lambda m, args, out: seen.append(args[0]))
    model(images)
    randomise(apply_svp(model, CONFIG))(images)
    changed = (seen[1] != seen[0]).any(-1).all(0)
    length = seen[0].shape[1]
    special = {"middle": [8], "head": [0], "double": [0, 17], "none": []}[class_token]
    assert changed.tolist() == [position not in special for position in range(length)]


def test_a_deleted_class_token_is_prompted_like_any_token_though_its_flag_is_on(images):
    model = apply_svp(VimLike(delete_cls_token=True).eval(), CONFIG)
    assert model.if_cls_token
    assert model.svp.spec.class_tokens == "none"


def test_keyword_and_positional_block_calls_give_the_same(images):
    torch.manual_seed(1)
    positional = VimLike().eval()
    by_keyword = copy.deepcopy(positional)
    by_keyword.keywords = True
    torch.manual_seed(2)
    randomise(apply_svp(positional, CONFIG))
    torch.manual_seed(2)
    randomise(apply_svp(by_keyword, CONFIG))
    assert torch.equal(positional(images), by_keyword(images))


def test_a_block_called_without_its_input_is_an_error_and_not_unprompted(images):
    model = apply_svp(VimLike().eval(), CONFIG)
    with pytest.raises(InputError, match="skipped silently"):
        model.layers[0](tokens=torch.zeros(1, 17, 16))


def test_reversed_blocks_leave_the_class_token_where_it_is_for_them(images):
    model = VimLike("head", if_bidirectional=True).eval()
    seen = {}
    for index, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda m, a, o, i=index: seen.setdefault(i, []).append(a[0]))
    before = model(images)
    apply_svp(model, CONFIG)
    assert torch.equal(model(images), before)
    randomise(model)(images)
    for block, special in ((0, 0), (1, 16)):
        plain, _, prompted = seen[block]
        unchanged = (prompted == plain).all(-1).all(0).nonzero().flatten().tolist()
        assert unchanged == [special]


def test_simam_weighs_the_images_and_not_while_disabled(model, images):
    from svp_peft.prompters import simam

    expected, plain = model(simam(images)), model(images)
    apply_svp(model, SVPConfig(simam_input=True, inner_bottleneck=4))
    assert torch.equal(model(images), expected)
    assert torch.equal(model(x=images), expected)
    with disable_adapter(model):
        assert torch.equal(model(images), plain)


def test_deepcopy_gives_the_copy_its_own_adapter(model, images):
    randomise(apply_svp(model, CONFIG))
    twin, expected = copy.deepcopy(model), model(images)
    with torch.no_grad():
        model.svp.alpha.zero_()
        model.head.weight.zero_()
    assert torch.equal(twin(images), expected)
    assert not torch.equal(model(images), expected)


def test_pickle_keeps_the_patched_model(model, images):
    randomise(apply_svp(model, CONFIG))
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(images), model(images))
    remove_svp(twin)
    assert "svp" in dict(model.named_children())


def test_timm_ema_follows_the_adapter(model, images):
    timm_utils = pytest.importorskip("timm.utils")
    apply_svp(model, CONFIG)
    ema = timm_utils.ModelEmaV3(model, decay=0.5)
    randomise(model)
    alpha = model.svp.alpha.detach().clone()
    ema.update(model)
    torch.testing.assert_close(ema.module.svp.alpha, alpha / 2)
    assert not torch.equal(ema(images), model(images))


def test_a_state_dict_round_trip_keeps_the_outputs(model, images):
    fresh = copy.deepcopy(model)
    randomise(apply_svp(model, CONFIG))
    apply_svp(fresh, CONFIG)
    assert fresh.load_state_dict(model.state_dict()).missing_keys == []
    assert torch.equal(fresh(images), model(images))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_float32_adapters_and_what_came_in(dtype, images):
    model = randomise(apply_svp(VimLike().eval(), CONFIG))
    seen = []
    model.layers[1].register_forward_hook(lambda m, args, out: seen.append(args[0].dtype))
    with torch.autocast("cpu", dtype=dtype):
        logits = model(images)
    assert seen == [dtype]
    # bf16 keeps 8 bits of every product, and errors add up over four blocks
    torch.testing.assert_close(logits.float(), model(images), rtol=0.1, atol=0.1)


def test_gradient_checkpointing_around_a_block_changes_nothing(images):
    model = randomise(apply_svp(VimLike(), CONFIG))
    model(images).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    hidden, _ = model.tokens(images)
    residual = None
    for layer in model.layers:
        hidden, residual = torch.utils.checkpoint.checkpoint(
            layer, hidden, residual, use_reentrant=False
        )
    model.head(model.norm_f(hidden + residual)[:, [8]].mean(1)).sum().backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, gradient)


def test_functional_call_takes_the_adapter_from_the_given_parameters(model, images):
    apply_svp(model, CONFIG, adapter_name="train")
    values = {k: v.clone() for k, v in model.state_dict().items()}
    values["svp.adapters.train/.alpha"].fill_(0.5)
    plain = model(images)
    other = torch.func.functional_call(model, values, (images,))
    assert not torch.equal(other, plain)
    assert torch.equal(model(images), plain)


def test_gradients_by_torch_func_are_those_of_autograd(images):
    model = apply_svp(VimLike().eval(), CONFIG)
    for parameter in model.svp.adapter.parameters():
        nn.init.normal_(parameter, std=0.3)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters, batch):
        return torch.func.functional_call(model, parameters, (batch,)).square().sum()

    values = {name: parameter.detach() for name, parameter in trained.items()}
    loss(trained, images).backward()
    whole = torch.func.grad(loss)(values, images)
    of_each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(values, images[:, None])
    for name, parameter in trained.items():
        torch.testing.assert_close(whole[name], parameter.grad)
        # one sum per image, added up in another order
        torch.testing.assert_close(of_each[name].sum(0), parameter.grad, rtol=1e-4, atol=1e-5)


def test_batch_of_one_trains(model):
    # the released in-place code fails here: "modified by an inplace operation"
    config = SVPConfig(cross_source="released", cross_group_size=2, inner_bottleneck=4)
    randomise(apply_svp(model, config)).train()
    model(torch.randn(1, 3, 16, 16)).sum().backward()
    assert model.svp.alpha.grad.abs().sum() > 0


def test_released_refuses_an_odd_number_of_patches():
    model = apply_svp(
        VimLike(patches=3).eval(), SVPConfig(cross_source="released", cross_group_size=2)
    )
    with pytest.raises(InputError, match="even number of patches"):
        model(torch.randn(1, 3, 12, 12))


@pytest.mark.parametrize("class_token", ["head", "double", "none"])
def test_released_refuses_other_class_tokens_than_a_middle_one(class_token):
    with pytest.raises(ConfigError, match="middle class token"):
        apply_svp(VimLike(class_token), SVPConfig(cross_source="released", cross_group_size=2))


def test_modules_to_save_get_a_copy_per_adapter_and_go_back(model, images):
    before, snap = model(images), snapshot(model)
    config = SVPConfig(inner_bottleneck=4, modules_to_save=("head", "norm_f", "layers.0.norm"))
    apply_svp(model, config)
    assert torch.equal(model(images), before)
    assert model.norm_f.weight.requires_grad
    with torch.no_grad():
        model.norm_f.weight.mul_(2)
        model.layers[0].norm.weight.mul_(2)
    assert not torch.equal(model(images), before)
    with disable_adapter(model):
        assert torch.equal(model(images), before)
        assert not model.norm_f.weight.requires_grad
    remove_svp(model)
    assert_same(snap, snapshot(model))


def test_modules_to_save_that_overlap_are_refused_in_one_adapter_and_between_two(model):
    whole = "layers.0.mixer"
    part = f"{whole}.{next(name for name, _ in model.layers[0].mixer.named_children())}"
    snap = snapshot(model)
    with pytest.raises(ConfigError, match=f"'{part}' is part of '{whole}'"):
        apply_svp(model, SVPConfig(modules_to_save=("head", part, whole)))
    assert_same(snap, snapshot(model))
    apply_svp(model, SVPConfig(inner_bottleneck=4, modules_to_save=(part,)))
    with pytest.raises(ConfigError, match=f"'{part}' is part of '{whole}'"):
        add_adapter(model, "other", SVPConfig(inner_bottleneck=4, modules_to_save=(whole,)))
    add_adapter(model, "same", SVPConfig(inner_bottleneck=4, modules_to_save=(part,)))


def test_a_model_without_head_is_patched_without_one(images):
    model = VimLike(num_classes=0)
    del model.head
    model.head = None
    apply_svp(model, CONFIG)
    assert model.svp.spec.head is None


def test_a_larger_model_is_patched_at_its_vim(images):
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = VimLike()

        def forward(self, batch):
            return self.net(batch["images"])

    outer = Outer().eval()
    before = outer({"images": images})
    apply_svp(outer, SVPConfig(simam_input=False, inner_bottleneck=4))
    assert torch.equal(outer({"images": images}), before)
    assert outer.svp.spec.owner == "net"
    assert outer.net.head.weight.requires_grad
    remove_svp(outer)
    apply_svp(outer.net, CONFIG)
    set_adapter(outer, "default")


# Errors: in every case the model is as it was before.


def refused(model: nn.Module, error: type, match: str, *args, **kwargs) -> None:
    before = snapshot(model)
    with pytest.raises(error, match=match):
        apply_svp(model, *args, **kwargs)
    assert_same(before, snapshot(model))


def test_second_apply_is_refused(model, images):
    randomise(apply_svp(model, CONFIG))
    expected = model(images)
    refused(model, AlreadyAppliedError, "prompt every block twice", CONFIG)
    assert torch.equal(model(images), expected)
    outer = nn.Sequential(model)
    refused(outer, AlreadyAppliedError, "'0' inside this model already", CONFIG)


@pytest.mark.parametrize(
    "config",
    [
        SVPConfig(layers=(0, 99)),
        SVPConfig(modules_to_save=("head", "no.such")),
        SVPConfig(modules_to_save=("layers",)),
        SVPConfig(cross_source="released", cross_group_size=3),
        {"inner_bottleneck": 4},
    ],
)
def test_a_config_that_does_not_fit_leaves_the_model_alone(model, config):
    refused(model, ConfigError, ".", config)


def test_a_bad_adapter_name_leaves_the_model_alone(model):
    refused(model, AdapterNameError, "not usable", CONFIG, adapter_name="a.b")


def test_other_models_are_refused_with_what_was_found_and_a_spec_to_start_from():
    model = nn.Sequential(nn.Linear(4, 4), nn.ModuleList(nn.Linear(4, 4) for _ in range(3)))
    refused(model, BackboneNotSupportedError, r"1: 3 x Linear.*BackboneSpec\(blocks=")
    with pytest.raises(BackboneNotSupportedError, match=r"not a torch\.nn\.Module"):
        apply_svp({"weights": 1})


def test_compiled_models_are_refused():
    compiled = torch.compile(VimLike(), backend="eager")
    with pytest.raises(BackboneNotSupportedError, match="compiled"):
        apply_svp(compiled, CONFIG)
    model = VimLike()
    model.layers[2].compile(backend="eager")
    with pytest.raises(BackboneNotSupportedError, match=r"'layers\.2' is compiled"):
        apply_svp(model, CONFIG)


def test_remove_svp_of_a_compiled_model_is_refused():
    model = apply_svp(VimLike(), CONFIG)
    with pytest.raises(BackboneNotSupportedError, match="remove_svp"):
        remove_svp(torch.compile(model, backend="eager"))


def test_models_made_in_inference_mode_are_refused_untouched(images):
    with torch.inference_mode():
        model = VimLike()
        before = model(images)
    with pytest.raises(BackboneNotSupportedError, match="inference_mode"):
        apply_svp(model, CONFIG)
    assert "svp" not in model._modules
    with torch.inference_mode():
        assert torch.equal(model(images), before)


def test_a_head_of_integers_is_refused_before_anything_is_patched(model, images):
    before = model(images)
    model.head.register_parameter(
        "code", nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    )
    with pytest.raises(ConfigError, match=r"'head', but its code is torch\.int8"):
        apply_svp(model, CONFIG)
    assert "svp" not in model._modules
    assert all(p.requires_grad for p in model.parameters() if p.is_floating_point())
    apply_svp(model, replace(CONFIG, modules_to_save=()))
    assert torch.equal(model(images), before)


def test_models_on_meta_are_refused():
    with torch.device("meta"):
        model = VimLike()
    with pytest.raises(BackboneNotSupportedError, match="meta device"):
        apply_svp(model, CONFIG)


def test_a_sequence_that_would_run_svp_as_one_of_its_parts_is_refused():
    refused(nn.Sequential(VimLike()), BackboneNotSupportedError, "the model inside, at '0'")


def test_wrapped_models_are_refused():
    refused(nn.DataParallel(VimLike()), BackboneNotSupportedError, "inner model first")


def test_the_released_svp_model_with_its_own_prompts_is_sent_to_the_converter():
    model = VimLike()
    model.prompt_generator = nn.ModuleList([nn.Linear(4, 4)])
    refused(model, BackboneNotSupportedError, "convert_svp_checkpoint")


def test_a_model_with_an_attribute_svp_of_its_own_is_refused():
    model = VimLike()
    model.svp = 3
    refused(model, BackboneNotSupportedError, "attribute `svp`")


def test_remove_without_apply_is_an_error(model):
    with pytest.raises(NotAppliedError, match="carries no SVP adapter"):
        remove_svp(model)


@pytest.mark.parametrize(
    "arguments",
    [{"if_random_token_rank": True}, {"inference_params": object()}],
)
def test_what_moves_tokens_or_skips_the_backward_scan_is_refused(arguments, images):
    model = apply_svp(VimLike().eval(), CONFIG)
    (name,) = arguments
    with pytest.raises(InputError, match=name):
        model(images, **arguments)
    with disable_adapter(model):
        model(images, **arguments)


def test_positional_arguments_are_seen_too(images):
    model = apply_svp(VimLike("head").eval(), CONFIG)
    with pytest.raises(InputError, match="if_random_cls_token_position"):
        model(images, None, True)


def test_random_position_is_ignored_where_the_model_ignores_it(images):
    model = apply_svp(VimLike("middle").eval(), CONFIG)
    model(images, if_random_cls_token_position=True)


def test_inference_params_at_a_block_are_refused():
    model = apply_svp(VimLike().eval(), CONFIG)
    with pytest.raises(InputError, match="forward scan only"):
        model.layers[0](torch.zeros(1, 17, 16), inference_params=object())
    with pytest.raises(InputError, match="forward scan only"):
        model.layers[0](torch.zeros(1, 17, 16), None, object())


def test_an_asymmetric_flip_is_refused_before_and_after_patching(images):
    model = VimLike("head")
    model.flip_img_sequences_ratio = 0.5
    refused(model, InputError, "flip_img_sequences_ratio=0.5")
    model.flip_img_sequences_ratio = -1
    apply_svp(model, CONFIG)
    model.flip_img_sequences_ratio = 0.5
    with pytest.raises(InputError, match="flip_img_sequences_ratio"):
        model(images)


def test_a_symmetric_flip_is_fine(images):
    model = VimLike("middle")
    model.flip_img_sequences_ratio = 0.5
    apply_svp(model, CONFIG)(images)


def test_tokens_of_another_width_are_refused():
    model = apply_svp(VimLike().eval(), CONFIG)
    with pytest.raises(InputError, match="width 16"):
        model.layers[0](torch.zeros(1, 17, 8))


# torch.compile and DDP


def test_the_patched_model_compiles_as_one_graph_and_follows_its_adapters(images):
    torch._dynamo.reset()
    model = randomise(apply_svp(VimLike().eval(), CONFIG, adapter_name="one"))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    first = model(images)
    # the same operations in the same order; aot_eager may fold some
    torch.testing.assert_close(compiled(images), first)
    add_adapter(compiled, "two", num_classes=3)
    set_adapter(compiled, "two")
    randomise(model)
    assert compiled(images).shape == (2, 3)
    torch.testing.assert_close(compiled(images), model(images))
    with disable_adapter(compiled):
        torch.testing.assert_close(compiled(images), model(images))
    set_adapter(compiled, "one")
    torch.testing.assert_close(compiled(images), first)


def test_the_built_in_vim_compiles_as_one_graph(images):
    torch._dynamo.reset()
    model = randomise(apply_svp(built_in().eval(), CONFIG))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    # the traced scan sums in another order than the eager kernels
    torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-5)


def test_gradients_of_the_compiled_model_are_those_of_the_eager_one(images):
    torch._dynamo.reset()
    model = randomise(apply_svp(built_in(), CONFIG))
    model(images).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(images).square().sum().backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            # the traced scan sums in another order than the eager kernels
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5)


def test_a_compiled_block_with_its_hook_is_one_graph():
    torch._dynamo.reset()
    model = randomise(apply_svp(VimLike().eval(), CONFIG))
    hidden = torch.randn(2, 17, 16)
    expected = model.layers[0](hidden)[0]
    compiled = torch.compile(model.layers[0], fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(hidden)[0], expected)


DDP_WORKER = """
import os, sys, torch
import torch.distributed as dist
from tests.lookalikes import VimLike
from svp_peft.config import SVPConfig
from svp_peft.patch import apply_svp

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
torch.manual_seed(0)
model = apply_svp(VimLike(), SVPConfig(inner_bottleneck=4, cross_group_size=2))
with torch.no_grad():
    model.svp.alpha.normal_(); model.svp.beta.normal_()
alone = [p.detach().clone() for p in model.parameters()]
wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=False)
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
images = torch.randn(2, 2, 3, 16, 16)
for _ in range(3):
    optimizer.zero_grad()
    wrapped(images[rank]).square().mean().backward()
    optimizer.step()
with torch.no_grad():
    trained = torch.cat([p.flatten() for p in model.parameters()])
others = [torch.empty_like(trained) for _ in range(2)]
dist.all_gather(others, trained)
assert torch.equal(*others), "ranks disagree"
for p, value in zip(model.parameters(), alone): p.data.copy_(value)
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
for _ in range(3):
    optimizer.zero_grad()
    (model(images[0]).square().mean() + model(images[1]).square().mean()).div(2).backward()
    optimizer.step()
with torch.no_grad():
    single = torch.cat([p.flatten() for p in model.parameters()])
torch.testing.assert_close(trained, single, rtol=1e-4, atol=1e-5)
# Leave together and past the interpreter's end, where gloo may still have a thread to join.
dist.barrier()
dist.destroy_process_group()
print("agreed", flush=True)
os._exit(0)
"""


def test_ddp_with_two_processes_trains_like_one_without_unused_parameters(tmp_path):
    tests = Path(__file__).parent
    paths = str(tests.parent)
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", DDP_WORKER, str(rank), str(tmp_path / "store")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [worker.communicate(timeout=250)[0] for worker in workers]
    assert [output.strip().splitlines()[-1] for output in outputs] == ["agreed"] * 2, outputs
    assert [worker.returncode for worker in workers] == [0, 0], outputs
