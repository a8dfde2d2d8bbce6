"""A model whose keys and values lie in pages: many tokens of many sequences in one forward.

`PagedModel.feed` is prefill: it fills the K/V of everything but the last token of each sequence.
`PagedModel.forward` is one packed forward, and returns hidden states: probes are scored from them.
decode.py runs one token per sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.attention import packed_attention, paged_attention
from thinkrl.model import Attend, Transformer
from thinkrl.pages import PagePool, Pages


@dataclass
class TokenForwards:
    """Tokens that went through the model, by purpose: it shows that prefixes are shared and what probes cost."""

    prefill: int = 0
    decode: int = 0
    probe: int = 0

    @property
    def total(self) -> int:
        return self.prefill + self.decode + self.probe


class PagedModel:
    """`model` with the pages of its K/V. Forwards of many tokens are cut at max_tokens_per_forward."""

    def __init__(
        self, model: Transformer, pool: PagePool, max_tokens_per_forward: int, forwards: TokenForwards
    ):
        self.model, self.pool, self.forwards = model, pool, forwards
        self.max_tokens_per_forward = max_tokens_per_forward
        self.device = model.embed.weight.device

    def feed(self, sequences: list[Pages]) -> None:
        """Fill the K/V of all tokens but the last of each sequence. The pages are reserved already."""
        while todo := [pages for pages in sequences if len(pages.unfed) > 1]:
            fresh = [pages for pages in todo if pages.filled == 0] or todo
            batch, room = [], self.max_tokens_per_forward
            for pages in fresh:
                fed = pages.unfed[:-1][:room]
                if fed:
                    batch.append((pages, fed))
                    room -= len(fed)
            self.forwards.prefill += len(self.forward(batch))

    def forward(self, batch: list[tuple[Pages, list[int]]]) -> Tensor:
        """Feed each sequence the given tokens behind what it has filled: hidden [T, D], K/V in the pages."""
        device, page_size = self.device, self.pool.page_size
        counts = torch.tensor([len(fed) for _, fed in batch], device=device)
        starts = torch.tensor([pages.filled for pages, _ in batch], device=device)
        cu_seqlens = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
        tokens = torch.tensor([token for _, fed in batch for token in fed], device=device)
        table = torch.tensor(rectangle([pages.table for pages, _ in batch]), dtype=torch.int32, device=device)
        sequence = torch.arange(len(batch), device=device).repeat_interleave(counts)
        positions = torch.arange(len(tokens), device=device) + (starts - cu_seqlens[:-1])[sequence]
        slots = table[sequence, positions // page_size].long() * page_size + positions % page_size
        if all(pages.filled == 0 for pages, _ in batch):
            # nothing in the cache yet: attend to what is at hand
            attend = storing(self.pool, slots, lambda layer, q, k, v: packed_attention(q, k, v, cu_seqlens))
        else:
            lengths = (starts + counts).int()
            attend = storing(self.pool, slots, attend_to_pages(self.pool, table, lengths, cu_seqlens))
        hidden = self.model(tokens, cu_seqlens, positions=positions, attend=attend)
        for pages, fed in batch:
            pages.filled += len(fed)
        return hidden


def storing(pool: PagePool, slots: Tensor, attend: Attend) -> Attend:
    """`attend`, after the new tokens' K/V went to their slots (page * page_size + offset) [T]."""

    def store_and_attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pool.keys[layer].flatten(0, 1).index_copy_(0, slots, k)
        pool.values[layer].flatten(0, 1).index_copy_(0, slots, v)
        return attend(layer, q, k, v)

    return store_and_attend


def attend_to_pages(
    pool: PagePool, table: Tensor, lengths: Tensor, cu_seqlens: Tensor | None = None
) -> Attend:
    """Attention over what lies in the pages."""
    return lambda layer, q, k, v: paged_attention(
        q, pool.keys[layer], pool.values[layer], table, lengths, cu_seqlens
    )


def rectangle(lists: list[list[int]]) -> list[list[int]]:
    """Page tables of unequal lengths, filled up with page 0, which is then never looked at."""
    width = max(1, *(len(row) for row in lists))
    return [row + [0] * (width - len(row)) for row in lists]
