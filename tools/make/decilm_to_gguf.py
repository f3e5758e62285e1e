"""Write a GGUF from a folder of `megaskip export-static --format decilm`, by llama.cpp's converter.

python tools/make/decilm_to_gguf.py LLAMA_CPP FOLDER --outtype f16 --outfile model.gguf

LLAMA_CPP is a clone of llama.cpp with convert_hf_to_gguf.py, whose flags follow it. Runs in the
converter's environment (torch, transformers, sentencepiece, gguf), without megaskip. What the
converter's own class for DeciLM does not do, it does (llama.cpp of November 2026):

- Vocabularies are those of every Llama; the converter's are Llama 3's and SentencePiece ones of
  tokenizer.json, without the scores that say which pieces are joined first.
- Layers with an attention and no MLP get an MLP of zeros: llama.cpp loses the attention's update
  where there is none.
- Heads may have another size than the hidden size over their number.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, LlamaConfig

LLAMA_CPP = Path(sys.argv.pop(1)) if len(sys.argv) > 2 else sys.exit(__doc__)
sys.path[:0] = [str(LLAMA_CPP), str(LLAMA_CPP / "gguf-py")]

import convert_hf_to_gguf  # noqa: E402
from conversion import ModelBase  # noqa: E402
from conversion.deci import DeciModel  # noqa: E402

ROPE_TYPES = ("default", "llama3")
"""Those that the converter writes for DeciLM; it leaves the fields of others out."""
ZEROS = 256
"""Width of an MLP of zeros: the least that every quantisation of llama.cpp can hold."""


class DeciLMConfig(LlamaConfig):
    """Llama's fields; transformers asks before it runs the folder's own class."""

    model_type = "nemotron-nas"


@ModelBase.register("DeciLMForCausalLM")
class DroppedModel(DeciModel):
    """A Llama with dropped sublayers as llama.cpp's architecture "deci"."""

    model_arch = DeciModel.model_arch

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        rope = self.rope_parameters.get("rope_type", "default")
        if rope not in ROPE_TYPES:
            sys.exit(f"rope_type is {rope}, and the converter writes {' and '.join(ROPE_TYPES)}")
        self.without_mlp = [
            layer
            for layer, width in enumerate(self._ffn_dims)
            if not width and self._num_heads[layer]
        ]
        for layer in self.without_mlp:
            self._ffn_dims[layer] = ZEROS

    def set_gguf_parameters(self) -> None:
        super().set_gguf_parameters()
        hidden, heads = self.hparams["hidden_size"], self.hparams["num_attention_heads"]
        if (head_dim := self.hparams.get("head_dim") or hidden // heads) != hidden // heads:
            self.gguf_writer.add_key_length(head_dim)
            self.gguf_writer.add_value_length(head_dim)

    def generate_extra_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from super().generate_extra_tensors()
        hidden = self.hparams["hidden_size"]
        for layer in self.without_mlp:
            name = f"model.layers.{layer}"
            yield f"{name}.post_attention_layernorm.weight", torch.ones(hidden)
            yield f"{name}.mlp.gate_proj.weight", torch.zeros(ZEROS, hidden)
            yield f"{name}.mlp.up_proj.weight", torch.zeros(ZEROS, hidden)
            yield f"{name}.mlp.down_proj.weight", torch.zeros(hidden, ZEROS)

    def set_vocab(self) -> None:
        if (self.dir_model / "tokenizer.model").is_file():
            self._set_vocab_sentencepiece()
        elif self._tokenizer()["model"].get("byte_fallback"):
            self._set_vocab_llama_hf()
            self._set_scores()
        else:
            self._set_vocab_gpt2()

    def _set_scores(self) -> None:
        """Give each piece the score by which llama.cpp joins pieces in the order of the merges."""
        model = self._tokenizer()["model"]
        scores = dict.fromkeys(model["vocab"], 0.0)
        for rank, pair in enumerate(model["merges"]):
            piece = "".join(pair.split(" ") if isinstance(pair, str) else pair)
            scores[piece] = scores[piece] or -1.0 - rank
        in_order = sorted(model["vocab"], key=model["vocab"].__getitem__)
        added = self.hparams["vocab_size"] - len(in_order)
        self.gguf_writer.add_token_scores([scores[piece] for piece in in_order] + [0.0] * added)

    def _tokenizer(self) -> dict[str, Any]:
        return json.loads((self.dir_model / "tokenizer.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    AutoConfig.register(DeciLMConfig.model_type, DeciLMConfig)
    convert_hf_to_gguf.main()
