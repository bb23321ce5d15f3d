"""Scale on paper: the arithmetic of collectives, buckets, overlap and synchronised batch norm; the page's tables."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torchvision")

from resfuse.costs import describe

from benchmarks import pages, records
from benchmarks.records import Conditions, Subject
from benchmarks.scaling import __main__ as command
from benchmarks.scaling import collectives
from benchmarks.scaling.buckets import CAP, FIRST, Bucket, Gradients, fill, overlap
from benchmarks.scaling.collectives import Cluster, all_gather, all_reduce
from benchmarks.scaling.estimate import EPOCHS, IMAGES, JPEG, estimate, sync_bn
from benchmarks.scaling.page import PAGE, page_tables
from benchmarks.scaling.profile import Profile, roofline_profile

ROUND = Cluster(8, 100e9, 10e9)
"""With round figures: 100 GB/s within a node, 10 GB/s for each adapter."""
SMALL = Profile(1.0, (Gradients(0.5, (4,)), Gradients(1.5, (8, 16))), 0.25, (64, 128))
RESNET50_PARAMETERS = 25_557_032


def is_close(found: float, expected: float) -> bool:
    return math.isclose(found, expected, rel_tol=1e-9)


# Collectives


def test_one_gpu_communicates_nothing() -> None:
    assert all_reduce(10**9, 1, ROUND) == 0
    assert all_gather(10**9, 1, ROUND) == 0


def test_large_all_reduce_by_hand() -> None:
    # A ring by chunks: 2 steps over NVLink, half of the bytes in each.
    assert is_close(all_reduce(10**9, 2, ROUND), 8.4e-6 + 2 * 3.4e-6 + 1e9 / 100e9)
    # Two nodes of eight: 30 steps, 4 of them by the network; 8 adapters of 10 GB/s carry 15/8 of the bytes.
    expected = 8.4e-6 + 26 * 3.4e-6 + 4 * 14e-6 + 2 * 15 / 16 * 1e9 / 80e9
    assert is_close(all_reduce(10**9, 16, ROUND), expected)


def test_small_all_reduce_by_hand() -> None:
    # LL, in a ring or a tree: 14 hops of 0.6 us.
    assert is_close(all_reduce(0, 8, ROUND), 6.6e-6 + 14 * 0.6e-6)
    # 128 nodes: a tree, 7 hops up and down between nodes and 7 in the chain of each.
    assert is_close(all_reduce(0, 1024, ROUND), 6.6e-6 + 2 * (7 * 0.6e-6 + 7 * 5e-6))


def test_all_gather_by_hand() -> None:
    assert is_close(all_gather(0, 8, ROUND), 6.6e-6 + 7 * 0.6e-6)
    # 15 steps, one of them to the other node; the hops of a ring across nodes take 1 us at least.
    assert is_close(all_gather(100, 16, ROUND), 6.6e-6 + 14 * 1e-6 + 2.7e-6 + 15 * 100 / (0.25 * 80e9))


def test_many_gpus_send_twice_the_bytes() -> None:
    quick = Cluster(8, 1e3, 1e3)  # so slow that latencies do not count
    assert all_reduce(10**6, 1 << 20, quick) == pytest.approx(2 * 1e6 / 1e3, rel=0.1)
    assert all_reduce(10**6, 2, quick) == pytest.approx(1e6 / 1e3, rel=1e-3)


def test_without_a_bandwidth_term_latency_remains() -> None:
    endless = Cluster(8, math.inf, math.inf)
    assert all_reduce(10**12, 64, endless) == all_reduce(0, 64, endless) > 0


@given(st.integers(0, 10**9), st.integers(0, 10), st.integers(0, 10))
def test_collectives_are_monotone(size: int, exponent: int, further: int) -> None:
    few, many = 2**exponent, 2 ** (exponent + further)
    for collective in (all_reduce, all_gather):
        assert collective(size, few, ROUND) <= collective(size, many, ROUND)
        assert collective(size, few, ROUND) <= collective(size + 4096, few, ROUND)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="gpus: expected at least 1, got 0"):
        all_reduce(1, 0, ROUND)
    with pytest.raises(ValueError, match=r"size: .* got -1"):
        all_gather(-1, 2, ROUND)
    with pytest.raises(ValueError, match="network_bandwidth: expected more than 0, got 0"):
        Cluster(network_bandwidth=0)
    with pytest.raises(ValueError, match="batch: expected at least 1, got 0"):
        estimate(SMALL, 0, 8, ROUND)
    with pytest.raises(ValueError, match="step time: expected more than 0 s, got 0"):
        SMALL.scaled(0)


# Buckets


def test_buckets_by_hand() -> None:
    layers = [Gradients(1.0, (3, 4)), Gradients(2.0, (10,)), Gradients(3.0, (1,)), Gradients(4.0, (2, 2))]
    # The first is closed at 5 bytes or more, the others at 10 or more; the rest is a bucket too.
    assert fill(layers, 5, 10) == [Bucket(7, 1.0), Bucket(10, 3.0), Bucket(5, 10.0)]
    assert fill([], 5, 10) == []


def test_buckets_are_those_of_torch() -> None:
    distributed = pytest.importorskip("torch.distributed")
    if not hasattr(distributed, "_compute_bucket_assignment_by_size"):
        pytest.skip("torch was built without its distributed part")
    generator = torch.Generator().manual_seed(0)
    numels = torch.randint(1, 3_000_000, (80,), generator=generator).tolist()
    tensors = [torch.empty(numel, device="meta") for numel in numels]
    indices, _ = distributed._compute_bucket_assignment_by_size(
        [torch.empty(1).expand(tensor.shape) for tensor in tensors], [FIRST, CAP]
    )
    expected = [sum(4 * numels[index] for index in bucket) for bucket in indices]
    found = fill([Gradients(1.0, (4 * numel,)) for numel in numels])
    assert [bucket.size for bucket in found] == expected


def test_overlap_by_hand() -> None:
    buckets = [Bucket(10, 1.0), Bucket(10, 2.0), Bucket(20, 4.0)]
    # 0.1 s for 10 bytes: the first two are hidden; the last is ready when backward ends.
    found = overlap(buckets, 4.0, lambda size: size / 100)
    assert is_close(found.communication, 0.4) and is_close(found.exposed, 0.2)
    # 1 s for a byte: from 1.0 on it is all in a row: 1 + 40 s, of which 37 come after backward.
    found = overlap(buckets, 4.0, lambda size: float(size))
    assert is_close(found.communication, 40.0) and is_close(found.exposed, 37.0)
    assert overlap(buckets, 4.0, lambda size: 0.0) == (0.0, 0.0)


# Synchronised batch norm


def test_sync_bn_messages_by_hand() -> None:
    found = sync_bn((64, 128), 8, ROUND)
    assert found.messages == 4
    assert found.size == 4 * (129 + 128) + 4 * (257 + 256)
    latency = 2 * (6.6e-6 + 7 * 0.6e-6) + 2 * (6.6e-6 + 14 * 0.6e-6)
    sent = 7 * 4 * (129 + 257) + 2 * 7 / 8 * 4 * (128 + 256)
    assert is_close(found.seconds, latency + sent / 25e9)
    assert sync_bn((64, 128), 1, ROUND) == (0, 0, 0.0)


# A step


def test_one_gpu_is_as_it_was() -> None:
    found = estimate(SMALL, 32, 1, ROUND, sync_group=1)
    assert (found.communication, found.exposed, found.sync_bn, found.sent) == (0, 0, 0, 0)
    assert found.seconds == SMALL.seconds == 3.25
    assert found.efficiency == 1
    assert is_close(found.images, 32 / 3.25)


def test_a_step_by_hand() -> None:
    found = estimate(SMALL, 32, 8, ROUND)
    reduce = 6.6e-6 + 14 * 0.6e-6 + 2 * 7 / 8 * 28 / 25e9  # one bucket of 28 bytes, ready at the end of backward
    assert (found.buckets, found.reduced, found.sent) == (1, 28, 2 * 7 / 8 * 28)
    assert is_close(found.exposed, reduce)
    assert is_close(found.seconds, 3.25 + reduce)
    assert is_close(found.images, 8 * 32 / (3.25 + reduce))
    assert is_close(found.data, found.images * JPEG)
    assert is_close(found.training, EPOCHS * IMAGES / found.images)
    assert 115e3 < JPEG < 116e3


def test_groups_of_synchronised_batch_norm() -> None:
    alone, node, every = (estimate(SMALL, 32, 1024, ROUND, group).sync_bn for group in (1, 8, 1024))
    assert alone == 0 < node < every
    assert node == sync_bn(SMALL.norms, 8, ROUND).seconds
    assert estimate(SMALL, 32, 4, ROUND, 8).sync_bn == sync_bn(SMALL.norms, 4, ROUND).seconds


def test_more_gpus_are_less_efficient_but_faster() -> None:
    found = [estimate(SMALL.scaled(0.03), 32, 2**exponent, Cluster(), 2**exponent) for exponent in range(11)]
    assert all(after.efficiency < before.efficiency for before, after in itertools.pairwise(found))
    assert all(after.images > before.images for before, after in itertools.pairwise(found))


# The profile of a network


@pytest.fixture(scope="module")
def resnet18() -> Profile:
    return roofline_profile("resnet18", 32, torch.bfloat16, describe("h200"))


def test_profile(resnet18: Profile) -> None:
    from torchvision import models

    model = models.resnet18()
    sizes = [size for layer in resnet18.backward for size in layer.sizes]
    assert sorted(sizes) == sorted(4 * parameter.numel() for parameter in model.parameters())
    with_gradients = [layer.sizes for layer in resnet18.backward if layer.sizes]
    assert sorted(with_gradients[0]) == [4 * 1000, 4 * 512_000]  # the head is first
    assert sorted(with_gradients[-1]) == [4 * 64, 4 * 64, 4 * 64 * 3 * 49]  # and the stem, with its batch norm, last
    assert len(resnet18.norms) == 20
    assert resnet18.forward > 0
    assert resnet18.backward_seconds > resnet18.forward
    assert is_close(resnet18.update, 5 * 4 * sum(parameter.numel() for parameter in model.parameters()) / 4.3e12)


def test_scaled_profile_has_the_same_proportions(resnet18: Profile) -> None:
    found = resnet18.scaled(0.5)
    assert is_close(found.seconds, 0.5)
    assert is_close(found.forward / found.update, resnet18.forward / resnet18.update)
    assert found.gradient_bytes == resnet18.gradient_bytes


# The command and the page


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model-train.csv"
    conditions = Conditions("a GPU", 1, "torch 0", "abc", "2026-01-01")
    subject = Subject("model", "resnet18", "resfuse", "train", "32x3x224x224", "bfloat16", "channels_last")
    records.update(path, [subject.record("time", [0.02], "s", conditions)])
    arguments = ["--model", "resnet18", "--batch", "32", "--gpus", "1", "8", "--sync-bn"]
    assert command.main([*arguments, "--csv", str(path)]) == 0
    output = capsys.readouterr().out
    assert "20.00 ms on one GPU (measured" in output
    assert all(len(line) <= 80 for line in output.splitlines()[2:])
    with pytest.raises(ValueError, match="has no time of a training step of resnet18 by eager_nchw"):
        command.measured_seconds(path, "resnet18", 32, "bfloat16", "eager_nchw")


@pytest.mark.parametrize("option", [["--gpus", "0"], ["--step-time", "0"], ["--step-time", "1", "--csv", "x"]])
def test_command_refuses(option: list[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(option)


def test_command_names_a_network_that_is_none() -> None:
    with pytest.raises(SystemExit, match="resnet51"):
        command.main(["--model", "resnet51"])


@pytest.mark.slow
def test_page() -> None:
    """`python -m benchmarks.scaling.page` writes them anew."""
    assert pages.tables_of(PAGE) == page_tables()


def test_figures_of_the_page_s_text() -> None:
    """Those that are in sentences."""
    text = PAGE.read_text()
    assert f"{4 * RESNET50_PARAMETERS / 1e6:.1f} MB" in text
    hops = collectives.LL
    for value in (hops.base, hops.node_hop, hops.ring_hop, hops.tree_hop):
        assert f"{1e6 * value:.1f}" in text
    assert f"{JPEG / 1e3:.0f} kB" in text
