"""What the operations of residual networks cost: FLOPs, bytes, launches, and the least time that a device needs."""

from resfuse.costs.cost import Cost, roofline
from resfuse.costs.device import Device
from resfuse.costs.kernels import backward_cost, backward_kernels, forward_cost, forward_kernels, is_estimated
from resfuse.costs.known import DEVICES, describe
from resfuse.costs.measure import measure_device
from resfuse.costs.operation import Operation, TensorInfo

__all__ = [
    "DEVICES", "Cost", "Device", "Operation", "TensorInfo", "backward_cost", "backward_kernels", "describe",
    "forward_cost", "forward_kernels", "is_estimated", "measure_device", "roofline",
]  # fmt: skip
