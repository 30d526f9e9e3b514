"""Build the native extension when torch and a C++ compiler are there; install without it otherwise.

Environment: CXX, MAX_JOBS, TORCH_CUDA_ARCH_LIST as for any torch extension;
FNGD_NO_EXTENSION=1 installs the plain-torch package; FNGD_NO_CUDA=1 leaves the CUDA sources out;
FNGD_SANITIZE=address,undefined builds for those sanitizers, whose libraries then have to be loaded first.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup

# The CUDA architectures of the tile table; used unless TORCH_CUDA_ARCH_LIST says otherwise.
DEFAULT_CUDA_ARCHS = "8.0;9.0;10.0"


def find_compiler() -> str | None:
    """Return the C++ compiler torch's build will call, or None."""
    names = [os.environ["CXX"].split()[0]] if "CXX" in os.environ else ["c++", "g++", "clang++", "cl"]
    return next(filter(None, map(shutil.which, names)), None)


def extension_arguments() -> dict:
    """Return setup()'s ext_modules and cmdclass, empty when the extension cannot be built here."""
    if os.environ.get("FNGD_NO_EXTENSION") == "1":
        return skip("FNGD_NO_EXTENSION=1")
    try:
        from torch.utils import cpp_extension
    except ImportError:
        return skip("torch is not importable (use pip install --no-build-isolation)")
    if find_compiler() is None:
        return skip("no C++ compiler was found")

    sources = sorted(str(path) for path in Path("csrc").glob("*.cpp"))
    # No fast math: the solver's guards rely on IEEE NaN and infinity.
    cxx_flags = ["/O2"] if sys.platform == "win32" else ["-O3", "-g0", "-Wall"]
    link_flags = []
    if "FNGD_SANITIZE" in os.environ:
        sanitize = f"-fsanitize={os.environ['FNGD_SANITIZE']}"
        cxx_flags = ["-O1", "-g1", "-Wall", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]
        # Python's own flags define what overflow does.
        cxx_flags += [sanitize, "-fno-wrapv"]
        link_flags.append(sanitize)
    if sys.platform == "linux":
        cxx_flags.append("-fopenmp")
        link_flags.append("-fopenmp")
    flags = {"cxx": cxx_flags}
    extension = cpp_extension.CppExtension
    cuda_sources = sorted(str(path) for path in Path("csrc").glob("*.cu"))
    if cuda_sources and has_cuda(cpp_extension):
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_CUDA_ARCHS)
        extension = cpp_extension.CUDAExtension
        sources += cuda_sources
        cxx_flags.append("-DFNGD_WITH_CUDA")
        flags["nvcc"] = ["-O3", "-DFNGD_WITH_CUDA"]
    module = extension("fngd_kernels._C", sources, extra_compile_args=flags, extra_link_args=link_flags)
    return {"ext_modules": [module], "cmdclass": {"build_ext": cpp_extension.BuildExtension}}


def has_cuda(cpp_extension) -> bool:
    """Return whether torch was built with CUDA and nvcc is installed."""
    import torch

    return (
        os.environ.get("FNGD_NO_CUDA") != "1"
        and torch.version.cuda is not None
        and cpp_extension.CUDA_HOME is not None
    )


def skip(reason: str) -> dict:
    """Say why the extension is left out."""
    print(f"fngd: installing without the native extension: {reason}", file=sys.stderr)
    return {}


setup(**extension_arguments())
