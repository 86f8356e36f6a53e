"""Runs the Python blocks of a documentation page, in order, in one namespace.

    python -m tests.docs_runner PAGE

A line before a block may say how to run it:

    <!-- network -->            the page runs against the loopback Hub (tests/test_docs.py)
    <!-- gpu -->                only where there is a GPU
    <!-- not run: reason -->    never
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

_FENCE = re.compile(r"^```(\w*)\s*$")
_MARK = re.compile(r"^<!-- (network|gpu|not run: \S.*) -->$")


@dataclass
class Block:
    """One fenced block of a page."""

    language: str
    line: int
    """Number of its first line of code, from 1."""
    code: str
    mark: str
    """"", "network", "gpu" or "not run: ..."."""


def blocks_of(page: Path) -> list[Block]:
    """All fenced blocks of a page."""
    blocks: list[Block] = []
    lines = page.read_text(encoding="utf-8").splitlines()
    start: int | None = None
    language = ""
    for number, line in enumerate(lines):
        fence = _FENCE.match(line)
        if start is None and fence:
            start, language = number + 1, fence[1]
        elif start is not None and line == "```":
            before = next((x for x in reversed(lines[: start - 1]) if x.strip()), "")
            mark = _MARK.match(before)
            code = "\n".join(lines[start:number]) + "\n"
            blocks.append(Block(language, start + 1, code, mark[1] if mark else ""))
            start = None
    assert start is None, f"{page}: the block that begins in line {start} does not end"
    return blocks


def run_page(page: Path) -> None:
    """Run the page's Python blocks; tracebacks name the page and its line."""
    namespace: dict[str, object] = {"__name__": "__docs__"}
    for block in blocks_of(page):
        skipped = block.mark.startswith("not run")
        if block.mark == "gpu":
            skipped = not torch.cuda.is_available()
        if block.language == "python" and not skipped:
            padded = "\n" * (block.line - 1) + block.code
            exec(compile(padded, str(page), "exec"), namespace)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        torch.manual_seed(0)
        run_page(Path(argument))
