"""What a planned cluster shall serve."""

import dataclasses

from cmjax.options import check_bounds, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """What a cluster shall serve, and on how many devices."""

    devices: int = option(
        384, "Devices: dies of an Ascend 910, else GPUs or chips.", flag="--devices", minimum=1, maximum=65_536
    )
    input_len: int = option(4096, "Tokens of a prompt.", flag="--input-len", minimum=1)
    output_len: int = option(256, "Tokens of an answer.", flag="--output-len", minimum=1)
    acceptance: float = option(
        0.7, "Share of the MTP module's drafts that are kept.", flag="--acceptance", minimum=0, maximum=1
    )
    reuse: float = option(0.0, "Share of a prompt whose latents the pool has.", flag="--reuse", minimum=0, maximum=0.99)
    price: float | None = option(
        None, "Of a device and an hour, in your currency.", flag="--price", minimum=0, unset="no cost is shown"
    )
    balance: float | None = option(
        None, "Busiest device's expert rows over the mean.", flag="--balance", minimum=1, unset="the machine's"
    )

    def __post_init__(self) -> None:
        check_bounds(self)
