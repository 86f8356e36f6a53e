"""The house rules about modules: who may import whom, how long a file may be."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "svp_peft"
# a module imports only from those before it
ORDER = (
    "errors config sharded ops download serialise vim prompters backbones state hooks heads patch "
    "adapter_tensors adapters grouped routing verify base_model adapter_config adapter_format "
    "adapter_store adapter_build adapter_file hub convert visualize integrations doctor cli "
    "__init__"
).split()


def imported_modules(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write `from svp_peft...`"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("svp_peft.")} & set(ORDER)


def test_every_module_has_its_place_in_the_order():
    parts = {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in PACKAGE.rglob("*.py")}
    assert parts <= set(ORDER), f"say in ORDER where {sorted(parts - set(ORDER))} belong"


def test_modules_import_only_lower_layers():
    for path in sorted(PACKAGE.rglob("*.py")):
        own = ORDER.index(path.relative_to(PACKAGE).with_suffix("").parts[0])
        upward = {name for name in imported_modules(path) if ORDER.index(name) > own}
        assert not upward, f"{path} imports {sorted(upward)} from a higher layer"


def test_library_files_stay_short():
    for path in sorted(PACKAGE.rglob("*.py")):
        lines = len(path.read_text().splitlines())
        assert lines <= 400, f"{path} has {lines} lines: split it by what it does"
