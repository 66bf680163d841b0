"""What one chip of each TPU generation has and does at most, and the bound that this sets on a program's time."""

import dataclasses
import re

from tto_jax.hlo_cost import Cost

GIB = 2**30
TOPOLOGY = re.compile(r"(\w+):(\d+x\d+(?:x\d+)?)")
EXAMPLES = ("v5e:8x8", "v6e:4x4", "v5p:4x4x4")


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak figures of one chip."""

    name: str
    hbm: int  # bytes that the compiler gives a program
    flops: float  # a second, products of bfloat16
    hbm_bandwidth: float  # bytes a second
    ici_bandwidth: float  # bytes a second that it sends to its neighbours, over all links
    dcn_bandwidth: float  # bytes a second that it sends to other slices


# Source: https://docs.cloud.google.com/tpu/docs/v5e, /v5p and /v6e, read in November 2026. ICI is given there in both
# directions together: here half of it. DCN is the pod's over its 256 chips (v5e 6.4, v6e 25.6 Tbit/s), and for v5p
# 50 Gbit/s a chip. HBM is what libtpu 0.0.51 says is available when a program does not fit, of 16, 95 and 32 GB.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", int(15.75 * GIB), 197e12, 819e9, 200e9, 3.125e9),
        Chip("v5p", int(95.73 * GIB), 459e12, 2765e9, 600e9, 6.25e9),
        Chip("v6e", int(31.24 * GIB), 918e12, 1638e9, 400e9, 12.5e9),
    )
}


def of(topology: str) -> Chip:
    """The chip of a topology such as v5e:8x8. Raises ValueError for a name that is none, or another chip."""
    found = TOPOLOGY.fullmatch(topology)
    if not found or found.group(1) not in CHIPS:
        raise ValueError(
            f"topology={topology!r}: give a chip of {tuple(CHIPS)} and the chips along each axis of a slice, "
            f"such as {', '.join(EXAMPLES)}"
        )
    return CHIPS[found.group(1)]


def bounds(chip: Chip, cost: Cost) -> dict[str, float]:
    """Seconds that the program takes at least, by what would limit it; each at its peak and alone."""
    sent = {network: sum(x.bytes for x in cost.collectives if x.network == network) for network in ("ici", "dcn")}
    return {
        "compute": cost.flops / chip.flops,
        "memory": cost.bytes / chip.hbm_bandwidth,
        "interconnect": sent["ici"] / chip.ici_bandwidth,
        "network between slices": sent["dcn"] / chip.dcn_bandwidth,
    }
