"""The command line and what the doctor sees, on real files and on made-up packages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from svp_peft import doctor
from svp_peft.adapter_config import CONFIG_NAME
from svp_peft.adapter_file import load_adapter, save_adapter
from svp_peft.adapter_format import WEIGHTS_NAME
from svp_peft.cli import main
from tests.fakehub import FakeHub
from tests.golden.golden_io import load_case
from tests.processes import Processes
from tests.tiny import base, trained


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_adapter(trained(), tmp_path / "adapter")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# inspect


def test_inspect_shows_config_tensors_size_and_health(folder, capsys):
    code, out, _ = run(capsys, "inspect", folder)
    assert code == 0
    rows = [line.split() for line in out.splitlines()]
    assert ["inner_bottleneck", "4"] in rows
    assert any(row[:3] == ["svp.inner.3.up.weight", "16x4", "float32"] for row in rows)
    assert "health: good" in out
    code, out, _ = run(capsys, "inspect", folder, "--json")
    report = json.loads(out)
    tensors = load_file(folder / WEIGHTS_NAME)
    assert report["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert report["head_parameters"] == 85
    assert report["config"] == json.loads((folder / CONFIG_NAME).read_text())
    assert {row["key"] for row in report["tensors"]} == set(tensors)
    assert report["health"] == {
        "ok": True,
        "problems": [],
        "notes": ["the base model is not named"],
    }


def test_inspect_of_a_sick_adapter_says_what_it_has_and_exits_with_1(folder, capsys):
    tensors = load_file(folder / WEIGHTS_NAME)
    tensors["svp.beta"][0, 0] = float("nan")
    save_file(tensors, folder / WEIGHTS_NAME)
    code, out, _ = run(capsys, "inspect", folder)
    assert code == 1
    assert "health: BAD" in out
    assert "svp.beta holds 1 NaN" in out
    code, out, _ = run(capsys, "inspect", folder, "--json")
    assert code == 1
    assert "svp.beta holds 1 NaN" in json.loads(out)["health"]["problems"][0]


def test_inspect_shows_the_codes_in_a_hostile_key_and_sends_none_to_the_terminal(folder, capsys):
    tensors = load_file(folder / WEIGHTS_NAME) | {"svp.\x1b[2J": torch.ones(1)}
    save_file(tensors, folder / WEIGHTS_NAME)
    code, out, err = run(capsys, "inspect", folder)
    assert code == 1
    assert "\x1b" not in out + err
    assert "svp.\\u001b[2J" in out


def test_inspect_notes_an_adapter_that_does_nothing(tmp_path, capsys):
    model = trained()
    torch.nn.init.zeros_(model.svp.alpha)
    torch.nn.init.zeros_(model.svp.beta)
    code, out, _ = run(capsys, "inspect", save_adapter(model, tmp_path))
    assert code == 0
    assert "every learned scale is zero" in out


def test_inspect_of_something_else_is_an_error_without_a_traceback(tmp_path, capsys):
    code, out, err = run(capsys, "inspect", tmp_path)
    assert (code, out) == (1, "")
    assert err.startswith("AdapterNotFoundError: ")
    code, out, err = run(capsys, "inspect", tmp_path, "--json")
    assert (code, err) == (1, "")
    assert json.loads(out)["error"] == "AdapterNotFoundError"


# convert, push, usage


def test_convert_asks_for_simam_and_then_writes_an_adapter(tmp_path, capsys):
    torch.save({"model": load_case("svp_d4_sl2_acts").state}, tmp_path / "checkpoint.pth")
    out_dir = tmp_path / "adapter"
    code, _, err = run(capsys, "convert", tmp_path / "checkpoint.pth", out_dir)
    assert code == 1
    assert "simam_input" in err
    code, out, _ = run(
        capsys, "convert", tmp_path / "checkpoint.pth", out_dir, "--simam-input", "no",
        "--base", "owner/vim", "--json",
    )  # fmt: skip
    assert code == 0
    assert json.loads(out) == {"adapter": str(out_dir)}
    code, out, _ = run(capsys, "inspect", out_dir, "--json")
    report = json.loads(out)
    assert code == 0
    assert report["config"]["cross_source"] == "released"
    assert report["config"]["base_model_name_or_path"] == "owner/vim"


@pytest.mark.parametrize("arguments", [[], ["inspect"], ["dance"], ["convert", "a", "b", "--x"]])
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "usage: svp-peft" in capsys.readouterr().err


def in_process(arguments: list[str]) -> list[object]:
    import contextlib
    import io

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    return [code, out.getvalue(), err.getvalue()]


def test_push_and_inspect_on_the_hub_and_exit_3_when_it_is_gone(folder, tmp_path):
    with Processes() as processes:
        with FakeHub() as hub:
            env = hub.env(tmp_path / "cache")
            arguments = ["push", str(folder), "me/birds", "--license", "mit", "--json"]
            code, out, err = processes.call(in_process, arguments, env=env).value
            assert (code, err) == (0, "")
            assert json.loads(out)["commit"] == hub.repos["me/birds"].refs["main"]
            assert b"license: mit" in hub.files("me/birds")["README.md"]
            for name in (CONFIG_NAME, WEIGHTS_NAME):
                assert hub.files("me/birds")[name] == (folder / name).read_bytes()
            code, out, _ = processes.call(in_process, ["inspect", "me/birds"], env=env).value
            assert code == 0
            assert "health: good" in out
            code, _, err = processes.call(in_process, ["inspect", "me/cars"], env=env).value
            assert code == 1
            assert err.startswith("HubError: ")
        code, _, err = processes.call(in_process, ["inspect", "me/cars"], env=env).value
        assert code == 3
        assert "cannot be reached" in err


def test_program_is_installed_under_its_name():
    program = Path(sys.executable).with_name("svp-peft")
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("svp_peft ")


def test_a_reader_that_stops_early_is_no_error(folder):
    code = f"from svp_peft.cli import main; raise SystemExit(main(['inspect', {str(folder)!r}]))"
    program = [sys.executable, "-u", "-c", code]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    _, errors = process.communicate(timeout=120)
    assert errors == ""
    assert process.returncode == 0


# doctor


def test_doctor_names_the_backend_that_would_run(capsys):
    code, out, _ = run(capsys, "doctor", "--json")
    report = json.loads(out)
    findings = {finding["name"]: finding for finding in report["findings"]}
    assert code == (0 if report["ok"] else 1)
    assert findings["torch"]["detail"].startswith(torch.__version__)
    chosen = findings["auto on cpu"]["detail"]
    assert chosen.startswith(("'cpu'", "'reference'"))
    assert {"python", "safetensors", "huggingface_hub", "c++ compiler", "triton"} <= findings.keys()
    for finding in report["findings"]:
        assert (finding["status"] == "problem") <= bool(finding["remedy"]), finding
    code, out, _ = run(capsys, "doctor")
    assert out.rstrip().endswith("found")


MAMBA = (
    "class Mamba:\n    def __init__(self, d_model, {arguments}):\n        pass\nRMSNorm = {norm}\n"
)
SCAN = (
    "def mamba_inner_fn_no_out_proj():\n    pass\n"
    "def forward(x):\n    return causal_conv1d_cuda.causal_conv1d_fwd({arguments})\n"
)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Puts a made-up mamba_ssm, causal_conv1d and their extension in front of sys.path."""
    monkeypatch.syspath_prepend(tmp_path)
    made = ("mamba_ssm", "causal_conv1d", "causal_conv1d_cuda")

    def forget() -> None:
        for name in [name for name in sys.modules if name.split(".")[0] in made]:
            del sys.modules[name]

    def write(
        *,
        arguments: str = "",
        norm: str = "object",
        calls: int = 5,
        takes: int = 5,
        broken: str = "",
    ) -> None:
        forget()
        files = {
            "mamba_ssm/__init__.py": broken or "import mamba_ssm.modules.mamba_simple\n",
            "mamba_ssm/modules/__init__.py": "",
            "mamba_ssm/modules/mamba_simple.py": MAMBA.format(arguments=arguments, norm=norm),
            "mamba_ssm/ops/__init__.py": "",
            "mamba_ssm/ops/selective_scan_interface.py": SCAN.format(
                arguments=", ".join("abcdefgh"[:calls])
            ),
            "causal_conv1d/__init__.py": "",
            "causal_conv1d_cuda.py": "def causal_conv1d_fwd():\n    '''causal_conv1d_fwd("
            + ", ".join(f"arg{index}: Tensor" for index in range(takes))
            + ") -> Tensor'''\n",
        }
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)

    yield write
    forget()


def found() -> dict[str, doctor.Finding]:
    sections = (*doctor._mamba_ssm(), *doctor._causal_conv1d())
    return {finding.name: finding for finding in sections}


@pytest.mark.parametrize(
    ("arguments", "label"),
    [
        ("bimamba_type='none', if_divide_out=False", "hustvl/Vim's fork"),
        ("bimamba_type='none', if_devide_out=False", "the released SVP code ships"),
        ("bimamba=True", "VideoMamba's fork"),
        ("bimamba_type='v3', nslices=5", "in the manner of"),
        ("expand=2", "the stock package"),
    ],
)
def test_doctor_tells_the_forks_apart(package, arguments, label):
    package(arguments=arguments)
    finding = found()["mamba-ssm"]
    assert finding.status == "ok"
    assert label in finding.detail
    assert "mamba_inner_fn_no_out_proj: yes" in finding.detail


def test_doctor_sees_a_causal_conv1d_of_another_age(package):
    package(arguments="bimamba_type='v2'", calls=5, takes=7)
    findings = found()
    assert "takes 7 arguments, as in 1.2 to 1.5.0" in findings["causal-conv1d"].detail
    finding = findings["mamba-ssm and causal-conv1d"]
    assert finding.status == "problem"
    assert "with 5 arguments and the installed causal-conv1d takes 7" in finding.detail
    assert "Install causal-conv1d 1.1" in finding.remedy
    package(arguments="bimamba_type='v2'", calls=7, takes=7)
    assert "mamba-ssm and causal-conv1d" not in found()


def test_doctor_sees_a_norm_that_is_none(package):
    package(norm="None")
    finding = found()["mamba-ssm RMSNorm"]
    assert finding.status == "problem"
    assert "RMSNorm is None" in finding.detail
    assert finding.remedy


def test_doctor_survives_a_package_that_cannot_be_imported(package):
    package(broken="raise OSError('undefined symbol: _ZN3c10')\n")
    finding = found()["mamba-ssm"]
    assert finding.status == "problem"
    assert "OSError: undefined symbol: _ZN3c10" in finding.detail
    assert "--no-build-isolation" in finding.remedy


def test_help_of_every_command_is_a_sentence(capsys):
    for command in ("inspect", "convert", "push", "doctor"):
        with pytest.raises(SystemExit) as exit_:
            main([command, "--help"])
        assert exit_.value.code == 0
        assert "--json" in capsys.readouterr().out


def test_inspected_adapter_is_the_one_that_loads(folder, capsys):
    (folder / CONFIG_NAME).write_text("{}")
    code, _, err = run(capsys, "inspect", folder)
    assert code == 1
    with pytest.raises(Exception, match="no peft_type"):
        load_adapter(base(), folder)
    assert "no peft_type" in err
