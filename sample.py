"""Answer a prompt, or measure a policy:

    torchrun --nproc_per_node=1 sample.py --prompt "374*6?"
    torchrun --nproc_per_node=2 sample.py --data FILE --n 8 --temperature 1
    torchrun --nproc_per_node=1 sample.py --long DIR --short DIR --prompt "…"

Prints accuracy, tokens (mean, max, share truncated), pass@k, maj@k and tokens per correct answer.
"""

from dataclasses import dataclass

from thinkrl.config import command_line, option, options_help, read_options


@dataclass(frozen=True)
class Options:
    _what = "what to answer"
    model: str = option("tiny", "Hugging Face folder, or 'tiny', the embedded model")
    prompt: str = option("", "answer this and print it")
    data: str = option("", "evaluate on: 'arith' (held out) | FILE.jsonl | FILE.parquet | hub:owner/name")
    source: str = option("", "grading rule for rows that name none: arith | gsm8k | math")
    limit: int = option(0, "at most this many problems; 0: all")
    system: str = option("", "system message")
    suffix: str = option("", "text appended to every question")
    _how = "how"
    n: int = option(1, "completions per problem")
    max_tokens: int = option(0, "completion limit; 0: 200 for the embedded model, else 2048")
    temperature: float = option(1.0, "0 is greedy")
    seed: int = option(42, "seed of every sampled token")
    device: str = option("auto", "where to compute", ("auto", "cpu", "cuda"))
    dtype: str = option("auto", "bfloat16 on CUDA, float32 on CPU", ("auto", "float32", "bfloat16"))
    out: str = option("", "also write every completion to this JSONL file")


def parse_options(argv: list[str]) -> Options:
    if "--help" in argv or "-h" in argv:
        print("\n".join(["usage: torchrun --nproc_per_node=N sample.py --prompt TEXT | --data FILE [--key value …]",
                         *options_help(Options)]))
        raise SystemExit(0)
    return Options(**read_options(argv, Options))
