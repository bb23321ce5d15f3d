"""Build parameters of the extension libraries, in one place.

setup.py loads this file by path (resfuse cannot be imported before it is built) and `resfuse.jit` imports it, so both
builds compile the same sources with the same flags. It imports neither resfuse nor torch: facts about torch are
passed in.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve().parent
# Each has code for this architecture alone, for its TMA and tensor cores, and needs CUTLASS.
CUTLASS_LIBRARIES = {"_sm90": "9.0a", "_sm100": "10.0a"}
LIBRARIES = ("_cpu", "_cuda", *CUTLASS_LIBRARIES)

# Of `_cuda`, sm_80 code runs on 8.x, sm_90a on Hopper; newer GPUs compile the sm_80 PTX.
DEFAULT_ARCH_LIST = "8.0+PTX;9.0a;10.0a"

# The stable ABI of torch 2.10: one binary then loads in every torch from 2.10 on. No -std: torch knows its own.
MACROS = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]

HOW_TO_GET_A_TOOLKIT = (
    "set CUDA_HOME, put nvcc on PATH, or `pip install 'cuda-toolkit[nvcc,crt,nvvm,cccl,cudart]=={cuda}.*'`, "
    "then install resfuse again"
)


CUTLASS_FLAGS = [
    "--expt-relaxed-constexpr",
    "-DNDEBUG",
    "-DCUTLASS_ENABLE_DIRECT_CUDA_DRIVER_CALL=1",  # tensor_maps.cpp has the functions
]
HOW_TO_GET_CUTLASS = "`pip install --no-deps 'nvidia-cutlass==4.2.*'`, then install resfuse again"


class BuildError(RuntimeError):
    """FORCE_CUDA=1 is set, but the CUDA library cannot be built."""


@dataclasses.dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit: its root directory and nvcc's release, e.g. "13.0"."""

    home: Path
    version: str

    @property
    def major(self) -> str:
        return self.version.split(".")[0]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything a build depends on. `skipped` maps each library that is not built to the reason."""

    torch: str | None
    torch_cuda: str | None
    compiler: str | None
    toolkit: Toolkit | None
    cutlass: Path | None
    arch_list: str
    max_jobs: int
    debug: bool
    skipped: Mapping[str, str]

    @property
    def libraries(self) -> list[str]:
        return [name for name in LIBRARIES if name not in self.skipped]

    @property
    def cuda_arch_list(self) -> str:
        """That of `_cuda`, whose PTX serves Blackwell: code for sm_100a would only make the build longer."""
        others = [arch for arch in re.split("[; ]+", self.arch_list) if arch != CUTLASS_LIBRARIES["_sm100"]]
        return ";".join(others) if any(arch.endswith("+PTX") for arch in others) else self.arch_list

    def as_info(self) -> dict[str, object]:
        """The settings as plain JSON values, for bug reports."""
        info = dataclasses.asdict(self)
        info["toolkit"] = f"CUDA {self.toolkit.version} at {self.toolkit.home}" if self.toolkit else None
        info["cutlass"] = str(self.cutlass) if self.cutlass else None
        info["python"] = sys.version.split()[0]
        return info

    def __str__(self) -> str:
        lines = [
            f"torch      {self.torch or 'not installed'} (CUDA {self.torch_cuda or 'none'})",
            f"compiler   {self.compiler or 'none'}{' (DEBUG)' if self.debug else ''}, {self.max_jobs} at a time",
        ]
        if "_cuda" in self.libraries and self.toolkit:
            lines.append(f"toolkit    CUDA {self.toolkit.version} at {self.toolkit.home} for {self.arch_list}")
        for name in LIBRARIES:
            reason = self.skipped.get(name)
            lines.append(f"{name:<10} {'NOT built: ' + reason if reason else 'will be built'}")
        return "\n".join(f"[resfuse] {line}" for line in lines)


def flag_set(env: Mapping[str, str], name: str) -> bool:
    return env.get(name, "").strip().lower() not in ("", "0", "false", "no", "off")


def usable_cores() -> int:
    """Number of cores that this process may run on: the default of MAX_JOBS."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def csrc_dir() -> Path:
    """The C++/CUDA sources: beside this file in an installed package, one level up in a checkout."""
    return next((p for p in (HERE / "csrc", HERE.parent / "csrc") if p.is_dir()), HERE.parent / "csrc")


def sources(name: str) -> list[Path]:
    """Absolute paths of a library's sources: bindings_cuda*.cpp and so on, then the kernels, sorted."""
    csrc = csrc_dir()
    bindings = [csrc / f"bindings{name}.cpp", *csrc.glob(f"bindings{name}_*.cpp")]
    folder = f"cuda/{name[1:]}" if name in CUTLASS_LIBRARIES else name[1:]
    kernels = [path for path in (csrc / folder).iterdir() if path.suffix in (".cpp", ".cu")]
    return [*sorted(bindings), *sorted(kernels)]


def include_dirs(name: str, cutlass: Path | None) -> list[str]:
    """Directories of the headers that a library includes, beside torch's and CUDA's."""
    folders = []
    if name in CUTLASS_LIBRARIES:
        assert cutlass is not None
        folders = [cutlass / "include", cutlass / "tools" / "util" / "include"]
    return [str(folder) for folder in (csrc_dir(), *folders)]


def compile_flags(name: str, debug: bool, toolkit: Toolkit | None = None) -> dict[str, list[str]]:
    """Flags per compiler: "cxx", "nvcc", the latter for a toolkit (None: for any).

    No -march: one binary serves every CPU, kernels choose their instruction set at run time.
    """
    # -fno-math-errno and -fno-trapping-math let loops with sqrt and comparisons vectorise; neither changes a result.
    optimise = ["-O0", "-g"] if debug else ["-O3", "-g0", "-fno-math-errno", "-fno-trapping-math"]
    # Messages of STD_TORCH_CHECK contain the file name: keep it relative to csrc, whatever the build directory.
    paths = f"-ffile-prefix-map={csrc_dir()}=csrc"
    # -Wno-psabi: vectors wider than the baseline ISA are passed only between functions that are always inlined.
    cxx = [*optimise, "-fopenmp-simd", "-fvisibility=hidden", "-Wall", "-Wno-psabi", paths, *MACROS]
    if name == "_cpu":
        return {"cxx": cxx}
    # -lineinfo lets profilers and compute-sanitizer name source lines, and changes no code. It doubles the size, which
    # compression more than makes up for; every driver that CUDA 13 supports can decompress it.
    # USE_CUDA unlocks the stream and device-guard part of torch's stable ABI.
    nvcc = ["-O0" if debug else "-O3", "-lineinfo", "-Xcompiler=-fvisibility=hidden", *MACROS, "-DUSE_CUDA"]
    if toolkit is not None and int(toolkit.major) >= 13:
        nvcc.append("--compress-mode=size")
    if name in CUTLASS_LIBRARIES:
        arch = CUTLASS_LIBRARIES[name].replace(".", "")
        nvcc += [f"-gencode=arch=compute_{arch},code=sm_{arch}", *CUTLASS_FLAGS]  # in place of TORCH_CUDA_ARCH_LIST's
    return {"cxx": [*cxx, "-DUSE_CUDA"], "nvcc": [*nvcc, "-g"] if debug else nvcc}


def link_flags() -> list[str]:
    """A missing symbol is an error when linking, not when a user first imports the library."""
    return ["-Wl,--as-needed", "-Wl,--no-undefined"] if sys.platform == "linux" else []


def cudart_bridge(toolkit: Toolkit, scratch: Path) -> list[str]:
    """Directories to add to the linker's path so that `-lcudart` resolves.

    Toolkits installed by pip ship libcudart.so.13 without the libcudart.so that the linker looks for; a symbolic link
    of that name in `scratch` bridges it.
    """
    folders = [toolkit.home / name for name in ("lib64", "lib")]
    if any((folder / "libcudart.so").exists() for folder in folders):
        return []
    for folder in folders:
        for library in sorted(folder.glob("libcudart.so.*")):
            scratch.mkdir(parents=True, exist_ok=True)
            link = scratch / "libcudart.so"
            link.unlink(missing_ok=True)
            link.symlink_to(library.resolve())
            return [str(scratch)]
    return []


def find_compiler(env: Mapping[str, str]) -> str | None:
    """$CXX, or the first C++ compiler on PATH; None where there is none."""
    if env.get("CXX"):
        command = env["CXX"].split()[0]
        return env["CXX"] if shutil.which(command, path=env.get("PATH", "")) else None
    return next((name for name in ("c++", "g++", "clang++") if shutil.which(name, path=env.get("PATH", ""))), None)


def candidate_homes(env: Mapping[str, str], site_packages: Sequence[str]) -> list[Path]:
    """Candidate locations of a CUDA toolkit, best first. An explicit CUDA_HOME or CUDA_PATH is the only one."""
    explicit = env.get("CUDA_HOME") or env.get("CUDA_PATH")
    if explicit:
        return [Path(explicit)]
    homes = []
    nvcc = shutil.which("nvcc", path=env.get("PATH", ""))
    if nvcc:
        homes.append(Path(nvcc).resolve().parent.parent)
    homes += [home for folder in site_packages for home in sorted(Path(folder, "nvidia").glob("cu[0-9]*"))]
    homes.append(Path("/usr/local/cuda"))
    return [home for home in homes if (home / "bin" / "nvcc").is_file()]


def inspect_toolkit(home: Path) -> Toolkit | str:
    """The toolkit at `home`, or the reason why it cannot be used."""
    nvcc = home / "bin" / "nvcc"
    if not nvcc.is_file():
        return f"{home} has no bin/nvcc"
    # conda keeps headers and libraries under targets/, Debian its libraries under lib/x86_64-linux-gnu/.
    needed = {
        "cuda_runtime_api.h": ("include", "targets/*/include"),
        "crt/host_config.h": ("include", "targets/*/include"),
        "libcudart.so*": ("lib*", "lib/*", "targets/*/lib"),
    }
    missing = [
        name
        for name, folders in needed.items()
        if not any(True for folder in folders for _ in home.glob(f"{folder}/{name}"))
    ]
    if missing:
        return f"the CUDA toolkit at {home} is incomplete, it lacks {' and '.join(missing)}"
    try:
        answer = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        return f"{nvcc} does not run: {error}"
    release = re.search(r"release (\d+\.\d+)", answer)
    return Toolkit(home, release.group(1)) if release else f"{nvcc} --version does not name its release"


def find_toolkit(env: Mapping[str, str], site_packages: Sequence[str], torch_cuda: str) -> Toolkit | str:
    """The first toolkit of torch's own CUDA major version, or the reason why there is none."""
    reasons = []
    for home in candidate_homes(env, site_packages):
        found = inspect_toolkit(home)
        if isinstance(found, str):
            reasons.append(found)
        elif found.major != torch_cuda.split(".")[0]:
            reasons.append(f"the toolkit at {home} is CUDA {found.version} but torch was built with CUDA {torch_cuda}")
        else:
            return found
    hint = HOW_TO_GET_A_TOOLKIT.format(cuda=torch_cuda)
    return f"{'; '.join(reasons) or 'no CUDA toolkit was found'}; {hint}"


def find_cutlass(site_packages: Sequence[str]) -> Path | None:
    """The folder with CUTLASS's headers that the wheel nvidia-cutlass has installed."""
    folders = (Path(folder, "cutlass_library", "source") for folder in site_packages)
    return next((folder for folder in folders if (folder / "include" / "cutlass" / "cutlass.h").is_file()), None)


def decide(
    env: Mapping[str, str], *, torch: str | None, torch_cuda: str | None, site_packages: Sequence[str] | None = None
) -> Settings:
    """Choose what to build, and say why the rest is not.

    The presence of a GPU never matters: a build machine without one must not silently lose CUDA.

    Args:
        env: environment variables: RESFUSE_SKIP_CPU_BUILD, RESFUSE_SKIP_CUDA_BUILD, FORCE_CUDA, CUDA_HOME, CUDA_PATH,
            TORCH_CUDA_ARCH_LIST, CXX, MAX_JOBS, DEBUG and PATH are read.
        torch: torch.__version__, or None where torch is not installed.
        torch_cuda: torch.version.cuda, None for a CPU-only torch.
        site_packages: where to look for a toolkit and CUTLASS installed by pip; sys.path if None.

    Raises:
        BuildError: FORCE_CUDA=1 and the CUDA library cannot be built.
    """
    compiler, toolkit = find_compiler(env), None
    folders = sys.path if site_packages is None else site_packages
    cutlass, arch_list = find_cutlass(folders), env.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCH_LIST
    cpu = cuda = None
    if torch is None:
        cpu = cuda = "torch is not installed in the build environment; install torch>=2.10, then resfuse again"
    elif compiler is None:
        again = "run `pip install --no-build-isolation --force-reinstall --no-deps` again"
        cpu = cuda = f"no C++ compiler was found; install g++ and {again}"
    else:
        if flag_set(env, "RESFUSE_SKIP_CPU_BUILD"):
            cpu = "RESFUSE_SKIP_CPU_BUILD is set; unset it and install resfuse again"
        if flag_set(env, "RESFUSE_SKIP_CUDA_BUILD"):
            cuda = "RESFUSE_SKIP_CUDA_BUILD is set; unset it and install resfuse again"
        elif torch_cuda is None:
            cuda = f"torch {torch} is a CPU-only build; install a CUDA build of torch, then resfuse again"
        else:
            found = find_toolkit(env, folders, torch_cuda)
            toolkit, cuda = (None, found) if isinstance(found, str) else (found, None)
    if cuda and flag_set(env, "FORCE_CUDA"):
        raise BuildError(f"FORCE_CUDA=1, but the CUDA library cannot be built: {cuda}")

    reasons = {"_cpu": cpu, "_cuda": cuda, **dict.fromkeys(CUTLASS_LIBRARIES, cuda)}
    for name, arch in CUTLASS_LIBRARIES.items() if toolkit else ():
        assert toolkit is not None
        if arch not in arch_list:
            reasons[name] = f"TORCH_CUDA_ARCH_LIST={arch_list} does not name {arch}"
        elif arch == "10.0a" and tuple(map(int, toolkit.version.split("."))) < (12, 8):
            reasons[name] = f"CUDA {toolkit.version} does not know {arch}; 12.8 does"
        elif cutlass is None:
            reasons[name] = f"CUTLASS's headers were not found; {HOW_TO_GET_CUTLASS}"
    return Settings(
        torch=torch,
        torch_cuda=torch_cuda,
        compiler=compiler,
        toolkit=toolkit,
        cutlass=cutlass,
        arch_list=arch_list,
        max_jobs=int(env["MAX_JOBS"]) if env.get("MAX_JOBS", "").isdigit() else usable_cores(),
        debug=flag_set(env, "DEBUG"),
        skipped={name: reason for name, reason in reasons.items() if reason},
    )


@contextlib.contextmanager
def build_environment(settings: Settings) -> Iterator[None]:
    """Let torch.utils.cpp_extension see these settings: it reads them from the environment and from its CUDA_HOME."""
    changes = {"TORCH_CUDA_ARCH_LIST": settings.cuda_arch_list, "MAX_JOBS": str(settings.max_jobs)}
    if settings.compiler:
        changes["CXX"] = settings.compiler
    if settings.toolkit:
        changes["CUDA_HOME"] = str(settings.toolkit.home)
    with mock.patch.dict(os.environ, changes):
        from torch.utils import cpp_extension

        # Computed when that module was first imported, possibly before this function ran.
        home = changes.get("CUDA_HOME", cpp_extension.CUDA_HOME)
        with mock.patch.object(cpp_extension, "CUDA_HOME", home):
            yield


def main() -> None:
    """Print the decision for this machine; the Makefile runs this before it installs a toolkit."""
    try:
        import torch
    except ImportError:
        versions: tuple[str | None, str | None] = (None, None)
    else:
        versions = (torch.__version__, torch.version.cuda)
    try:
        print(decide(os.environ, torch=versions[0], torch_cuda=versions[1]))
    except BuildError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
