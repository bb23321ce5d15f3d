"""Builds resfuse and its extension libraries; what to build is decided in resfuse/_build.py.

Environment: RESFUSE_SKIP_CUDA_BUILD, RESFUSE_SKIP_CPU_BUILD, FORCE_CUDA, CUDA_HOME, TORCH_CUDA_ARCH_LIST, MAX_JOBS,
DEBUG, CXX (CONTRIBUTING.md has the table). Install with --no-build-isolation to build against the torch you run.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def load_build_parameters() -> ModuleType:
    """Import resfuse/_build.py by path: resfuse itself cannot be imported before it is built."""
    spec = importlib.util.spec_from_file_location("_resfuse_build", ROOT / "resfuse" / "_build.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def torch_versions() -> tuple[str | None, str | None]:
    try:
        import torch
    except ImportError:
        return None, None
    return torch.__version__, torch.version.cuda


build = load_build_parameters()
torch_version, torch_cuda = torch_versions()
try:
    settings = build.decide(os.environ, torch=torch_version, torch_cuda=torch_cuda)
except build.BuildError as error:
    sys.exit(f"error: {error}")


def write_record(package: Path) -> None:
    """Record the build settings: resfuse._extension explains a missing library by them, `resfuse info` prints them."""
    (package / "_build_info.json").write_text(json.dumps(settings.as_info(), indent=2) + "\n")


class BuildPy(build_py):
    """Also ships the C++/CUDA sources (for resfuse.jit) and the record."""

    def run(self) -> None:
        package = ROOT / "resfuse" if self.editable_mode else Path(self.build_lib) / "resfuse"
        if self.editable_mode:
            super().run()
        else:
            shutil.rmtree(package, ignore_errors=True)  # leftovers of an earlier build must not get into a wheel
            super().run()
            shutil.copytree(ROOT / "csrc", package / "csrc")
        write_record(package)


def extension(name: str) -> Extension:
    from torch.utils import cpp_extension

    make = cpp_extension.CppExtension if name == "_cpu" else cpp_extension.CUDAExtension
    bridge = build.cudart_bridge(settings.toolkit, ROOT / "build" / "cudart") if name != "_cpu" else []
    return make(
        f"resfuse.{name}",
        [os.path.relpath(path, ROOT) for path in build.sources(name)],
        include_dirs=build.include_dirs(name, settings.cutlass),
        library_dirs=bridge,
        extra_compile_args=build.compile_flags(name, settings.debug, settings.toolkit),
        extra_link_args=build.link_flags(),
        py_limited_api=True,
    )


def main() -> None:
    print(settings, flush=True)
    options: dict[str, object] = {"cmdclass": {"build_py": BuildPy}}
    if settings.libraries:
        with build.build_environment(settings):
            from torch.utils.cpp_extension import BuildExtension

            class BuildExt(BuildExtension):
                def run(self) -> None:
                    super().run()
                    if self.inplace:
                        write_record(ROOT / "resfuse")

            options["ext_modules"] = [extension(name) for name in settings.libraries]
            options["cmdclass"] = {"build_py": BuildPy, "build_ext": BuildExt}
            options["options"] = {"bdist_wheel": {"py_limited_api": "cp310"}}
            setup(**options)
    else:
        setup(**options)


main()
