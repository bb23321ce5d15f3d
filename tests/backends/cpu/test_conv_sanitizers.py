"""The convolution kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import cpp_extension

from resfuse import _build

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
RUN = """
import sys, torch
torch.ops.load_library(sys.argv[1])
from resfuse import _extension
_extension.mark_loaded("_cpu")
from tests.backends.cpu.random_convolutions import check, main
from tests.backends.cpu.test_conv import PATHS, path_call
from tests.backends.cpu.test_conv_chain import check_chains
from tests.backends.cpu.test_conv_pool import check_pooling
from tests.contract import FUSED, forward
torch.set_num_threads(2)
for dtype in (torch.float32, torch.bfloat16):
    main(7, 150, dtype)
    check_chains(dtype, 40)
    check_pooling(dtype, 60)
    for name in PATHS:
        call = path_call(name, dtype)
        check(call)
        forward(FUSED, call.with_options(training=True))
print("clean")
"""


def sanitizer_library(name: str) -> str:
    found = subprocess.run(["g++", f"-print-file-name=lib{name}.so"], capture_output=True, text=True).stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip(f"the compiler has no lib{name}")
    return found


def sanitized(path: Path, *sanitizers: str) -> Path:
    """The CPU library, compiled with sanitizers."""
    includes = [f"-I{directory}" for directory in cpp_extension.include_paths()]
    links = [f"-L{directory}" for directory in cpp_extension.library_paths()]
    flags = [flag for flag in _build.compile_flags("_cpu", debug=False)["cxx"] if not flag.startswith("-O")]
    sources = map(str, _build.sources("_cpu"))
    command = ["g++", "-std=c++17", "-shared", "-fPIC", *flags, *sanitizers, "-g", "-O1", *includes, *sources, *links]
    subprocess.run([*command, "-ltorch", "-ltorch_cpu", "-lc10", "-o", str(path)], check=True)
    return path


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sanitized") / "sanitized.so"
    return sanitized(path, "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


def run(library: Path, *prefix: str, **environment: str) -> None:
    command = [*prefix, sys.executable, "-c", RUN, str(library)]
    environ = {**os.environ, **environment}
    result = subprocess.run(command, env=environ, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "clean" in result.stdout


@pytest.mark.parametrize("instruction_set", ["avx512", "avx2", "baseline"])
def test_addresses_and_undefined_behaviour(library: Path, instruction_set: str) -> None:
    preload = f"{sanitizer_library('asan')} {sanitizer_library('ubsan')}"
    run(library, RESFUSE_CPU_ISA=instruction_set, LD_PRELOAD=preload, ASAN_OPTIONS="detect_leaks=0")


def test_races(tmp_path: Path) -> None:
    """Under ThreadSanitizer, which wants addresses that are not randomised; libraries without it are not watched."""
    preload = sanitizer_library("tsan")
    library = sanitized(tmp_path / "sanitized.so", "-fsanitize=thread")
    run(library, "setarch", "-R", LD_PRELOAD=preload, TSAN_OPTIONS="ignore_noninstrumented_modules=1")
