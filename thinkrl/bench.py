"""The sampler beside transformers' generate, in one run on one machine.

    python -m thinkrl.bench [--cases …] [--repeat N]

8 prompts of 20 to 60 tokens × 8 samples × 128 tokens, random Qwen2 weights, vocabulary 4096, temperature 1, no filters.
Two workloads: every completion runs to 128 tokens; or 64 of the 4096 ids stop, so that lengths spread over 1 to 128 and
a static batch waits for its longest. Only tokens of completions count. The two engines take turns, and the best of the
repeats is reported, because a neighbour on the machine can only slow a run down. transformers computes in fp32 always.

"matmuls" is how fast decoding would be if a step were nothing but its matrix products on 64 rows, done by F.linear;
"ours" is the same with the product that the sampler uses.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from thinkrl.checkpoint import load_model
from thinkrl.model import Transformer
from thinkrl.sampler import Sampler, fast_linear

VOCABULARY, PROMPTS, SAMPLES, TOKENS = 4096, 8, 8, 128

CASES = {  # layers, width, heads, kv heads, mlp width, our dtype
    "1.3M fp32": (4, 128, 4, 2, 384, torch.float32),
    "56M fp32": (12, 640, 10, 2, 1728, torch.float32),
    "56M bf16": (12, 640, 10, 2, 1728, torch.bfloat16),
}


def twins(layers: int, width: int, heads: int, kv_heads: int, mlp_width: int, dtype: torch.dtype):
    """The same random weights as a transformers model and as ours."""
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, intermediate_size=mlp_width, max_position_embeddings=512,
        tie_word_embeddings=True, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    theirs = transformers.Qwen2ForCausalLM(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return theirs, load_model(folder, dtype=dtype)


def run_transformers(model, prompts: list[list[int]], stop_ids: list[int]) -> int:
    """Completion tokens written."""
    longest = max(map(len, prompts))
    rows = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.inference_mode():
        out = model.generate(
            rows, attention_mask=mask, max_new_tokens=TOKENS, num_return_sequences=SAMPLES, do_sample=True,
            temperature=1.0, top_k=0, top_p=1.0, eos_token_id=stop_ids or None, pad_token_id=0,
        )  # fmt: skip
    stopped = torch.isin(out[:, longest:], torch.tensor(stop_ids, dtype=out.dtype))
    return int((stopped.cumsum(1) - stopped.long() == 0).sum())


def run_ours(sampler: Sampler, prompts: list[list[int]], stop_ids: list[int], seed: int = 0) -> int:
    groups = sampler.generate(prompts, n=SAMPLES, max_tokens=TOKENS, stop_ids=stop_ids, seed=seed)
    return sum(len(completion.tokens) for group in groups for completion in group)


def matmuls_alone(model: Transformer, product: Callable, rows: int = PROMPTS * SAMPLES) -> float:
    """Tokens per second if a decode step were nothing but its matrix products."""
    weights = [linear.weight for block in model.blocks for linear in (block.qkv, block.o, block.gate_up, block.down)]
    weights.append(model.head_weight)
    inputs = [torch.randn(rows, weight.shape[1]).to(weight.dtype) for weight in weights]
    best = 0.0
    with torch.inference_mode():
        for _ in range(20):
            start = time.perf_counter()
            for x, weight in zip(inputs, weights):
                product(x, weight)
            best = max(best, rows / (time.perf_counter() - start))
    return best


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args(argv)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; tokens per second")
    print("case       lengths   transformers   thinkrl   ratio   matmuls   share   ours   share")
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(20, 60, PROMPTS).int().tolist()
    prompts = [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    for case in options.cases:
        theirs, model = twins(*CASES[case])
        sampler = Sampler(model)
        for workload, stop_ids in (("128", []), ("spread", list(range(1, VOCABULARY, 64)))):
            engines = {
                "theirs": lambda: run_transformers(theirs, prompts, stop_ids),  # noqa: B023
                "ours": lambda: run_ours(sampler, prompts, stop_ids),  # noqa: B023
            }
            speed = dict.fromkeys(engines, 0.0)
            plain = fast = 0.0
            for _ in range(options.repeat):
                for name, run in engines.items():
                    start = time.perf_counter()
                    tokens = run()
                    speed[name] = max(speed[name], tokens / (time.perf_counter() - start))
                plain = max(plain, matmuls_alone(model, F.linear))
                fast = max(fast, matmuls_alone(model, fast_linear))
            ours = speed["ours"]
            print(f"{case:10} {workload:7} {speed['theirs']:14.0f} {ours:9.0f} {ours / speed['theirs']:7.2f} "
                  f"{plain:9.0f} {ours / plain:7.0%} {fast:6.0f} {ours / fast:7.0%}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
