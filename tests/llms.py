"""Tiny random language models of other families, with tokenizers and chat templates in each one's manner."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

#: Control tokens of each family, end of text first, a template that writes one user message, and how many of the
#: control tokens (from the second on) the encoding puts before every text; GLM-4 and Llama write them in both places.
TEMPLATES = {
    "glm4": (
        ["<|user|>", "[gMASK]", "<sop>", "<|assistant|>"],
        "[gMASK]<sop>{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        2,
    ),
    "qwen3": (
        ["<|im_end|>", "<|im_start|>"],
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        0,
    ),
    "llama": (
        ["<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"],
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
        "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        1,
    ),
}


def write_llm(folder: Path, family: str, texts: Iterable[str], *, vocab_size: int = 500, seed: int = 0) -> Path:
    """A random model of two layers, whose heads, KV groups and head width differ as the family allows."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import (
        Glm4Config,
        Glm4ForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    control, template, opening = TEMPLATES[family]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=control, initial_alphabet=alphabet)
    )
    names: dict[str, Any] = {"eos_token": control[0], "pad_token": control[0]}
    if family == "llama":
        names["bos_token"] = control[1]
    if opening:
        first = control[1 : 1 + opening]
        raw.post_processor = processors.TemplateProcessing(
            single=" ".join([*first, "$A"]), special_tokens=[(token, raw.token_to_id(token)) for token in first]
        )
    PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=template, **names).save_pretrained(folder)

    sizes: dict[str, Any] = {
        "vocab_size": raw.get_vocab_size(), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "initializer_range": 0.3, "pad_token_id": 0, "eos_token_id": 0, "bos_token_id": None,
        "tie_word_embeddings": False, "max_position_embeddings": 1024,
    }  # fmt: skip
    torch.manual_seed(seed)
    model = {
        "glm4": lambda: Glm4ForCausalLM(
            Glm4Config(**sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=8, attention_bias=True)
        ),
        "qwen3": lambda: Qwen3ForCausalLM(
            Qwen3Config(**sizes, num_attention_heads=4, num_key_value_heads=1, head_dim=16)
        ),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=4)),
    }[family]()
    model.save_pretrained(folder)
    return folder
