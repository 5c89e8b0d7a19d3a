"""YaRN, the context extension of RoPE that the published DeepSeek models use (arXiv:2309.00071)."""

import math
from dataclasses import dataclass

from cmjax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """YaRN context extension: which rotary frequencies are stretched, and two scales that follow from `factor`.

    `mscale` and `mscale_all_dim` are 0 where the file leaves them out. `attention_factor`, where given, replaces
    the scale of cos and sin; `truncate` rounds the correction range outwards to whole dimensions.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if not self.factor > 0 or not self.original_max_position_embeddings > 0:
            raise UserError(
                f"rope_scaling: factor ({self.factor}) and original_max_position_embeddings "
                f"({self.original_max_position_embeddings}) must be positive"
            )
        if not self.beta_fast > 0 or not self.beta_slow > 0:
            raise UserError(
                f"rope_scaling: beta_fast ({self.beta_fast}) and beta_slow ({self.beta_slow}) must be positive"
            )

    def magnitude(self, mscale: float) -> float:
        """m(mscale) = 0.1 mscale ln(factor) + 1, and 1 where the context is not extended."""
        return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    @property
    def softmax_factor(self) -> float:
        """What the softmax scale is multiplied by."""
        return self.magnitude(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    @property
    def rope_factor(self) -> float:
        """What cos and sin are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self.magnitude(self.mscale) / self.magnitude(self.mscale_all_dim)
        return self.magnitude(1.0)

    def correction_range(self, rope_dim: int, rope_theta: float) -> tuple[float, float]:
        """First and last frequency index (of rope_dim / 2) of the ramp from unchanged to divided by `factor`.

        The upper bound is clamped to rope_dim - 1, not to the last frequency, as the published models do.
        """

        def index(num_rotations: float) -> float:
            wavelengths = self.original_max_position_embeddings / (num_rotations * 2 * math.pi)
            return rope_dim * math.log(wavelengths) / (2 * math.log(rope_theta))

        low, high = index(self.beta_fast), index(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        return max(low, 0), min(high, rope_dim - 1)
