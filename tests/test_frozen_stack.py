"""A patched Vim whose blocks run as one op against the same model whose blocks are called."""

import copy
import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import svp_peft as sp
from svp_peft.ops.cuda import prompter_copies
from svp_peft.vim import stack
from svp_peft.vim.block import DropPath

pytestmark = pytest.mark.gpu

# by import_module: the package's attribute of this name is the function
frozen_stack = importlib.import_module("svp_peft.ops.cuda.frozen_stack")


def patched(depth: int = 4, **options: object) -> sp.VisionMamba:
    torch.manual_seed(0)
    model = sp.vim_small(num_classes=7, depth=depth, drop_path_rate=0.0, **options).cuda()
    sp.apply_svp(model, sp.SVPConfig(cross_group_size=2))
    with torch.no_grad():
        model.svp.alpha.normal_(std=0.3)
        model.svp.beta.normal_(std=0.3)
    return model


def run(model: sp.VisionMamba, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    with torch.autocast("cuda", torch.bfloat16):
        logits = model(images)
        torch.nn.functional.cross_entropy(logits, torch.arange(len(images)).cuda() % 7).backward()
    return logits, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Says whether blocks are called or run as one op."""
    once = stack.run

    def choose(one_by_one: bool) -> None:
        monkeypatch.setattr(stack, "run", (lambda *_: None) if one_by_one else once)

    return choose


@pytest.mark.parametrize("batch", [1, 3, 24])
@pytest.mark.parametrize("options", [{}, {"rms_norm": False}, {"embed_dim": 192}], ids=str)
@pytest.mark.parametrize("fused", [False, True])
def test_the_logits_are_the_same(fused, batch, options, called, monkeypatch):
    """To the bit, if every product is cuBLAS's and of one size."""

    def same(found: Tensor, expected: Tensor) -> bool:
        if not fused:
            return torch.equal(found, expected)
        # inner comes from float32 sums in another order, so that some of its elements round to the
        # neighbouring bfloat16, 2^-8 away; rounding alone puts logits off by 0.5%
        return bool((found - expected).norm() < 1e-2 * expected.norm())

    if not fused:
        monkeypatch.setattr(frozen_stack, "FUSED_UP", False)
        monkeypatch.setattr(prompter_copies, "PADDED_ROWS", 1)
    model = patched(**options)
    images = torch.randn(batch, 3, 224, 224, device="cuda")
    called(True)
    run(model, images)
    expected, gradients = run(model, images)
    called(False)
    found, mine = run(model, images)
    assert same(found, expected)
    assert mine.keys() == gradients.keys()
    for name, gradient in gradients.items():
        # sums over the tokens are added up in another order, products in bfloat16 alike
        off = (mine[name] - gradient).norm() / gradient.norm()
        assert off < 1e-2, (name, off)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        once = model(images)
        called(True)
        assert same(once, model(images))


def test_the_op_runs_as_one_node_of_the_graph():
    model = patched()
    images = torch.randn(2, 3, 224, 224, device="cuda")
    run(model, images)
    nodes = []
    with torch.autocast("cuda", torch.bfloat16):
        pending = [model(images).grad_fn]
    while pending:
        node = pending.pop()
        if node is not None and node not in nodes:
            nodes.append(node)
            pending += [parent for parent, _ in node.next_functions]
    names = [type(node).__name__ for node in nodes]
    assert names.count("_BlocksBackward") == 1
    assert names.count("_FrozenBackward") == 1  # the first block, which has no residual stream


def test_what_is_not_trained_gets_no_gradient_and_a_base_model_no_prompts(called):
    model = patched()
    images = torch.randn(2, 3, 224, 224, device="cuda")
    run(model, images)
    model.svp.inner[2].requires_grad_(False)
    _, gradients = run(model, images)
    assert not any(name.startswith("svp.adapters.default.inner.2") for name in gradients)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16), sp.disable_adapter(model):
        found = model(images)
        called(True)
        assert torch.equal(found, model(images))


def test_whole_images_are_dropped_anew_in_every_pass():
    model = patched(depth=3)
    model.eval()
    images = torch.randn(1, 3, 224, 224, device="cuda").expand(256, -1, -1, -1)
    run(model, images[:2])
    for block in model.layers[1:]:
        block.drop_path = DropPath(0.5)
    model.train()
    torch.manual_seed(1)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        first, second = model(images), model(images)
    assert len(first.unique(dim=0)) >= 4  # two blocks, dropped or not
    assert not torch.equal(first, second)
    assert first.isfinite().all()


def test_two_forward_passes_before_their_backward_passes():
    model = patched()
    a, b = torch.randn(2, 2, 3, 224, 224, device="cuda")
    run(model, a)
    expected = [run(model, images)[1] for images in (a, b)]
    expected = [{name: g.clone() for name, g in found.items()} for found in expected]
    model.zero_grad()
    labels = torch.arange(2).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        losses = [torch.nn.functional.cross_entropy(model(images), labels) for images in (a, b)]
        (losses[0] + losses[1]).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            total = expected[0][name] + expected[1][name]
            # autocast adds up the head's gradients in bfloat16
            atol = 1e-3 * total.abs().max().item()
            torch.testing.assert_close(parameter.grad, total, rtol=1e-2, atol=atol)


def test_a_copied_model_has_a_stack_of_its_own():
    model = patched()
    images = torch.randn(2, 3, 224, 224, device="cuda")
    run(model, images)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.svp.alpha.zero_()
        other.svp.beta.zero_()
    first, _ = run(model, images)
    run(other, images)
    changed, _ = run(other, images)
    again, _ = run(model, images)
    assert torch.equal(first, again)
    assert not torch.equal(first, changed)
