"""Speculative decoding with the model's own MTP module, and sampling: the same tokens in fewer steps.

    python scripts/speculative.py
    python scripts/speculative.py --drafts 2 --temperature 0.8

Every request samples by a seed of its own; a draft is kept where it is the very token that was sampled.
"""

import argparse
from pathlib import Path

import cmjax
from cmjax.checkpoint import Tokenizer
from cmjax.mesh import carve, virtual_devices
from cmjax.serve import Engine, EngineSettings, SamplingParams

MODEL = Path(__file__).parents[1] / "models" / "demo"
PROMPTS = ["import os\nimport ", "def __init__(self", "class Test(unittest.TestCase):\n    def "]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drafts", type=int, default=1, help="tokens that the MTP module guesses ahead")
    parser.add_argument("--temperature", type=float, default=0.0)
    args = parser.parse_args()
    model, tokenizer = cmjax.load(MODEL), Tokenizer.from_folder(MODEL)
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    sampling = [SamplingParams(max_tokens=48, temperature=args.temperature, seed=seed) for seed in range(len(prompts))]
    pools = carve(virtual_devices(2), ep_size=1, prefill_ep_size=1, num_prefill_instances=1)
    results = {}
    for drafts in (0, args.drafts):
        settings = EngineSettings(max_model_len=128, num_speculative_tokens=drafts)
        results[drafts] = Engine(model, pools, settings=settings).generate(prompts, sampling)
    plain, drafting = results[0], results[args.drafts]
    for text, output in zip(PROMPTS, drafting.outputs, strict=True):
        print(f"{text!r} -> {tokenizer.decode(output.token_ids)!r}")
    same = sum(a.token_ids == b.token_ids for a, b in zip(plain.outputs, drafting.outputs, strict=True))
    steps = int(drafting.kept_drafts.sum())
    tokens = sum(len(output.token_ids) - 1 for output in drafting.outputs)
    print(f"{same} of {len(prompts)} are those without drafts; {drafting.acceptance_rate:.0%} of the drafts were kept:")
    print(f"{tokens} tokens after the first in {steps} steps of a request, {tokens / steps:.2f} a step")


if __name__ == "__main__":
    main()
