"""Write the training data and start of the embedded model; `make tiny` then trains it.

    python -m thinkrl.assets.tiny.make --out DIR

    DIR/chains.jsonl      rows {"problem", "response"} by thinkrl.arith
    DIR/start/            a Llama checkpoint folder with random weights: config, tokenizer, model.safetensors

Then `train.py sft` trains DIR/start on DIR/chains.jsonl, each row once, and model.safetensors is all that
changes hands.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from thinkrl.arith import MAX_EPISODES, sft_rows
from thinkrl.options import option, parse_as, run_tool
from thinkrl.run.lock import take

EOS, UNK = "<|eos|>", "<|unk|>"
TAGS = [
    *(f"<{slash}{tag}>" for tag in ("think", "answer") for slash in ("", "/")),
    "</rethink>",
    "<|long|>",
    "<|short|>",
    *(f"<{slash}episode_{k}>" for k in range(1, MAX_EPISODES + 1) for slash in ("", "/")),
]
WORDS = ["recall ", "check ", "so ", "wait", " ok", " no"]  # a word owns its space: one token
VOCABULARY = [EOS, UNK, *"0123456789", *"+-*=?", "\n", " ", *WORDS, *TAGS]

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": len(VOCABULARY),
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "hidden_act": "silu",
    "max_position_embeddings": 1024,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "bos_token_id": None,
    "eos_token_id": VOCABULARY.index(EOS),
    "torch_dtype": "float32",
    "thinkrl_embedded": True,  # train.py's small defaults apply to this folder and to models trained from it
}
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ message['content'] }}"
    "{% endif %}{% endfor %}"
)


def tokenizer() -> Tokenizer:
    """One token per entry of VOCABULARY; the longest entry wins; any other character is UNK."""
    out = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token=UNK))
    longest_first = sorted(VOCABULARY, key=len, reverse=True)
    pattern = "|".join(re.escape(word) for word in longest_first)
    out.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    out.decoder = decoders.Fuse()
    out.add_special_tokens(
        [AddedToken(EOS, special=True, normalized=False), AddedToken(UNK, special=True, normalized=False)]
    )
    return out


def random_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Names and shapes of Llama in transformers. Matrices ~ N(0, 1/fan_in); those that write to the
    residual stream quieter.
    """
    generator = torch.Generator().manual_seed(seed)
    width, inner, layers = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["num_hidden_layers"]
    kv = width // CONFIG["num_attention_heads"] * CONFIG["num_key_value_heads"]

    def matrix(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * gain / columns**0.5

    quiet = (2 * layers) ** -0.5
    weights = {"model.embed_tokens.weight": matrix(CONFIG["vocab_size"], width)}
    for i in range(layers):
        at = f"model.layers.{i}."
        for name, rows in (("q", width), ("k", kv), ("v", kv)):
            weights[f"{at}self_attn.{name}_proj.weight"] = matrix(rows, width)
        weights[f"{at}self_attn.o_proj.weight"] = matrix(width, width, quiet)
        weights[f"{at}mlp.gate_proj.weight"] = matrix(inner, width)
        weights[f"{at}mlp.up_proj.weight"] = matrix(inner, width)
        weights[f"{at}mlp.down_proj.weight"] = matrix(width, inner, quiet)
        weights[f"{at}input_layernorm.weight"] = torch.ones(width)
        weights[f"{at}post_attention_layernorm.weight"] = torch.ones(width)
    weights["model.norm.weight"] = torch.ones(width)
    weights["lm_head.weight"] = matrix(CONFIG["vocab_size"], width)
    return weights


def write_folder(path: Path, weights: dict[str, torch.Tensor]) -> None:
    """A Hugging Face checkpoint folder."""
    path.mkdir(parents=True, exist_ok=True)
    tokenizer().save(str(path / "tokenizer.json"))
    texts = {
        "config.json": CONFIG,
        "generation_config.json": {
            "eos_token_id": VOCABULARY.index(EOS),
            "do_sample": True,
            "temperature": 1.0,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": EOS,
            "unk_token": UNK,
            "clean_up_tokenization_spaces": False,
            "model_max_length": CONFIG["max_position_embeddings"],
            "chat_template": CHAT_TEMPLATE,
        },
        "prompts.json": {"long": "<|long|>", "short": "<|short|>"},
    }
    for name, content in texts.items():
        (path / name).write_text(json.dumps(content, indent=2) + "\n")
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


@dataclass(frozen=True)
class Options:
    out: str = option("runs/tiny", "folder to write")
    rows: int = option(128_000, "chains to write: 1000 steps of 128", low=1)
    seed: int = option(1, "of problems, chains and weights")


def parse(argv: list[str]) -> Options:
    return parse_as(Options, argv, "python -m thinkrl.assets.tiny.make [--key value …]")


def main(options: Options) -> None:
    out = Path(options.out)
    take(out)
    write_folder(out / "start", random_weights(options.seed))
    with (out / "chains.jsonl").open("w") as file:
        for row in sft_rows(options.seed, options.rows):
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    run_tool("make", parse, main)
