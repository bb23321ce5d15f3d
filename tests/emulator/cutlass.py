"""CUTLASS's headers for the emulator: a copy in which calls stand in for the inline PTX of sm_90a.

The text of the PTX selects the call and the order of its operands.  An instruction that is not in the table fails when
it is executed.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

HEADERS = (
    "cute/arch/cluster_sm90.hpp",
    "cute/arch/copy_sm75.hpp",
    "cute/arch/copy_sm90.hpp",
    "cute/arch/copy_sm90_desc.hpp",
    "cute/arch/copy_sm90_tma.hpp",
    "cute/arch/mma_sm90_gmma.hpp",
    "cutlass/arch/barrier.h",
    "cutlass/arch/reg_reconfig.h",
    "cutlass/arch/wmma.h",
    "cutlass/cutlass.h",
    "cutlass/device_kernel.h",
    "cutlass/pipeline/sm90_pipeline.hpp",
)
# The device's side of the headers, without __CUDA_ARCH__, which would also choose it in NVIDIA's headers of types.
DEFINES = (
    "__CUDA_ARCH_FEAT_SM90_ALL",
    "CUTLASS_ARCH_MMA_SM90_ENABLED",
    "CUTE_ARCH_MMA_SM90A_ENABLED",
    "CUTE_ARCH_ELECT_ONE_SM90_ENABLED",
    "CUTE_ARCH_LDSM_SM75_ACTIVATED",
    "CUTE_CVTA_GENERIC_TO_SHARED_ACTIVATED",
    "CUDA_CTA_RECONFIG_ACTIVATED",
    "CUTLASS_ENABLE_DIRECT_CUDA_DRIVER_CALL",  # the encoders of tensor maps are linked, not looked up in a driver
)
FLAGS = (
    *(f"-D{name}=1" for name in DEFINES),
    *("-D__CUDACC_VER_MAJOR__=13", "-D__CUDACC_VER_MINOR__=0"),
    *("-w", "-Wno-psabi", "-fpermissive"),  # templates that are not used name device functions
    "-fno-canonical-system-headers",  # a header finds others beside the link to it, not beside the original
)

SHARED = r"\[(%\d+)\]"
BYTES = r"::complete_tx::bytes(?:\.L2::cache_hint)?"
TILE = r"\[(%\d+)\], \[(%\d+), \{(.*?)\}\], \[(%\d+)\]"
# {PTX: C++ with its groups}; the first that is found in an asm counts. %n are the operands.
INSTRUCTIONS = {
    rf"mbarrier\.init\S* {SHARED}, (%\d+);": r"mbarrier_init(\1, \2)",
    rf"LAB_WAIT.*mbarrier\.try_wait\.parity\S* P1, {SHARED}, (%\d+)": r"mbarrier_wait(\1, \2)",
    rf"@P2 mbarrier\.test_wait\.parity\S* P1, {SHARED}, (%\d+);": r"mbarrier_test(\1, \2, %0, %3)",
    rf"mbarrier\.try_wait\.parity\S* P1, {SHARED}, (%\d+);": r"mbarrier_test(\1, \2, %0)",
    r"mapa\S* remAddr32, (%\d+), (%\d+); mbarrier\.arrive\.shared::cluster\.b64 _, ": r"mbarrier_arrive_remote(\1, \2)",
    rf"mbarrier\.arrive\.expect_tx\.shared::cta\.b64 _, {SHARED}, (%\d+);": r"mbarrier_arrive_expect(\1, \2)",
    rf"mbarrier\.arrive\.shared::cta\.b64 \w+, {SHARED};": r"mbarrier_arrive(\1)",
    rf"mbarrier\.expect_tx\S* {SHARED}, (%\d+);": r"mbarrier_expect(\1, \2)",
    r"fence\.mbarrier_init\.release\.cluster;": "fence_mbarrier_init()",
    r"fence\.proxy\.async\S*;": "fence_proxy_async()",
    r"\bbar(?:rier)?\.sync (%\d+), (%\d+);": r"named_barrier(\1, \2, true)",
    r"\bbar(?:rier)?\.arrive (%\d+), (%\d+);": r"named_barrier(\1, \2, false)",
    r"elect\.sync \S+, (%\d+);": r"elect(\1, %0, %1)",
    r"setmaxnreg\.(inc|dec)\.sync\.aligned\.u32 (%\d+);": r"setmaxnreg_\1(\2)",
    r"prefetch\.tensormap \[(%\d+)\];": r"prefetch_tensor_map(\1)",
    rf"cp\.async\.bulk\.tensor\.\dd\.shared::cluster\.global\.mbarrier{BYTES} {TILE}": (
        r"tma_load(\2, {\3}, {}, \1, \4)"
    ),
    rf"cp\.async\.bulk\.tensor\.\dd\.shared::cluster\.global\.im2col\.mbarrier{BYTES} {TILE}, \{{(.*?)\}};": (
        r"tma_load(\2, {\3}, {\5}, \1, \4)"
    ),
    r"cp\.async\.bulk\.tensor\.\dd\.global\.shared::cta\.bulk_group \[(%\d+), \{(.*?)\}\], \[(%\d+)\];": (
        r"tma_store(\1, {\2}, \3)"
    ),
    r"cp\.async\.bulk\.commit_group;": "tma_store_commit()",
    r"cp\.async\.bulk\.wait_group(?:\.read)? (%\d+);": r"tma_store_wait(\1)",
    r"wgmma\.fence\.sync\.aligned;": "wgmma_fence()",
    r"wgmma\.commit_group\.sync\.aligned;": "wgmma_commit()",
    r"wgmma\.wait_group\.sync\.aligned (%\d+);": r"wgmma_wait(\1)",
    r"setp\.ne\.b32 p, (%\d+), 0; wgmma\.mma_async\.sync\.aligned\.m64n\d+k(?:16|8)\.f32\.(bf16|f16|tf32)\.\2 "
    r"\{(.*?)\}, (%\d+), (%\d+), p, (.*?);": r"wgmma<emu::MmaType::\2>(\4, \5, \1, {\6}, \3)",
    rf"ldmatrix\.sync\.aligned\.x\d\.m8n8\.shared\.b16 \{{(.*?)\}}, {SHARED};": r"ldmatrix_from<false>(\2, \1)",
    rf"ldmatrix\.sync\.aligned\.x\d\.trans\.m8n8\.shared\.b16 \{{(.*?)\}}, {SHARED};": r"ldmatrix_from<true>(\2, \1)",
    rf"stmatrix\.sync\.aligned\.x\d\.m8n8\.shared\.b16 {SHARED}, \{{(.*?)\}};": r"stmatrix(\1, \2)",
    r"brkpt;": 'fail("a breakpoint of CUTLASS")',
}

Edit = tuple[str, str, str]
"""(a header, a pattern that it has once, what replaces it)"""


def overlay(include: Path, target: Path, edits: Sequence[Edit] = ()) -> None:
    """Make the folder `target` from CUTLASS's `include`: links, for headers find each other, and what differs."""
    scratch = target.with_suffix(".new")
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(include, scratch, copy_function=os.symlink)
    for name in {*HEADERS, *(name for name, _, _ in edits)}:
        text = "\n" if name.endswith("wmma.h") else (include / name).read_text()
        for _, pattern, replacement in (edit for edit in edits if edit[0] == name):
            text, count = re.subn(pattern, replacement, text)
            assert count == 1, f"{count} times in {name}: {pattern}"
        (scratch / name).unlink()
        (scratch / name).write_text(translated(text, name))
    scratch.rename(target)


def translated(text: str, name: str) -> str:
    """A header, with every `asm` replaced and the line numbers kept."""
    if name.endswith("cutlass.h"):  # indices of the thread
        text = text.replace("defined(__CUDA_ARCH__)", "1")
    text = text.replace("CUDA_BARRIER_ENABLED 0", "CUDA_BARRIER_ENABLED 1")
    text = text.replace("extern __shared__", "extern")  # of CUTLASS's own kernels
    parts, end = [], 0
    for match in re.finditer(r"\basm(?:\s+volatile)?\s*\(", text):
        sections = list(_split(text, match.end(), ":"))
        parts += [text[end : match.start()], _call(*sections), "\n" * text.count("\n", match.start(), _end(sections))]
        end = _end(sections) + 1
    return "".join([*parts, text[end:]])


Section = tuple[int, str]
"""(where in the header it ends, its text)"""


def _end(sections: list[Section]) -> int:
    return sections[-1][0]


def _split(text: str, start: int, separator: str) -> Iterator[Section]:
    """The parts of what is in parentheses that were opened right before `start`."""
    depth, begin = 0, start
    for token in re.finditer(r'"(?:\\.|[^"\\])*"|//[^\n]*|[(){}\[\]:,]', text[start:]):
        at, what = start + token.start(), token[0]
        if (what == ")" and depth == 0) or (what == separator and depth == 0):
            yield at, text[begin:at]
            begin = at + 1
            if what == ")":
                return
        depth += (what in "([{") - (what in ")]}")


def _call(template: Section, *operands: Section) -> str:
    """The C++ of an asm: its template, then outputs, inputs and clobbers."""
    expressions = []
    for _, section in operands[:2]:
        for _, operand in _split(section + ")", 0, ","):
            if operand.strip():
                expressions.append(operand[operand.index("(") :].strip())
    ptx = "".join(re.findall(r'"((?:\\.|[^"\\])*)"', template[1])).replace(r"\n", " ").replace(r"\t", " ")
    ptx = " ".join(ptx.split())
    for pattern, call in INSTRUCTIONS.items():
        if match := re.search(pattern, ptx):
            return "emu::" + re.sub(r"%(\d+)", lambda number: expressions[int(number[1])], match.expand(call))
    return f'emu::fail("PTX that is not emulated: %s", "{ptx}")' if ptx else "(void)0"
