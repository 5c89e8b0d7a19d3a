"""Operators in C++ for CPU devices, one interface each, beside the XLA form that stands for them everywhere else.

An operator is called with its XLA form, a function of the same arguments. The C++ runs where a program is lowered for
CPUs; other platforms lower the form, and so do differentiation, `jax.vmap`, and types that the C++ has not. A traced
step holds one equation `kernels_NAME` with the form as a parameter, so that whoever counts or prices a step finds the
form's operations there; it is traced when they look. `status` says what runs, `configure` and $CMJAX_KERNELS choose.
"""

from cmjax.kernels.attention import AttentionSpec, ExpandedSpec, absorb, attend, attend_expanded, release
from cmjax.kernels.products import Weights, expert_mlp, product
from cmjax.kernels.rows import PackSpec, RouterConfig, Scoring, TopkMethod, choose, lay_out, norm, pack
from cmjax.kernels.sampling import SamplerSpec, choose_tokens
from cmjax.kernels.settings import (
    KernelsMode,
    KernelStatus,
    Tiling,
    configure,
    is_native,
    mode,
    status,
    tiling,
    without_help,
)

__all__ = [
    "AttentionSpec",
    "ExpandedSpec",
    "KernelStatus",
    "KernelsMode",
    "PackSpec",
    "RouterConfig",
    "SamplerSpec",
    "Scoring",
    "Tiling",
    "TopkMethod",
    "Weights",
    "absorb",
    "attend",
    "attend_expanded",
    "choose",
    "choose_tokens",
    "configure",
    "expert_mlp",
    "is_native",
    "lay_out",
    "mode",
    "norm",
    "pack",
    "product",
    "release",
    "status",
    "tiling",
    "without_help",
]
