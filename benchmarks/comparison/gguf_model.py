"""A Hugging Face Llama as llama.cpp reads it: float32 GGUF, by the `gguf` package's own writer, without a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write(folder: Path, path: Path) -> None:
    """Convert the model in `folder` to `path`.

    llama.cpp rotates neighbouring pairs of a head, Hugging Face its halves, so the rows of q and k change places (as in
    llama.cpp's own converter).
    """
    import gguf
    from safetensors.torch import load_file
    from transformers import AutoConfig

    c: Any = AutoConfig.from_pretrained(folder)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_vocab_size(c.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("no_vocab")
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    for name, tensor in load_file(folder / "model.safetensors").items():
        for part, heads in (("q_proj", c.num_attention_heads), ("k_proj", c.num_key_value_heads)):
            if part in name:
                halves = tensor.view(heads, 2, c.head_dim // 2, -1)  # [heads, half, pair, H]
                tensor = halves.transpose(1, 2).reshape(tensor.shape)
        for theirs, its in names.items():
            name = name.replace(theirs, its)
        writer.add_tensor(name, tensor.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
