"""What one device of a known type can do, in SI units, read from devices.csv.

The figures are vendor peaks (dense, at boost clock); devices.csv names the source and the standing of each cell.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources

from whalepy.errors import ClusterError
from whalepy.hardware.efficiency import (
    FEWEST_WAVES,
    GIB,
    NVLINK_C2C,
    PRACTICE,
    TILE,
    Curve,
    Practice,
    default_curve,
    fraction_at,
)
from whalepy.hardware.near import did_you_mean

# Usable by torch where no print-out was found: marketed sizes are GiB, and driver and ECC take 1 to 8 % of them.
USABLE_FRACTION = 0.95

# Bytes/s per direction of a x16 slot, by PCIe generation (theoretical).
PCIE_X16 = {"3": 15.75e9, "4": 31.5e9, "5": 63e9}

# The rates to look at for a dtype, best first: without units of its own a device computes in float32 instead.
_RATE_FIELDS: dict[str, tuple[str, ...]] = {
    "float32": ("fp32",),
    "tf32": ("tf32", "fp32"),
    "float16": ("fp16", "fp32"),
    "bfloat16": ("bf16", "fp32"),
    "float8": ("fp8",),
}
_DTYPE_ALIASES = {
    "fp32": "float32",
    "fp16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
    "fp8": "float8",
    "float8_e4m3fn": "float8",
    "float8_e5m2": "float8",
    "fp64": "float64",
    "double": "float64",
}
# Assumed, and true of data-centre parts; GeForce and RTX parts are far slower in float64.
_FLOAT64_PER_FLOAT32 = 0.5

# Kinds of operators whose curve is one over bytes; those of the others are over FLOPs.
BOUND_BY_MEMORY = ("normalise", "batch norm", "exponential", "tanh")

# Where each pair of devices has links of its own. Sources: NVIDIA DGX-1 white paper, hybrid cube mesh of links of
# 25 GB/s, two to most neighbours (P100: 20 GB/s, one); AMD Instinct MI300X data sheet, 64 GB/s to each of seven.
_PAIRS = {"V100-SXM": 50e9, "P100-SXM": 20e9, "MI300X": 64e9, "MI325X": 64e9, "MI250X": 50e9}

# Source: stas00/ml-engineering, compute/accelerator/README.md: the best shapes reach 87 % on A100.
_BEST_FRACTION = 0.9

# A rate this much above that of float32 is taken to be that of matrix units.
_UNITS_GAIN = 1.5

# Of a device of which nobody says it.
_MULTIPROCESSORS = 100

# Whose measured curve stands for a dtype that was not measured.
_CURVE_OF = {"float16": "bfloat16", "bfloat16": "float16", "float64": "float32", "tf32": "float32"}


@dataclass(frozen=True)
class DeviceProfile:
    """The figures of one device type; a rate of 0 means that the device has no units for it."""

    name: str
    vendor: str  # NVIDIA, AMD or CPU
    torch_name: str  # what torch.cuda.get_device_name says; empty where torch never reports this row
    memory_bytes: int  # usable by torch
    memory_bandwidth: float  # bytes/s
    fp32: float  # FLOP/s, as are the following
    tf32: float = 0.0
    fp16: float = 0.0
    bf16: float = 0.0
    fp8: float = 0.0
    fp64: float = 0.0  # 0: half of float32 is assumed
    link: str = ""  # what joins the devices of one node, in words
    link_bandwidth: float = 0.0  # bytes/s per direction over all links of one device
    pcie_bandwidth: float = 0.0  # bytes/s per direction; 0 where the host is reached otherwise
    compute_capability: str = ""
    source: str = ""
    notes: str = ""
    marks: tuple[tuple[str, str], ...] = ()  # (field, standing): ?, memory, derived, estimated, assumed, measured
    base: str = ""  # the known type that this one refines
    # What it makes of its peaks; where empty or None, what is taken for its vendor.
    product_efficiency: tuple[tuple[str, Curve], ...] = ()  # by dtype: FLOPs of one product -> fraction of the rate
    memory_efficiency: Curve = ()  # bytes that one kernel reads and writes -> fraction of the memory bandwidth
    # By kind of operator: FLOPs -> fraction of the rate; of those that are bound by memory, bytes.
    kind_efficiency: tuple[tuple[str, Curve], ...] = ()
    launch_s: float | None = None  # seconds of the host per kernel
    host_bandwidth: float | None = None  # bytes/s per direction between the device and pinned memory of its host
    runtime_bytes: int | None = None  # held by context, libraries and communicators
    multiprocessors: int = 0  # 0: not known
    scale: float = 1.0  # of the speed that these figures give, what published training runs have reached

    def rate(self, dtype: str = "float32") -> float:
        """Peak FLOP/s of matrix products in `dtype` (a torch or short name); float64 is assumed half of float32.

        A type without units for float16, bfloat16 or tf32 computes at its float32 rate. Raises ClusterError for an
        unknown dtype, and for float8 without units.
        """
        name = known_dtype(dtype)
        if name == "float64":
            return self.fp64 or self.fp32 * _FLOAT64_PER_FLOAT32
        rates = (getattr(self, field) for field in _RATE_FIELDS[name])
        best = next((rate for rate in rates if rate > 0), 0.0)
        if not best:
            raise ClusterError(f"{self.name} has no {name} units", fix="plan with float16, bfloat16 or float32")
        return best

    def sheet_rate(self, dtype: str = "float32") -> float:
        """`rate` as the data sheet has it, where this profile is measured on a known type: what MFU refers to."""
        sheet = profile_table().get(self.base)
        return self.rate(dtype) if sheet is None or self.vendor == "CPU" else sheet.rate(dtype)

    def product_fraction(self, flops: float, dtype: str = "float32") -> float:
        """The fraction of `rate(dtype)` that one matrix product of `flops` FLOPs reaches."""
        name = known_dtype(dtype)
        curves = dict(self.product_efficiency)
        measured = curves.get(name) or curves.get(_CURVE_OF.get(name, ""))
        return fraction_at(measured or self._taken_for_products(dtype), flops)

    def memory_fraction(self, nbytes: float) -> float:
        """The fraction of `memory_bandwidth` that a kernel which reads and writes `nbytes` in all reaches."""
        taken = self._taken
        default = default_curve(self.memory_bandwidth, taken.memory_fraction, taken.fill_s)
        return fraction_at(self.memory_efficiency or default, nbytes)

    def product_seconds(self, flops: float, dtype: str = "float32", kind: str = "", outputs: int = 0) -> float:
        """Seconds of one matrix product, or operator of a kind made of products, of `flops` FLOPs, the launch aside.

        `outputs`: elements of the result of a product, where known.
        """
        if flops <= 0:
            return 0.0
        apart = dict(self.kind_efficiency).get(kind)
        taken = None if self.product_efficiency else dict(self._taken.kinds).get(kind)
        if apart is None and taken is not None and self._has_units(dtype):
            apart = default_curve(self.rate(dtype), taken, self._taken.fill_s)
        fraction = fraction_at(apart, flops) if apart else self.product_fraction(flops, dtype)
        waves = 0.0 if apart else self._waves_lost(dtype, outputs)
        return flops * (1 + waves) / (self.rate(dtype) * self._scaled(fraction))

    def memory_seconds(self, nbytes: float, kind: str = "") -> float:
        """Seconds of one kernel that reads and writes `nbytes` bytes in all, the launch aside."""
        if nbytes <= 0:
            return 0.0
        apart = dict(self.kind_efficiency).get(kind) if kind in BOUND_BY_MEMORY else None
        taken = None if self.memory_efficiency or kind not in BOUND_BY_MEMORY else dict(self._taken.kinds).get(kind)
        if apart is None and taken is not None:
            apart = default_curve(self.memory_bandwidth, taken, self._taken.fill_s)
        fraction = fraction_at(apart, nbytes) if apart else self.memory_fraction(nbytes)
        return nbytes / (self.memory_bandwidth * self._scaled(fraction))

    @property
    def computes_beside(self) -> bool:
        """Whether it computes while collectives are under way: those of a CPU take its cores."""
        return self.vendor != "CPU"

    @property
    def launch_seconds(self) -> float:
        """Seconds of the host per kernel: no kernel takes less."""
        return self._taken.launch_s if self.launch_s is None else self.launch_s

    @property
    def host_link(self) -> float:
        """Bytes/s per direction between the device and pinned memory of its host."""
        if self.host_bandwidth is not None:
            return self.host_bandwidth
        slot = self.memory_bandwidth if self.vendor == "CPU" else self.pcie_bandwidth or NVLINK_C2C
        return slot * self._taken.host_fraction

    @property
    def runtime_memory(self) -> int:
        """Bytes of `memory_bytes` that context, libraries and communicators hold."""
        return self._taken.runtime_bytes if self.runtime_bytes is None else self.runtime_bytes

    def _waves_lost(self, dtype: str, outputs: int) -> float:
        """What a product takes longer because its last wave of tiles does not fill the device, over what it takes else.

        Results of few waves are made in smaller tiles. Source: NVIDIA, Matrix Multiplication Background User's Guide,
        sections 2.3 and 3.2.
        """
        if not outputs or self.product_efficiency or not self._has_units(dtype):
            return 0.0
        wave = TILE * (self.multiprocessors or _MULTIPROCESSORS)
        return self._taken.waves_lost * min(1 / FEWEST_WAVES, wave / outputs)

    def _taken_for_products(self, dtype: str) -> Curve:
        taken = self._taken
        fraction = taken.product_fraction if self._has_units(dtype) else taken.vector_fraction
        return default_curve(self.rate(dtype), fraction, taken.fill_s)

    def _scaled(self, fraction: float) -> float:
        """A fraction of a peak with the scale of the type, which lifts none above what the best kernels reach."""
        return min(fraction * self.scale, max(fraction, _BEST_FRACTION))

    def _has_units(self, dtype: str) -> bool:
        """Whether matrix units compute in it."""
        return self.rate(dtype) > _UNITS_GAIN * self.fp32

    @property
    def _taken(self) -> Practice:
        return PRACTICE.get(self.vendor, PRACTICE["NVIDIA"])

    @property
    def bridge_is_optional(self) -> bool:
        """Whether the link is a bridge that joins pairs at most and is usually absent: PCIe is taken instead."""
        return "else PCIe" in self.link

    @property
    def pair_bandwidth(self) -> float | None:
        """Bytes/s per direction between two devices of one node, where only several together reach `link_bandwidth`."""
        known = self.base or self.name
        return next((pair for start, pair in _PAIRS.items() if known.startswith(start)), None)

    @property
    def peer_bandwidth(self) -> float:
        """Bytes/s per direction between two devices of this type in one node, where nothing else is known."""
        return self.pcie_bandwidth if self.bridge_is_optional and self.pcie_bandwidth else self.link_bandwidth


def known_dtype(dtype: str) -> str:
    """The name under which a dtype has a rate. Raises ClusterError where none has."""
    short = dtype.removeprefix("torch.").lower()
    name = _DTYPE_ALIASES.get(short, short)
    if name not in _RATE_FIELDS and name != "float64":
        known = (*_RATE_FIELDS, "float64", *_DTYPE_ALIASES)
        raise ClusterError(f"no device has a rate for dtype {dtype!r}", fix=did_you_mean(name, known))
    return name


def known_profiles() -> tuple[DeviceProfile, ...]:
    """Every profile, in the order of devices.csv."""
    return tuple(profile_table().values())


def marketed_gb(name: str) -> str:
    """The memory size a type is sold with, in GB, as written on the box."""
    return _marketed()[name]


# --- the table --------------------------------------------------------------------------------------------------

_TERA, _GIGA = 1e12, 1e9
_COLUMNS_OF = {
    "memory_bytes": ("memory_bytes", "memory_gib_usable", "memory_gb"),
    "memory_bandwidth": ("memory_bandwidth_GBps",),
    "fp32": ("fp32_tflops",),
    "tf32": ("tf32_tflops",),
    "fp16": ("fp16_tensor_tflops", "fp16_vector_tflops"),
    "bf16": ("bf16_tensor_tflops",),
    "fp8": ("fp8_tflops",),
    "link_bandwidth": ("intra_link_GBps_per_direction",),
    "pcie_bandwidth": ("pcie_gen",),
    "compute_capability": ("compute_capability",),
    "torch_name": ("pytorch_reported_name",),
}
_MARK = re.compile(r"(\?|memory|derived|assumed): ([\w, ]+)")


@lru_cache
def _rows() -> tuple[dict[str, str], ...]:
    text = resources.files("whalepy.hardware").joinpath("devices.csv").read_text(encoding="utf-8")
    return tuple(csv.DictReader(text.splitlines()))


@lru_cache
def profile_table() -> dict[str, DeviceProfile]:
    """Every profile by name, in the order of devices.csv."""
    return {row["name"]: _read(row) for row in _rows()}


@lru_cache
def _marketed() -> dict[str, str]:
    return {row["name"]: row["memory_gb"] for row in _rows()}


def _read(row: dict[str, str]) -> DeviceProfile:
    def number(column: str, unit: float) -> float:
        return float(round(float(row[column]) * unit))

    return DeviceProfile(
        name=row["name"],
        vendor=row["vendor"],
        torch_name=row["pytorch_reported_name"],
        memory_bytes=_usable_bytes(row),
        memory_bandwidth=number("memory_bandwidth_GBps", _GIGA),
        fp32=number("fp32_tflops", _TERA),
        tf32=number("tf32_tflops", _TERA),
        fp16=number("fp16_tensor_tflops", _TERA) or number("fp16_vector_tflops", _TERA),
        bf16=number("bf16_tensor_tflops", _TERA),
        fp8=number("fp8_tflops", _TERA),
        link=row["intra_link"],
        link_bandwidth=number("intra_link_GBps_per_direction", _GIGA),
        pcie_bandwidth=PCIE_X16.get(row["pcie_gen"], 0.0),
        compute_capability=row["compute_capability"],
        multiprocessors=int(row["multiprocessors"]),
        source=row["source"],
        notes=row["notes"],
        marks=_marks(row),
        scale=_scales().get(row["name"], 1.0),
    )


@lru_cache
def _scales() -> dict[str, float]:
    """By type, what scales.csv says: it names the runs that each figure comes from."""
    text = resources.files("whalepy.hardware").joinpath("scales.csv").read_text(encoding="utf-8")
    return {row["type"]: float(row["scale"]) for row in csv.DictReader(text.splitlines())}


def _usable_bytes(row: dict[str, str]) -> int:
    if row["memory_bytes"]:
        return int(row["memory_bytes"])
    if row["memory_gib_usable"]:
        return int(float(row["memory_gib_usable"]) * GIB)
    return int(float(row["memory_gb"]) * GIB * USABLE_FRACTION)


def _marks(row: dict[str, str]) -> tuple[tuple[str, str], ...]:
    """The unsure fields of a row with their standing, as the notes column gives them by column name."""
    standing: dict[str, str] = {}
    for part in row["notes"].split(" | "):
        if match := _MARK.fullmatch(part):
            standing |= {column.strip(): match[1] for column in match[2].split(",")}
    if not row["memory_bytes"] and not row["memory_gib_usable"]:
        standing["memory_bytes"] = "estimated"
    marks = ((field, next(filter(None, map(standing.get, columns)), "")) for field, columns in _COLUMNS_OF.items())
    return tuple((field, mark) for field, mark in marks if mark)
