"""Commands and files of bench/ that pages and scripts name are there."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from paths import ROOT

PAGES = [
    *(ROOT / "README.md", ROOT / "SECURITY.md", ROOT / "Makefile", ROOT / ".ci/run"),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "bench").rglob("*.md")),
    *sorted((ROOT / "bench").rglob("*.sh")),
    *sorted((ROOT / "bench").rglob("*.py")),
]
COMMAND = re.compile(r"-m (bench(?:\.\w+)+)")
FILE = re.compile(r"\b((?:bench|tests)/[\w/]+\.(?:py|sh|md))\b")


def is_command(module):
    """Whether `python -m` can run it: a module that does something then, or a package with a __main__."""
    spec = find_spec(module)
    if spec is not None and spec.submodule_search_locations is not None:
        spec = find_spec(f"{module}.__main__")
    return spec is not None and 'if __name__ == "__main__"' in Path(spec.origin).read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_files_exist(page):
    text = page.read_text()
    assert [command for command in COMMAND.findall(text) if not is_command(command)] == []
    assert [name for name in FILE.findall(text) if not (ROOT / name).exists()] == []


def test_the_index_has_every_command():
    index = (ROOT / "bench" / "README.md").read_text()
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
        for path in (ROOT / "bench").rglob("*.py")
    }
    commands = {module for module in modules if is_command(module)}
    assert {"bench.train", "bench.kernels.plot"} <= commands
    assert commands <= set(COMMAND.findall(index)), commands - set(COMMAND.findall(index))
