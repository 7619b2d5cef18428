"""A simulated CUDA device, on which the CUDA paths of ``smart`` run without a GPU.

    with simulated() as device:
        model = build_model(...).to("cuda")
        with device.counted() as counts:
            ...
    counts["launch"], counts["wait"]

A tensor subclass says that it lies on cuda:0 and keeps its numbers on the CPU; a dispatch mode sees every operation.
What a GPU would refuse is refused: operands on two devices, a generator of another device, numpy of a CUDA tensor.
``torch.cuda``'s streams, events and graphs are replaced. A captured graph is a tape: nothing takes effect while it is
recorded, transfers and synchronisations within it raise, and a replay repeats it on the memory that it was recorded
with, so that moved weights and host values that were baked in show. A copy to pinned memory arrives when its event is
waited for, not before. Autograd, autocast and the fused optimiser are torch's own, by their dispatch keys for CUDA.

It cannot see what only the hardware knows: kernels that lack a dtype, rounding, races, speed.
"""

from simulated_cuda.device import CPU, CUDA, CudaTensor, Device, Forbidden
from simulated_cuda.machine import reason_not_to_run, simulated
from simulated_cuda.runtime import DEFAULT, Graph

__all__ = [
    "CPU",
    "CUDA",
    "DEFAULT",
    "CudaTensor",
    "Device",
    "Forbidden",
    "Graph",
    "reason_not_to_run",
    "simulated",
]
