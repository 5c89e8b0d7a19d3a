"""Compile a decode step for TPUs that are not here, and say what it takes of their memory.

python scripts/compile_for_tpu.py                        # Moonlight at EP64, needs pip install 'cmjax[tpu]'
python scripts/compile_for_tpu.py deepseek-v2-lite v5e 16
"""

import sys

from cmjax.checkpoint.configs import find_config
from cmjax.targets import StepRequest, compile_apart

GIB = 2**30


def main(model: str = "moonlight-16b-a3b", target: str = "v5p", ep_size: str = "64") -> None:
    found = find_config(model)
    settings = {"max_num_seqs_per_rank": 32, "max_model_len": 4096, "block_size": 128, "steps_per_call": 1}
    request = StepRequest(target, "decode", int(ep_size), found.config.to_hf(), settings)
    report = compile_apart(request)
    if report.status != "ok":
        sys.exit(f"{found.name} on {ep_size} {target}: {report.reason}")
    assert report.total is not None
    print(f"{found.name} on {ep_size} {target}, {report.tokens:,} sequences:")
    for name in ("weights", "cache", "exchange", "temporaries", "total", "memory"):
        print(f"  {name:12} {(getattr(report, name) or 0) / GIB:7.2f} GiB")
    for kind, use in report.collectives.items():
        print(f"  {kind}: {use['calls']} calls")


if __name__ == "__main__":
    main(*sys.argv[1:])
