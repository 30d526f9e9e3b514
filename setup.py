"""Build the native extension when torch and a C++ compiler are there; install without it otherwise.

The CUDA sources are left out where torch has no CUDA, or no toolkit is there that compiles them.

Environment: CXX, MAX_JOBS, CUDA_HOME, TORCH_CUDA_ARCH_LIST as for any torch extension;
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

    cuda = wants_cuda(cpp_extension)
    module = extension(cpp_extension, cuda)

    class BuildExtension(cpp_extension.BuildExtension):
        """Torch's, which goes on without the CUDA sources where this toolkit does not build them."""

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:  # whatever torch, ninja or a compiler makes of a toolkit
                if not cuda:
                    raise
                leave_cuda_out(f"{cpp_extension.CUDA_HOME} does not build them, see above ({error})")
                vars(module).update(vars(extension(cpp_extension, cuda=False)))
                super().build_extensions()

    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension}}


def extension(cpp_extension, cuda: bool):
    """Return the extension with or without its CUDA sources."""
    sources = sorted(str(path) for path in Path("csrc").glob("*.cpp"))
    # No fast math: the solver's guards rely on IEEE NaN and infinity.
    cxx_flags = ["/O2"] if sys.platform == "win32" else ["-O3", "-g0", "-Wall"]
    link_flags = []
    if "FNGD_SANITIZE" in os.environ:
        sanitize = f"-fsanitize={os.environ['FNGD_SANITIZE']}"
        cxx_flags = ["-O0", "-g1", "-Wall", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]
        # Python's own flags define what overflow does.
        cxx_flags += [sanitize, "-fno-wrapv"]
        link_flags.append(sanitize)
    if sys.platform == "linux":
        cxx_flags.append("-fopenmp")
        link_flags.append("-fopenmp")
    flags = {"cxx": cxx_flags}
    kind = cpp_extension.CppExtension
    if cuda:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_CUDA_ARCHS)
        kind = cpp_extension.CUDAExtension
        sources += sorted(str(path) for path in Path("csrc").glob("*.cu"))
        cxx_flags.append("-DFNGD_WITH_CUDA")
        flags["nvcc"] = ["-O3", "-DFNGD_WITH_CUDA"]
    return kind("fngd_kernels._C", sources, extra_compile_args=flags, extra_link_args=link_flags)


def wants_cuda(cpp_extension) -> bool:
    """Return whether to build the CUDA sources; say so where a torch with CUDA goes without them."""
    import torch

    if torch.version.cuda is None:
        return False
    missing = "FNGD_NO_CUDA=1" if os.environ.get("FNGD_NO_CUDA") == "1" else ""
    if not missing and cpp_extension.CUDA_HOME is None:
        missing = "no CUDA toolkit was found (CUDA_HOME, or nvcc in PATH)"
    if missing:
        leave_cuda_out(missing)
    return not missing


def leave_cuda_out(reason: str) -> None:
    """Say why the CUDA sources are left out."""
    print(f"fngd: installing without the CUDA sources: {reason}", file=sys.stderr)


def skip(reason: str) -> dict:
    """Say why the extension is left out."""
    print(f"fngd: installing without the native extension: {reason}", file=sys.stderr)
    return {}


setup(**extension_arguments())
