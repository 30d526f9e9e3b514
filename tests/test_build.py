"""The package without its native extension: it imports, says once what is slower, and computes the same."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import setuptools
import torch
from setuptools import Distribution
from torch.utils import cpp_extension

import fngd_kernels as fk
from fngd_kernels import native
from fngd_kernels.ops import coefficients, finite  # noqa: F401 - registers their operators
from fngd_kernels.ops.registration import OPERATORS

BLOCK = """
import json, sys, warnings

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name == "fngd_kernels._C":
            raise ImportError("blocked by the test")

sys.meta_path.insert(0, Blocker())
"""


def run_without_extension(code: str) -> str:
    """Run the code in a fresh interpreter where the extension cannot be imported; return what it prints."""
    command = [sys.executable, "-c", BLOCK + textwrap.dedent(code)]
    environment = {name: value for name, value in os.environ.items() if name != "FNGD_NO_EXTENSION"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_one_warning_says_what_is_slower_and_how_to_build():
    printed = run_without_extension("""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import fngd_kernels
            from fngd_kernels import native
            from fngd_kernels.ops import nodes, solve
        assert not native.AVAILABLE
        print(*(w.message for w in caught if "fngd" in str(w.message)), sep="\\n")
    """)
    (message,) = printed.strip().splitlines()
    assert "blocked by the test" in message
    assert "slower" in message
    assert "pip install --no-build-isolation -e ." in message


def test_solves_and_op_registration_work():
    printed = run_without_extension("""
        warnings.simplefilter("ignore")
        import torch
        import fngd_kernels as fk
        k = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64).expand(2, 2, 2).clone()
        k[1, 1, 1] = -1
        x, info = fk.solve(k, 0.5, return_info=True)
        torch.library.opcheck(torch.ops.fngd.solve.default, (k[:1], torch.ones(1, dtype=k.dtype), None))
        print(json.dumps({"x": x[0].tolist(), "failed": x[1].isnan().all().item(), "info": info.tolist()}))
    """)
    x = torch.linalg.solve(
        torch.tensor([[2.5, 1.0], [1.0, 3.5]], dtype=torch.float64), torch.ones(2).double()
    )
    result = json.loads(printed)
    assert result["info"] == [0, 2]
    assert result["failed"]
    assert result["x"] == pytest.approx(x.tolist())


def test_gram_and_combine_give_the_same_numbers():
    printed = run_without_extension("""
        warnings.simplefilter("ignore")
        import torch
        import fngd_kernels as fk
        a, e = torch.arange(12.0).view(3, 4), torch.arange(6.0).view(3, 2)
        print(json.dumps([fk.gram(a, e).tolist(), fk.combine(a, e, torch.ones(3)).tolist()]))
    """)
    a, e = torch.arange(12.0).view(3, 4), torch.arange(6.0).view(3, 2)
    assert json.loads(printed) == [fk.gram(a, e).tolist(), fk.combine(a, e, torch.ones(3)).tolist()]


def test_training_gives_the_same_weights():
    program = """
        import torch, fngd
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3), torch.nn.Flatten(), torch.nn.Linear(12, 3)
        ).double()
        x, y = torch.randn(8, 2, 4, 4, dtype=torch.float64), torch.randint(0, 3, (8,))
        opt = fngd.FNGD(model, lr=0.1, momentum=0.9, norms="weighted")
        for _ in range(4):
            opt.set_samples(range(8))
            opt.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            opt.step()
        assert opt.stats()["solved_batches"] == 1
        print(json.dumps([p.tolist() for p in model.parameters()]))
    """
    printed = run_without_extension('warnings.simplefilter("ignore")\n' + textwrap.dedent(program))
    plain = "import json\n" + textwrap.dedent(program)
    native = subprocess.run([sys.executable, "-c", plain], capture_output=True, text=True, check=True)
    for actual, expected in zip(json.loads(printed), json.loads(native.stdout), strict=True):
        torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_the_switch_leaves_the_extension_out_when_the_program_starts(monkeypatch):
    monkeypatch.setenv("FNGD_NO_EXTENSION", "1")
    program = "from fngd_kernels import native; print(native.AVAILABLE)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    assert "works without its native extension (FNGD_NO_EXTENSION=1)" in done.stderr


def build_extensions(monkeypatch, toolkit, build):
    """Let setup.py's command build with a torch that has CUDA; return the extension."""
    given = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", toolkit)
    monkeypatch.setattr(cpp_extension.BuildExtension, "build_extensions", build)
    monkeypatch.delenv("FNGD_NO_EXTENSION", raising=False)
    root = Path(__file__).parents[1]
    monkeypatch.chdir(root)
    runpy.run_path(str(root / "setup.py"))
    command = given["cmdclass"]["build_ext"](Distribution())
    command.extensions = given["ext_modules"]
    command.build_extensions()
    return command.extensions[0]


def has_cuda_sources(extension):
    found = [source for source in extension.sources if source.endswith(".cu")]
    assert bool(found) == ("-DFNGD_WITH_CUDA" in extension.extra_compile_args["cxx"])
    return bool(found)


def test_a_toolkit_that_does_not_compile_leaves_cuda_out_and_says_so(monkeypatch, tmp_path, capfd):
    built = []

    def build(command):
        (extension,) = command.extensions
        built.append(has_cuda_sources(extension))
        extension._needs_stub = False  # as setuptools notes on what it was given
        if built[-1]:
            raise RuntimeError("Error compiling objects for extension")

    extension = build_extensions(monkeypatch, str(tmp_path), build)
    assert built == [True, False]
    assert hasattr(extension, "_needs_stub")
    message = f"fngd: installing without the CUDA sources: {tmp_path} does not build them, see above"
    assert message in capfd.readouterr().err


@pytest.mark.parametrize(
    ("toolkit", "switch", "reason"),
    [("/usr", "1", "FNGD_NO_CUDA=1"), (None, "0", "no CUDA toolkit was found")],
)
def test_cuda_sources_that_are_not_asked_for_are_not_built(monkeypatch, toolkit, switch, reason, capfd):
    monkeypatch.setenv("FNGD_NO_CUDA", switch)
    assert not has_cuda_sources(build_extensions(monkeypatch, toolkit, lambda command: None))
    assert f"fngd: installing without the CUDA sources: {reason}" in capfd.readouterr().err


def test_what_does_not_compile_without_cuda_is_an_error(monkeypatch):
    monkeypatch.setenv("FNGD_NO_CUDA", "1")

    def build(command):
        raise RuntimeError("Error compiling objects for extension")

    with pytest.raises(RuntimeError, match="Error compiling"):
        build_extensions(monkeypatch, "/usr", build)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_cuda_headers_are_those_that_every_toolkit_has(tmp_path):
    sources = (Path(__file__).parents[1] / "csrc").glob("*.cpp")
    lines = [line for path in sources for line in path.read_text().splitlines()]
    includes = {line for line in lines if re.match("#include <.*cuda", line)}
    assert len(includes) > 2
    source = tmp_path / "headers.cpp"
    source.write_text("\n".join(includes))
    # torch's CPU builds come without this one, which its build writes
    generated = tmp_path / "c10/cuda/impl/cuda_cmake_macros.h"
    generated.parent.mkdir(parents=True)
    generated.touch()
    paths = [f"-I{path}" for path in (*cpp_extension.include_paths(), tmp_path)]
    done = subprocess.run(["nvcc", "-std=c++20", "-M", *paths, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "cuda_runtime_api.h" in done.stdout
    # a toolkit made of wheels has none of these libraries' headers
    assert not re.findall(r"(?:cublas|cusparse|cusolver|curand|cufft|cudnn|nccl)\w*\.h", done.stdout)


class OnCuda(torch.Tensor):
    is_cuda = True


@pytest.mark.parametrize(
    "fallback",
    [
        lambda k: OPERATORS["found_non_finite"]([k]),
        lambda k: OPERATORS["scale_bias"](k, k[:, 0, 0], 1, True, True),
        lambda k: OPERATORS["solve"](k, k[:, 0, 0], None),
        lambda k: OPERATORS["coefficients"](k, 0.1, 0.0, "mean"),
    ],
)
def test_cuda_tensors_without_the_cuda_part_are_named_once(fallback, monkeypatch):
    native.warn_of_missing_cuda.cache_clear()
    monkeypatch.setattr(native, "AVAILABLE", True)
    monkeypatch.setattr(native, "HAS_CUDA", False)
    k = torch.eye(3).expand(2, 3, 3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if native.extension is not None:
            fallback(k)
            assert not caught
        for _ in range(2):
            fallback(k.as_subclass(OnCuda))
    native.warn_of_missing_cuda.cache_clear()
    (message,) = (str(w.message) for w in caught)
    assert "without the CUDA part of its native extension" in message
