"""Sampling: continuous batching over KV pages; the samples of a group share their prompt; probes fork what was written.

The protocol of one call, `generate(prompts, n)`:

    admit     waiting completions become rows while pages and rows last; a prompt is prefilled once for its n samples
    reserve   every row gets the pages of its next `page_size` tokens; when none is free the youngest row gives its own
              back and returns to the head of the queue, to be recomputed from its tokens
    step      one token for every row: one forward, one draw, all bookkeeping in tensors
    retire    rows that met a stop id, a stop string or their limit leave; the last rows move into the holes

A decode step contains no Python loop over sequences and reads nothing back from the device. On CUDA the host
looks at the rows only every LOOK_EVERY steps; a row that ended in between stands still, repeating its last
and harmless write.

Randomness has an address. The key of a completion (seed, step, problem, sample, …) and the position of a
token in the completion hash to the number that draws the token, so a trajectory does not depend on its
neighbours in the batch, on preemption or on the world size, up to floating-point ties.

Log-probs are those of the distribution sampled from, log softmax(logits / temperature); greedy decoding
(temperature 0) reports them at temperature 1. There is no top-p or top-k: a policy trained on truncated
samples would be scored by a distribution it was not sampled from.
"""

from __future__ import annotations

import functools
import os
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.attention import packed_attention, paged_attention
from kernels.logprob import linear_logprob
from kernels.sample import hash_key, sample_token
from thinkrl.model import Attend, Transformer
from thinkrl.pages import OutOfPages, PagePool, Pages
from thinkrl.tokenizer import StopStrings, Tokenizer
from thinkrl.types import UserError

LOOK_EVERY = 8  # decode steps between two looks of the host at a CUDA device; a CPU is looked at after each


@dataclass
class Completion:
    """What the sampler wrote behind a prompt."""

    tokens: list[int]  # the stop token included
    logprobs: list[float]  # one per token, at the sampling temperature
    finish_reason: str  # "stop" | "length"
    hidden: Tensor | None = None  # [len(tokens), D], the state that predicted each token, if it was asked for
    prompt: int = 0  # which prompt of the call
    sample: int = 0  # which of its n


@dataclass
class TokenForwards:
    """Tokens that went through the model, by purpose: the proof that prefixes are shared and that probes
    are cheap.
    """

    prefill: int = 0
    decode: int = 0
    probe: int = 0

    @property
    def total(self) -> int:
        return self.prefill + self.decode + self.probe


class Sampler:
    """Writes completions with `model`, which it may own alone (`load_weights`) or share with the caller.

    num_pages   KV pages of `page_size` tokens; None: what max_rows contexts can use, within a share of the free memory
    memory_share   that share, on CUDA (of the host's memory it is a quarter)
    max_rows    completions that decode at the same time
    max_tokens_per_forward   prefill and probes are cut into forwards of this size

    `idle` are the forks that their owner keeps for later and adds here: where nobody else can give way, they
    give their pages back and are recomputed from their tokens when they are used.
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
    ):
        self.model, self.tokenizer = model, tokenizer
        self.memory_share = memory_share
        self.num_pages, self.page_size, self.max_rows = num_pages, page_size, max_rows
        self.max_tokens_per_forward = max_tokens_per_forward
        self.look_every = LOOK_EVERY if self.device.type == "cuda" else 1
        self.forwards = TokenForwards()
        self._pool: PagePool | None = None
        self.idle: weakref.WeakSet[Pages] = weakref.WeakSet()
        self._calls: list[
            _Call
        ] = []  # in progress, one inside a callback of the other: these can give pages back
        self._matchers: dict[tuple[str, ...], StopStrings] = {}
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.forward = partial(_linear_forward, module)

    @property
    def device(self) -> torch.device:
        return self.model.embed.weight.device

    @property
    def pool(self) -> PagePool:
        """The KV pages, created when first used."""
        if self._pool is None:
            config, dtype = self.model.config, self.model.embed.weight.dtype
            count = self.num_pages
            if count is None:
                page_bytes = (
                    2 * config.layers * self.page_size * config.kv_heads * config.head_dim * dtype.itemsize
                )
                if self.device.type == "cuda":
                    room = int(self.memory_share * torch.cuda.mem_get_info(self.device)[0])
                else:
                    room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
                count = min(self.max_rows * -(-config.max_positions // self.page_size), room // page_bytes)
            self._pool = PagePool(
                config.layers, count, config.kv_heads, config.head_dim, self.page_size, dtype, self.device
            )
        return self._pool

    def release_pool(self) -> None:
        """Give the memory of the KV pages back, before a backward that needs it. The next call creates
        them anew.
        """
        if self._pool is not None:
            held = len(self._pool.handles)
            assert held == 0, f"{held} sequences still hold pages: release the forks first"
            self._pool = None
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # or the next pool would see as free only what this one left

    @torch.no_grad()
    def load_weights(self, policy: nn.Module) -> None:
        """Copy the policy's parameters into the sampler's own, in place. Collective when they are sharded.

        One parameter is gathered at a time, so the copy never needs a second model. K/V of the old weights is
        worthless from here on, so nothing may hold pages.
        """
        assert self._pool is None or not self._pool.handles, "sequences of the old weights still hold pages"
        own = dict(self.model.named_parameters())
        theirs = dict(policy.named_parameters())
        if own.keys() != theirs.keys():
            raise UserError(
                f"the policy is not of the sampler's architecture: {sorted(own.keys() ^ theirs.keys())[:3]} differ"
            )
        for name, parameter in own.items():
            source = theirs[name]
            parameter.copy_(source.full_tensor() if hasattr(source, "full_tensor") else source)

    @torch.inference_mode()
    def generate(
        self,
        prompts: list[list[int]],
        n: int = 1,
        max_tokens: int = 256,
        temperature: float = 1.0,
        stop: Sequence[str] = (),
        stop_ids: Sequence[int] | None = None,
        seed: int = 0,
        keys: Sequence[tuple[int, ...]] | None = None,
        on_finish: Callable[[Completion, Pages], None] | None = None,
        prefix: Sequence[Pages] | None = None,
        return_hidden: bool = False,
    ) -> list[list[Completion]]:
        """n completions of every prompt, in the order asked for.

        temperature    0 is greedy
        stop           strings; the completion ends with the token whose text completes one; needs the tokenizer
        stop_ids       None: the tokenizer's own; the sampled stop id is part of the completion
        keys           one tuple of ints per completion, prompt by prompt: the address of its randomness; None gives
                       (prompt, sample)
        on_finish      called with each completion before its pages are freed. It may fork them, score forks, sample
                       from forks, and keep forks beyond the call (a kept fork holds its pages until released,
                       or idle)
        prefix         one sequence per prompt, from `prefill` or a fork: prompts[i], which may then be empty, continues
                       prefix[i] on its pages. The prefix stays the caller's, to be released by the caller
        return_hidden  keep the hidden state behind every log-prob, len(tokens) × D numbers per completion

        When anything raises, every page taken since the call began is free again.
        """
        stop = [stop] if isinstance(stop, str) else list(stop)
        if stop_ids is None:
            stop_ids = self.tokenizer.stop_ids if self.tokenizer else ()
        if prefix is None:
            prefix = [None] * len(prompts)
        groups = [
            _Group(i, [*(source.tokens if source else ()), *prompt], source, n)
            for i, (prompt, source) in enumerate(zip(prompts, prefix, strict=True))
        ]
        hidden = None
        if return_hidden:  # first of all, because the pool takes a share of what is free
            shape = min(len(prompts) * n, self.max_rows) * (max_tokens + 1), self.model.config.width
            hidden = torch.zeros(shape, dtype=self.model.embed.weight.dtype, device=self.device)
        before = set(self.pool.handles)
        self._check(groups, n, max_tokens, temperature, stop_ids, keys)
        addresses = torch.tensor(
            keys if keys is not None else [(g.index, s) for g in groups for s in range(n)]
        )
        row_keys = hash_key(seed, *addresses.unbind(-1)).tolist() if prompts else []
        waiting = deque(_Row(group, s, row_keys[group.index * n + s]) for group in groups for s in range(n))
        call = _Call(self, waiting, max_tokens, temperature, stop, stop_ids, on_finish, hidden)
        results: list[list[Completion]] = [[None] * n for _ in prompts]
        self._calls.append(call)
        try:
            for completion in call.run():
                results[completion.prompt][completion.sample] = completion
        except BaseException:
            self.pool.release_all_but(before)
            raise
        finally:
            self._calls.remove(call)
        return results

    @torch.inference_mode()
    def prefill(self, tokens: list[int], prefix: Pages | None = None) -> Pages:
        """The K/V of `tokens`, behind `prefix` if one is given, as a sequence that the caller forks and
        releases.
        """
        pages = prefix.fork() if prefix else self.pool.new([])
        pages.tokens = pages.tokens + list(tokens)
        try:
            self._require(pages.tokens, 0, "prefix")
            self._reserve(pages, len(pages.tokens) - 1)
            self._feed([pages])
        except BaseException:
            pages.release()
            raise
        return pages

    @torch.inference_mode()
    def score(self, forks: Sequence[Pages], suffixes: Sequence[list[int]]) -> list[Tensor]:
        """Log-probs (temperature 1) of each suffix behind its fork, teacher-forced: a list of [len(suffix)] fp32.

        All suffixes go through the model in one packed forward, as far as max_tokens_per_forward and the free
        pages allow. The forks are released.
        """
        results: list[Tensor] = []
        try:
            for fork, suffix in zip(forks, suffixes, strict=True):
                self._require(fork.tokens, len(suffix), "probe")
            while len(results) < len(forks):
                batch, size = [], 0
                for fork, suffix in zip(forks[len(results) :], suffixes[len(results) :]):
                    self.idle.discard(fork)
                    fed = (
                        fork.unfed + suffix[:-1]
                    )  # what the last suffix token would predict is not asked for
                    if batch and size + len(fed) > self.max_tokens_per_forward:
                        break
                    try:
                        fork.reserve(fork.filled + len(fed))
                    except OutOfPages:
                        if batch:
                            break
                        self._reserve(fork, fork.filled + len(fed))
                    batch.append((fork, fed, suffix))
                    size += len(fed)
                results += self._score(batch)
                for fork, _, _ in batch:
                    fork.release()
        finally:
            for fork in forks:
                fork.release()
        return results

    def _score(self, batch: list[tuple[Pages, list[int], list[int]]]) -> list[Tensor]:
        hidden = self._forward([(fork, fed) for fork, fed, _ in batch])
        self.forwards.probe += len(hidden)
        ends = torch.tensor([len(fed) for _, fed, _ in batch]).cumsum(0).tolist()
        rows = [r for end, (_, _, suffix) in zip(ends, batch) for r in range(end - len(suffix), end)]
        targets = [token for _, _, suffix in batch for token in suffix]
        rows, targets = torch.tensor([rows, targets], dtype=torch.int64, device=self.device)
        logprob, _ = linear_logprob(hidden[rows], self.model.head_weight, targets)
        with torch.inference_mode(False):  # a tensor born in inference mode may never meet autograd
            return list(logprob.clone().split([len(suffix) for _, _, suffix in batch]))

    def _stop_strings(self, stop: list[str]) -> StopStrings | None:
        """The matcher for these strings, kept because it has looked at the text of the whole vocabulary."""
        if not stop:
            return None
        if self.tokenizer is None:
            raise UserError("stop strings need the tokenizer: Sampler(model, tokenizer)")
        if tuple(stop) not in self._matchers:
            self._matchers[tuple(stop)] = StopStrings(self.tokenizer, stop)
        return self._matchers[tuple(stop)]

    def _check(self, groups, n, max_tokens, temperature, stop_ids, keys) -> None:
        vocab = self.model.config.vocab_size
        if n < 1 or max_tokens < 1:
            raise UserError(f"n = {n} completions of max_tokens = {max_tokens}: both must be at least 1")
        if not temperature >= 0.0:
            raise UserError(f"temperature = {temperature}: it must be 0 (greedy) or more")
        if not all(0 <= token < vocab for token in stop_ids):
            raise UserError(f"stop_ids {list(stop_ids)} are not all in the vocabulary of {vocab}")
        if keys is not None and (len(keys) != len(groups) * n or len({len(key) for key in keys}) > 1):
            raise UserError(
                f"{len(keys)} keys for {len(groups)} prompts × {n} samples: give each completion one tuple, all as long"
            )
        for group in groups:
            if not group.tokens:
                raise UserError(
                    f"prompt {group.index} is empty: there is nothing to predict the first token from"
                )
            if not 0 <= min(group.tokens) <= max(group.tokens) < vocab:
                raise UserError(f"prompt {group.index} has a token outside the vocabulary of {vocab}")
            self._require(group.tokens, max_tokens, f"prompt {group.index}")

    def _require(self, tokens: list[int], more: int, what: str) -> None:
        longest = self.model.config.max_positions
        if len(tokens) + more > longest:
            raise UserError(
                f"{what}: {len(tokens)} tokens and {more} more exceed the model's context of {longest}"
            )
        self.pool.require(len(tokens) + more - 1)

    def _reserve(self, pages: Pages, length: int) -> bool:
        """`pages.reserve(length)`, at the cost of what can be recomputed. True if the table changed.

        The sequence that has to give way may be this one, which is then released and waits for its turn.
        """
        while pages in self.pool.handles:
            try:
                return pages.reserve(length)
            except OutOfPages:
                if not (any(call.preempt(pages) for call in reversed(self._calls)) or self._forget_idle()):
                    raise UserError(
                        f"a sequence of {length} tokens finds no free KV page: it and forks hold all "
                        f"{self.pool.num_pages}; release forks earlier or raise num_pages"
                    ) from None
        return False

    def _forget_idle(self) -> bool:
        """Free the pages of what is idle; False if it holds none."""
        holding = [pages for pages in self.idle if pages.table]
        for pages in holding:
            pages.forget()
        return bool(holding)

    def _feed(self, sequences: list[Pages]) -> None:
        """Fill the K/V of all tokens but the last of each sequence. The pages are reserved already."""
        while todo := [pages for pages in sequences if len(pages.unfed) > 1]:
            fresh = [pages for pages in todo if pages.filled == 0] or todo
            batch, room = [], self.max_tokens_per_forward
            for pages in fresh:
                fed = pages.unfed[:-1][:room]
                if fed:
                    batch.append((pages, fed))
                    room -= len(fed)
            self.forwards.prefill += len(self._forward(batch))

    def _forward(self, batch: list[tuple[Pages, list[int]]]) -> Tensor:
        """Feed each sequence the given tokens behind what it has filled: hidden [T, D], K/V in the pages."""
        device, page_size = self.device, self.page_size
        counts = torch.tensor([len(fed) for _, fed in batch], device=device)
        starts = torch.tensor([pages.filled for pages, _ in batch], device=device)
        cu_seqlens = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
        tokens = torch.tensor([token for _, fed in batch for token in fed], device=device)
        table = torch.tensor(
            _rectangle([pages.table for pages, _ in batch]), dtype=torch.int32, device=device
        )
        sequence = torch.arange(len(batch), device=device).repeat_interleave(counts)
        positions = torch.arange(len(tokens), device=device) + (starts - cu_seqlens[:-1])[sequence]
        slots = table[sequence, positions // page_size].long() * page_size + positions % page_size
        if all(
            pages.filled == 0 for pages, _ in batch
        ):  # nothing in the cache yet: attend to what is at hand
            attend = _storing(self.pool, slots, lambda layer, q, k, v: packed_attention(q, k, v, cu_seqlens))
        else:
            attend = _storing(self.pool, slots, _paged(self.pool, table, (starts + counts).int(), cu_seqlens))
        hidden = self.model(tokens, cu_seqlens, positions=positions, attend=attend)
        for pages, fed in batch:
            pages.filled += len(fed)
        return hidden


def _storing(pool: PagePool, slots: Tensor, attend: Attend) -> Attend:
    """`attend`, after the new tokens' K/V went to their slots (page * page_size + offset) [T]."""

    def store_and_attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pool.keys[layer].flatten(0, 1).index_copy_(0, slots, k)
        pool.values[layer].flatten(0, 1).index_copy_(0, slots, v)
        return attend(layer, q, k, v)

    return store_and_attend


def _paged(pool: PagePool, table: Tensor, lengths: Tensor, cu_seqlens: Tensor | None = None) -> Attend:
    return lambda layer, q, k, v: paged_attention(
        q, pool.keys[layer], pool.values[layer], table, lengths, cu_seqlens
    )


def _rectangle(lists: list[list[int]]) -> list[list[int]]:
    """Page tables of unequal lengths, filled up with page 0, which is then never looked at."""
    width = max(1, *(len(row) for row in lists))
    return [row + [0] * (width - len(row)) for row in lists]


def fast_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, on a CPU from oneDNN: in fp32 torch asks MKL, which takes more than twice as long on AMD processors.

    In inference mode only, because oneDNN's product has no derivative, and not for a few rows, where its
    set-up shows.
    """
    if (
        len(x) >= 8
        and weight.is_cpu
        and torch.is_inference_mode_enabled()
        and _onednn_multiplies(weight.dtype)
    ):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


@functools.cache
def _onednn_multiplies(dtype: torch.dtype) -> bool:
    """bf16 needs AVX-512."""
    return torch.backends.mkldnn.is_available() and (
        dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _logits(hidden: Tensor, head: Tensor) -> Tensor:
    """In fp32 on CUDA, as the trainer has them: bf16 logits are 0.1 apart where they are large, a few per
    cent of a probability.
    """
    if hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(hidden, head.T, out_dtype=torch.float32)
    return fast_linear(hidden, head)


def _linear_forward(module: nn.Linear, x: Tensor) -> Tensor:
    return fast_linear(x, module.weight, module.bias)


@dataclass
class _Group:
    """The n completions of one prompt."""

    index: int
    tokens: list[int]  # prefix and prompt
    source: Pages | None  # the caller's sequence that the prompt continues
    to_admit: int
    pages: Pages | None = None  # the prompt's K/V, while some of the n still wait for it


@dataclass(eq=False)
class _Row:
    """One completion. What changes with every token lives in the call's tensors while the row is live."""

    group: _Group
    sample: int
    key: int
    tokens: list[int] = field(default_factory=list)  # read back when it finished or was preempted
    logprobs: list[float] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)
    pages: Pages | None = None
    slot: int = -1  # its lines in the output buffers: fixed while live, where its place in the batch moves
    admitted: int = -1  # the call's step count when it became live
    order: int = -1  # of admission
    searched: int = 0  # tokens already searched for stop strings
    stopped: bool = False  # by one of them


class _Call:
    """One call of generate: the waiting completions, the live rows, and the tensors a decode step works on.

    Row i of the batch, i < len(self.rows), is column i of `state`, the integers that a step reads and
    advances:

        token     the last one of the sequence, to be fed
        length    of the sequence before it, which is its position, and where its K/V goes
        position  of the next token in the completion: the last word of its random number's address
        cursor    where the next token goes in the output buffers; `end` is where the row reaches its limit
        key       hash of the other words of the address
    """

    CURSOR = 3

    def __init__(
        self,
        sampler: Sampler,
        waiting: deque[_Row],
        max_tokens: int,
        temperature: float,
        stop: list[str],
        stop_ids: Sequence[int],
        on_finish: Callable[[Completion, Pages], None] | None,
        hidden: Tensor | None,  # [rows at a time × (max_tokens + 1), D], to keep the states in
    ):
        model, device = sampler.model, sampler.device
        self.sampler, self.pool, self.waiting = sampler, sampler.pool, waiting
        self.max_tokens, self.temperature, self.on_finish = max_tokens, temperature, on_finish
        self.rows: list[_Row] = []
        self.clock = 0  # decode steps so far
        self.reserved = 0  # clock up to which every live row has its pages
        self.admissions = 0

        capacity = min(len(waiting), sampler.max_rows)
        longest = max((len(row.group.tokens) for row in waiting), default=0) + max_tokens
        self.slots = list(range(capacity))
        self.stride = max_tokens + 1  # an ended row writes behind its last token until the host looks
        self.state = torch.zeros(6, capacity, dtype=torch.int64, device=device)
        self.done = torch.zeros(capacity, dtype=torch.bool, device=device)
        self.ending = torch.zeros(
            capacity, dtype=torch.bool, device=device
        )  # a token came that may end a stop string
        self.page_table = torch.zeros(
            capacity, self.pool.pages_for(longest), dtype=torch.int32, device=device
        )
        self.tokens = torch.zeros(capacity * self.stride, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(capacity * self.stride, device=device)
        self.hidden = hidden
        self.is_stop = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=device)
        self.is_stop[list(stop_ids)] = True
        self.stop_ids = set(stop_ids)
        self.stops, self.may_end = sampler._stop_strings(stop), None
        if self.stops:
            self.may_end = torch.zeros_like(self.is_stop)
            self.may_end[[token for token in self.stops.endings if token < model.config.vocab_size]] = True

    def run(self) -> Iterator[Completion]:
        while self.rows or self.waiting:
            self._admit()
            if self.clock == self.reserved:
                self._reserve_ahead()
            for _ in range(min(self.sampler.look_every, self.reserved - self.clock)):
                self._step()
            yield from self._retire()

    def _admit(self) -> None:
        """Make rows of waiting completions, first come first served, prefilling in one go what has no K/V
        yet.
        """
        pool = self.pool
        room = pool.free_pages - len(self.rows)  # the live rows' next pages
        chosen, unfed = [], []
        while self.waiting and self.slots:
            row, group = self.waiting[0], self.waiting[0].group
            fresh = not row.tokens
            cost = 2  # the copy of a page shared in part, and the next one
            if not (fresh and group.pages):
                cost += pool.pages_for(len(group.tokens) + len(row.tokens) - 1)
            if cost > room and (self.rows or chosen):
                break
            room -= cost
            self.waiting.popleft()
            row.slot = self.slots.pop()
            chosen.append(row)
            if fresh and group.pages:
                continue
            pages = group.source.fork() if group.source else pool.new([])
            pages.tokens = group.tokens + row.tokens
            self.sampler._reserve(pages, len(pages.tokens) - 1)
            unfed.append(pages)
            if fresh:
                group.pages = pages
            else:
                row.pages = pages
        if not chosen:
            return
        self.sampler._feed(unfed)
        for row in chosen:
            group = row.group
            if row.pages is None:
                row.pages = group.pages.fork()
                group.to_admit -= 1
                if group.to_admit == 0:
                    group.pages.release()
                    group.pages = None
            row.admitted, row.order = self.clock, self.admissions
            self.admissions += 1
        columns = [
            (
                row.pages.tokens[-1],
                row.pages.filled,
                len(row.tokens),
                row.slot * self.stride,
                row.slot * self.stride + self.max_tokens - len(row.tokens),
                row.key,
            )
            for row in chosen
        ]
        n = len(self.rows)
        self.state[:, n : n + len(chosen)] = torch.tensor(columns, device=self.state.device).T
        self.done[n : n + len(chosen)] = False
        self.ending[n : n + len(chosen)] = False
        self.rows += chosen
        self.reserved = self.clock

    def _reserve_ahead(self) -> None:
        """Pages for the next `page_size` tokens of every row, the oldest row first."""
        changed = set()
        for row in list(self.rows):
            if row.pages is None:  # an older row took its pages a moment ago
                continue
            row.pages.filled = len(row.pages.tokens) - 1 + self.clock - row.admitted
            last = len(row.group.tokens) + self.max_tokens - 1  # the last token of a completion needs no K/V
            moved = self.sampler._reserve(row.pages, min(row.pages.filled + self.pool.page_size, last))
            if moved or row.admitted == self.clock:
                changed.add(row)
        places = [i for i, row in enumerate(self.rows) if row in changed]
        if places:
            tables = torch.tensor(_rectangle([self.rows[i].pages.table for i in places]), dtype=torch.int32)
            self.page_table[places, : tables.shape[1]] = tables.to(self.page_table.device)
        self.width = max(len(row.pages.table) for row in self.rows)
        self.reserved = self.clock + self.pool.page_size

    def preempt(self, pages: Pages) -> bool:
        """Free some page for `pages`: a prompt kept for waiting samples, or the youngest row's; False if there is none.

        The youngest row may be the one that asks, and then its own pages are gone.
        """
        for row in self.waiting:
            if row.group.pages and row.group.pages is not pages:
                row.group.pages.release()
                row.group.pages = None
                return True
        if not self.rows or [row.pages for row in self.rows] == [pages]:
            return False
        youngest = max(self.rows, key=lambda row: row.order)
        place = self.rows.index(youngest)
        self._read_back([place])
        self._compact([place])
        youngest.pages.release()
        youngest.pages = None
        youngest.group.to_admit += not youngest.tokens
        self.waiting.appendleft(youngest)
        return True

    def _step(self) -> None:
        """One token for every row."""
        n, page_size = len(self.rows), self.pool.page_size
        state = self.state[:, :n]
        token, length, position, cursor, end, key = state.unbind()
        table = self.page_table[:n, : self.width]
        page = table.gather(1, (length // page_size).unsqueeze(1)).squeeze(1)
        slots = page.long() * page_size + length % page_size
        attend = _storing(self.pool, slots, _paged(self.pool, table, (length + 1).int()))
        model = self.sampler.model
        hidden = model(token, positions=length, attend=attend)
        logits = _logits(hidden, model.head_weight)
        new, logprob, _ = sample_token(logits, hash_key(key, position), self.temperature)

        self.tokens.index_copy_(0, cursor, new)
        self.logprobs.index_copy_(0, cursor, logprob)
        if self.hidden is not None:
            self.hidden.index_copy_(0, cursor, hidden)
        if self.may_end is not None:
            self.ending[:n] |= self.may_end[new]
        cursor += ~self.done[:n]
        done = self.done[:n].logical_or_(self.is_stop[new]).logical_or_(cursor >= end)
        # An ended row is fed the same token at the same position until the host looks: nothing changes any
        # more.
        state[1:3] += ~done
        torch.where(done, token, new, out=token)
        self.clock += 1
        self.sampler.forwards.decode += n

    def _retire(self) -> Iterator[Completion]:
        """Take the ended rows out, and hand each over with its pages before these are freed."""
        n = len(self.rows)
        if self.may_end is not None:
            for place in self.ending[:n].nonzero().flatten().tolist():
                self._match(place)
        ended = self.done[:n].nonzero().flatten().tolist()
        if not ended:
            return
        self._read_back(ended)
        rows = [self.rows[place] for place in ended]
        self._compact(ended)
        for row in rows:
            row.pages.tokens = row.group.tokens + row.tokens
            row.pages.filled = len(row.pages.tokens) - 1
            self.sampler.idle.add(row.pages)  # to be forked, and no longer written to
        for row in rows:
            stopped = row.stopped or row.tokens[-1] in self.stop_ids
            hidden = None
            if self.hidden is not None:
                with torch.inference_mode(False):  # a tensor born in inference mode may never meet autograd
                    hidden = torch.cat([part.clone() for part in row.hidden])
            completion = Completion(
                row.tokens, row.logprobs, "stop" if stopped else "length", hidden, row.group.index, row.sample
            )
            if self.on_finish:
                with torch.inference_mode(False), torch.no_grad():
                    self.on_finish(completion, row.pages)
            row.pages.release()
            yield completion

    def _match(self, place: int) -> None:
        """End the row behind the first new token whose text completes a stop string."""
        row, start = self.rows[place], self.rows[place].slot * self.stride
        tokens = row.tokens + self.tokens[start : self.state[self.CURSOR, place]].tolist()
        found = self.stops.find(tokens, row.searched)
        row.searched = len(tokens)
        self.ending[place] = False
        if found is not None:
            row.stopped = True
            self.done[place] = True
            self.state[self.CURSOR, place] = start + found + 1 - len(row.tokens)

    def _read_back(self, places: list[int]) -> None:
        """What these rows wrote since they were admitted, into Python lists."""
        for place, cursor in zip(places, self.state[self.CURSOR, places].tolist()):
            row = self.rows[place]
            written = slice(row.slot * self.stride, cursor)
            row.tokens += self.tokens[written].tolist()
            row.logprobs += self.logprobs[written].tolist()
            if self.hidden is not None:
                row.hidden.append(self.hidden[written].clone())

    def _compact(self, places: list[int]) -> None:
        """Remove rows from the batch: the last ones move into the holes, so that the live ones stay the
        first.
        """
        n = len(self.rows) - len(places)
        holes = [place for place in places if place < n]
        movers = [place for place in range(n, len(self.rows)) if place not in places]
        self.slots += [self.rows[place].slot for place in places]
        if movers:
            self.state[:, holes] = self.state[:, movers]
            self.page_table[holes] = self.page_table[movers]
            for tensor in (self.done, self.ending):
                tensor[holes] = tensor[movers]
        for hole, mover in zip(holes, movers):
            self.rows[hole] = self.rows[mover]
        del self.rows[n:]
