"""The sampler beside transformers' generate, in one run on one machine: `python -m thinkrl.bench [--cases …] [--repeat N]`.

8 prompts of 20 to 60 tokens × 8 samples × 128 tokens, random Qwen2 weights, vocabulary 4096, temperature 1, no filters.
Two workloads: every completion runs to 128 tokens; or 64 of the 4096 ids stop, so that lengths spread over 1 to 128 and
a static batch waits for its longest. Only tokens of completions count. The two engines take turns, and the best of the
repeats is reported, because a neighbour on the machine can only slow a run down. "matmuls alone" is the time of one
step's matrix products on 64 rows, for the share of the machine that the decode loop reaches.
"""

from __future__ import annotations

import argparse
import tempfile
import time

import torch
import torch.nn.functional as F

from thinkrl.checkpoint import load_model
from thinkrl.sampler import Sampler

VOCABULARY, PROMPTS, SAMPLES, TOKENS = 4096, 8, 8, 128

CASES = {  # layers, width, heads, kv heads, mlp width, our dtype; transformers always computes in fp32
    "1.3M fp32": (4, 128, 4, 2, 384, torch.float32),
    "56M fp32": (12, 640, 10, 2, 1728, torch.float32),
    "56M bf16": (12, 640, 10, 2, 1728, torch.bfloat16),
}


def pair(layers: int, width: int, heads: int, kv_heads: int, mlp_width: int, dtype: torch.dtype):
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
    rows = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    with torch.inference_mode():
        out = model.generate(
            rows,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=TOKENS,
            num_return_sequences=SAMPLES,
            eos_token_id=stop_ids or None,
            pad_token_id=0,
        )
    written = out[:, longest:]
    ended = torch.isin(written, torch.tensor(stop_ids, dtype=written.dtype))
    before_end = ended.cumsum(1) - ended.long() == 0
    return int(before_end.sum())


def run_ours(sampler: Sampler, prompts: list[list[int]], stop_ids: list[int], seed: int) -> int:
    groups = sampler.generate(prompts, n=SAMPLES, max_tokens=TOKENS, stop_ids=stop_ids, seed=seed)
    return sum(len(completion.tokens) for group in groups for completion in group)


def matmuls_alone(model, rows: int = PROMPTS * SAMPLES, steps: int = 20) -> float:
    """Tokens per second if a decode step were nothing but its matrix products."""
    weights = [linear.weight for block in model.blocks for linear in (block.qkv, block.o, block.gate_up, block.down)]
    weights.append(model.head_weight)
    inputs = [torch.randn(rows, weight.shape[1]).to(weight.dtype) for weight in weights]
    best = float("inf")
    with torch.inference_mode():
        for _ in range(steps):
            start = time.perf_counter()
            for x, weight in zip(inputs, weights):
                F.linear(x, weight)
            best = min(best, time.perf_counter() - start)
    return rows / best


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args(argv)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; tokens per second")
    print(
        f"{'case':10} {'lengths':9} {'transformers':>12} {'thinkrl':>9} {'ratio':>6} {'matmuls alone':>14} {'share':>6}"
    )
    for case in options.cases:
        theirs, ours = pair(*CASES[case])
        sampler = Sampler(ours)
        generator = torch.Generator().manual_seed(0)
        prompts = [
            torch.randint(VOCABULARY, (length,), generator=generator).tolist()
            for length in torch.linspace(20, 60, PROMPTS).int().tolist()
        ]
        for lengths, stop_ids in (("128", []), ("spread", list(range(1, 4096, 64)))):
            speeds, alone = {"theirs": 0.0, "ours": 0.0}, 0.0
            for repeat in range(options.repeat):
                for engine in speeds:
                    start = time.perf_counter()
                    tokens = (
                        run_transformers(theirs, prompts, stop_ids)
                        if engine == "theirs"
                        else run_ours(sampler, prompts, stop_ids, seed=repeat)
                    )
                    speeds[engine] = max(speeds[engine], tokens / (time.perf_counter() - start))
                alone = max(alone, matmuls_alone(ours))
            ratio, share = speeds["ours"] / speeds["theirs"], speeds["ours"] / alone
            print(f"{case:10} {lengths:9} {speeds['theirs']:12.0f} {speeds['ours']:9.0f} {ratio:6.2f} "
                  f"{alone:14.0f} {share:6.0%}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
