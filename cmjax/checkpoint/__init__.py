"""Folders of models: safetensors in every number format, orbax checkpoints, tokenizers, quantizing one offline."""

from cmjax.checkpoint.detokenizer import Detokenizer, starts_in, token_starts
from cmjax.checkpoint.load import load
from cmjax.checkpoint.orbax import restore, save
from cmjax.checkpoint.quantize import Techniques
from cmjax.checkpoint.quantize_folder import quantize_folder
from cmjax.checkpoint.tokenizer import Tokenizer
from cmjax.checkpoint.weights import TensorSource, load_checkpoint, load_params, save_hf

__all__ = [
    "Detokenizer",
    "Techniques",
    "TensorSource",
    "Tokenizer",
    "load",
    "load_checkpoint",
    "load_params",
    "quantize_folder",
    "restore",
    "save",
    "save_hf",
    "starts_in",
    "token_starts",
]
