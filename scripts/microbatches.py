"""Two microbatches in decode: the same tokens, and exchanges that hide behind work when they take time.

    python scripts/microbatches.py

The fabric's modelled delay makes every exchange last as long as its bytes say; `cmjax bench pipeline` measures it
properly, with a picture.
"""

import time
from pathlib import Path

import cmjax
from cmjax.mesh import carve, fabric, virtual_devices
from cmjax.serve import Engine, EngineSettings, SamplingParams

MODEL = Path(__file__).parents[1] / "tests" / "data" / "parity" / "v3-mtp"
SECONDS_PER_BYTE = 2e-6


def main() -> None:
    model = cmjax.load(MODEL)
    prompts = [[1 + i, 2 + i, 3 + i] for i in range(16)]
    pools = carve(virtual_devices(8), ep_size=4, prefill_ep_size=4, num_prefill_instances=1)
    outputs = {}
    for microbatches in (1, 2):
        settings = EngineSettings(max_model_len=64, max_num_seqs_per_rank=4, microbatches=microbatches)
        engine = Engine(model, pools, settings=settings)
        engine.generate(prompts, SamplingParams(max_tokens=17))  # compiled, and without delay
        fabric.configure(delay=fabric.DelayModel({"ub": 0.0}, {"ub": 1.0}, SECONDS_PER_BYTE))
        begin = time.perf_counter()
        result = engine.generate(prompts, SamplingParams(max_tokens=17))
        fabric.configure(delay=None)
        outputs[microbatches] = [output.token_ids for output in result.outputs]
        step_ms = result.timings.decode_s / result.timings.decode_steps * 1e3
        print(f"microbatches {microbatches}: {step_ms:.1f} ms a step, {time.perf_counter() - begin:.2f} s in all")
    if outputs[1] != outputs[2]:
        raise SystemExit("the tokens differ")
    print("the tokens are equal")


if __name__ == "__main__":
    main()
