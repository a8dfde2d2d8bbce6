"""Peer of `bench_peers`, run in an environment without thinkrl.

    python thinkrl/tools/peer.py transformers|vllm|trl REQUEST.json

Prints {"ready": version} after loading. For every line on stdin it runs once and prints the seconds.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any


def by_transformers(request: dict) -> tuple[str, Callable[[], None]]:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        request["model"], dtype=getattr(torch, request["dtype"])
    ).eval()
    longest = max(map(len, request["prompts"]))
    rows = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in request["prompts"]])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in request["prompts"]])

    def work() -> None:
        with torch.inference_mode():
            out = model.generate(
                rows, attention_mask=mask, max_new_tokens=request["tokens"],
                num_return_sequences=request["samples"], do_sample=True, temperature=1.0, top_k=0,
                top_p=1.0, pad_token_id=0,
            )  # fmt: skip
        assert out.shape == (len(rows) * request["samples"], longest + request["tokens"])

    return transformers.__version__, work


def by_vllm(request: dict) -> tuple[str, Callable[[], None]]:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine in this process
    import vllm

    engine = vllm.LLM(
        request["model"],
        dtype=request["dtype"],
        skip_tokenizer_init=True,
        max_model_len=512,
        enable_prefix_caching=False,
    )
    settings = vllm.SamplingParams(
        n=request["samples"], temperature=1.0, max_tokens=request["tokens"], ignore_eos=True, detokenize=False
    )
    prompts: list[Any] = [{"prompt_token_ids": prompt} for prompt in request["prompts"]]

    def work() -> None:
        results = engine.generate(prompts, settings, use_tqdm=False)
        written = sum(len(sample.token_ids) for result in results for sample in result.outputs)
        assert written == len(prompts) * request["samples"] * request["tokens"]

    return vllm.__version__, work


def train_by_trl(request: dict, answer: Callable[..., None], clock: Callable[[], float]) -> None:
    """Run steps of GRPOTrainer on request. Every completion has all tokens; half of the rewards are 1."""
    import tempfile

    import trl
    from datasets import Dataset
    from transformers import TrainerCallback

    class Turns(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            answer(ready=trl.__version__)

        def on_step_begin(self, args, state, control, **kwargs):
            if not sys.stdin.readline():
                os._exit(0)  # no more turns
            self.begun = clock()

        def on_step_end(self, args, state, control, **kwargs):
            answer(seconds=clock() - self.begun)

    def reward(completions: list[str], completion_ids: list[list[int]], **kwargs) -> list[float]:
        assert [len(ids) for ids in completion_ids] == [tokens] * len(texts) * samples
        return [float(i % 2) for i in range(len(completions))]

    texts, samples, tokens = request["texts"], request["samples"], request["tokens"]
    with tempfile.TemporaryDirectory() as folder:
        config = trl.GRPOConfig(
            output_dir=folder, use_cpu=True, bf16=False, per_device_train_batch_size=len(texts) * samples,
            num_generations=samples, max_completion_length=tokens,
            generation_kwargs={"min_new_tokens": tokens}, temperature=1.0, top_k=0, beta=0.0,
            learning_rate=2e-4, max_steps=1000, gradient_checkpointing=False, report_to=[],
            save_strategy="no", logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trl.GRPOTrainer(
            request["model"],
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": texts}),
            callbacks=[Turns()],
        ).train()


def main(peer: str, path: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr

    def answer(**values) -> None:
        print(json.dumps(values), file=answers, flush=True)

    with open(path) as file:
        request = json.load(file)
    clock = getattr(time, request["clock"])
    if peer == "trl":
        return train_by_trl(request, answer, clock)
    version, work = {"transformers": by_transformers, "vllm": by_vllm}[peer](request)
    answer(ready=version)
    for _ in sys.stdin:
        begun = clock()
        work()
        answer(seconds=clock() - begun)


if __name__ == "__main__":
    main(*sys.argv[1:])
