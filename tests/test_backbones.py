import copy
import logging

import pytest
import torch
from torch import nn

from svp_peft.adapters import disable_adapter
from svp_peft.backbones import BackboneSpec, class_token_positions, find_backbone
from svp_peft.config import SVPConfig
from svp_peft.errors import BackboneNotSupportedError, InputError
from svp_peft.patch import apply_svp, remove_svp
from svp_peft.routing import route
from svp_peft.vim import VisionMamba
from tests.lookalikes import (
    ArmLike,
    Classifier,
    LocalVimLike,
    MambaPeftLike,
    MambaRegLike,
    MambaVisionLike,
    MixerModelLike,
    PlainMambaLike,
    ReleasedSvpLike,
    VideoMambaLike,
    VimLike,
    VMambaLike,
)

IMAGES = (2, 3, 16, 16)

# name: (model, shape of its input, family, class tokens, path of the head)
MODELS = {
    "vim": (VimLike, IMAGES, "vim", "middle", "head"),
    "vim head": (lambda: VimLike("head"), IMAGES, "vim", "head", "head"),
    "vim double": (lambda: VimLike("double"), IMAGES, "vim", "double", "head"),
    "vim none": (lambda: VimLike("none"), IMAGES, "vim", "none", "head"),
    "vim segmentation": (
        lambda: VimLike(delete_cls_token=True, num_classes=0),
        IMAGES,
        "vim",
        "none",
        "head",
    ),
    "vim in pairs": (lambda: VimLike("head", if_bidirectional=True), IMAGES, "vim", "head", "head"),
    "released svp": (ReleasedSvpLike, IMAGES, "released_svp", "middle", "head"),
    "video image": (VideoMambaLike, IMAGES, "videomamba", "head", "head"),
    "video clip": (
        lambda: VideoMambaLike(frames=3),
        (2, 3, 3, 16, 16),
        "videomamba",
        "head",
        "head",
    ),
    "mamba_reg": (MambaRegLike, IMAGES, "mamba_reg", (4, 9, 14), "head"),
    "local vim": (LocalVimLike, IMAGES, "local_vim", "none", "head"),
    "local vim middle": (lambda: LocalVimLike("middle"), IMAGES, "local_vim", "middle", "head"),
    "arm": (ArmLike, IMAGES, "arm", "middle", "head"),
    "plain mamba": (PlainMambaLike, IMAGES, "plain_mamba", "none", None),
    "plain mamba classifier": (
        lambda: Classifier(PlainMambaLike()),
        IMAGES,
        "plain_mamba",
        "none",
        "head",
    ),
    "mamba-peft": (lambda: MambaPeftLike(VimLike()), IMAGES, "vim", "middle", "module.head"),
    "mixer model": (MixerModelLike, (2, 7), "mixer_model", "none", None),
    "vmamba": (VMambaLike, IMAGES, "vmamba", "none", "classifier.head"),
    "vmamba channels first": (
        lambda: VMambaLike(True),
        IMAGES,
        "vmamba",
        "none",
        "classifier.head",
    ),
    "efficient vmamba": (
        lambda: VMambaLike(convolutions=True),
        IMAGES,
        "vmamba",
        "none",
        "classifier.head",
    ),
    "mambavision": (MambaVisionLike, IMAGES, "mambavision", "none", "head"),
}


@pytest.fixture(params=MODELS)
def case(request):
    torch.manual_seed(1)
    make, shape, family, class_tokens, head = MODELS[request.param]
    inputs = torch.randint(0, 10, shape) if len(shape) == 2 else torch.randn(shape)
    return make().eval(), inputs, family, class_tokens, head


def first(output):
    return output[0] if isinstance(output, tuple) else output


def randomise(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.svp.adapter.parameters():
            parameter.normal_(std=0.3)


def test_each_family_is_recognised_by_its_structure(case, caplog):
    model, _, family, class_tokens, head = case
    with caplog.at_level(logging.INFO, "svp_peft"):
        spec = find_backbone(model)
    assert (spec.family, spec.class_tokens, spec.head) == (family, class_tokens, head)
    assert f"family {family!r}" in caplog.text


def test_a_fresh_adapter_changes_no_bit_a_trained_one_does_and_removal_restores(case):
    model, inputs, *_ = case
    before = first(model(inputs))
    keys = list(model.state_dict())
    apply_svp(model, SVPConfig(inner_bottleneck=2, cross_group_size=2))
    assert torch.equal(first(model(inputs)), before)
    randomise(model)
    trained = first(model(inputs))
    assert not torch.equal(trained, before)
    assert torch.equal(first(copy.deepcopy(model)(inputs)), trained)
    with disable_adapter(model):
        assert torch.equal(first(model(inputs)), before)
    remove_svp(model)
    assert torch.equal(first(model(inputs)), before)
    assert list(model.state_dict()) == keys


def test_every_trained_parameter_of_every_family_gets_a_gradient(case):
    model, inputs, *_ = case
    apply_svp(model, SVPConfig(inner_bottleneck=2, cross_group_size=2))
    randomise(model)
    first(model(inputs)).square().sum().backward()
    prompters = dict(model.svp.adapter.named_parameters())
    assert [name for name, p in prompters.items() if p.grad is None] == []


def test_images_of_a_batch_do_not_see_each_other(case):
    model, inputs, *_ = case
    apply_svp(model, SVPConfig(inner_bottleneck=2))
    randomise(model)
    expected = first(model(inputs))
    # matrix products of other batch sizes may round differently
    for row in range(2):
        torch.testing.assert_close(
            first(model(inputs[row : row + 1])), expected[row : row + 1], rtol=1e-4, atol=1e-5
        )
    with route(model, ["default", "__base__"]):
        torch.testing.assert_close(first(model(inputs))[:1], expected[:1], rtol=1e-4, atol=1e-5)


def test_prompts_are_the_formula_in_every_layout():
    tokens = torch.randn(2, 9, 8)
    for layout in ("tokens", "channels_last", "channels_first"):
        model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Identity()])})
        spec = BackboneSpec(blocks="blocks", d_model=8, layout=layout, head=None)
        # an identity has no parameters to learn the device from
        model["blocks"][0].weight = nn.Parameter(torch.zeros(1))
        apply_svp(model, SVPConfig(inner_bottleneck=2), backbone=spec)
        randomise(model)
        expected = model.svp.adapter(tokens, 0)
        maps = tokens.unflatten(1, (3, 3))
        if layout == "tokens":
            out = model["blocks"][0](tokens)
        elif layout == "channels_last":
            out = model["blocks"][0](maps).flatten(1, 2)
        else:
            out = model["blocks"][0](maps.movedim(-1, 1)).movedim(1, -1).flatten(1, 2)
        torch.testing.assert_close(out, expected)


def test_hierarchical_models_have_prompters_of_each_width_and_skip_other_blocks():
    model = apply_svp(VMambaLike(convolutions=True), SVPConfig(inner_bottleneck=2))
    spec = model.svp.spec
    # the second block of either stage has no SSM branch, and the third stage no blocks
    assert spec.blocks == ("layers.0.blocks.0", "layers.1.blocks.0", "layers.1.blocks.2")
    assert spec.widths == (8, 16, 16)
    assert [p.in_features for p in model.svp.cross] == [8, 16]
    vision = apply_svp(MambaVisionLike(), SVPConfig(inner_bottleneck=2))
    assert vision.svp.spec.blocks[0] == "levels.1.blocks.0"
    assert vision.svp.spec.widths == (8, 8, 16, 16)


def test_features_kept_without_a_copy_stay_what_they_were():
    model = LocalVimLike().eval()
    images = torch.randn(IMAGES)
    apply_svp(model, SVPConfig(inner_bottleneck=2, layers=(3,)))
    before = [out.clone() for out in model.features(images)]
    randomise(model)
    after = model.features(images)
    assert all(torch.equal(a, b) for a, b in zip(after[:3], before[:3], strict=True))
    assert not torch.equal(after[3], before[3])


def test_prompt_tokens_of_mambapeft_are_refused_but_may_be_placed_by_hand():
    model = MambaPeftLike(VimLike(), prompts=2)
    with pytest.raises(BackboneNotSupportedError, match="moves the class token") as caught:
        find_backbone(model)
    start = "BackboneSpec(blocks='module.layers', class_tokens=(position,), owner='module')"
    assert start in str(caught.value)
    spec = find_backbone(model, eval(start, {"BackboneSpec": BackboneSpec, "position": 10}))
    assert spec.class_tokens == (10,)
    assert spec.head == "module.head"


@pytest.mark.parametrize(
    ("kind", "length", "expected"),
    [
        ("none", 5, ()),
        ("head", 5, (0,)),
        ("tail", 5, (4,)),
        ("middle", 197, (98,)),
        ("middle", 16, (7,)),
        ("double", 5, (0, 4)),
        ((3, 1), 5, (1, 3)),
    ],
)
def test_positions_follow_the_length_and_are_mirrored_in_reversed_blocks(kind, length, expected):
    kind = BackboneSpec(blocks="layers", class_tokens=kind).class_tokens
    assert class_token_positions(kind, length) == expected
    mirrored = tuple(sorted(length - 1 - p for p in expected))
    assert class_token_positions(kind, length, reversed_block=True) == mirrored


def test_middle_is_where_vim_inserts_it_for_even_and_odd_patch_counts():
    for patches in range(1, 20):
        assert class_token_positions("middle", patches + 1) == (patches // 2,)


def test_a_position_beyond_the_tokens_is_an_error():
    with pytest.raises(InputError, match=r"stand at \(3,\).*3 tokens"):
        class_token_positions((3,), 3)


@pytest.mark.parametrize(
    "bad", [{"class_tokens": "centre"}, {"class_tokens": (-1,)}, {"layout": "BHWC"}]
)
def test_a_spec_checks_itself(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        BackboneSpec(blocks="layers", **bad)


def test_a_spec_overrides_the_records():
    model = VimLike("middle")
    spec = find_backbone(model, BackboneSpec(blocks="layers", class_tokens="head"))
    assert (spec.class_tokens, spec.widths, spec.head) == ("head", (16,) * 4, "head")
    part = BackboneSpec(blocks=("layers.1", "layers.3"), d_model=16)
    assert find_backbone(model, part).blocks == ("layers.1", "layers.3")


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        (BackboneSpec(blocks="stages"), "'stages' of the backbone spec is not a module"),
        (BackboneSpec(blocks=("layers.0", "layers.0")), "1 are distinct"),
        (BackboneSpec(blocks="layers", owner="net"), "owner='net'"),
        (BackboneSpec(blocks="layers", head="fc"), "head='fc'"),
        (BackboneSpec(blocks="layers", d_model=(16, 16)), "2 widths for 4 blocks"),
        (BackboneSpec(blocks="layers", reversed_blocks=(9,)), r"reversed_blocks=\(9,\)"),
        (BackboneSpec(blocks="patch_embed"), "0 blocks"),
    ],
)
def test_a_spec_that_does_not_fit_is_refused(spec, match):
    with pytest.raises(BackboneNotSupportedError, match=match):
        find_backbone(VimLike(), spec)


def test_a_block_that_stands_in_the_stack_twice_is_refused():
    model = VimLike()
    model.layers[2] = model.layers[1]
    with pytest.raises(BackboneNotSupportedError, match="4 blocks of which 3 are distinct"):
        find_backbone(model)
    maps = VMambaLike()
    maps.layers[1].blocks[2] = maps.layers[1].blocks[0]
    with pytest.raises(BackboneNotSupportedError, match="3 blocks of which 2 are distinct"):
        find_backbone(maps)


def test_several_candidates_are_listed():
    model = nn.ModuleDict({"teacher": VimLike(), "student": VimLike()})
    with pytest.raises(BackboneNotSupportedError, match=r"'teacher'.*'student'"):
        find_backbone(model)


def test_an_unknown_model_gets_a_spec_that_works_once_the_width_is_filled_in():
    class Unknown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(3, 8)
            self.trunk = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))
            self.top = nn.ModuleDict({"head": nn.Linear(8, 3)})

        def forward(self, x):
            x = self.stem(x)
            for block in self.trunk:
                x = block(x)
            return self.top["head"](x)

    model = Unknown()
    with pytest.raises(BackboneNotSupportedError) as caught:
        find_backbone(model)
    assert "trunk: 5 x Linear" in str(caught.value)
    start = "BackboneSpec(blocks='trunk', d_model=..., class_tokens='none', head='top.head')"
    assert start in str(caught.value)
    spec = eval(start.replace("...", "8"), {"BackboneSpec": BackboneSpec})
    x = torch.randn(2, 6, 3)
    before = model(x)
    assert torch.equal(apply_svp(model, SVPConfig(inner_bottleneck=2), backbone=spec)(x), before)


def test_the_built_in_vim_is_found_with_every_class_token():
    for flags, expected in (
        ({"if_cls_token": False}, "none"),
        ({"if_cls_token": True, "use_middle_cls_token": True}, "middle"),
        ({"if_cls_token": True, "use_middle_cls_token": False}, "head"),
        ({"if_cls_token": True, "use_double_cls_token": True}, "double"),
    ):
        model = VisionMamba(img_size=16, patch_size=4, stride=4, embed_dim=16, depth=2, **flags)
        assert find_backbone(model).class_tokens == expected


@pytest.mark.parametrize(
    "fields",
    [
        {"blocks": 3},
        {"blocks": ("layers.0", 1)},
        {"blocks": "layers", "class_tokens": ("a", 1)},
        {"blocks": "layers", "class_tokens": (True,)},
        {"blocks": "layers", "class_tokens": None},
    ],
    ids=str,
)
def test_a_spec_of_the_wrong_kind_is_named(fields):
    name = list(fields)[-1]
    with pytest.raises(InputError, match=f"{name}="):
        BackboneSpec(**fields)
