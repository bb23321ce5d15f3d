"""Builds the extension libraries at run time, with exactly the parameters of setup.py.

For an installation without them (no compiler at install time, or a checkout that was never built) and for work on the
kernels: only what changed is compiled again.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from resfuse import _build, _extension
from resfuse.backends import dispatch


def load(*, build_directory: str | os.PathLike[str] | None = None, verbose: bool = False) -> dict[str, str | None]:
    """Compile and load each library that this process lacks (`torch.utils.cpp_extension.load`).

    Args:
        build_directory: where to build; torch's own cache of extensions if None.
        verbose: show the compiler's commands and output.

    Returns:
        Per library of `_build.LIBRARIES`: None when it is loaded, else the reason why it cannot be built here.

    Raises:
        RuntimeError: a compiler is there and the compilation failed.
        resfuse._build.BuildError: FORCE_CUDA=1 and there is no usable CUDA toolkit.
    """
    settings = _build.decide(os.environ, torch=torch.__version__, torch_cuda=torch.version.cuda)
    outcome: dict[str, str | None] = {}
    for name in _build.LIBRARIES:
        outcome[name] = _extension.load(name)
        if outcome[name] is not None:
            outcome[name] = settings.skipped.get(name)
            if outcome[name] is None:
                _compile(name, settings, build_directory, verbose)
                dispatch.forget_choices()
    return outcome


def _compile(
    name: str, settings: _build.Settings, build_directory: str | os.PathLike[str] | None, verbose: bool
) -> None:
    from torch.utils import cpp_extension

    label = f"resfuse{name}"
    with _build.build_environment(settings):
        folder = Path(build_directory or cpp_extension.get_default_build_root()) / f"{label}_torch{torch.__version__}"
        folder.mkdir(parents=True, exist_ok=True)
        flags = _build.compile_flags(name, settings.debug, settings.toolkit)
        bridge = _build.cudart_bridge(settings.toolkit, folder / "cudart") if settings.toolkit else []
        cpp_extension.load(
            label,
            [str(path) for path in _build.sources(name)],
            extra_cflags=flags["cxx"],
            extra_cuda_cflags=flags.get("nvcc"),
            extra_include_paths=_build.include_dirs(name, settings.cutlass),
            extra_ldflags=[*_build.link_flags(), *(f"-L{path}" for path in bridge)],
            build_directory=str(folder),
            verbose=verbose,
            with_cuda=name != "_cpu",
            is_python_module=False,
        )
    _extension.mark_loaded(name)
