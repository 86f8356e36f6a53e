"""The notebooks run from top to bottom, and hold nothing of the machine they were run on."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def cells_of(notebook: Path) -> list[dict]:
    return [c for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]


def test_there_are_two_notebooks():
    assert [n.stem for n in NOTEBOOKS] == ["adapt_and_look", "many_tasks"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda n: n.stem)
def test_a_notebook_runs_from_top_to_bottom(notebook, tmp_path):
    script = tmp_path / f"{notebook.stem}.py"
    script.write_text("\n\n".join("".join(cell["source"]) for cell in cells_of(notebook)))
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=FOLDER,
        env={
            **os.environ,
            "SVP_NOTEBOOK_QUICK": "1",
            "MPLBACKEND": "Agg",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(FOLDER.parent.parent),
            "TMPDIR": str(tmp_path),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda n: n.stem)
def test_a_notebook_was_run_in_order_and_holds_no_machine_paths(notebook):
    cells = cells_of(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = json.dumps([cell["outputs"] for cell in cells])
    outputs = re.sub(r'"image/png": "[^"]*"', "", outputs)
    assert not re.findall(r"(?:/home|/root|/tmp|/work|/Users|[A-Z]:\\\\)[^\s\"]*", outputs)
    assert "Traceback" not in outputs
