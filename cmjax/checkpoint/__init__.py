"""Folders of models: safetensors in every number format, orbax checkpoints, tokenizers, quantizing one offline."""

from cmjax.checkpoint.formats import TensorSource
from cmjax.checkpoint.load import load
from cmjax.checkpoint.orbax import restore, save
from cmjax.checkpoint.quantize import Techniques
from cmjax.checkpoint.quantize_folder import quantize_folder
from cmjax.checkpoint.safetensors import SafetensorsFolder, read_json, write_safetensors
from cmjax.checkpoint.tokenizer import Tokenizer
from cmjax.checkpoint.weights import load_checkpoint, load_params, save_hf

__all__ = [
    "SafetensorsFolder",
    "Techniques",
    "TensorSource",
    "Tokenizer",
    "load",
    "load_checkpoint",
    "load_params",
    "quantize_folder",
    "read_json",
    "restore",
    "save",
    "save_hf",
    "write_safetensors",
]
