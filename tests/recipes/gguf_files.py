"""GGUF files as others write them: a tiny Llama with random weights, and a tokenizer that a few texts made."""

import json
from pathlib import Path

import numpy as np

from cald_speech.data.tokens import train_tokenizer

SIZES = {"width": 16, "layers": 3, "heads": 2, "inner": 32}


def write_gguf(
    path: Path, texts: list[Path], *, architecture: str = "llama", num_embeddings: int | None = None
) -> Path:
    """A model whose q, k, v have as many heads as its queries; ``num_embeddings`` None: one for each token."""
    import gguf  # not everybody has it

    tokenizer = train_tokenizer(texts, 300, path.parent / "tokenizer")
    described = json.loads((path.parent / "tokenizer" / "tokenizer.json").read_text())["model"]
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    width, inner = SIZES["width"], SIZES["inner"]
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in {
        "context_length": 128,
        "embedding_length": width,
        "block_count": SIZES["layers"],
        "feed_forward_length": inner,
        "head_count": SIZES["heads"],
        "head_count_kv": SIZES["heads"],
        "rope_freq_base": 10_000.0,
        "layer_norm_rms_eps": 1e-5,
        "vocab_size": num_embeddings or len(tokens),
    }.items():
        getattr(writer, f"add_{name}")(value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges([" ".join(pair) for pair in described["merges"]])
    for end in ("bos", "eos", "unk", "pad"):
        getattr(writer, f"add_{end}_token_id")(0)
    random = np.random.default_rng(0)
    tensor = lambda *shape: (0.3 * random.standard_normal(shape)).astype(np.float32)  # noqa: E731
    writer.add_tensor("token_embd.weight", tensor(num_embeddings or len(tokens), width))
    writer.add_tensor("output_norm.weight", np.ones(width, np.float32))
    for layer in range(SIZES["layers"]):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", tensor(width, width))
        for name, shape in {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}.items():
            writer.add_tensor(f"blk.{layer}.ffn_{name}.weight", tensor(*shape))
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(width, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
