"""One decode step, eager or as a CUDA graph: feeds a token of every row and samples the next one.

`eager_step` launches about ten kernels per layer. For a small model the host takes longer to launch them than
the GPU to run them. `GraphStep` records the same step once and replays it with one call. A graph has fixed
shapes and addresses, so

    sizes       the number of rows is rounded up to a bucket, page tables have their full width
    addresses   row states and page tables are copied into the graph's buffers before every replay
    padding     padding rows have one token of context, in a scratch page that no sequence uses
    numbers     there is one graph per temperature; keys and positions of random numbers are data

Graphs are kept as long as the page pool they write to. New weights are copied in place, so graphs stay valid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.sample import sample_token
from thinkrl.decode.paged_model import PagedModel


class RowState:
    """State of the batch that a step reads and advances: tensors int64 [rows], element i for row i."""

    def __init__(self, columns: Tensor):
        self.columns = columns  # [6, rows]
        (
            self.token,  # the last one of the sequence, to be fed
            self.length,  # of the sequence before it, which is its position, and where its K/V goes
            self.position,  # of the next token in the completion: part of its random number's key
            self.key,  # hash of the key's other numbers
            self.cursor,  # where the next token goes in the output buffers
            self.end,  # the cursor at which the row reaches its limit
        ) = columns.unbind()

    def first(self, n: int) -> RowState:
        """Views of the first n rows."""
        return RowState(self.columns[:, :n])


def eager_step(
    paged: PagedModel, state: RowState, page_table: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample every row's next token [B]; return also its log-prob [B] and predicting hidden state [B, D]."""
    hidden = paged.decode(state.token, state.length, page_table)
    logits = paged.logits(hidden)
    token, logprob, _ = sample_token(logits, state.key, state.position, temperature)
    return token, logprob, hidden


def bucket(rows: int) -> int:
    """Round up to 1, 2, 3, 4, 6, 8, 12, 16, …: few graphs, and at most a third of the rows is padding."""
    power = 1 << (rows - 1).bit_length()
    return power * 3 // 4 if power >= 4 and rows <= power * 3 // 4 else power


class GraphStep:
    """`eager_step` as CUDA graphs, recorded when a bucket or temperature is first used. CUDA only."""

    def __init__(self, max_rows: int):
        self.max_rows = bucket(max_rows)
        self.graphs: dict[tuple[int, float], tuple[torch.cuda.CUDAGraph, tuple[Tensor, Tensor, Tensor]]] = {}
        self.state: RowState | None = None
        self.page_table: Tensor | None = None  # [max_rows, pages]
        self.memory = None  # of the graphs' intermediate results, shared by all of them

    def __call__(
        self, paged: PagedModel, state: RowState, page_table: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `eager_step`. The results are overwritten by the next call."""
        n, width = page_table.shape
        if self.page_table is None or width > self.page_table.shape[1]:
            self._allocate(paged, width)
        rows = bucket(n)
        self.state.columns[:, :n] = state.columns
        self.page_table[:n, :width] = page_table
        if rows > n:
            self.state.columns[:, n:rows] = 0
            self.page_table[n:rows] = paged.pool.scratch
        if (rows, temperature) not in self.graphs:
            self._record(paged, rows, temperature)
        graph, results = self.graphs[rows, temperature]
        graph.replay()
        return tuple(result[:n] for result in results)

    def _allocate(self, paged: PagedModel, width: int) -> None:
        """Allocate buffers for page tables of at least `width`; drop graphs that used the old ones."""
        self.graphs.clear()
        self.memory = torch.cuda.graph_pool_handle()
        width = 1 << (width - 1).bit_length()
        self.state = RowState(torch.zeros(6, self.max_rows, dtype=torch.int64, device=paged.device))
        self.page_table = torch.zeros(self.max_rows, width, dtype=torch.int32, device=paged.device)

    def _record(self, paged: PagedModel, rows: int, temperature: float) -> None:
        arguments = paged, self.state.first(rows), self.page_table[:rows], temperature
        # compiles kernels, which a recording may not; the K/V it writes are written again
        eager_step(*arguments)
        graph = torch.cuda.CUDAGraph()
        # thread_local: another thread (NCCL's watchdog) may ask the device something meanwhile
        with torch.cuda.graph(graph, pool=self.memory, capture_error_mode="thread_local"):
            results = eager_step(*arguments)
        self.graphs[rows, temperature] = graph, results
