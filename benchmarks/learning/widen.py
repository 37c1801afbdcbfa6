"""A GPT-2 of the shape of GPT-2 small that computes the same function as a small one.

    python -m benchmarks.learning.widen models/imdb-gpt2-mini runs/imdb-gpt2-wide

Without a model hub there is no trained policy of that size to learn from. So the small model is made larger: each
hidden unit, head and MLP unit stands `--times` times side by side, with the weights that read them divided by that
number, and blocks follow that add nothing, because their output projections are zero. Log-probabilities are the same up
to rounding. What the policy knows is what the small model knows; what a step computes and what the adapters can change
is that of a model of this size.

Source: the expansion of Net2Net (Chen et al. 2016), without its noise. LayerNorm of a repeated vector is the repeated
LayerNorm, so no statistic changes.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from plaudit.policy.pretrained import load_tokenizer

TIMES, LAYERS = 4, 12
"""Of the embedded policy, 192 units and 3 heads: 768 units, 12 heads and 12 layers, as GPT-2 small has."""


def widen(small: GPT2LMHeadModel, *, times: int, layers: int) -> GPT2LMHeadModel:
    """The same function with `times` as many units, and `layers` blocks. In fp32.

    The output head is not tied to the embeddings: it reads `times` copies of each unit, and embeddings are not read.
    """
    config = GPT2Config(**small.config.to_dict())
    config.n_embd, config.n_head = times * small.config.n_embd, times * small.config.n_head
    config.n_inner = None if small.config.n_inner is None else times * small.config.n_inner
    config.n_layer, config.tie_word_embeddings, config.dtype = layers, False, torch.float32
    if hasattr(config, "intermediate_size"):
        config.intermediate_size = 4 * config.n_embd
    wide = GPT2LMHeadModel(config)
    source = {name: tensor.float() for name, tensor in small.state_dict().items()}
    with torch.no_grad():
        for name, parameter in wide.named_parameters():
            if name in source:
                parameter.copy_(_widened(name, source, times))
            elif ".c_proj." in name:
                parameter.zero_()  # a further block adds nothing
    return wide.eval()


def _widened(name: str, source: Mapping[str, Tensor], times: int) -> Tensor:
    tensor = source[name]
    if name == "lm_head.weight":
        return tensor.repeat(1, times) / times
    if ".c_attn." in name:  # queries, keys and values stand side by side
        parts = [part.repeat(*([times] if part.ndim == 1 else [times, times])) for part in tensor.chunk(3, dim=-1)]
        return torch.cat(parts, dim=-1) / (times if tensor.ndim == 2 else 1)
    if tensor.ndim == 1:
        return tensor.repeat(times)
    if "wte" in name or "wpe" in name:
        return tensor.repeat(1, times)
    return tensor.repeat(times, times) / times


def wide_policy(small: Path, directory: Path) -> Path:
    """The widened policy with its tokenizer in a directory, made unless it is there."""
    if not (directory / "tokenizer_config.json").is_file():  # written last
        torch.manual_seed(0)  # of the further blocks
        model = widen(GPT2LMHeadModel.from_pretrained(small), times=TIMES, layers=LAYERS)
        model.save_pretrained(directory)
        load_tokenizer(small).save_pretrained(directory)
    return directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("small", type=Path, help="directory of a GPT-2")
    parser.add_argument("into", type=Path)
    arguments = parser.parse_args()
    model = GPT2LMHeadModel.from_pretrained(wide_policy(arguments.small, arguments.into))
    print(f"{model.num_parameters() / 1e6:.1f} million parameters")


if __name__ == "__main__":
    main()
