"""llama.cpp's own server (by the package xllamacpp) with a tiny random judge in a GGUF file that this program writes.

    python -m harness.foreign.llama_cpp TOKENIZER.json PORT

Runs in an environment with `xllamacpp` and `gguf`. The model is a Llama of one layer whose next token is almost always
one of the digits 1 to 5, which of them depends on the text. So it names scores, and its probabilities say which.
"""

import json
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np

WIDTH, HEADS, CONTEXT = 64, 2, 2048
DIGITS = ("1", "2", "3", "4", "5")
NORMAL, CONTROL = 1, 3
"""llama.cpp's types of tokens."""
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def write_model(tokenizer: Path, path: Path) -> None:
    """A model over the vocabulary of a byte-level BPE tokenizer, with random weights but for the digits' rows."""
    import gguf

    bpe = json.loads(tokenizer.read_text(encoding="utf-8"))
    tokens: dict[str, int] = bpe["model"]["vocab"]
    special: dict[str, int] = {entry["content"]: entry["id"] for entry in bpe["added_tokens"]}
    tokens = tokens | special
    names = sorted(tokens, key=lambda name: tokens[name])
    assert [tokens[name] for name in names] == list(range(len(names)))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in bpe["model"]["merges"]]
    end = max(special.values()) if len(special) == 1 else special["<|endoftext|>"]

    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny-judge")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(names))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(names)
    writer.add_token_types([CONTROL if name in special else NORMAL for name in names])
    writer.add_token_merges(merges)
    writer.add_eos_token_id(end)
    writer.add_bos_token_id(end)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)

    random = np.random.default_rng(0)

    def normal(rows: int, scale: float) -> Any:
        return (scale * random.standard_normal((rows, WIDTH))).astype(np.float32)

    embedding, output = normal(len(names), 1.0), normal(len(names), 0.02)
    embedding[:, 0] = 8.0  # the same for every token, so that every state points to the digits
    for digit in DIGITS:
        output[tokens[digit]] = normal(1, 0.2)[0]
        output[tokens[digit], 0] = 2.0
    ones = np.ones(WIDTH, dtype=np.float32)
    tensors = {
        "token_embd.weight": embedding,
        "output_norm.weight": ones,
        "output.weight": output,
        "blk.0.attn_norm.weight": ones,
        "blk.0.ffn_norm.weight": ones,
        **{f"blk.0.attn_{name}.weight": normal(WIDTH, 0.05) for name in ("q", "k", "v", "output")},
        **{f"blk.0.ffn_{name}.weight": normal(WIDTH, 0.05) for name in ("gate", "up", "down")},
    }
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    tokenizer, port = Path(sys.argv[1]), int(sys.argv[2])
    import xllamacpp

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "judge.gguf"
        write_model(tokenizer, path)
        settings = xllamacpp.CommonParams()
        settings.model.path = str(path)
        settings.model_alias = {"tiny-judge"}
        settings.hostnames = ["127.0.0.1"]
        settings.port = port
        settings.n_ctx = CONTEXT
        settings.n_parallel = 2
        settings.cpuparams.n_threads = 1
        settings.warmup = False
        server = xllamacpp.Server(settings)
        print(server.listening_address, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
