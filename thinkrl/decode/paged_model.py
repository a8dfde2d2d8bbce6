"""Forwards of a model whose keys and values are in pages.

feed       prefill: fills the K/V of everything but the last token of each sequence
forward    one packed forward of many tokens of many sequences; probes are scored from its hidden states
decode     one token of every sequence, in as few operations as possible
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.attention import packed_attention, paged_attention
from kernels.gate import silu_mul
from kernels.norm import add_rms_norm
from kernels.rotary import Places, rotate_and_store
from thinkrl.decode.pages import PagePool, Pages
from thinkrl.model import Attend, Transformer, fast_linear, inverse_frequencies, pack_weight


@dataclass
class TokenForwards:
    """Number of tokens that went through the model, by purpose."""

    prefill: int = 0
    decode: int = 0
    probe: int = 0

    @property
    def total(self) -> int:
        return self.prefill + self.decode + self.probe


class PagedModel:
    """`model` with a page pool. Forwards of many tokens are split at max_tokens_per_forward."""

    def __init__(
        self, model: Transformer, pool: PagePool, max_tokens_per_forward: int, forwards: TokenForwards
    ):
        self.model, self.pool, self.forwards = model, pool, forwards
        self.max_tokens_per_forward = max_tokens_per_forward
        self.device = model.embed.weight.device
        self.packed: list[list[Tensor]] = []  # qkv, o, gate_up and down of each block, then the head
        self._packed_from: list[list[Tensor]] = []  # held, or another tensor could take an id
        self._packed_versions: list[tuple[int, int]] = []  # their ids and numbers of changes in place

    def pack_weights(self) -> None:
        """Pack the weights that `decode` and `logits` multiply with, unless they are those packed before.

        See `pack_weight`. The owner of the model may have changed them since the last call.
        """
        blocks = [[b.qkv, b.o, b.gate_up, b.down] for b in self.model.blocks]
        weights = [[linear.weight for linear in block] for block in blocks] + [[self.model.head_weight]]
        versions = [(id(w), 0 if w.is_inference() else w._version) for ws in weights for w in ws]
        if versions != self._packed_versions:
            self.packed = [[pack_weight(w) for w in ws] for ws in weights]
            self._packed_from, self._packed_versions = weights, versions

    def feed(self, sequences: list[Pages]) -> None:
        """Fill the K/V of all tokens but the last of each sequence. Their pages must be reserved."""
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
        """Feed each sequence the given tokens after its filled ones; returns hidden [T, D], writes K/V to
        pages.
        """
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
            # nothing in the cache yet: attend to the new tokens alone
            longest = max(len(fed) for _, fed in batch)
            packed = lambda layer, q, k, v: packed_attention(q, k, v, cu_seqlens, longest)  # noqa: E731
            attend = storing(self.pool, slots, packed)
        else:
            lengths = (starts + counts).int()
            attend = storing(self.pool, slots, attend_to_pages(self.pool, table, lengths, cu_seqlens))
        hidden = self.model(tokens, cu_seqlens, positions=positions, attend=attend)
        for pages, fed in batch:
            pages.filled += len(fed)
        return hidden

    def decode(self, token: Tensor, position: Tensor, page_table: Tensor) -> Tensor:
        """Feed one token [B] of every sequence at its position [B] (int64); returns hidden [B, D], writes K/V
        to pages. By the weights of the last `pack_weights`.

        The same function as `Transformer.forward` with attention over pages. Small operations are fused,
        because the number of kernels bounds a step: 9 per layer on CUDA, 10 if attention splits the context.
        """
        model, pool, eps = self.model, self.pool, self.model.config.norm_eps
        frequencies = inverse_frequencies(model.config.head_dim, model.config.rope, self.device)
        places, lengths = Places(position, page_table, frequencies, pool.page_size), position + 1
        x, delta = model.embed(token), None
        for block, weights, keys, values in zip(model.blocks, self.packed, pool.keys, pool.values):
            qkv, o_weight, gate_up, down = weights
            x, h = add_rms_norm(x, delta, block.attention_norm.weight, eps)
            norms = (block.q_norm.weight, block.k_norm.weight, eps) if block.q_norm else ()
            q = rotate_and_store(fast_linear(h, qkv, block.qkv.bias), places, keys, values, *norms)
            o = paged_attention(q, keys, values, page_table, lengths).flatten(1)
            x, h = add_rms_norm(x, fast_linear(o, o_weight), block.mlp_norm.weight, eps)
            delta = fast_linear(silu_mul(fast_linear(h, gate_up)), down)
        return add_rms_norm(x, delta, model.norm.weight, eps)[1]

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute `Transformer.logits` by the packed weight of the head."""
        return self.model.logits(hidden, self.packed[-1][0])


def storing(pool: PagePool, slots: Tensor, attend: Attend) -> Attend:
    """Wrap `attend` to first write the new tokens' K/V to their slots (page * page_size + offset) [T]."""

    def store_and_attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pool.keys[layer].flatten(0, 1).index_copy_(0, slots, k)
        pool.values[layer].flatten(0, 1).index_copy_(0, slots, v)
        return attend(layer, q, k, v)

    return store_and_attend


def attend_to_pages(
    pool: PagePool, table: Tensor, lengths: Tensor, cu_seqlens: Tensor | None = None
) -> Attend:
    """Attention over the K/V in the pages."""
    return lambda layer, q, k, v: paged_attention(
        q, pool.keys[layer], pool.values[layer], table, lengths, cu_seqlens
    )


def rectangle(lists: list[list[int]]) -> list[list[int]]:
    """Pad page tables to equal length with page 0, which is not read there."""
    width = max(1, *(len(row) for row in lists))
    return [row + [0] * (width - len(row)) for row in lists]
