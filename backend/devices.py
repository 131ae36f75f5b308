"""GPUs by name with their peak rates: what a roofline needs, one table.

Rates are those of dense products without structured sparsity, accumulated in float32, in FLOP/s. `fp32` and what is
not a product run on the ordinary cores, everything else on tensor cores. Vendors quote tensor core rates "with
sparsity", twice the dense ones: where a source does so, it is halved here and `source` says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from pi05c.backend.targets import Target, parse_targets
from pi05c.graph.errors import UsageError

TERA = 1e12
GIGA = 1e9

WIDER = {"fp4": "fp8", "fp8": "fp16", "int8": "fp16", "bf16": "fp32", "fp16": "fp32", "tf32": "fp32"}
"""The format in which a product is computed on a GPU that lacks its own."""


@dataclass(frozen=True)
class Device:
    """One GPU.

    Attributes:
        name: as `--target` takes it.
        product: the vendor's name, with the variant that the figures are of.
        target: canonical name of its compute capability, as in `TARGETS`.
        rates: dense FLOP/s by format: `fp32`, `tf32`, `fp16`, `bf16`, `int8`, `fp8`, `fp4`.
        bandwidth: of the memory, in bytes/s.
        source: the vendor's document, and what was derived from it.
    """

    name: str
    product: str
    target: str
    rates: Mapping[str, float]
    bandwidth: float
    source: str

    def rate(self, number_format: str) -> float:
        """Dense FLOP/s of products in a format, or in the next wider one where the GPU lacks it."""
        while number_format not in self.rates:
            number_format = WIDER[number_format]
        return self.rates[number_format]


def _device(name: str, product: str, target: str, bandwidth: float, source: str, **rates: float) -> Device:
    """A row of the table, in teraFLOP/s and GB/s."""
    scaled = MappingProxyType({key: rate * TERA for key, rate in rates.items()})
    return Device(name, product, target, scaled, bandwidth * GIGA, source)


_HOPPER = {"fp32": 66.9, "tf32": 494.7, "fp16": 989.4, "bf16": 989.4, "int8": 1978.9, "fp8": 1978.9}

DEVICES: tuple[Device, ...] = (
    _device(
        "a100",
        "A100 80GB SXM",
        "sm80",
        2039,
        "NVIDIA A100 Tensor Core GPU datasheet; it gives dense rates",
        fp32=19.5,
        tf32=156,
        fp16=312,
        bf16=312,
        int8=624,
    ),
    _device(
        "orin",
        "Jetson AGX Orin 64GB",
        "sm87",
        204.8,
        "NVIDIA Jetson AGX Orin Series Technical Brief: 5.3 FP32 TFLOPS, 170 sparse INT8 TOPS of the tensor cores; "
        "derived: INT8 halved, FP16 and BF16 half of that, TF32 a quarter (Ampere's ratios)",
        fp32=5.3,
        tf32=21.25,
        fp16=42.5,
        bf16=42.5,
        int8=85,
    ),
    _device(
        "l4",
        "L4",
        "sm89",
        300,
        "NVIDIA L4 Tensor Core GPU datasheet; tensor core rates halved",
        fp32=30.3,
        tf32=60,
        fp16=121,
        bf16=121,
        int8=242.5,
        fp8=242.5,
    ),
    _device(
        "l40s",
        "L40S",
        "sm89",
        864,
        "NVIDIA L40S datasheet; it gives dense rates beside sparse ones",
        fp32=91.6,
        tf32=183,
        fp16=362.05,
        bf16=362.05,
        int8=733,
        fp8=733,
    ),
    _device(
        "rtx4090",
        "GeForce RTX 4090",
        "sm89",
        1008,
        "NVIDIA Ada GPU Architecture whitepaper, appendix A: dense, with FP32 accumulation",
        fp32=82.6,
        tf32=82.6,
        fp16=165.2,
        bf16=165.2,
        int8=660.6,
        fp8=330.3,
    ),
    _device(
        "h100",
        "H100 SXM5 80GB",
        "sm90",
        3350,
        "NVIDIA H100 Tensor Core GPU architecture whitepaper (dense rates) and datasheet (bandwidth)",
        **_HOPPER,
    ),
    _device(
        "h200",
        "H200 SXM 141GB",
        "sm90",
        4800,
        "NVIDIA H200 Tensor Core GPU datasheet (bandwidth); its tensor core rates are those of the H100 SXM",
        **_HOPPER,
    ),
    _device(
        "thor",
        "Jetson AGX Thor T5000",
        "sm110",
        273,
        "NVIDIA technical blog, Introducing NVIDIA Jetson Thor: 2070 sparse FP4, 1035 dense FP4, 517 dense FP8 TFLOPS; "
        "derived: FP16 and BF16 half of FP8, TF32 half of FP16, FP32 as 2560 cores x 2 x 1.57 GHz",
        fp32=8.04,
        tf32=129.25,
        fp16=258.5,
        bf16=258.5,
        int8=517,
        fp8=517,
        fp4=1035,
    ),
    _device(
        "rtx5090",
        "GeForce RTX 5090",
        "sm120",
        1792,
        "NVIDIA RTX Blackwell GPU Architecture whitepaper, appendix A: dense, with FP32 accumulation",
        fp32=104.8,
        tf32=104.8,
        fp16=209.5,
        bf16=209.5,
        int8=838,
        fp8=419,
        fp4=1676,
    ),
    _device(
        "rtxpro6000",
        "RTX PRO 6000 Blackwell Workstation Edition",
        "sm120",
        1792,
        "NVIDIA RTX PRO 6000 Blackwell Workstation Edition datasheet: 125 FP32 TFLOPS, 4000 sparse FP4 TOPS; derived: "
        "FP4 halved, FP8 and INT8 half of that, FP16 and BF16 a quarter, TF32 an eighth (no halved FP32 accumulation, "
        "unlike GeForce)",
        fp32=125,
        tf32=250,
        fp16=500,
        bf16=500,
        int8=1000,
        fp8=1000,
        fp4=2000,
    ),
)
"""Every GPU whose rates are known, by compute capability. The first of one capability stands for it."""


def find_device(text: str) -> Device:
    """The GPU of a name such as `h100` or `RTX 5090`; a compute capability (`sm120`) stands for its first GPU here.

    Raises:
        UsageError: no rates are known for it; those that are known are named.
    """
    spelled = "".join(character for character in text.lower() if character not in " -_.")
    if (named := next((device for device in DEVICES if device.name == spelled), None)) is not None:
        return named
    known = ", ".join(device.name for device in DEVICES)
    (target, *others) = parse_targets(text)
    if others:
        raise UsageError(f"--target {text} names several GPUs, but cost is that of one: choose among {known}")
    alias = spelled in target.aliases and spelled not in _SAME_CHIP
    found = None if alias else device_of(target)
    if found is None:
        raise UsageError(f"the peak rates of {text} are not in the table: choose among {known}")
    return found


def device_of(target: Target) -> Device | None:
    """The GPU that stands for a compute capability; None where no rates are known of any."""
    return next((device for device in DEVICES if device.target == target.name), None)


_SAME_CHIP = frozenset({"agxorin", "jetsonorin", "agxthor", "jetsonthor"})
"""Other names of GPUs in the table."""

__all__ = ["DEVICES", "Device", "device_of", "find_device"]
