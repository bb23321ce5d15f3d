"""The build: its decisions, the distributions, the symbols of the libraries, reports of a missing one."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import cpp_extension

import resfuse
from resfuse import _build, _extension, jit
from tests.needs import ROOT


def run(*command: object, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    """Output of a command that must succeed."""
    done = subprocess.run([str(part) for part in command], env=env, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def fake_toolkit(home: Path, version: str = "13.0", *, unversioned_cudart: bool = True) -> Path:
    """A directory that looks like a CUDA toolkit; its nvcc only tells its version."""
    files = ["bin/nvcc", "include/cuda_runtime_api.h", "include/crt/host_config.h", "lib/libcudart.so.13"]
    for name in files + ["lib/libcudart.so"] * unversioned_cudart:
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).touch()
    (home / "bin" / "nvcc").write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.1'\n")
    (home / "bin" / "nvcc").chmod(0o755)
    return home


@pytest.fixture
def compiler_only(tmp_path: Path) -> dict[str, str]:
    """An environment with a C++ compiler on PATH and nothing else."""
    folder = tmp_path / "compiler-bin"
    folder.mkdir()
    (folder / "c++").write_text("#!/bin/sh\n")
    (folder / "c++").chmod(0o755)
    return {"PATH": str(folder)}


def decide(env: dict[str, str], **changes: object) -> _build.Settings:
    facts = {"torch": "2.11.0", "torch_cuda": "13.0", "site_packages": []}
    return _build.decide(env, **{**facts, **changes})  # type: ignore[arg-type]


# --- decisions -------------------------------------------------------------------------------------------------------


def test_a_toolkit_of_torchs_cuda_version_builds_for_gpus(compiler_only: dict[str, str], tmp_path: Path) -> None:
    home = fake_toolkit(tmp_path / "cuda")
    settings = decide({**compiler_only, "CUDA_HOME": str(home)})
    assert settings.libraries == ["_cpu", "_cuda"]
    assert settings.toolkit == _build.Toolkit(home, "13.0")
    assert f"CUDA 13.0 at {home} for {_build.DEFAULT_ARCH_LIST}" in str(settings)
    json.dumps(settings.as_info())


def test_cutlass_from_pip_builds_for_hopper_and_blackwell_too(compiler_only: dict[str, str], tmp_path: Path) -> None:
    env, site = {**compiler_only, "CUDA_HOME": str(fake_toolkit(tmp_path / "cuda"))}, tmp_path / "site"
    for name in _build.CUTLASS_LIBRARIES:
        assert "pip install --no-deps 'nvidia-cutlass" in decide(env).skipped[name]
    header = site / "cutlass_library" / "source" / "include" / "cutlass" / "cutlass.h"
    header.parent.mkdir(parents=True)
    header.touch()
    settings = decide(env, site_packages=[str(site)])
    assert settings.libraries == ["_cpu", "_cuda", "_sm90", "_sm100"]
    assert _build.include_dirs("_cuda", settings.cutlass) == [str(_build.csrc_dir())]
    for name, arch in (("_sm90", "90a"), ("_sm100", "100a")):
        assert str(header.parents[1]) in _build.include_dirs(name, settings.cutlass)
        found = [flag for flag in _build.compile_flags(name, debug=False)["nvcc"] if flag.startswith("-gencode")]
        assert found == [f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    json.dumps(settings.as_info())
    ampere = decide({**env, "TORCH_CUDA_ARCH_LIST": "8.0;10.0a"}, site_packages=[str(site)])
    assert ampere.skipped == {"_sm90": "TORCH_CUDA_ARCH_LIST=8.0;10.0a does not name 9.0a"}
    older = {**env, "CUDA_HOME": str(fake_toolkit(tmp_path / "older", "12.6"))}
    settings = decide(older, site_packages=[str(site)], torch_cuda="12.6")
    assert settings.skipped == {"_sm100": "CUDA 12.6 does not know 10.0a; 12.8 does"}


@pytest.mark.parametrize(
    ("named", "compiled"),
    [
        (_build.DEFAULT_ARCH_LIST, "8.0+PTX;9.0a"),
        ("9.0a 10.0a 10.0+PTX", "9.0a;10.0+PTX"),
        ("9.0a;10.0a", "9.0a;10.0a"),  # without PTX nothing else would serve Blackwell
        ("10.0a+PTX", "10.0a+PTX"),
    ],
)
def test_where_there_is_ptx_blackwell_has_code_in_its_own_library_alone(
    compiler_only: dict[str, str], tmp_path: Path, named: str, compiled: str
) -> None:
    env = {**compiler_only, "CUDA_HOME": str(fake_toolkit(tmp_path / "cuda")), "TORCH_CUDA_ARCH_LIST": named}
    with _build.build_environment(decide(env)):
        assert os.environ["TORCH_CUDA_ARCH_LIST"] == compiled


def test_nvcc_on_path_and_a_toolkit_from_pip_are_found(compiler_only: dict[str, str], tmp_path: Path) -> None:
    on_path = fake_toolkit(tmp_path / "cuda")
    path = f"{compiler_only['PATH']}:{on_path / 'bin'}"
    assert decide({"PATH": path}).toolkit == _build.Toolkit(on_path, "13.0")

    from_pip = fake_toolkit(tmp_path / "site" / "nvidia" / "cu13", "13.0")
    older = fake_toolkit(tmp_path / "older", "12.8")
    path = f"{compiler_only['PATH']}:{older / 'bin'}"
    found = decide({"PATH": path}, site_packages=[str(tmp_path / "site")]).toolkit
    assert found == _build.Toolkit(from_pip, "13.0"), "the toolkit of torch's own major version is preferred"


@pytest.mark.parametrize(
    ("env", "facts", "skipped"),
    [
        ({"RESFUSE_SKIP_CUDA_BUILD": "1"}, {}, {"_cuda": "RESFUSE_SKIP_CUDA_BUILD is set"}),
        ({"RESFUSE_SKIP_CPU_BUILD": "yes"}, {}, {"_cpu": "RESFUSE_SKIP_CPU_BUILD is set"}),
        ({}, {"torch_cuda": None}, {"_cuda": "is a CPU-only build"}),
        ({}, {"torch_cuda": "12.8"}, {"_cuda": "is CUDA 13.0 but torch was built with CUDA 12.8"}),
        ({}, {"torch": None}, {"_cpu": "torch is not installed", "_cuda": "torch is not installed"}),
        ({"CXX": "no-such-compiler"}, {}, {"_cpu": "no C++ compiler", "_cuda": "no C++ compiler"}),
        ({"PATH": ""}, {}, {"_cpu": "no C++ compiler", "_cuda": "no C++ compiler"}),
        ({"CUDA_HOME": "/nowhere"}, {}, {"_cuda": "has no bin/nvcc"}),
        ({"CUDA_HOME": "incomplete"}, {}, {"_cuda": "lacks crt/host_config.h"}),
        ({"CUDA_HOME": ""}, {}, {"_cuda": "no CUDA toolkit was found; set CUDA_HOME"}),
        ({"CUDA_HOME": ""}, {}, {"_cuda": "cuda-toolkit[nvcc,crt,nvvm,cccl,cudart]==13.0.*"}),
    ],
)
def test_every_skipped_library_has_a_reason(
    compiler_only: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    env: dict[str, str], facts: dict[str, Any], skipped: dict[str, str],
) -> None:  # fmt: skip
    """In one line each; that of the CUDA library is also that of CUTLASS's, and an error with FORCE_CUDA."""
    home = fake_toolkit(tmp_path / "cuda")
    if env.get("CUDA_HOME") == "incomplete":
        shutil.rmtree(home / "include" / "crt")
        env = {}
    if env.get("CUDA_HOME") == "":
        monkeypatch.setattr(_build, "candidate_homes", lambda env, site_packages: [])
    env = {**compiler_only, "CUDA_HOME": str(home), **env}
    settings = decide(env, **facts)
    cutlass = skipped.get("_cuda", "CUTLASS's headers were not found")
    skipped = {**skipped, **dict.fromkeys(_build.CUTLASS_LIBRARIES, cutlass)}
    assert settings.skipped.keys() == skipped.keys()
    for name, reason in skipped.items():
        assert name not in settings.libraries
        (line,) = (line for line in str(settings).splitlines() if name in line)
        assert "NOT built: " in line and reason in line
    if "_cuda" in skipped:
        with pytest.raises(_build.BuildError, match=f"(?s)FORCE_CUDA=1.*{re.escape(skipped['_cuda'])}"):
            decide({**env, "FORCE_CUDA": "1"}, **facts)


def test_the_presence_of_a_gpu_decides_nothing(compiler_only: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def asked() -> bool:
        raise AssertionError("torch.cuda.is_available() was asked")

    monkeypatch.setattr(torch.cuda, "is_available", asked)
    decide(compiler_only)


def test_arch_list_jobs_and_debug_come_from_the_environment(compiler_only: dict[str, str]) -> None:
    settings = decide({**compiler_only, "TORCH_CUDA_ARCH_LIST": "9.0a", "MAX_JOBS": "7", "DEBUG": "1"})
    assert (settings.arch_list, settings.max_jobs, settings.debug) == ("9.0a", 7, True)
    assert decide({**compiler_only, "DEBUG": "0"}).debug is False
    for unset in ({}, {"MAX_JOBS": ""}):
        assert decide({**compiler_only, **unset}).max_jobs == _build.usable_cores() >= 1
    assert "-O0" in _build.compile_flags("_cpu", debug=True)["cxx"]
    assert "-O3" in _build.compile_flags("_cpu", debug=False)["cxx"]


def test_flags_serve_every_cpu_and_every_torch(tmp_path: Path) -> None:
    """Only toolkits that can compress are asked to."""
    found = {}
    for name, major in (("_cpu", 12), ("_cuda", 12), ("_cuda", 13)):
        found[name, major] = _build.compile_flags(name, debug=False, toolkit=_build.Toolkit(tmp_path, f"{major}.6"))
        for flags in found[name, major].values():
            assert "-DTORCH_TARGET_VERSION=0x020a000000000000" in flags
            assert not [flag for flag in flags if flag.startswith(("-march", "-mtune", "-std", "-ffast-math"))]
    assert set(found["_cuda", 13]["nvcc"]) - set(found["_cuda", 12]["nvcc"]) == {"--compress-mode=size"}
    assert found["_cuda", 13]["cxx"] == found["_cuda", 12]["cxx"]


def test_cudart_of_a_pip_toolkit_is_bridged(tmp_path: Path) -> None:
    bare = _build.Toolkit(fake_toolkit(tmp_path / "pip", unversioned_cudart=False), "13.0")
    (folder,) = _build.cudart_bridge(bare, tmp_path / "scratch")
    assert (Path(folder) / "libcudart.so").resolve() == bare.home / "lib" / "libcudart.so.13"
    assert _build.cudart_bridge(bare, tmp_path / "scratch") == [folder], "a second build finds the link in place"
    complete = _build.Toolkit(fake_toolkit(tmp_path / "full"), "13.0")
    assert _build.cudart_bridge(complete, tmp_path / "unused") == []


def test_build_environment_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6")
    for name in ("CXX", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    before = cpp_extension.CUDA_HOME, dict(os.environ)
    toolkit = _build.Toolkit(tmp_path, "13.0")
    settings = _build.Settings("2.11.0", "13.0", "c++", toolkit, None, "9.0a", max_jobs=3, debug=False, skipped={})
    with _build.build_environment(settings):
        found = [os.environ[name] for name in ("TORCH_CUDA_ARCH_LIST", "CXX", "MAX_JOBS")]
        assert (found, cpp_extension.CUDA_HOME) == (["9.0a", "c++", "3"], str(tmp_path))
    assert before == (cpp_extension.CUDA_HOME, dict(os.environ))


def test_every_source_is_compiled() -> None:
    """Into exactly one of the libraries; all that csrc has besides is included by them."""
    compiled = [path for name in _build.LIBRARIES for path in _build.sources(name)]
    in_tree = [path for pattern in ("*.cpp", "*.cu") for path in _build.csrc_dir().rglob(pattern)]
    assert sorted(compiled) == sorted(in_tree)


# --- the run-time build ----------------------------------------------------------------------------------------------


def test_jit_compiles_what_setup_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toolkit = fake_toolkit(tmp_path / "cuda", unversioned_cudart=False)
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_build, "find_cutlass", lambda site_packages: tmp_path)
    monkeypatch.setattr(_extension, "_outcome", dict.fromkeys(_build.LIBRARIES, "not built"))
    calls = {}
    monkeypatch.setattr(cpp_extension, "load", lambda name, sources, **rest: calls.update({name: (sources, rest)}))

    assert jit.load(build_directory=tmp_path / "build") == dict.fromkeys(_build.LIBRARIES)
    assert [_extension.load(name) for name in _build.LIBRARIES] == [None] * len(_build.LIBRARIES)
    for name in _build.LIBRARIES:
        sources, rest = calls[f"resfuse{name}"]
        flags = _build.compile_flags(name, debug=False, toolkit=_build.Toolkit(toolkit, "13.0"))
        assert sources == [str(path) for path in _build.sources(name)]
        assert rest["extra_cflags"] == flags["cxx"]
        assert rest["extra_cuda_cflags"] == flags.get("nvcc")
        assert rest["extra_include_paths"] == _build.include_dirs(name, tmp_path)
        assert rest["extra_ldflags"][: len(_build.link_flags())] == _build.link_flags()
        assert rest["is_python_module"] is False
    bridge = [flag for flag in calls["resfuse_cuda"][1]["extra_ldflags"] if flag.startswith("-L")]
    assert len(bridge) == 1


def test_jit_says_why_it_can_not_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("FORCE_CUDA", raising=False)
    monkeypatch.setattr(_extension, "_outcome", {**dict.fromkeys(_build.LIBRARIES), "_cpu": "not built: ..."})
    outcome = jit.load()
    assert "no C++ compiler" in (outcome["_cpu"] or "")
    assert outcome["_cuda"] is None, "what is loaded already is not built again"


@pytest.mark.slow
def test_jit_builds_and_loads_the_cpu_library(tmp_path: Path) -> None:
    program = """
import sys, torch, resfuse
from resfuse import _extension, jit
from resfuse.backends import dispatch
from resfuse.types import Problem
_extension._outcome["_cpu"] = "pretend that it was never built"
x, r = torch.randn(2, 2, 8, 3, 3)
problem = Problem("add_relu_forward", x.device, x.dtype, x.shape)
assert dispatch.explain_choice(problem)[0] == "reference"
assert jit.load(build_directory=sys.argv[1])["_cpu"] is None
assert dispatch.explain_choice(problem)[0] == "cpu"
with resfuse.use_backend("cpu"):
    assert torch.equal(resfuse.add_relu(x, r), torch.relu(x + r))
"""
    run(sys.executable, "-c", program, tmp_path, env={**os.environ, "RESFUSE_SKIP_CUDA_BUILD": "1", "FORCE_CUDA": ""})


# --- the libraries ---------------------------------------------------------------------------------------------------


def built(name: str) -> Path:
    """Path of an in-place library; skips the test, with the reason, where it was not built."""
    reason = _extension.load(name)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    return ROOT / "resfuse" / f"{name}.abi3.so"


@pytest.mark.parametrize("name", _build.LIBRARIES)
def test_libraries_need_no_python_and_only_stable_torch_symbols(name: str) -> None:
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is not installed")
    listing = run("nm", "-D", "--undefined-only", built(name))
    undefined = [line.split()[-1].split("@")[0] for line in listing.splitlines()]
    assert not [symbol for symbol in undefined if symbol.startswith(("Py", "_Py"))]
    torch_symbols = [symbol for symbol in undefined if "torch" in symbol or "c10" in symbol or "3at" in symbol]
    assert torch_symbols, "the library registers its operators with torch"
    # The stable ABI is C: a mangled C++ name of torch would tie the binary to one release.
    assert not [symbol for symbol in torch_symbols if symbol.startswith("_Z")]


@pytest.mark.parametrize(
    ("name", "operators"), [("cuda", 8), ("sm90", 1), ("sm100", 1)]
)  # of batch norm and of convolutions
def test_libraries_for_gpus_register_their_operators_without_one(name: str, operators: int) -> None:
    built(f"_{name}")
    importlib.import_module(f"resfuse.backends.{name}")  # defines them
    schemas = [schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith(f"resfuse_{name}::")]
    assert len(schemas) >= operators
    assert [name for name in schemas if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")] == []


# --- how a missing library is reported -------------------------------------------------------------------------------


def test_a_library_that_cannot_be_loaded_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "_HERE", tmp_path)
    outcome: dict[str, str | None] = {}
    monkeypatch.setattr(_extension, "_outcome", outcome)
    assert _extension.build_info() == {}
    assert "_cpu.abi3.so is not beside resfuse; run `pip install" in (_extension.load("_cpu") or "")
    outcome.clear()
    (tmp_path / "_cpu.abi3.so").write_text("not a library")
    reason = _extension.load("_cpu") or ""
    assert f"torch {torch.__version__} cannot load it" in reason
    assert _extension.load("_cpu") is reason, "asked once per process"

    (tmp_path / "_cuda.abi3.so").touch()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is a CPU-only build" in (_extension.load("_cuda") or "")
    outcome.clear()  # a library of an earlier build: the record counts
    (tmp_path / "_build_info.json").write_text(json.dumps({"skipped": {"_cuda": "no CUDA toolkit was found"}}))
    assert _extension.load("_cuda") == "not built: no CUDA toolkit was found"


# --- distributions ---------------------------------------------------------------------------------------------------

TABLE = "backends/tables/gpu-of-the-tests.json"
NATIVE = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution, built from a copy so that the checkout stays as it is."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("sdist")
    skipped = shutil.ignore_patterns(
        ".git", ".venv*", "build", "dist", "out", "*.so", "*.egg-info", "_build_info.json", ".*_cache"
    )
    shutil.copytree(ROOT, folder / "checkout", ignore=skipped)
    (folder / "checkout" / "resfuse" / TABLE).parent.mkdir(exist_ok=True)
    (folder / "checkout" / "resfuse" / TABLE).write_text("{}")
    options = ("--sdist", "--no-isolation", "--skip-dependency-check")
    run(sys.executable, "-m", "build", *options, "-o", folder, folder / "checkout")
    (archive,) = folder.glob("*.tar.gz")
    (folder / "unpacked").mkdir()
    run("tar", "xf", archive, "-C", folder / "unpacked")  # tarfile's safe filter is missing from Debian 12's Python
    (unpacked,) = (folder / "unpacked").iterdir()
    return unpacked


def install(sdist: Path, target: Path, **env: str) -> Path:
    """Build a wheel from the unpacked sdist and install it into `target`, without downloading anything."""
    source = target.parent / "source"
    shutil.copytree(sdist, source)
    environment = {**os.environ, "FORCE_CUDA": "", **env}
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", target.parent, source, env=environment)
    (wheel,) = target.parent.glob("*.whl")
    run(*pip, "install", "-q", "--no-deps", "--no-index", "--target", target, wheel)
    return wheel


PROGRAM = """
import resfuse, sys, torch
from resfuse import _build, _extension
assert resfuse.__file__.startswith(sys.argv[1]), resfuse.__file__
assert all(path.is_file() for name in _build.LIBRARIES for path in _build.sources(name))
x, r = torch.randn(2, 2, 8, 3, 3)
assert torch.equal(resfuse.add_relu(x, r), torch.relu(x + r))
print(_extension.load("_cpu"), _extension.load("_cuda"), resfuse.available_backends(), sep="; ")
"""


def in_installation(target: Path) -> str:
    """The libraries' reasons and the backends, by the installed resfuse."""
    return run(sys.executable, "-c", PROGRAM, target, env={**os.environ, "PYTHONPATH": str(target)}, cwd=target)


@pytest.mark.slow
def test_sdist_and_wheel_are_complete_and_work(sdist: Path, tmp_path: Path) -> None:
    for name in [*NATIVE, "LICENSE", "CHANGELOG.md", "Makefile", "requirements/constraints.txt", "resfuse/_build.py"]:
        assert (sdist / name).is_file(), f"sdist lacks {name}"
    assert not list(sdist.rglob("*.so"))

    wheel = install(sdist, tmp_path / "site", RESFUSE_SKIP_CUDA_BUILD="1")
    assert "cp310-abi3" in wheel.name, "one wheel serves every Python from 3.10 on"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"resfuse-{resfuse.__version__}.dist-info/METADATA").decode()
    assert {f"resfuse/{name}" for name in NATIVE} <= names
    assert {"resfuse/_cpu.abi3.so", "resfuse/_build_info.json", "resfuse/py.typed", f"resfuse/{TABLE}"} <= names
    assert not [name for name in names if name.startswith(("tests/", "csrc/", "build/"))]
    assert "Requires-Dist: torch>=2.10" in metadata

    found = in_installation(tmp_path / "site")
    assert found.startswith("None; not built: RESFUSE_SKIP_CUDA_BUILD") and "'cpu'" in found


@pytest.mark.slow
def test_without_a_compiler_pure_python_installs_and_says_why(sdist: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    wheel = install(sdist, tmp_path / "site", PATH=str(tmp_path / "empty"), CXX="", CUDA_HOME="")
    assert "py3-none-any" in wheel.name
    found = in_installation(tmp_path / "site")
    assert found.startswith("not built: no C++ compiler was found") and "'reference'" in found


@pytest.mark.slow
def test_force_cuda_without_a_toolkit_fails_the_build(sdist: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "FORCE_CUDA": "1", "CUDA_HOME": str(tmp_path / "nowhere")}
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=sdist, env=environment, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "error: FORCE_CUDA=1, but the CUDA library cannot be built" in done.stderr
