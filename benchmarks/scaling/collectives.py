"""How long a collective takes: latency of its steps plus bytes over bandwidth, after the cost model inside NCCL.

NCCL chooses algorithm and protocol by such a model, in its src/graph/tuning.cc (as of commit b647562, whose tables the
latencies are from).  This has the parts of it that matter for gradients (megabytes) and for the statistics of batch
norms (kilobytes).
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple


class Protocol(NamedTuple):
    """How data is handed on: flags with every word (LL: quick, a quarter of the bandwidth), or in chunks (Simple)."""

    name: str
    base: float
    """s, whatever the size and the number of GPUs."""
    node_hop: float
    """s from GPU to GPU by NVLink."""
    ring_hop: float
    """s from node to node in a ring."""
    tree_hop: float
    """s from node to node in a tree."""
    share: float
    """Of the bandwidth."""


LL = Protocol("LL", 6.6e-6, 0.6e-6, 2.7e-6, 5.0e-6, 0.25)
SIMPLE = Protocol("Simple", 8.4e-6, 3.4e-6, 14.0e-6, 28.0e-6, 1.0)
PROTOCOLS = (LL, SIMPLE)
NETWORK_OVERHEAD = 1e-6
"""s: the least that any hop takes in a ring that crosses nodes (NCCL: 1 us on Intel's processors, 2 us on AMD's)."""
TREE_SHARE = 0.92
"""Of the bandwidth that a tree reaches, of what a ring reaches."""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Nodes of some GPUs each, and what connects them."""

    gpus_per_node: int = 8
    node_bandwidth: float = 0.8 * 450e9
    """B/s out of one GPU, within the node: NVLink 4 has 450 GB/s in each direction (H100 and H200 datasheets)."""
    network_bandwidth: float = 0.8 * 50e9
    """B/s out of one GPU's own adapter: ConnectX-7 has 400 Gb/s, one for each GPU (DGX H100 and H200 user guides)."""

    def __post_init__(self) -> None:
        for name in ("gpus_per_node", "node_bandwidth", "network_bandwidth"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected more than 0, got {getattr(self, name)}")

    def nodes(self, gpus: int) -> int:
        """That so many GPUs are on."""
        return -(-gpus // self.gpus_per_node)

    def bandwidth(self, gpus: int) -> float:
        """B/s of a ring of so many GPUs: with several nodes, as many rings in parallel as a node has adapters."""
        if self.nodes(gpus) == 1:
            return self.node_bandwidth
        return min(self.node_bandwidth, self.gpus_per_node * self.network_bandwidth)


def all_reduce(size: int, gpus: int, cluster: Cluster) -> float:
    """Seconds to sum `size` bytes over so many GPUs, by the quickest of ring and tree and of the two protocols.

    Ring: 2 (n - 1) steps and 2 (n - 1) / n of the bytes; tree: up and down through a chain in each node and a double
    binary tree of the nodes, twice the bytes.  Zero for one GPU.

    Raises:
        ValueError: `gpus` is not positive, or `size` negative.
    """
    _check(size, gpus)
    if gpus == 1:
        return 0.0
    return min(
        algorithm(size, gpus, cluster, protocol) for algorithm in (_ring_reduce, _tree_reduce) for protocol in PROTOCOLS
    )


def all_gather(size: int, gpus: int, cluster: Cluster) -> float:
    """Seconds until each GPU has `size` bytes of each: a ring of n - 1 steps, by the quicker protocol.

    Raises:
        ValueError: `gpus` is not positive, or `size` negative.
    """
    _check(size, gpus)
    if gpus == 1:
        return 0.0
    between = cluster.nodes(gpus) - 1
    return min(
        protocol.base
        + _ring_latency(gpus - 1, between, gpus, cluster, protocol)
        + (gpus - 1) * size / (protocol.share * cluster.bandwidth(gpus))
        for protocol in PROTOCOLS
    )


def _ring_reduce(size: int, gpus: int, cluster: Cluster, protocol: Protocol) -> float:
    nodes = cluster.nodes(gpus)
    latency = _ring_latency(2 * (gpus - 1), 2 * nodes if nodes > 1 else 0, gpus, cluster, protocol)
    return protocol.base + latency + 2 * (gpus - 1) / gpus * size / (protocol.share * cluster.bandwidth(gpus))


def _tree_reduce(size: int, gpus: int, cluster: Cluster, protocol: Protocol) -> float:
    nodes = cluster.nodes(gpus)
    chain = (min(gpus, cluster.gpus_per_node) - 1) * protocol.node_hop
    latency = 2 * (chain + math.ceil(math.log2(nodes)) * protocol.tree_hop)
    return protocol.base + latency + 2 * size / (protocol.share * TREE_SHARE * cluster.bandwidth(gpus))


def _ring_latency(steps: int, between: int, gpus: int, cluster: Cluster, protocol: Protocol) -> float:
    """Of `steps`, of which `between` go from node to node."""
    crosses = cluster.nodes(gpus) > 1
    hop = max(protocol.node_hop, NETWORK_OVERHEAD * (1 if protocol is LL else 3)) if crosses else protocol.node_hop
    between = min(between, steps)
    return (steps - between) * hop + between * protocol.ring_hop


def _check(size: int, gpus: int) -> None:
    if gpus < 1:
        raise ValueError(f"gpus: expected at least 1, got {gpus}")
    if size < 0:
        raise ValueError(f"size: expected a number of bytes, got {size}")
