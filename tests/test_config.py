import copy
import pickle

import pytest

from svp_peft.config import SVPConfig, check_adapter_name
from svp_peft.errors import AdapterNameError, ConfigError


def test_defaults_are_those_of_the_contract():
    config = SVPConfig()
    assert (config.inner_bottleneck, config.cross_group_size, config.dropout) == (64, 8, 0.0)
    assert (config.cross_source, config.simam_input) == ("token", False)
    assert (config.use_cross, config.use_inner, config.layers) == (True, True, None)
    assert config.modules_to_save == ("head",)
    assert (config.base_model_name_or_path, config.revision) == (None, None)


@pytest.mark.parametrize(
    "config",
    [
        SVPConfig(),
        SVPConfig(layers=[3, 1], modules_to_save=["head", "norm_f"], use_cross=False, dropout=0.1),
        SVPConfig(cross_source="released", base_model_name_or_path="a/b", revision="main"),
    ],
)
def test_to_dict_and_from_dict_are_inverse(config):
    assert SVPConfig.from_dict(config.to_dict()) == config
    assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config))


def test_lists_become_sorted_tuples_so_that_equal_configs_are_equal():
    assert SVPConfig(layers=[3, 1]).layers == (1, 3)
    assert SVPConfig(modules_to_save=None).modules_to_save == ()


def test_config_is_immutable():
    with pytest.raises(AttributeError):
        SVPConfig().dropout = 0.5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("inner_bottleneck", 0),
        ("inner_bottleneck", True),
        ("inner_bottleneck", 64.0),
        ("inner_bottleneck", "64"),
        ("cross_group_size", -8),
        ("cross_group_size", None),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("dropout", float("nan")),
        ("dropout", "0.1"),
        ("dropout", True),
        ("cross_source", "paper"),
        ("cross_source", None),
        ("simam_input", 1),
        ("use_cross", "yes"),
        ("layers", []),
        ("layers", [0, 0]),
        ("layers", [-1]),
        ("layers", [1.0]),
        ("layers", "all"),
        ("modules_to_save", "head"),
        ("modules_to_save", ["head", "head"]),
        ("modules_to_save", ["../head"]),
        ("modules_to_save", [1]),
        ("base_model_name_or_path", ""),
        ("base_model_name_or_path", 3),
        ("revision", b"main"),
    ],
)
def test_bad_values_are_refused_with_the_field_and_the_value(field, value):
    with pytest.raises(ConfigError) as caught:
        SVPConfig(**{field: value})
    assert f"{field}={value!r}" in str(caught.value)


def test_an_adapter_without_prompters_is_refused():
    with pytest.raises(ConfigError, match="linear probe"):
        SVPConfig(use_cross=False, use_inner=False)


@pytest.mark.parametrize("extra", [{"use_cross": False}, {"use_inner": False}, {"layers": [0]}])
def test_released_does_not_combine_with_what_the_authors_code_lacks(extra):
    with pytest.raises(ConfigError, match="released"):
        SVPConfig(cross_source="released", **extra)


def test_unknown_keys_are_named():
    with pytest.raises(ConfigError, match=r"\['bottleneck'\].*newer svp_peft"):
        SVPConfig.from_dict({"bottleneck": 64})


@pytest.mark.parametrize(
    "name", ["a", "aa", "svp", "train", "keys", "birds-v2", "_", "0", "default"]
)
def test_plain_words_are_adapter_names_even_where_modules_have_such_attributes(name):
    assert check_adapter_name(name) == name


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "..", "a b", "ä", "a\n", None, 3, "__base__"])
def test_other_names_are_refused(name):
    with pytest.raises(AdapterNameError):
        check_adapter_name(name)
