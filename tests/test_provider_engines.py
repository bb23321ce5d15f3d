"""Providers with a runtime of their own on GPUs: their stream, TensorRT's engine, the models that they are given."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("torchvision")

from benchmarks.cases import networks
from benchmarks.providers import tensorrt_engine
from benchmarks.providers.exported import onnx_model
from benchmarks.providers.side_stream import SideStream
from tests.stand_ins import calibrated


def test_a_side_stream_works_between_what_is_before_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    current = SimpleNamespace(wait_stream=lambda other: events.append("torch waits"))
    side = SimpleNamespace(cuda_stream=140, wait_stream=lambda other: events.append("the library waits"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    stream = SideStream(torch.device("cuda"))
    with stream.ordered() as address:
        events.append(f"work on {address}")
    assert events == ["the library waits", "work on 140", "torch waits"]
    assert stream.address == 140


class Flags(set[str]):
    """TensorRT's builder configuration."""

    set_flag, clear_flag = set.add, set.discard
    builder_optimization_level = 3

    def create_timing_cache(self, content: bytes) -> bytes:
        return content + b"+"

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> None:
        self.cache = cache

    def get_timing_cache(self) -> Any:
        return SimpleNamespace(serialize=lambda: self.cache)


def fake_tensorrt(config: Flags, plan: Any = b"plan", readable: bool = True) -> Any:
    parser = SimpleNamespace(
        parse=lambda model: readable, num_errors=1, get_error=lambda index: "node 3: no such thing"
    )
    builder = SimpleNamespace(
        create_network=lambda flags: flags, create_builder_config=lambda: config,
        build_serialized_network=lambda network, config: plan,
    )  # fmt: skip
    return SimpleNamespace(
        Logger=type("Logger", (), {"ERROR": 1, "__init__": lambda self, level: None}),
        Builder=lambda logger: builder, OnnxParser=lambda network, logger: parser,
        NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=1), BuilderFlag=SimpleNamespace(TF32="tf32"),
        TensorIOMode=SimpleNamespace(INPUT="input", OUTPUT="output"),
    )  # fmt: skip


def test_tensorrt_keeps_its_timings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "below" / "timings"
    for allowed, content in ((True, b"+"), (False, b"++")):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
        config = Flags({"tf32"})
        assert tensorrt_engine.build(fake_tensorrt(config), b"model", cache) == b"plan"
        assert cache.read_bytes() == content
        assert ("tf32" in config) == allowed
        assert config.builder_optimization_level == tensorrt_engine.OPTIMIZATION_LEVEL


def test_tensorrt_says_what_it_can_not_read(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="can not read the model: node 3"):
        tensorrt_engine.build(fake_tensorrt(Flags(), readable=False), b"", tmp_path / "timings")
    with pytest.raises(RuntimeError, match="found no engine"):
        tensorrt_engine.build(fake_tensorrt(Flags(), plan=None), b"", tmp_path / "timings")
    assert not (tmp_path / "timings").exists()


def test_an_engine_is_given_the_addresses_of_tensors() -> None:
    modes = {"input": "input", "residual": "input", "output": "output"}
    addresses: dict[str, int] = {}
    launched: list[int] = []

    def execute(stream: int) -> bool:
        launched.append(stream)
        return stream == 7

    context = SimpleNamespace(set_tensor_address=addresses.__setitem__, execute_async_v3=execute)
    engine = SimpleNamespace(
        num_io_tensors=3, get_tensor_name=list(modes).__getitem__, get_tensor_mode=modes.__getitem__,
        create_execution_context=lambda: context,
    )  # fmt: skip
    streams = iter((contextlib.nullcontext(7), contextlib.nullcontext(8)))
    output, input, residual = (torch.rand(2) for _ in range(3))
    step = tensorrt_engine.make_engine_step(fake_tensorrt(Flags()), engine, output, lambda: next(streams))
    assert step(input, residual) is output
    assert addresses == {"output": output.data_ptr(), "input": input.data_ptr(), "residual": residual.data_ptr()}
    with pytest.raises(RuntimeError, match="could not enqueue"):
        step(input, residual)
    assert launched == [7, 8]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_exported_models_are_valid_and_of_their_dtype(dtype: torch.dtype) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    module, input = calibrated(networks.build_block("resnet18", "layer2.0"), (1, 64, 6, 6), dtype=dtype)
    model = onnx.load_from_string(onnx_model(module, (input,)))
    onnx.checker.check_model(model, full_check=True)
    kinds = {onnx.TensorProto.FLOAT: torch.float32, onnx.TensorProto.FLOAT16: torch.float16}
    kinds[onnx.TensorProto.BFLOAT16] = torch.bfloat16
    (given,), (made,) = model.graph.input, model.graph.output
    assert kinds[given.type.tensor_type.elem_type] == kinds[made.type.tensor_type.elem_type] == dtype
    assert [size.dim_value for size in given.type.tensor_type.shape.dim] == [1, 64, 6, 6]
