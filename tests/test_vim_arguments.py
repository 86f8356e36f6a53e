"""Constructor arguments of the built-in Vim: values that cannot work, and kinds that do."""

from __future__ import annotations

from typing import Any

import pytest

from svp_peft import VisionMamba
from svp_peft.errors import InputError
from tests.test_vim_model import SMALL


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bimamba_type": "v3"}, "bimamba_type='v3'"),
        ({"final_pool_type": "avg"}, "final_pool_type='avg'"),
        ({"img_size": 2}, "smaller than patch_size"),
        ({"drop_block_rate": 0.1}, "drop_block_rate=0.1"),
        ({"ssm_cfg": {"dt_init": "zeros"}}, "dt_init='zeros'"),
        ({"ssm_cfg": {"expand": 0}}, "expand=0 cannot work. Pass a number from 0.0625 on"),
        ({"ssm_cfg": {"d_conv": 0}}, "d_conv=0"),
        ({"ssm_cfg": {"dt_rank": "automatic"}}, "dt_rank='automatic'"),
        ({"ssm_cfg": {"bias": "no"}}, "bias='no' is neither True nor False"),
        ({"depth": -1}, "depth=-1 cannot work. Pass an integer of at least 0"),
        ({"embed_dim": 16.0}, "embed_dim=16.0 cannot work"),
        ({"d_state": 0}, "d_state=0"),
        ({"num_classes": True}, "num_classes=True"),
        ({"img_size": (16,)}, "img_size=\\(16,\\) is not a size"),
        ({"patch_size": 0}, "patch_size=0 is not a size"),
        ({"stride": "4"}, "stride='4' is not a size"),
        ({"drop_path_rate": 1.5}, "drop_path_rate=1.5 cannot work. Pass a number from 0 to 1"),
        ({"norm_epsilon": float("nan")}, "norm_epsilon=nan"),
        ({"flip_img_sequences_ratio": "x"}, "flip_img_sequences_ratio='x' cannot work. Pass a num"),
        ({"init_layer_scale": "x"}, "init_layer_scale='x'"),
        ({"if_rope": "no"}, "if_rope='no' is neither True nor False"),
        ({"if_rope": True, "img_size": 12}, "grid is 3x3"),
        ({"if_rope": True, "img_size": (16, 32)}, "grid is 4x8"),
        ({"if_rope": True, "use_double_cls_token": True}, "2 class tokens"),
        ({"if_rope": True, "embed_dim": 18}, "embed_dim=18"),
    ],
)
def test_an_argument_that_cannot_work_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        VisionMamba(**{**SMALL, **arguments})


def test_an_unknown_argument_is_refused() -> None:
    with pytest.raises(TypeError, match="if_biderectional"):
        VisionMamba(**SMALL, if_biderectional=True)


class Index:
    """An integer that is no int, as numpy's are."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


def test_integers_of_other_libraries_are_sizes() -> None:
    model = VisionMamba(**{**SMALL, "img_size": Index(16), "stride": (Index(4), 4)})
    assert model.img_size == (16, 16)
    assert model.patch_embed.stride == (4, 4)
