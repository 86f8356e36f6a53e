"""README and docs say what is true: their code runs, their links lead somewhere."""

import os
import re
import subprocess
import sys
import unicodedata
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import svp_peft
import svp_peft.ops
import svp_peft.visualize
from tests.docs_runner import blocks_of, run_page
from tests.fakehub import FakeHub

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def with_python(page: Path, network: bool) -> bool:
    run = [b for b in blocks_of(page) if b.language == "python" and b.mark[:7] != "not run"]
    return bool(run) and any(b.mark == "network" for b in run) == network


OFFLINE = [p for p in PAGES if with_python(p, network=False)]
NETWORK = [p for p in PAGES if with_python(p, network=True)]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that has the examples, as a checkout has; the current folder of the test."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", OFFLINE, ids=[str(p.relative_to(ROOT)) for p in OFFLINE])
def test_the_code_of_a_page_runs(page, checkout):
    backend = svp_peft.get_backend()
    try:
        run_page(page)
    finally:
        svp_peft.set_backend(backend)


def published_checkpoint(path: Path) -> None:
    """A checkpoint of the structure that hustvl published, narrow and shallow."""
    model = svp_peft.VisionMamba(
        depth=4,
        embed_dim=32,
        d_state=4,
        bimamba_type="v2",
        rms_norm=True,
        if_cls_token=True,
        use_middle_cls_token=True,
    )
    torch.save({"model": model.state_dict(), "args": Namespace(model="vim_small")}, path)


def test_the_code_of_pages_that_use_the_hub_runs_against_one_on_the_loopback(checkout):
    assert NETWORK, "no page shows how to use the Hub"
    published_checkpoint(checkout / "published.pth")
    with FakeHub() as hub:
        content = (checkout / "published.pth").read_bytes()
        for name in ("tiny", "small"):
            file = f"vim_{name[0]}_midclstok_80p5acc.pth"
            hub.add(f"hustvl/Vim-{name}-midclstok", {file: content})
        done = subprocess.run(
            [sys.executable, "-m", "tests.docs_runner", *map(str, NETWORK)],
            env={**os.environ, **hub.env(checkout), "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_failing_block_is_reported_with_its_page_and_line(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("text\n\n```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n")
    with pytest.raises(AssertionError) as failure:
        run_page(page)
    last = failure.traceback[-1]
    assert (Path(str(last.path)), last.lineno + 1) == (page, 8)


def test_marks_are_read_from_the_line_before_a_block(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- not run: it would fail -->\n```python\n1 / 0\n```\n<!-- network -->\n```python\n```\n"
    )
    run_page(page)
    assert [b.mark for b in blocks_of(page)] == ["not run: it would fail", "network"]


def without_code(page: Path) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def anchors_of(page: Path) -> set[str]:
    """What `#...` may point to in a page: headings, and the names of the API reference."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    found = set(re.findall(r"^::: ([\w.]+)", text, flags=re.M))
    for heading in re.findall(r"^#+ (.+)$", text, flags=re.M):
        plain = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode()
        found.add(re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower()))
    return found


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_of_a_page_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page)):
        if re.match(r"[a-z]+:", target):
            assert re.match(r"https?://\w", target), f"{page.name}: {target}"
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target} does not exist"
        assert file.is_relative_to(ROOT), f"{page.name}: {target} leaves the repository"
        if anchor:
            assert anchor in anchors_of(file), f"{page.name}: {target} has no such heading"


@pytest.mark.parametrize("module", [svp_peft, svp_peft.ops, svp_peft.visualize])
def test_every_public_name_is_in_the_reference(module):
    described: set[str] = set()
    for page in (ROOT / "docs" / "reference").glob("*.md"):
        described |= set(
            re.findall(r"^::: svp_peft\.(?:\w+\.)*(\w+)", page.read_text(), flags=re.M)
        )
    # the page of errors describes the whole module
    assert set(module.__all__) - described - {"SVPError"} == set()


def test_every_page_is_in_the_navigation():
    config = (ROOT / ".mkdocs.yml").read_text()
    listed = set(re.findall(r": ([\w/]+\.md)$", config, flags=re.M))
    assert listed == {str(p.relative_to(ROOT / "docs")) for p in PAGES[1:]}


def test_bash_blocks_name_only_scripts_and_targets_that_exist():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.M)
    for page in PAGES:
        for block in blocks_of(page):
            if block.language != "bash":
                continue
            for script in re.findall(r"(?:python\S*|torchrun.*?) (examples/\S+\.py)", block.code):
                assert (ROOT / script).is_file(), f"{page.name}: {script} does not exist"
            for target in re.findall(r"^make (\w+)", block.code, flags=re.M):
                assert target in targets, f"{page.name}: make {target} does not exist"
