"""Mistakes planted one at a time, each of which the default tier must notice.

python -m tests.mutants                      # all of them, as a table; exits with 1 if one is missed
python -m tests.mutants --only stale,17      # those whose name contains a text, or with a number
python -m tests.mutants --list

Each is planted in a copy of the tree and tested by the part of the suite that is expected to notice.  A change of
csrc/cpu is compiled there; csrc/cuda is executed by tests/emulator, which compiles what has changed.  First of all, the
tests in question must pass without any mistake.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests.needs import ROOT


class Mutant(NamedTuple):
    """`old`, which `file` has once, replaced by `new`; `tests` are arguments of pytest."""

    name: str
    file: str
    old: str
    new: str
    tests: str

    def plant(self, tree: Path) -> None:
        path = tree / self.file
        text = path.read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: {self.file} has {text.count(self.old)} times: {self.old!r}")
        path.write_text(text.replace(self.old, self.new))


# fmt: off
MUTANTS = tuple(Mutant(*row) for row in (
    ("residual dropped", "resfuse/ops/conv_bn_act.py",
     "input, conv_weight, conv_bias, convolution, bn, residual, relu, overwrite_residual\n        )",
     "input, conv_weight, conv_bias, convolution, bn, None, relu, overwrite_residual\n        )",
     "tests/ops/test_conv_bn_act.py::test_options"),
    ("eval backward by the training formula", "resfuse/ops/bn_act.py",
     "grad_output, input, saved.output, saved.vectors, ctx.relu, ctx.training, needs_input,",
     "grad_output, input, saved.output, saved.vectors, ctx.relu, True, needs_input,",
     "tests/ops/test_known_bugs.py::test_eval_backward_does_not_use_the_training_formula"),
    ("statistics of the forward not copied", "resfuse/backends/reference.py",
     "_widen(bn.running_mean).clone()", "_widen(bn.running_mean)",
     "tests/ops/test_autograd.py::test_statistics_of_an_eval_forward_survive_training"),
    ("gradients of a frozen layer skipped", "resfuse/ops/conv_bn_act.py",
     "any(needs_conv), needs_residual and ctx.relu, ctx.request,",
     "needs_conv[1], needs_residual and ctx.relu, ctx.request,",
     "tests/ops/test_known_bugs.py::test_gradients_flow_to_a_frozen_layers_input_only"),
    ("registered operator swaps padding and dilation", "resfuse/ops/conv_bn_act.py",
     "tuple(padding), tuple(dilation), groups", "tuple(dilation), tuple(padding), groups",
     "tests/systems/test_compile.py::test_settings_of_a_convolution"),
    ("fake promises other strides", "resfuse/ops/conv_bn_act.py",
     "    memory_format = conv_memory_format(input, conv_weight)\n    return torch.empty(",
     "    memory_format = torch.contiguous_format\n    return torch.empty(",
     "tests/ops/test_opcheck.py::test_conv_bn_act"),
    ("export loses the bias of a convolution", "resfuse/ops/decompositions.py",
     "conv_weight.to(input.dtype), conv_bias, stride", "conv_weight.to(input.dtype), None, stride",
     "tests/systems/test_export.py::test_decompositions_take_every_argument"),
    ("merged M2 without the distance of means", "resfuse/ops/sync_bn_act.py",
     "    m2 = m2s.sum(0) + (counts * (means - mean).square()).sum(0)\n", "    m2 = m2s.sum(0)\n",
     "tests/distributed/test_distributed.py::test_merged_statistics_are_those_of_the_whole"),
    ("autocast ignored", "resfuse/functional.py",
     "if autocast and input.dtype != torch.float64 else input.dtype",
     "if autocast and input.dtype == torch.float64 else input.dtype",
     "tests/ops/test_conv_bn_act.py::test_autocast"),
    ("dtype of the residual unchecked", "resfuse/arguments.py",
     "    if residual.dtype != input.dtype:\n", "    if residual.dtype != input.dtype and pad:\n",
     "tests/ops/test_bad_input.py"),
    ("stride of one dimension for both", "resfuse/types.py",
     "    return pair[0], pair[-1]", "    return pair[0], pair[0]",
     "tests/ops/test_known_bugs.py::test_keyword_geometry_is_not_dropped"),
    ("channels_last output becomes NCHW", "resfuse/layout.py",
     "if is_channels_last(input) or is_channels_last(conv_weight):",
     "if is_channels_last(input) and is_channels_last(conv_weight):",
     "tests/ops/test_conv_bn_act.py::test_layouts"),
    ("request ignored", "resfuse/backends/dispatch.py",
     "return choose(problem, _request.get() if request is IN_FORCE else request)[1]", "return choose(problem, None)[1]",
     "tests/backends/test_dispatch.py"),
    ("backward follows a later request", "resfuse/backends/dispatch.py",
     "return choose(problem, _request.get() if request is IN_FORCE else request)[1]",
     "return choose(problem, _request.get())[1]",
     "tests/backends/test_dispatch.py"),
    ("momentum swapped", "resfuse/backends/reference.py",
     "running_var, True, momentum, eps)", "running_var, True, 1 - momentum, eps)",
     "tests/ops/test_differential.py::test_bn_act"),
    ("eps dropped in backward", "resfuse/backends/reference.py",
     "(_widen(bn.running_var) + bn.eps).rsqrt()", "_widen(bn.running_var).rsqrt()",
     "tests/ops/test_known_bugs.py::test_frozen_batch_norm_uses_eps"),
    ("second sum dropped", "resfuse/backends/reference.py",
     "        g = g - _per_channel(sum_g) / count - xhat * _per_channel(sum_g_xhat) / count\n",
     "        g = g - _per_channel(sum_g) / count\n",
     "tests/ops/test_autograd.py::test_second_derivatives_equal_eager"),
    ("tiles that are not finite kept", "csrc/cpu/conv_winograd.inl",
     "        if (finite)\n", "        if (true)\n",
     "tests/backends/cpu/test_conv.py::test_not_finite"),
    ("weight gradients that are not finite kept", "csrc/cpu/conv_weight_grad.inl",
     "finite &= check[lane] == 0.0f;", "(void)check;",
     "tests/backends/cpu/test_conv.py::test_weight_gradients_that_are_not_finite"),
    ("gradients of a column that is not there", "csrc/cpu/conv_weight_grad.inl",
     "has_right = left + 1 < conv.out_width;", "has_right = true;",
     "tests/backends/cpu/test_conv.py::test_weight_gradients"),
    ("mask of what is zero only as a bfloat16", "csrc/cpu/bn_act.inl",
     "std::is_same_v<T, bf16> ? 0x1p-134f : 0.0f", "0.0f",
     "tests/ops/test_recomputed_output.py::test_bn_act"),
    ("last maximum of a window taken", "csrc/cpu/max_pool.inl",
     "(value > best) |", "(value >= best) |",
     "tests/ops/test_max_pool.py::test_equals_pytorch"),
    ("last maximum of a window taken, CUDA", "csrc/cuda/max_pool.cu",
     "value[k] > best[k] ||", "value[k] >= best[k] ||",
     "tests/ops/test_max_pool.py::test_equals_pytorch"),
    ("bypassed hook of a max pooling", "resfuse/nn/max_pool.py",
     "not options and unobserved(f) and", "not options and",
     "tests/ops/test_max_pool.py"),
    ("mean not rounded before it normalises, CUDA", "csrc/cuda/bn_act_forward.cu",
     "    memory.vectors[threadIdx.x] = affine<T>(args, channel, mean, invstd);\n",
     "    memory.vectors[threadIdx.x] = affine<T>(args, channel, mean * (1 + 1e-7f), invstd);\n",
     "tests/ops/test_recomputed_output.py::test_bn_act"),
    ("activation computed again though it was written to", "resfuse/ops/recompute.py",
     "version is not None and version == tensor._version", "version is not None",
     "tests/fuse/test_recompute.py::test_activation_written_to_before_it_is_read"),
    ("activation computed again without its residual", "resfuse/ops/recompute.py",
     "saved.z, vectors, residual)", "saved.z, vectors, None)",
     "tests/fuse/test_recompute.py::test_networks_of_resfuse"),
    ("activations computed again stay", "resfuse/ops/recompute.py",
     "        ctx.reading = None  # all readers", "        # all readers",
     "tests/fuse/test_recompute.py::test_memory_is_freed_after_backward"),
    ("what was computed again outlives its backward pass", "resfuse/ops/recompute.py",
     "if node.reading is None or node.reading.task != task:", "if node.reading is None:",
     "tests/fuse/test_recompute.py::test_in_place_writes_are_noticed"),
    ("second derivatives through activations computed again lost", "resfuse/ops/recompute.py",
     "output_of(ctx.kept[0], torch.is_grad_enabled())", "output_of(ctx.kept[0], False)",
     "tests/fuse/test_recompute.py::test_second_derivatives"),
    ("a residual saved that nobody else saves", "resfuse/ops/recompute.py",
     "or ctx.kept[1] is not None or _is_saved(residual))", "or True)",
     "tests/fuse/test_recompute.py::test_every_way_of_writing_a_block"),
    ("copies lose recomputation", "resfuse/fuse/fused_class.py",
     "(cls._resfuse_original, *cls._resfuse_options)", "(cls._resfuse_original, cls._resfuse_options[0])",
     "tests/fuse/test_recompute.py::test_copies_keep_it_and_unfuse_takes_it_away"),
    ("parameters that FSDP has taken away", "resfuse/ops/recompute.py",
     "vectors = (saved.weight_copy, saved.bias_copy,", "vectors = (saved.weight, saved.bias,",
     "tests/distributed/test_distributed.py::test_two_processes"),
    ("NaN swallowed by max pooling", "csrc/cpu/conv_pool.inl",
     "          most = value != value ? value : most;\n", "",
     "tests/backends/cpu/test_conv_pool.py"),
    ("residual that may be the input is overwritten", "csrc/bindings_cpu_conv.cpp",
     "(is_read_before(args.conv) || !may_overlap(*residual, given))", "true",
     "tests/backends/cpu/test_conv_pool.py"),
    ("an image of the input overwritten before it is read", "csrc/bindings_cpu_conv.cpp",
     "given.size(1) * given.size(2) * given.size(3) == last.filters * last.out_height * last.out_width", "true",
     "tests/backends/cpu/test_conv_chain.py"),
    ("the second output between convolutions written over the first", "csrc/cpu/conv_chain.cpp",
     "memory + i % 2 * part_bytes", "memory",
     "tests/backends/cpu/test_conv_chain.py"),
    ("a convolution's input written to before it is computed", "resfuse/nn/lazy.py",
     "lazy.detach() if lazy.before else lazy.evaluate()", "lazy.before or lazy.evaluate()",
     "tests/backends/cpu/test_conv_chain.py"),
    ("residual of fewer channels read beyond them", "csrc/cpu/conv_gemm.inl",
     "std::clamp<int64_t>(args.residual_channels - at, 0, filters)", "filters",
     "tests/backends/cpu/test_conv.py::test_random"),
    ("NaN swallowed by ReLU, convolutions on the CPU", "csrc/cpu/conv_vec.inl",
     "vrelu(vec value) { return value < 0.0f ? vec{} : value; }",
     "vrelu(vec value) { return value > 0.0f ? value : vec{}; }",
     "tests/backends/cpu/test_conv.py::test_not_finite"),
    ("a view's statistics updated in a copy", "resfuse/backends/cpu.py",
     "    copy_back(bn, means, variances)\n", "",
     "tests/ops/test_bn_act.py::test_statistics_that_are_views_are_updated_where_they_lie"),
    ("running_var biased", "csrc/cpu/bn_act.inl",
     "args.momentum * (m2 / (count - 1))", "args.momentum * (m2 / count)",
     "tests/ops/test_known_bugs.py::test_running_variance_is_unbiased_and_the_normalising_one_biased"),
    ("NaN swallowed by ReLU, CPU", "csrc/cpu/vec.inl",
     "    return part < 0.0f ? decltype(part){} : part;\n",
     "    return part > 0.0f ? part : decltype(part){};\n",
     "tests/ops/test_add_relu.py::test_special_values"),
    ("NaN swallowed by ReLU, CUDA", "csrc/cuda/vector.cuh",
     "float relu(float x) { return x <= 0.f ? 0.f : x; }", "float relu(float x) { return x > 0.f ? x : 0.f; }",
     "tests/ops/test_add_relu.py::test_special_values"),
    ("mask from the wrong tensor, CUDA", "csrc/cuda/bn_act_backward.cu",
     "      E::unpack(y, output);\n", "      E::unpack(x, output);\n",
     "tests/ops/test_bn_act.py::test_options"),
    ("grid barrier removed, CUDA", "csrc/cuda/reduce.cuh",
     "    cooperative_groups::this_grid().sync();\n", "    __syncthreads();\n",
     "tests/backends/test_cuda.py::test_any_number_of_parts"),
    ("dilation of the wrong dimension, CUDA", "csrc/cuda/conv_tile.cuh",
     "    const int dy = r * conv.dilation_h, dx = s * conv.dilation_w;\n    c = 0;",
     "    const int dy = r * conv.dilation_w, dx = s * conv.dilation_w;\n    c = 0;",
     "tests/backends/test_cuda_conv.py::test_every_tile"),
    ("mask from the wrong tensor, Triton", "resfuse/backends/triton/bn_tile.py",
     "            y = tl.load(y_ptr + offset + offsets, mask, other=0.0)\n",
     "            y = tl.load(dy_ptr + offset + offsets, mask, other=0.0)\n",
     "tests/ops/test_bn_act.py::test_options"),
    ("running_var biased, Triton", "resfuse/backends/triton/reduce.py",
     "m2 / (count - 1) * momentum", "m2 / count * momentum",
     "tests/ops/test_known_bugs.py::test_running_variance_is_unbiased_and_the_normalising_one_biased"),
    ("rows padded by the columns' padding, Triton", "resfuse/backends/triton/conv_tile.py",
     "CONV.stride_h - CONV.pad_h\n", "CONV.stride_h - CONV.pad_w\n",
     "tests/ops/test_conv_bn_act.py::test_shapes"),
    ("num_batches_tracked forgotten", "resfuse/nn/batch_norm.py",
     "            count.add_(batches)\n", "            pass\n",
     "tests/nn/test_settings.py::test_norm_settings"),
    ("momentum=None taken for 0", "resfuse/nn/batch_norm.py",
     "1.0 / (float(count) + 1.0)", "0.0",
     "tests/nn/test_settings.py::test_momentum_none_is_the_average_of_all_batches"),
    ("lost hook", "resfuse/nn/fused_call.py",
     "        attributes[\"_forward_hooks\"]\n        or attributes", "        attributes",
     "tests/nn/test_fallback.py::test_hooks_on_inner_modules_run"),
    ("stride on the wrong convolution", "resfuse/nn/blocks.py",
     "    stride_first: ClassVar[bool] = False\n", "    stride_first: ClassVar[bool] = True\n",
     "tests/nn/test_modules.py::test_block_has_torchvisions_state_and_arguments"),
    ("final ReLU missing", "resfuse/nn/blocks.py",
     "    return call(block.relu, add_(output, residual, last=True))\n",
     "    return add_(output, residual, last=True)\n",
     "tests/nn/test_modules.py::test_block_equals_torchvisions"),
    ("padded shortcut starts at the second pixel", "resfuse/nn/zero_pad.py",
     "input[:, :, :: self.stride, :: self.stride]", "input[:, :, 1 :: self.stride, :: self.stride]",
     "tests/ops/test_pad_residual.py::test_shortcut_alone"),
    ("state_dict keys of a network changed", "resfuse/models/network.py",
     "            self.add_module(f\"layer{i + 1}\", Stage(blocks, checkpoint, recompute))\n",
     "            self.add_module(f\"stage{i + 1}\", Stage(blocks, checkpoint, recompute))\n",
     "tests/nn/test_models.py::test_torchvisions_checkpoint"),
    ("failed fuse_ leaves half a model", "resfuse/fuse/fuse.py",
     "        for module in fusion.changed:\n            _restore(module)\n        raise", "        raise",
     "tests/fuse/test_undo.py::test_failure_leaves_the_model_as_it_was"),
    ("another source rewritten", "resfuse/fuse/rewrite.py",
     "                same = _same_code(_compile(node, function).__code__, code)\n", "                same = True\n",
     "tests/fuse/test_left_alone.py::test_source_edited_since"),
    ("norm that nobody reads is not computed", "resfuse/fuse/rewrite.py",
     "        return {name for name in self.pending if name not in statement.live_before or name in overwritten}\n",
     "        return set()\n",
     "tests/fuse/test_styles.py::test_trap"),
    ("nested functions see what is not computed", "resfuse/fuse/rewrite.py",
     "*self._force_captured(body[0])", "*[]",
     "tests/fuse/test_styles.py::test_between_other_layers"),
    ("input written before it is read", "resfuse/nn/lazy.py",
     "                    lazy.detach() if lazy.before else lazy.evaluate()\n",
     "                    lazy.detach()\n",
     "tests/fuse/test_styles.py::test_trap"),
    ("pending result given to two readers", "resfuse/fuse/rewrite.py",
     "        if (alias - stored) & node.live_after:\n            return False\n", "",
     "tests/fuse/test_styles.py::test_trap"),
    ("contract ten times as wide", "resfuse/contract.py",
     "FACTOR = 1.5\n", "FACTOR = 15\n",
     "tests/ops/test_contract.py"),
    ("wrong bytes in the roofline", "resfuse/roofline.py",
     "moved = sum(map(nbytes, (*read.values(), *outputs)))", "moved = sum(map(nbytes, read.values()))",
     "tests/explain/test_roofline.py"),
    ("verify reports no violation", "resfuse/cli/verify.py",
     "violations = [finding for finding in findings if finding[1].violated]",
     "violations = []  # type: ignore[var-annotated]",
     "tests/cli/test_cli.py"),
    ("stable ABI of another torch", "resfuse/_build.py",
     'MACROS = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]', "MACROS: list[str] = []",
     "tests/packaging/test_build.py"),
    ("wrong provider gets a speed", "benchmarks/harness.py",
     "        if complaint := workload.complaint(errors):\n",
     "        if (complaint := workload.complaint(errors)) and graph:\n",
     "tests/benchmarks/test_harness.py::test_a_wrong_provider_gets_no_speed"),
))
# fmt: on


def copied(folder: Path) -> Path:
    """A copy of the working tree, with the libraries that were built in it."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    built = [str(path.relative_to(ROOT)) for path in (ROOT / "resfuse").glob("_*.abi3.so")]
    for name in [*filter(None, listed.split("\0")), *built, "resfuse/_build_info.json"]:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (ROOT / "build" / "emulator").mkdir(parents=True, exist_ok=True)
    (folder / "build").mkdir()
    (folder / "build" / "emulator").symlink_to(ROOT / "build" / "emulator")  # objects, named by their contents
    return folder


def run(tree: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(tree), "RESFUSE_SKIP_CUDA_BUILD": "1"}
    return subprocess.run([sys.executable, *command], cwd=tree, env=environment, capture_output=True, text=True)


def pytest(tree: Path, tests: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return run(tree, "-m", "pytest", "-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", *tests)


def outcome(mutant: Mutant) -> tuple[str, str]:
    """("caught", "missed" or "error", the end of the output)."""
    with tempfile.TemporaryDirectory() as folder:
        tree = copied(Path(folder))
        mutant.plant(tree)
        if mutant.file.startswith("csrc/") and "cuda" not in mutant.file:
            built = run(tree, "setup.py", "-q", "build_ext", "--inplace")
            if built.returncode:
                return "error", built.stdout + built.stderr
        done = pytest(tree, mutant.tests.split())
    return {0: "missed", 1: "caught"}.get(done.returncode, "error"), done.stdout + done.stderr


def chosen(only: str) -> list[tuple[int, Mutant]]:
    numbered = list(enumerate(MUTANTS, 1))
    wanted = [text for text in only.split(",") if text]
    return [
        (number, mutant)
        for number, mutant in numbered
        if not wanted or any(text == str(number) or (not text.isdigit() and text in mutant.name) for text in wanted)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="NAME,...", help="numbers, or parts of names")
    parser.add_argument("--list", action="store_true", help="show them and run nothing")
    parser.add_argument("--trust", action="store_true", help="do not run the tests without a mistake first")
    arguments = parser.parse_args()
    mutants = chosen(arguments.only)
    if arguments.list or not mutants:
        for number, mutant in mutants:
            print(f"{number:3} {mutant.name:44} {mutant.file}")
        return int(not mutants)
    if not arguments.trust:
        with tempfile.TemporaryDirectory() as folder:
            done = pytest(copied(Path(folder)), sorted({test for _, m in mutants for test in m.tests.split()}))
        if done.returncode:
            print(done.stdout[-4000:] + done.stderr[-2000:])
            print("The tests fail without any mistake.")
            return 2
    missed = 0
    print(f"{'':3} {'mistake':44} {'file':36} {'outcome':8} {'s':>5}")
    for number, mutant in mutants:
        begin = time.perf_counter()
        word, output = outcome(mutant)
        missed += word != "caught"
        print(f"{number:3} {mutant.name:44} {mutant.file:36} {word:8} {time.perf_counter() - begin:5.0f}", flush=True)
        if word == "error":
            print(output[-3000:])
    print(f"{len(mutants) - missed} of {len(mutants)} caught")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
