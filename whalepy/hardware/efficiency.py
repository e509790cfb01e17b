"""How much of its peaks a device reaches: by the size of the work, and what is taken where nobody measured.

A kernel of a device takes `max(launch_s, size / (peak * fraction))`: the host issues one every `launch_s` seconds.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

GIB = 2**30

Curve = tuple[tuple[float, float], ...]
"""Points (FLOPs or bytes of one kernel, fraction of the peak), by ascending size."""

# Elements of a result that one multiprocessor makes at a time, 128 by 256. Source: NVIDIA, Matrix Multiplication
# Background User's Guide, section 2.3: the most efficient of the usual tiles.
TILE = 128 * 256

# Of a result that would be made in fewer waves of such tiles the tiles are taken to be smaller.
FEWEST_WAVES = 4

# Where the curves taken by default begin and end, in FLOPs or bytes.
_SIZES = (1e3, 1e14)


@dataclass(frozen=True)
class Practice:
    """What is taken for the devices of one vendor."""

    product_fraction: float  # of the peak of matrix units, in large products of the shapes that models have
    vector_fraction: float  # of the peak of a device or a dtype without them
    memory_fraction: float  # of the memory bandwidth, in large elementwise operators
    fill_s: float  # seconds that a kernel loses until the device is full, and when it runs out
    launch_s: float  # seconds of the host per operator
    host_fraction: float  # of the bandwidth of the slot
    runtime_bytes: int  # held by the libraries, not by tensors
    source: str
    waves_lost: float = 0.0  # of products on matrix units, for want of tiles to fill the device
    kinds: tuple[tuple[str, float], ...] = ()
    """By kind of operator: fraction of the rate, or of the memory bandwidth; others are as products or elementwise."""


# The fractions of NVIDIA devices are round numbers with which the dry run comes close to every second published
# training run of benchmarks/published (V100 to B200, eager torch); `python -m benchmarks.fidelity` calls the other runs
# held out. The waves that a product loses are those with which every second run of BigScience, whose ranks have the
# most various parts of rows and layers, is forecast best (the rank correlation of all was in view): half a wave is what
# tiles leave empty on average, the rest are edges of tiles and what begins and ends a kernel. The fraction of unaligned
# products was set on two GPTs of BigScience, with heads 150 and 108 wide, the first of them a run that is called held
# out; that it holds for rows of other lengths is assumed. AMD devices: the same, products in the ratio of the best
# bfloat16 products, 60.1 % of the peak on MI300X to 86.9 % on A100 SXM. Source: stas00/ml-engineering,
# compute/accelerator/README.md, "Maximum Achievable Matmul FLOPS".
# Assumed: eager torch spends 5 to 25 us of the host per operator; a CUDA context, library workspaces and the buffers of
# one NCCL communicator come to about 1 GiB.
_KINDS = (
    ("attention", 0.4),
    ("attention backward", 0.5),
    ("convolution", 0.4),
    ("convolution backward", 0.4),
    ("normalise", 0.8),
    ("batch norm", 0.25),
    ("unaligned batched product", 0.04),
)
PRACTICE = {
    "NVIDIA": Practice(0.71, 0.70, 0.60, 5e-6, 8e-6, 0.8, GIB, "set on published training runs", 1.2, _KINDS),
    "AMD": Practice(0.49, 0.70, 0.60, 8e-6, 10e-6, 0.8, GIB, "the best shapes reach 60 % on MI300X", 1.2, _KINDS),
    # The peaks of the CPU slot are round numbers that a rank does reach. Measured with torch 2.13 on one thread of an
    # x86-64: 1.7 us for a sum of two elements, 2.4 us for a product of 16 x 16; beside tensors a process with torch,
    # gloo, transformers and a captured GPT-2 or ResNet-50 holds 475 MB, without transformers 365 MB.
    "CPU": Practice(1.0, 1.0, 1.0, 2e-6, 2e-6, 0.5, int(0.44 * GIB), "its peaks are round numbers already"),
}

# Host links that are not PCIe, bytes/s per direction. Source: NVIDIA, NVLink-C2C, 900 GB/s both ways together.
NVLINK_C2C = 450e9


def fraction_at(curve: Curve, size: float) -> float:
    """The fraction at `size`: between two points the time is linear in the size; above the last one, the last.

    Below the first in proportion to the size: a smaller kernel takes as long as the smallest one.
    """
    sizes = [point[0] for point in curve]
    above = bisect_right(sizes, size)
    if above == 0:
        return curve[0][1] * size / sizes[0]
    if above == len(curve):
        return curve[-1][1]
    (low, below), (high, upper) = curve[above - 1], curve[above]
    first, last = low / below, high / upper
    return size / (first + (last - first) * (size - low) / (high - low))


def default_curve(peak: float, fraction: float, fill_s: float) -> Curve:
    """The curve of kernels that take `fill_s + size / (peak * fraction)` seconds."""
    return tuple((size, size / (peak * fill_s + size / fraction)) for size in _SIZES)
