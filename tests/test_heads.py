import pytest
import torch
from torch import nn

from svp_peft.errors import AdapterKeyError, AdapterShapeError, InputError
from svp_peft.heads import head_for, head_from_tensors, two_layer_head


def test_two_layer_head_is_that_of_the_released_code():
    head = two_layer_head(10, 3)
    assert {k: tuple(t.shape) for k, t in head.state_dict().items()} == {
        "0.weight": (5, 10),
        "0.bias": (5,),
        "1.weight": (3, 5),
        "1.bias": (3,),
    }
    x = torch.randn(4, 10)
    # no activation in between: the head is linear
    torch.testing.assert_close(head(2 * x) - head(x), head(3 * x) - head(2 * x))


def test_a_linear_base_gives_a_linear_head_of_its_precision():
    base = nn.Linear(6, 5, bias=False).to(torch.bfloat16)
    head = head_for(base, 7, 99)
    assert isinstance(head, nn.Linear)
    assert (head.in_features, head.out_features, head.bias) == (6, 7, None)
    assert head.weight.dtype == torch.bfloat16


def test_an_identity_gives_a_linear_head_of_the_models_width():
    head = head_for(nn.Identity(), 7, 6)
    assert (head.in_features, head.out_features) == (6, 7)
    assert (head.bias == 0).all()
    assert 0 < head.weight.abs().max() < 0.2


def test_a_sequential_base_keeps_all_but_its_last_layer():
    base = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 5))
    nn.init.constant_(base[0].weight, 3)
    head = head_for(base, 7, 6)
    assert head[-1].out_features == 7
    assert (head[0].weight == 3).all()
    assert head[0] is not base[0]
    assert base[-1].out_features == 5


def test_unknown_heads_and_bad_class_counts_are_refused():
    with pytest.raises(InputError, match="is a Conv2d"):
        head_for(nn.Conv2d(1, 1, 1), 7, 6)
    for bad in (0, -1, True, 2.0, None):
        with pytest.raises(InputError, match="num_classes="):
            head_for(nn.Linear(6, 5), bad, 6)


@pytest.mark.parametrize(
    "head",
    [
        nn.Linear(6, 9),
        nn.Linear(6, 9, bias=False),
        two_layer_head(6, 9),
        nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 9)),
    ],
)
def test_a_head_is_rebuilt_from_its_tensors(head):
    base = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 5))
    rebuilt = head_from_tensors(base, head.state_dict(), 6)
    shapes = {key: tensor.shape for key, tensor in head.state_dict().items()}
    assert {key: tensor.shape for key, tensor in rebuilt.state_dict().items()} == shapes


def test_no_tensors_rebuild_an_identity():
    assert isinstance(head_from_tensors(nn.Identity(), {}, 6), nn.Identity)


def test_tensors_of_no_known_head_are_refused():
    with pytest.raises(AdapterKeyError, match=r"\['fc.weight'\]"):
        head_from_tensors(nn.Linear(6, 5), {"fc.weight": torch.zeros(2, 2)}, 6)
    with pytest.raises(AdapterKeyError):
        head_from_tensors(nn.Linear(6, 5), {}, 6)
    with pytest.raises(AdapterShapeError, match="6 features"):
        head_from_tensors(nn.Identity(), nn.Linear(8, 5).state_dict(), 6)
