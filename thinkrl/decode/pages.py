"""KV pages: allocate, share, copy on write, free.

The cache of every layer is cut into pages of 16 positions. A sequence owns a page table, the list of pages
that hold its positions in order. So its context needs no contiguous memory, and sequences with a common
prefix share pages.

    prompt of 37 tokens, n = 3 samples         pages of 16
        prompt    a b c                        c holds positions 32..35
        sample 0  a b d                        a, b shared; writing to a shared c copies it
        sample 1  a b e
        sample 2  a b c                        the last one holding c writes in place

Prefill, decode, preemption, probes and continuations follow one rule. A sequence keeps all its `tokens`. The
K/V of the first `filled` of them is in its pages, and never that of the last one. The model must still be fed
`tokens[filled:]`, and the hidden state of the last token predicts the next one. A new prompt has filled = 0,
and so has a preempted sequence; in a decoding sequence only the last token is unfed. A fork at `cut` shares
the K/V of its first cut - 1 tokens and feeds token cut - 1 again, because the hidden state that predicts the
token after the cut is not in the cache.

If no page is free, `PagePool.reserve` takes pages from sequences that can be recomputed: first a decode loop
preempts a row, then the `idle` forks lose their pages.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable

import numpy as np
import torch

from thinkrl.types import UserError


class OutOfPages(RuntimeError):
    """No page is free now."""


class PagePool:
    """`num_pages` pages per layer, `keys[layer]` and `values[layer]`: [num_pages, page_size, Hkv, Dh]."""

    def __init__(
        self,
        num_layers: int,
        num_pages: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int = 16,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        # Zeros, not empty: a masked position has probability 0, and 0 times a NaN in the memory is NaN.
        shape = (2, num_layers, num_pages + 1, page_size, num_kv_heads, head_dim)
        if torch.device(device).type == "cpu":
            # numpy's zeros take no memory before they are written, torch's do
            zeros = np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)
            self.storage = torch.from_numpy(zeros).view(dtype).view(shape)
        else:
            self.storage = torch.zeros(shape, dtype=dtype, device=device)
        self.keys, self.values = self.storage[0].unbind(), self.storage[1].unbind()
        self.page_size = page_size
        self.num_pages = num_pages
        self.scratch = num_pages  # page without an owner, for writes that are never read
        self.references = [0] * num_pages
        # every sequence that holds pages, so that a failed call can release all of them
        self.handles: set[Pages] = set()
        # forks kept for later: they may lose their pages, and are recomputed from their tokens when used
        self.idle: weakref.WeakSet[Pages] = weakref.WeakSet()
        # functions that free a page for a sequence, called last first: those of the running decode loops
        self.preempters: list[Callable[[Pages], bool]] = []
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def free_pages(self) -> int:
        return len(self._free)

    def pages_for(self, length: int) -> int:
        """Pages that `length` positions occupy."""
        return -(-length // self.page_size)

    def require(self, length: int) -> None:
        """Raise UserError if a sequence of `length` positions does not fit the whole pool."""
        if self.pages_for(length) > self.num_pages:
            raise UserError(
                f"a sequence of {length} tokens needs {self.pages_for(length)} KV pages of {self.page_size}, "
                f"but the pool has only {self.num_pages}: raise num_pages or lower max_tokens"
            )

    def new(self, tokens: list[int]) -> Pages:
        """Make a sequence without K/V or pages."""
        return Pages(self, list(tokens), [], 0)

    def allocate(self) -> int:
        """Take a free page. Raises OutOfPages."""
        if not self._free:
            raise OutOfPages(f"all {self.num_pages} KV pages are in use")
        page = self._free.pop()
        self.references[page] = 1
        return page

    def share(self, pages: list[int]) -> list[int]:
        """Add a reference to each page; returns a copy of the list."""
        for page in pages:
            self.references[page] += 1
        return list(pages)

    def free(self, pages: list[int]) -> None:
        """Drop one reference to each page; the last reference returns it."""
        for page in pages:
            assert self.references[page] > 0, f"page {page} freed twice"
            self.references[page] -= 1
            if self.references[page] == 0:
                self._free.append(page)

    def reserve(self, pages: Pages, length: int) -> None:
        """Call `pages.reserve(length)`, preempting other sequences if no page is free.

        The preempted sequence may be `pages` itself, which is then released. Raises UserError when no
        sequence can be preempted.
        """
        while pages in self.handles:
            try:
                pages.reserve(length)
                return
            except OutOfPages:
                if not (any(preempt(pages) for preempt in reversed(self.preempters)) or self._forget_idle()):
                    raise UserError(
                        f"a sequence of {length} tokens finds no free KV page: it and forks hold all "
                        f"{self.num_pages}; release forks earlier or raise num_pages"
                    ) from None

    def _forget_idle(self) -> bool:
        """Free the pages of the idle forks; False if they hold none."""
        holding = [pages for pages in self.idle if pages.table]
        for pages in holding:
            pages.forget()
        return bool(holding)

    def release_all_but(self, kept: set[Pages]) -> None:
        """Release every sequence that is not in `kept`."""
        for handle in self.handles - kept:
            handle.release()


class Pages:
    """One sequence: its `tokens`, and the pages `table` with the K/V of the first `filled` of them."""

    def __init__(self, pool: PagePool, tokens: list[int], table: list[int], filled: int):
        self.pool, self.tokens, self.table, self.filled = pool, tokens, table, filled
        pool.handles.add(self)

    @property
    def unfed(self) -> list[int]:
        """Tokens that the model must still be fed; the last one is always among them."""
        return self.tokens[self.filled :]

    def fork(self, cut: int | None = None) -> Pages:
        """Make a new sequence of the first `cut` tokens (default: all) on the same pages.

        A shared page is copied when a sequence writes to it. The fork holds its pages until its own
        `release()`.
        """
        cut = len(self.tokens) if cut is None else cut
        assert self in self.pool.handles, "a released sequence has no pages to share"
        if not 1 <= cut <= len(self.tokens):
            raise UserError(f"cannot fork at {cut}: the sequence has {len(self.tokens)} tokens")
        filled = min(cut - 1, self.filled)
        shared = self.pool.share(self.table[: self.pool.pages_for(filled)])
        return Pages(self.pool, self.tokens[:cut], shared, filled)

    def reserve(self, length: int) -> None:
        """Make positions filled..length-1 writable. Raises OutOfPages.

        Shared pages in this range are copied first. After OutOfPages the sequence is valid and keeps the
        pages that it got.
        """
        pool = self.pool
        assert self in pool.handles, "a released sequence cannot grow"
        first = self.filled // pool.page_size
        for i in range(first, len(self.table)):
            if pool.references[self.table[i]] > 1:
                page = pool.allocate()
                pool.storage[:, :, page] = pool.storage[:, :, self.table[i]]
                pool.free([self.table[i]])
                self.table[i] = page
        while len(self.table) < pool.pages_for(length):
            self.table.append(pool.allocate())

    def forget(self) -> None:
        """Release the pages but keep the tokens, which must all be fed again."""
        self.pool.free(self.table)
        self.table, self.filled = [], 0

    def release(self) -> None:
        """Release the sequence and its pages. A second call has no effect."""
        if self in self.pool.handles:
            self.forget()
            self.pool.handles.remove(self)
