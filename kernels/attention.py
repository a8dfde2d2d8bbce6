"""Attention over packed rows (training, prefill) and over pages of keys and values (decoding, probes).

    o_i = Σ_{j<=i} p_ij v_j        p_i = softmax_j(q_i · k_j / √Dh)        i and j in the same sequence

`packed_attention`: S sequences lie end to end in one row of T tokens, sequence s being tokens cu_seqlens[s] to
cu_seqlens[s+1]. `paged_attention`: keys and values lie in pages of a pool, and token j of sequence s is slot j mod page_size of
page page_table[s, j // page_size]; the queries are the last tokens of each sequence. In both, H query heads share
Hkv key heads: query head h reads key head h // (H / Hkv), at any ratio.

Letters: T tokens (queries), S sequences, H query heads, Hkv key heads, Dh head width, P pages per sequence, L longest context.

Costs of packed attention for one sequence of n tokens and one head. Naive: 2 n² Dh FLOP (half of it masked away) for each of two
products, and p written and read at 4 n² bytes, three times over. Fused: the unmasked half of the FLOP, 2.5 times that in the
backward, and q, k, v, o read or written once: 8 n Dh bytes in bf16. Decoding reads 4 Hkv Dh bytes of bf16 keys and values per
token of context and does 4 H Dh FLOP with them, H / Hkv FLOP a byte, so the bytes are the whole cost; SDPA would
first write the pages out as a padded block, at three times those bytes.

    python -m kernels.attention     the benchmark
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def packed_attention_ref(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The specification of `packed_attention`: one sequence at a time, the whole matrix of scores."""
    return torch.cat([_causal_ref(q[a:b], k[a:b], v[a:b]) for a, b in pairwise(cu_seqlens.tolist())])


def _causal_ref(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [N, H, Dh], the last N of the L tokens of k, v [L, Hkv, Dh] -> [N, H, Dh]."""
    (n, heads, width), length = q.shape, len(k)
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("nhd,lhd->hnl", q, k) * width**-0.5
    future = torch.ones(n, length, dtype=torch.bool, device=q.device).triu(length - n + 1)
    return torch.einsum("hnl,lhd->nhd", scores.masked_fill(future, float("-inf")).softmax(-1), v)


def paged_attention_ref(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, lengths: Tensor, cu_seqlens: Tensor | None = None
) -> Tensor:
    """The specification of `paged_attention`: one sequence at a time, its pages laid end to end."""
    ends = range(len(lengths) + 1) if cu_seqlens is None else cu_seqlens.tolist()
    outputs = []
    for (a, b), length, pages in zip(pairwise(ends), lengths.tolist(), page_table):
        k, v = (x[pages].flatten(0, 1)[:length] for x in (k_pages, v_pages))
        outputs.append(_causal_ref(q[a:b], k, v))
    return torch.cat(outputs)


@lru_cache(maxsize=8)
def _blocks(cu_seqlens: tuple[int, ...]) -> tuple[list[Tensor], Tensor]:
    """Sequences of like length side by side: ([S_b, L_b] token index of every slot, per block), [T] slot of every token.

    A block ends where a sequence is shorter than 3/4 of the block's longest, so padding stays under a quarter. Slots past
    the end of a sequence repeat its last token: causality keeps them from every query that counts. Every layer asks for the same
    answer, hence the cache.
    """
    by_length = sorted(pairwise(cu_seqlens), key=lambda span: span[0] - span[1])
    blocks: list[list[Tensor]] = []
    longest, slots, slot = 0, torch.empty(cu_seqlens[-1], dtype=torch.int64), 0
    for start, end in by_length:
        if not blocks or end - start < 0.75 * longest:
            longest = end - start
            blocks.append([])
        blocks[-1].append(torch.arange(start, start + longest).clamp_(max=end - 1))
        slots[start:end] = torch.arange(slot, slot + end - start)
        slot += longest
    return [torch.stack(rows) for rows in blocks], slots


def packed_attention_torch(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """`packed_attention` in PyTorch ops: gather blocks of like lengths, SDPA on each, scatter back."""
    blocks, slots = _blocks(tuple(cu_seqlens.tolist()))
    outputs = []
    for tokens in blocks:
        tokens = tokens.to(q.device)
        padded = (x.index_select(0, tokens.flatten()).unflatten(0, tokens.shape).transpose(1, 2) for x in (q, k, v))
        output = F.scaled_dot_product_attention(*padded, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, slots.to(q.device))


def paged_attention_torch(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, lengths: Tensor, cu_seqlens: Tensor | None = None
) -> Tensor:
    """`paged_attention` in PyTorch ops, all sequences at once.

    Decoding is memory traffic and little else. Keys are gathered head by head into [S, Hkv, L, Dh], as fast as page by page and
    ready for bmm. Values are not gathered: `embedding_bag` sums weighted rows straight out of the pages.
    """
    page_size, kv_heads, width = k_pages.shape[1:]
    length = int(lengths.max())
    pages = -(-length // page_size)
    token = torch.arange(0, page_size * kv_heads, kv_heads, dtype=torch.int32, device=q.device)
    rows = (page_table[:, :pages, None] * (page_size * kv_heads) + token).flatten(1)[:, :length]
    dead = torch.arange(length, dtype=torch.int32, device=q.device) >= lengths[:, None]  # [S, L]
    # slots past the end read the first token, whose finite values a weight of 0 removes; 0 · NaN would not be removed
    rows = torch.where(dead, rows[:, :1], rows)
    rows = rows[:, None] + torch.arange(kv_heads, dtype=torch.int32, device=q.device)[:, None]  # [S, Hkv, L]
    keys = k_pages.view(-1, width).index_select(0, rows.flatten()).view(*rows.shape, width)
    if cu_seqlens is None:
        return _decode_torch(q, keys, v_pages, rows, dead)
    values = v_pages.view(-1, width).index_select(0, rows.flatten()).view(*rows.shape, width)

    counts = cu_seqlens.diff()
    query = torch.arange(int(counts.max()), dtype=torch.int32, device=q.device)
    real = query < counts[:, None]  # [S, N]
    last = (lengths - counts)[:, None] + query  # position of each query: the last key it sees
    future = torch.arange(length, dtype=torch.int32, device=q.device) > last[..., None]
    padded = q.index_select(0, (cu_seqlens[:-1, None] + query).clamp_(max=len(q) - 1).flatten()).unflatten(0, real.shape)
    visible = ~(future | dead[:, None])[:, None]  # [S, 1, N, L]
    output = F.scaled_dot_product_attention(
        padded.transpose(1, 2), keys, values, attn_mask=visible, enable_gqa=q.shape[1] != kv_heads
    )
    return output.transpose(1, 2)[real]


def _decode_torch(q: Tensor, keys: Tensor, v_pages: Tensor, rows: Tensor, dead: Tensor) -> Tensor:
    """One query per sequence: q [S, H, Dh], keys [S, Hkv, L, Dh], rows [S, Hkv, L] into the values' heads."""
    (sequences, heads, width), (_, kv_heads, length) = q.shape, rows.shape
    group = heads // kv_heads
    scores = torch.bmm((q * width**-0.5).view(-1, group, width), keys.flatten(0, 1).transpose(1, 2))
    weights = scores.view(sequences, heads, length).masked_fill_(dead[:, None], float("-inf")).softmax(-1)
    rows = rows[:, :, None].expand(-1, -1, group, -1).reshape(sequences * heads, length)
    bags = F.embedding_bag(rows, v_pages.view(-1, width), mode="sum", per_sample_weights=weights.flatten(0, 1))
    return bags.view(q.shape)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Causal attention within each sequence of a packed row. Differentiable.

    q [T, H, Dh]; k, v [T, Hkv, Dh], H a multiple of Hkv; cu_seqlens int32 [S+1], from 0 to T, no sequence empty
    returns [T, H, Dh] in q's dtype; softmax and sums in fp32
    """
    return packed_attention_torch(q, k, v, cu_seqlens)


def paged_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, lengths: Tensor, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Attention of the last tokens of each sequence over its pages. Not differentiable.

    q           [T, H, Dh]; their own keys and values are in the pages already
    k_pages     [num_pages, page_size, Hkv, Dh], v_pages likewise, contiguous
    page_table  [S, P] int32: entries past a sequence's end may hold any valid page, which is never looked at
    lengths     [S] int32, at least 1: tokens of context, the queries among them
    cu_seqlens  None: one query per sequence (T = S). Otherwise int32 [S+1]: sequence s has queries cu_seqlens[s] to
                cu_seqlens[s+1], its last ones, each seeing the context up to itself
    returns     [T, H, Dh] in q's dtype; softmax and sums in fp32
    """
    return paged_attention_torch(q, k_pages, v_pages, page_table, lengths, cu_seqlens)
