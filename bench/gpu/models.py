"""Untrained models and problems of the real sizes of Llama-3.2-1B and Llama-3-8B, for benchmarks without downloads."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Size:
    """What decides the shapes of a Llama."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    is_tied: bool

    def linears(self) -> dict[str, tuple[int, int, int]]:
        """Distinct shapes of a block's linears: name to d_in, d_out, how many of them a block has."""
        head = self.hidden // self.heads
        return {
            "q,o": (self.hidden, self.hidden, 2),
            "k,v": (self.hidden, head * self.kv_heads, 2),
            "gate,up": (self.hidden, self.intermediate, 2),
            "down": (self.intermediate, self.hidden, 1),
        }


SIZES = {
    "1b": Size(2048, 8192, 16, 32, 8, 128256, True),
    "8b": Size(4096, 14336, 32, 32, 8, 128256, False),
    "toy": Size(64, 160, 2, 4, 2, 384, True),
}


def make_model(size: Size, folder: Path, *, layers: int | None = None, seed: int = 0) -> Path:
    """Write an untrained bfloat16 Llama with a small byte-level tokenizer to a new folder.

    Parameters
    ----------
    size : Size
        Shapes.
    folder : Path
        Made.
    layers : int, optional
        Fewer decoder blocks than the original has.
    seed : int
        Of the weights.
    """
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=layers or size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        vocab_size=size.vocabulary,
        max_position_embeddings=4096,
        tie_word_embeddings=size.is_tied,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model = model.to_empty(device=device).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(1.0)
        else:
            # every block adds about as much as comes in, which keeps activations finite and distinct
            std = 1.0 if "embed" in name else parameter.shape[1] ** -0.5
            parameter.data.normal_(std=std)
    model.tie_weights()
    folder.mkdir(parents=True)
    model.to("cpu").save_pretrained(folder)
    _tokenizer(min(size.vocabulary, 1024)).save_pretrained(folder)
    return folder


def _tokenizer(vocabulary: int):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from cospadi.calibration.data import builtin_text

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([builtin_text("calibration")], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def make_problem(
    d_in: int, d_out: int, device: torch.device, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a weight [d_out, d_in] float32 and an activation Gram [d_in, d_in] float64 with decaying spectra."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    decay = torch.arange(1, d_in + 1, device=device) ** -0.5
    weight = (normal(d_out, d_in) * d_in**-0.5).addmm(
        normal(d_out, 64) * d_in**-0.5, normal(64, d_in) * 0.2
    )
    gram = torch.zeros((d_in, d_in), dtype=torch.float64, device=device)
    mixing = torch.linalg.qr(normal(d_in, d_in)).Q
    n_tokens = 2 * d_in
    for rows in range(0, n_tokens, 4096):
        x = (normal(min(4096, n_tokens - rows), d_in) * decay) @ mixing
        gram += (x.T @ x).double()
    return weight, gram / n_tokens


def main() -> int:
    """Write one model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int)
    args = parser.parse_args()
    print(make_model(SIZES[args.size], args.folder, layers=args.layers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
