"""The prefix cache: prompts that begin alike, blocks in a folder that the next engine finds, and namespaces that share
nothing.

    python scripts/prefix_cache.py
    python scripts/prefix_cache.py --node redis://localhost:6379      # the pool on a server, in place of the folder
"""

import argparse
import tempfile
import time
from pathlib import Path

import cmjax
from cmjax.checkpoint import Tokenizer
from cmjax.mesh import carve, virtual_devices
from cmjax.serve import Engine, EngineSettings, SamplingParams
from cmjax.serve.caching import CacheSettings

MODEL = Path(__file__).parents[1] / "models" / "demo"
PROMPTS = ["def first(self):\n", "def second(self):\n", "class Third:\n"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--node", action="append", default=[], help="redis://host:port, several times for several")
    args = parser.parse_args()
    model, tokenizer = cmjax.load(MODEL), Tokenizer.from_folder(MODEL)
    common = tokenizer.encode(Path(tempfile.__file__).read_text())[:600]
    pools = carve(virtual_devices(3), ep_size=1, prefill_ep_size=1, num_prefill_instances=2)
    texts: list[list[int]] = []

    with tempfile.TemporaryDirectory() as folder:
        cache = CacheSettings(
            nodes=tuple(args.node), folder=None if args.node else f"{folder}/pool", key_file=f"{folder}/key"
        )
        for name in ("the first engine", "the next engine"):
            engine = Engine(model, pools, settings=EngineSettings(max_model_len=1024), cache=cache)
            engine.start()
            print(f"{name}:")
            for prompt in PROMPTS:
                begin = time.perf_counter()
                handle = engine.submit([*common, *tokenizer.encode(prompt)], SamplingParams(max_tokens=8))
                texts.append(handle.result().token_ids)
                seconds, num_cached = time.perf_counter() - begin, handle.num_cached_tokens
                print(f"  {prompt!r}: {num_cached} of {len(handle.prompt_ids)} tokens cached, {seconds * 1e3:.0f} ms")
            stranger = engine.submit([*common, 1], SamplingParams(max_tokens=1), namespace="another tenant")
            stranger.result()
            print(f"  another tenant: {stranger.num_cached_tokens} tokens cached")
            engine.wait_until_stored()
            counts = engine.stats().cache
            print(f"  {counts.num_hits} tokens from the instances' own blocks, {counts.num_pool_hits} from the pool")
            engine.shutdown()
    half = len(texts) // 2
    print("the same texts:", texts[:half] == texts[half:])


if __name__ == "__main__":
    main()
