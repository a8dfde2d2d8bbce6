"""Sampling with continuous batching over KV pages.

`Sampler` has four operations: generate, prefill, score, load_weights. Samples of a group share their prompt's
pages, and probes fork pages of completions. The folder decode/ has the parts: pages, packed forwards, decode
loop.

The key of a completion (seed, step, problem, sample, …) and the position of a token hash to the random number
that draws the token. So a trajectory does not depend on the rest of the batch, on preemption or on the world
size, up to floating-point ties.

Log-probs are those of the sampled distribution, log softmax(logits / temperature); greedy decoding
(temperature 0) returns them at temperature 1. There is no top-p or top-k, because the trainer's log-probs are
those of the whole distribution.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from weakref import WeakSet

import torch
from torch import Tensor, nn

from kernels.logprob import linear_logprob
from kernels.sample import hash_key
from thinkrl.decode.loop import LOOK_EVERY, Completion, DecodeLoop, Group, Request, Row
from thinkrl.decode.paged_model import PagedModel, TokenForwards
from thinkrl.decode.pages import OutOfPages, PagePool, Pages
from thinkrl.decode.step import GraphStep, eager_step
from thinkrl.distributed import free_memory, whole
from thinkrl.model import Transformer
from thinkrl.tokenizer import StopStrings, Tokenizer
from thinkrl.types import UserError

Choice = tuple[int, tuple[int, ...]]  # an index in a suffix, and the ids that may be there


class Sampler:
    """Sampler of completions with `model`, which may be its own copy (`load_weights`) or shared with the
    caller.

    num_pages       number of KV pages of `page_size` tokens; None: as many as max_rows contexts can use, in a
                    share of the free memory
    max_rows        completions that decode at the same time
    max_tokens_per_forward   prefill and probes are split into forwards of this size
    memory_share    share of the free CUDA memory for the pages (on a CPU: a quarter of the host's memory)
    cuda_graphs     record the decode step and replay it, on CUDA
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None = None,
        num_pages: int | None = None,
        page_size: int = 16,
        max_rows: int = 256,
        max_tokens_per_forward: int = 8192,
        memory_share: float = 0.8,
        cuda_graphs: bool = True,
    ):
        self.model, self._tokenizer = model, tokenizer
        self.memory_share, self.cuda_graphs = memory_share, cuda_graphs and self.device.type == "cuda"
        self.num_pages, self.page_size, self.max_rows = num_pages, page_size, max_rows
        self.max_tokens_per_forward = max_tokens_per_forward
        self.look_every = LOOK_EVERY if self.device.type == "cuda" else 1
        self.forwards = TokenForwards()
        self.on_completion: Callable[[], object] | None = None  # called once per completion of a prompt
        self._paged: PagedModel | None = None
        self._step: Callable = eager_step
        self._matchers: dict[tuple[str, ...], StopStrings] = {}

    @property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer of the model. Raises UserError if the sampler was made without one."""
        if self._tokenizer is None:
            raise UserError("stop strings and texts need the tokenizer: Sampler(model, tokenizer)")
        return self._tokenizer

    @property
    def device(self) -> torch.device:
        return self.model.embed.weight.device

    @property
    def paged(self) -> PagedModel:
        """Model with its KV pages, which are allocated on first use."""
        if self._paged is None:
            config, dtype = self.model.config, self.model.embed.weight.dtype
            count = self._default_pages() if self.num_pages is None else self.num_pages
            pool = PagePool(
                config.layers, count, config.kv_heads, config.head_dim, self.page_size, dtype, self.device
            )
            self._paged = PagedModel(self.model, pool, self.max_tokens_per_forward, self.forwards)
            self._step = GraphStep(self.max_rows) if self.cuda_graphs else eager_step
        return self._paged

    @property
    def pool(self) -> PagePool:
        return self.paged.pool

    @property
    def idle(self) -> WeakSet[Pages]:
        """Forks that their owner added here: they lose their pages if nothing else can be preempted.

        When used they are recomputed from their tokens.
        """
        return self.pool.idle

    def _default_pages(self) -> int:
        """Number of pages that max_rows contexts can use, within the share of the free memory."""
        config = self.model.config
        page_bytes = 2 * config.layers * self.page_size * config.kv_heads * config.head_dim
        page_bytes *= self.model.embed.weight.dtype.itemsize
        if self.device.type == "cuda":
            room = int(self.memory_share * free_memory(self.device))
        else:
            room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
        return min(self.max_rows * -(-config.max_positions // self.page_size), room // page_bytes)

    def release_pool(self) -> None:
        """Free the memory of the KV pages for a backward. The next call allocates them again."""
        if self._paged is not None:
            held = len(self.pool.handles)
            assert held == 0, f"{held} sequences still hold pages: release the forks first"
            self._paged, self._step = None, eager_step

    @torch.no_grad()
    def load_weights(self, policy: nn.Module) -> None:
        """Copy the policy's parameters into the sampler's own, in place. Collective when they are sharded.

        One parameter is gathered at a time, so no second full copy exists. No sequence may hold pages, whose
        K/V would be of the old weights.
        """
        assert self._paged is None or not self.pool.handles, "sequences of the old weights still hold pages"
        own = dict(self.model.named_parameters())
        theirs = dict(policy.named_parameters())
        if own.keys() != theirs.keys():
            raise UserError(
                f"the policy is not of the sampler's architecture: {sorted(own.keys() ^ theirs.keys())[:3]} "
                "differ"
            )
        for name, parameter in own.items():
            parameter.copy_(whole(theirs[name].to(parameter.dtype)))  # cast first: half the bytes in bf16

    @torch.inference_mode()
    def generate(
        self,
        prompts: list[list[int]],
        n: int = 1,
        max_tokens: int | Sequence[int] = 256,
        temperature: float = 1.0,
        stop: Sequence[str] = (),
        stop_ids: Sequence[int] | None = None,
        seed: int = 0,
        keys: Sequence[tuple[int, ...]] | None = None,
        on_finish: Callable[[Completion, Pages], None] | None = None,
        on_tokens: Callable[[int, int, list[int]], None] | None = None,
        prefix: Sequence[Pages] | None = None,
        return_hidden: bool = False,
    ) -> list[list[Completion]]:
        """Sample n completions of every prompt; returns a list of n per prompt.

        max_tokens     of every completion; or a limit for those of each prompt
        temperature    0 is greedy
        stop           stop strings; a completion ends with the token whose text completes one
        stop_ids       None: the tokenizer's; a sampled stop id is part of the completion
        keys           one tuple of ints per completion, prompt by prompt, the key of its random numbers;
                       None: (prompt, sample)
        on_finish      called with each completion and its pages before they are freed. It may fork them,
                       score forks, sample from forks, and keep forks after the call (a kept fork holds its
                       pages until it is released, or idle)
        on_tokens      called with (prompt, sample, tokens so far) of every live completion whenever the host
                       reads them, to show text during decoding
        prefix         one sequence per prompt, from `prefill` or a fork: prompts[i], which may then be empty,
                       continues prefix[i] on its pages. The caller still owns prefix[i] and releases it
        return_hidden  keep the hidden state of every log-prob, [len(tokens), D] per completion

        If the call raises, all pages that it took are freed. Raises UserError for invalid arguments, and for
        a sequence that does not fit the context or the pages.
        """
        stop = [stop] if isinstance(stop, str) else list(stop)
        if stop_ids is None:
            stop_ids = self._tokenizer.stop_ids if self._tokenizer else ()
        sources: Sequence[Pages | None] = [None] * len(prompts) if prefix is None else prefix
        limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else list(max_tokens)
        groups = [
            Group(i, [*(source.tokens if source else ()), *prompt], source, n, limit)
            for i, (prompt, source, limit) in enumerate(zip(prompts, sources, limits, strict=True))
        ]
        most = max(limits, default=1)
        hidden = None
        if return_hidden:  # first, because the pool takes a share of the free memory
            shape = min(len(prompts) * n, self.max_rows) * (most + 1), self.model.config.width
            hidden = torch.zeros(shape, dtype=self.model.embed.weight.dtype, device=self.device)
        before = set(self.pool.handles)
        self._check(groups, n, temperature, stop_ids, keys)
        addresses = torch.tensor(
            keys if keys is not None else [(g.index, s) for g in groups for s in range(n)]
        )
        row_keys = hash_key(seed, *addresses.unbind(-1)).tolist() if prompts else []
        waiting = deque(Row(group, s, row_keys[group.index * n + s]) for group in groups for s in range(n))
        request = Request(most, temperature, stop_ids, self._stop_strings(stop), on_finish, on_tokens)
        loop = DecodeLoop(self.paged, waiting, request, self.max_rows, self.look_every, self._step, hidden)
        results: dict[tuple[int, int], Completion] = {}
        try:
            for completion in loop.run():
                results[completion.prompt, completion.sample] = completion
                if self.on_completion and not groups[completion.prompt].source:
                    self.on_completion()
        except BaseException:
            self.pool.release_all_but(before)
            raise
        return [[results[i, sample] for sample in range(n)] for i in range(len(prompts))]

    @torch.inference_mode()
    def prefill(self, tokens: list[int], prefix: Pages | None = None) -> Pages:
        """Compute K/V of `tokens`, after `prefix` if given. Returns a sequence, which the caller must
        release.
        """
        pages = prefix.fork() if prefix else self.pool.new([])
        pages.tokens = pages.tokens + list(tokens)
        try:
            self._require(pages.tokens, 0, "prefix")
            self.pool.reserve(pages, len(pages.tokens) - 1)
            self.paged.feed([pages])
        except BaseException:
            pages.release()
            raise
        return pages

    @torch.inference_mode()
    def score(
        self,
        forks: Sequence[Pages],
        suffixes: Sequence[list[int]],
        choices: Sequence[Sequence[Choice]] | None = None,
    ) -> list[Tensor]:
        """Score each suffix after its fork, teacher-forced, at temperature 1: log-probs, a list of
        [len(suffix)] fp32.

        choices   per suffix, pairs (i, ids): also the log-probability that its token i is one of `ids`. These
                  follow the suffix's log-probs: [len(suffix) + len(choices)]

        All suffixes are in one packed forward, as far as max_tokens_per_forward and the free pages allow. The
        forks are released.
        """
        results: list[Tensor] = []
        if choices is None:
            choices = [()] * len(suffixes)
        try:
            for fork, suffix in zip(forks, suffixes, strict=True):
                self._require(fork.tokens, len(suffix), "probe")
            while len(results) < len(forks):
                batch = self._probe_batch(forks[len(results) :], suffixes[len(results) :])
                results += self._score(batch, choices[len(results) :])
                for fork, _, _ in batch:
                    fork.release()
        finally:
            for fork in forks:
                fork.release()
        return results

    def _probe_batch(
        self, forks: Sequence[Pages], suffixes: Sequence[list[int]]
    ) -> list[tuple[Pages, list[int], list[int]]]:
        """Reserve pages for the first probes that fit one forward: (fork, tokens to feed, suffix)."""
        batch: list[tuple[Pages, list[int], list[int]]] = []
        size = 0
        for fork, suffix in zip(forks, suffixes):
            self.idle.discard(fork)
            fed = fork.unfed + suffix[:-1]  # the prediction after the suffix is not needed
            if batch and size + len(fed) > self.max_tokens_per_forward:
                break
            try:
                fork.reserve(fork.filled + len(fed))
            except OutOfPages:
                if batch:
                    break
                self.pool.reserve(fork, fork.filled + len(fed))
            batch.append((fork, fed, suffix))
            size += len(fed)
        return batch

    def _score(
        self, batch: list[tuple[Pages, list[int], list[int]]], choices: Sequence[Sequence[Choice]]
    ) -> list[Tensor]:
        hidden = self.paged.forward([(fork, fed) for fork, fed, _ in batch])
        self.forwards.probe += len(hidden)
        ends = torch.tensor([len(fed) for _, fed, _ in batch]).cumsum(0).tolist()
        starts = [end - len(suffix) for end, (_, _, suffix) in zip(ends, batch)]
        rows = [r for start, end in zip(starts, ends) for r in range(start, end)]
        targets = [token for _, _, suffix in batch for token in suffix]
        rows, targets = torch.tensor([rows, targets], dtype=torch.int64, device=self.device)
        logprob, _ = linear_logprob(hidden[rows], self.model.head_weight, targets)
        asked = [(start + i, ids) for start, more in zip(starts, choices) for i, ids in more]
        chosen = self._choose(hidden, asked).split([len(more) for more in choices[: len(batch)]])
        own = logprob.split([len(suffix) for _, _, suffix in batch])
        with torch.inference_mode(False):  # autograd refuses a tensor made in inference mode
            return [torch.cat(pair) for pair in zip(own, chosen)]

    def _choose(self, hidden: Tensor, asked: list[Choice]) -> Tensor:
        """Log of the summed probability of `ids` after a hidden row, for each (row, ids): [len(asked)]."""
        places: dict[tuple[int, ...], list[int]] = {}  # many rows have the same ids
        for place, (_, ids) in enumerate(asked):
            places.setdefault(ids, []).append(place)
        chosen = hidden.new_empty(len(asked), dtype=torch.float32)
        for ids, where in places.items():
            wanted = torch.tensor(ids, device=self.device)
            for first in range(0, len(where), 64):  # bounds the memory of logits
                some = where[first : first + 64]
                at = torch.tensor(some, device=self.device)
                states = hidden[[asked[place][0] for place in some]]
                logits = self.model.logits(states).float()
                chosen[at] = logits[:, wanted].logsumexp(-1) - logits.logsumexp(-1)
        return chosen

    def _stop_strings(self, stop: list[str]) -> StopStrings | None:
        """Matcher of these strings, cached because it is built from the text of the whole vocabulary."""
        if not stop:
            return None
        if tuple(stop) not in self._matchers:
            self._matchers[tuple(stop)] = StopStrings(self.tokenizer, stop)
        return self._matchers[tuple(stop)]

    def _check(self, groups: list[Group], n: int, temperature: float, stop_ids, keys) -> None:
        vocab = self.model.config.vocab_size
        least = min((group.max_tokens for group in groups), default=1)
        if n < 1 or least < 1:
            raise UserError(f"n = {n} completions of max_tokens = {least}: both must be at least 1")
        if not temperature >= 0.0:
            raise UserError(f"temperature = {temperature}: it must be 0 (greedy) or more")
        if not all(0 <= token < vocab for token in stop_ids):
            raise UserError(f"stop_ids {list(stop_ids)} are not all in the vocabulary of {vocab}")
        if keys is not None and (len(keys) != len(groups) * n or len({len(key) for key in keys}) > 1):
            raise UserError(
                f"{len(keys)} keys for {len(groups)} prompts × {n} samples: give each completion one tuple, "
                "all as long"
            )
        for group in groups:
            if not group.tokens:
                raise UserError(
                    f"prompt {group.index} is empty: there is nothing to predict the first token from"
                )
            if not 0 <= min(group.tokens) <= max(group.tokens) < vocab:
                raise UserError(f"prompt {group.index} has a token outside the vocabulary of {vocab}")
            self._require(group.tokens, group.max_tokens, f"prompt {group.index}")

    def _require(self, tokens: list[int], more: int, what: str) -> None:
        longest = self.model.config.max_positions
        if len(tokens) + more > longest:
            raise UserError(
                f"{what}: {len(tokens)} tokens and {more} more exceed the model's context of {longest}"
            )
        self.pool.require(len(tokens) + more - 1)
