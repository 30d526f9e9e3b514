"""Who may import whom."""

import ast
import re
import sys

import pytest

from paths import ROOT

KERNELS = sorted((ROOT / "fngd_kernels").rglob("*.py"))
OPTIMIZER = sorted((ROOT / "python" / "fngd").rglob("*.py"))


def imports(path):
    """Return every absolute module name that the file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def offending(path, *prefixes):
    return {name for name in imports(path) if any(name == p or name.startswith(f"{p}.") for p in prefixes)}


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: str(p.relative_to(ROOT)))
def test_kernels_know_no_modules_and_no_optimizer(path):
    assert offending(path, "fngd", "torch.nn", "torch.optim", "bench", "tests") <= {"torch.nn.functional"}


TRITON_BACKEND = ROOT / "fngd_kernels" / "backends" / "triton"
OUTSIDE_TRITON = [path for path in [*KERNELS, *OPTIMIZER] if TRITON_BACKEND not in path.parents]


@pytest.mark.parametrize("path", OUTSIDE_TRITON, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_triton_backend_imports_triton(path):
    assert not offending(path, "triton")


@pytest.mark.parametrize("path", OPTIMIZER, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_optimizer_imports_no_benchmarks_no_tests_and_no_backends(path):
    assert not offending(path, "bench", "tests", "fngd_kernels.backends")


def resolved(path, source):
    """Return the files of a package that a file imports by relative names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            module = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            for alias in node.names:
                submodule = module / alias.name
                files = {submodule.with_suffix(".py"), submodule / "__init__.py"} & source
                found |= files or {module.with_suffix(".py"), module / "__init__.py"} & source
    return found - {path}


@pytest.mark.parametrize("files", [KERNELS, OPTIMIZER], ids=["kernels", "optimizer"])
def test_no_import_cycles(files):
    source = set(files)
    ahead = {path: resolved(path, source) for path in files}
    done = set()
    while ahead:
        ready = [path for path, needed in ahead.items() if needed <= done]
        assert ready, f"a cycle among {sorted(str(path.relative_to(ROOT)) for path in ahead)}"
        for path in ready:
            done.add(path)
            del ahead[path]


LAYERS = (
    ("torch_private", "routed_class", "event_log", "distributed", "memory", "state"),
    ("drawn", "base_optimizer", "update", "rules"),
    ("capture",),
    ("coefficients", "gauss_newton"),
    ("preconditioner", "samples", "contrib"),
    ("optimizer",),
    ("graphs",),
    ("__init__",),
)
"""The optimizer's files and folders in the order of the data; each imports from those before it."""


def test_the_optimizer_is_built_in_layers():
    package = ROOT / "python" / "fngd"
    level = {name: number for number, names in enumerate(LAYERS) for name in names}
    for path in OPTIMIZER:
        name = path.relative_to(package).parts[0].removesuffix(".py")
        for imported in resolved(path, set(OPTIMIZER)):
            other = imported.relative_to(package).parts[0].removesuffix(".py")
            allowed = other == name or level[other] < level[name]
            assert allowed, f"{path.relative_to(package)} imports {imported.relative_to(package)}"


PRIVATE = re.compile(r"\b(?:torch|nn|module|t|p|parameter|owner|kind)(?:\.\w+)*\._(?!_)\w+")
"""A name that begins with an underscore, of torch or of a tensor or module of it."""


@pytest.mark.parametrize("path", [*KERNELS, *OPTIMIZER], ids=lambda p: str(p.relative_to(ROOT)))
def test_private_names_of_torch_have_one_home(path):
    assert path.name == "torch_private.py" or not PRIVATE.search(path.read_text())


def test_the_cost_model_and_the_choice_are_pure_python():
    packages = ("backends", "backends/torch", "backends/triton")
    own = ("arguments", "cost_model", "damping", "geometry", "plans", "workspace", "ops/choose")
    costs = ("backends/torch/costs", "backends/triton/costs", "backends/triton/tiles")
    for file in (*(f"{name}/__init__.py" for name in packages), *(f"{name}.py" for name in (*own, *costs))):
        imported = imports(ROOT / "fngd_kernels" / file)
        assert {name.split(".")[0] for name in imported} <= set(sys.stdlib_module_names), file


def with_headers(path):
    """Return the file and all files of its folder that it includes, directly or through others."""
    found, waiting = set(), [path]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += [
                path.parent / name for name in re.findall(r'^#include "(.+)"', path.read_text(), re.M)
            ]
    return found


def test_cuda_sources_and_the_solver_include_no_torch_also_through_headers():
    sources = [*ROOT.glob("csrc/*.cu"), ROOT / "csrc" / "solve_cpu.cpp"]
    read = set().union(*map(with_headers, sources))
    names = {path.name for path in read}
    assert {"solve.h", "coefficients.h", "finite.h", "scale_bias.h", "symmetric.h"} <= names
    for path in read:
        included = re.findall(r"^#include.*", path.read_text(), re.M)
        assert not [line for line in included if any(word in line for word in ("torch", "ATen", "c10"))], path


def test_every_package_is_installed():
    listed = re.search(
        r"^packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL
    )
    assert listed is not None
    folders = {path.parent.relative_to(ROOT) for path in [*KERNELS, *OPTIMIZER]}
    names = {".".join(folder.parts).removeprefix("python.") for folder in folders}
    assert set(re.findall(r'"(.+?)"', listed[1])) == names
