"""Quantize a checkpoint to int8 as a library, and let both versions continue a prompt.

    python scripts/quantize.py [MODEL_DIR] [--out DIR]

The calibration text is this repository's; a model of another subject wants text of its own.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

import cmjax
from cmjax.checkpoint import Techniques, Tokenizer, quantize_folder
from cmjax.mesh import bring_up
from cmjax.model import num_bytes
from cmjax.serve import Engine, EngineSettings, SamplingParams

MODELS = Path(__file__).parents[1] / "models"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=MODELS / "demo", help="Hugging Face folder with a tokenizer")
    parser.add_argument("--out", type=Path, help="where the int8 folder is kept")
    arguments = parser.parse_args()

    bring_up(8)  # before anything else touches a device
    tokenizer = Tokenizer.from_folder(arguments.model)
    texts = [json.loads(line)["text"] for line in (MODELS / "data" / "calibration.jsonl").open()]
    stream = [token for text in texts[:40] for token in tokenizer.encode(text)]
    input_ids = np.array(stream[: len(stream) // 128 * 128]).reshape(-1, 128)[:32]

    with tempfile.TemporaryDirectory() as work:
        out = arguments.out or Path(work) / "int8"
        quantize_folder(
            arguments.model, out, input_ids, Techniques(), lambda done, total: print(f"layer {done} of {total}")
        )
        models = {"float32": cmjax.load(arguments.model), "int8": cmjax.load(out)}
    prompt = tokenizer.encode("class Point:\n    def __init__(self, x, y):\n")
    settings = EngineSettings(max_model_len=64, max_num_seqs_per_rank=1)
    for name, model in models.items():
        result = Engine(model, ep_size=8, settings=settings).generate([prompt], SamplingParams(max_tokens=16))
        text = tokenizer.decode(result.outputs[0].token_ids)
        print(f"{name}, {num_bytes(model.params) / 1e6:.1f} MB: {text!r}")


if __name__ == "__main__":
    main()
