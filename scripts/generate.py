"""Generate with a checkpoint, as a library: load, place on the virtual supernode, continue prompts, print the traffic.

    python scripts/generate.py [MODEL_DIR] [--ep 320]
    XLA_FLAGS=--xla_force_host_platform_device_count=384 python scripts/generate.py

The devices are brought up here; with the variable set, those it asks for are used.
"""

import argparse
from pathlib import Path

import cmjax
from cmjax.checkpoint import Tokenizer
from cmjax.mesh import Supernode, fabric
from cmjax.serve import Engine, EngineSettings, SamplingParams

BUNDLED = Path(__file__).parents[1] / "models" / "demo"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=BUNDLED, help="Hugging Face folder with a tokenizer")
    parser.add_argument("--ep", type=int, default=320, help="ranks of the decode instance")
    arguments = parser.parse_args()

    model, tokenizer = cmjax.load(arguments.model), Tokenizer.from_folder(arguments.model)
    engine = Engine(
        model,
        Supernode.preset("cloudmatrix384"),
        ep_size=arguments.ep,
        settings=EngineSettings(max_model_len=64, max_num_seqs_per_rank=1),
    )
    for instance in engine.pools.instances:
        print(f"{instance.name}: EP{instance.ep_size}, ranks {instance.ranks.start} to {instance.ranks.stop - 1}")

    prompts = ["import os", "class Point:\n    def __init__(self, x, y):\n", "def test_"]
    result = engine.generate([tokenizer.encode(prompt) for prompt in prompts], SamplingParams(max_tokens=16))
    for prompt, output in zip(prompts, result.outputs, strict=True):
        print(repr(prompt), "->", repr(tokenizer.decode(output.token_ids)))

    traffic = fabric.traffic.snapshot()
    for entry in traffic.entries:
        print(f"{entry.plane:5} {entry.collective:18} {entry.calls:6} calls {entry.num_bytes.sum():12,} bytes")
    busiest = result.decode_load.max(axis=1) if result.decode_load.size else []
    print(
        "rows of the busiest expert in decode, by MoE layer (the MTP module, last, drafts nothing yet):",
        list(map(int, busiest)),
    )


if __name__ == "__main__":
    main()
