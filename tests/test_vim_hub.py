"""`load_vim` end to end against a Hub on the loopback, with files of the published structure.

The client reads its settings when it is imported, so every scenario is a process of its own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from svp_peft import VisionMamba
from tests.fakehub import FakeHub
from tests.vim_files import entry_name, tiny_vim, write_official

SMALL = "hustvl/Vim-small-midclstok"
PLAIN, TUNED = "vim_s_midclstok_80p5acc.pth", "vim_s_midclstok_ft_81p6acc.pth"
BASE = "hustvl/Vim-base-midclstok"

CLIENT = """
import json, sys
import torch
import svp_peft

def load(options):
    try:
        model = svp_peft.load_vim(options.pop("name"), **options).eval()
    except svp_peft.SVPError as error:
        return {"error": type(error).__name__, "message": str(error)}
    image = torch.linspace(-1, 1, 3 * 224 * 224).view(1, 3, 224, 224)
    with torch.no_grad():
        logits = model(image)[0].tolist()
    return {"logits": logits, "stride": model.patch_embed.stride[0]}

print(json.dumps([load(options) for options in json.loads(sys.argv[1])]))
"""


@pytest.fixture(scope="module")
def models() -> dict[str, VisionMamba]:
    torch.manual_seed(1)
    return {PLAIN: tiny_vim(), TUNED: tiny_vim(stride=8), "base.pth": tiny_vim(embed_dim=32)}


@pytest.fixture
def hub(models: dict[str, VisionMamba], tmp_path: Path) -> Iterator[FakeHub]:
    def file(name: str, stride: int = 16) -> bytes:
        return write_official(tmp_path / name, models[name], entry_name(stride)).read_bytes()

    with FakeHub() as hub:
        hub.add(SMALL, {PLAIN: file(PLAIN), TUNED: file(TUNED, 8), "README.md": b"# Vim\n"})
        hub.add(BASE, {"base.pth": file("base.pth")})
        yield hub


def load_in_a_process(hub: FakeHub, home: Path, *scenarios: dict[str, Any]) -> list[dict[str, Any]]:
    """What the client printed for each scenario, the arguments of one `load_vim` call."""
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, json.dumps(scenarios)],
        env={**os.environ, **hub.env(home), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def logits_of(model: VisionMamba) -> list[float]:
    image = torch.linspace(-1, 1, 3 * 224 * 224).view(1, 3, 224, 224)
    with torch.no_grad():
        return model(image)[0].tolist()


def test_the_published_files_are_downloaded_once_and_kept_as_slim_copies(
    hub: FakeHub, models: dict[str, VisionMamba], tmp_path: Path
) -> None:
    home = tmp_path / "home"
    plain, tuned, base = load_in_a_process(
        hub, home, {"name": SMALL}, {"name": SMALL, "filename": TUNED}, {"name": BASE}
    )
    # the same weights through the same code, in another process: equal up to the threads' rounding
    assert plain["logits"] == pytest.approx(logits_of(models[PLAIN]), rel=1e-4, abs=1e-5)
    assert tuned["logits"] == pytest.approx(logits_of(models[TUNED]), rel=1e-4, abs=1e-5)
    assert base["logits"] == pytest.approx(logits_of(models["base.pth"]), rel=1e-4, abs=1e-5)
    assert (plain["stride"], tuned["stride"]) == (16, 8)
    assert [request.method for request in hub.requests if request.host == "cdn"].count("GET") == 3

    slim = sorted(home.glob("assets/svp_peft/**/*.safetensors"))
    original = sum(path.stat().st_size for path in tmp_path.glob("*.pth"))
    assert [path.name for path in slim] == sorted(
        f"{name}.safetensors" for name in (PLAIN, TUNED, "base.pth")
    )
    # without the optimiser's two moments and the EMA a quarter is left
    assert sum(path.stat().st_size for path in slim) < 0.3 * original

    # the second load asks for the commit alone, and reads the slim copy: the original is gone
    for blob in home.glob("hub/models--*/blobs/*"):
        blob.write_bytes(b"")
    hub.requests.clear()
    (again,) = load_in_a_process(hub, home, {"name": SMALL})
    assert again == plain
    assert [request.method for request in hub.requests] == ["GET"]
    assert hub.count(f"GET /api/models/{SMALL}") == 1


def test_a_cached_model_loads_without_the_hub(hub: FakeHub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    online = load_in_a_process(hub, home, {"name": SMALL}, {"name": BASE})
    slim = next(home.glob(f"assets/svp_peft/**/{PLAIN}.safetensors"))
    slim.write_bytes(b"damaged")
    hub.stop()
    offline = load_in_a_process(
        hub,
        home,
        {"name": SMALL, "local_files_only": True},
        {"name": BASE, "local_files_only": True},
        {"name": SMALL},
        {"name": SMALL, "filename": TUNED, "local_files_only": True},
    )
    assert offline[:2] == online
    assert offline[2] == online[0]
    assert offline[3]["error"] == "HubError"
    assert "not in the Hub cache" in offline[3]["message"]
    assert slim.stat().st_size > 1000


def test_what_the_hub_refuses_is_said(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("me/private", {"vim.pth": b"x"}, private=True)
    hub.add("me/many", {"a.pth": b"x", "b.pth": b"y"})
    hub.add("me/none", {"README.md": b"x"})
    hub.add("me/bad", {"vim.pth": b"not a checkpoint"})
    found = load_in_a_process(
        hub,
        tmp_path / "home",
        {"name": "me/missing"},
        {"name": "me/private", "token": "hf_wrong"},
        {"name": SMALL, "filename": "nothing.pth"},
        {"name": SMALL, "revision": "nowhere"},
        {"name": "me/many"},
        {"name": "me/none"},
        {"name": "me/bad"},
    )
    wanted = [
        ("HubError", "does not exist"),
        ("HubError", "private"),
        ("CheckpointError", f"no file 'nothing.pth'.*{PLAIN}"),
        ("HubError", "no such revision"),
        ("CheckpointError", "several checkpoints.*a.pth"),
        ("CheckpointError", "has no checkpoint"),
        ("CheckpointError", "vim.pth"),
    ]
    for answer, (kind, message) in zip(found, wanted, strict=True):
        assert answer["error"] == kind, answer
        assert re.search(message, answer["message"]), answer


def test_a_repository_with_a_config_needs_no_guess(hub: FakeHub, tmp_path: Path) -> None:
    model = tiny_vim(use_middle_cls_token=False, if_divide_out=False)
    data = write_official(tmp_path / "vim.pth", model, "my_vim").read_bytes()
    config = {"use_middle_cls_token": False, "if_divide_out": False, "model_type": "vim"}
    hub.add("me/vim", {"vim.pth": data, "config.json": json.dumps(config).encode()})
    # the second one reads the slim copy
    first, second = load_in_a_process(
        hub, tmp_path / "home", {"name": "me/vim"}, {"name": "me/vim"}
    )
    assert first == second
    assert first["logits"] == pytest.approx(logits_of(model), rel=1e-4, abs=1e-5)
