"""The decode loop: the completions of one `Sampler.generate` call, one token for every row per step.

    admit     waiting completions become rows while there are free pages and rows; a prompt is prefilled once
              for its n samples
    reserve   every row gets the pages of its next `page_size` tokens; if none is free, the youngest row is
              preempted: it gives up its pages, returns to the head of the queue and is recomputed from its
              tokens
    step      one token for every row: one forward, one draw, all bookkeeping in tensors
    retire    rows that reached a stop id, a stop string or their limit leave; the last rows take their places

A step contains no Python loop over rows and reads nothing back from the device. On CUDA the host reads the
rows only every LOOK_EVERY steps. A row that ended in between repeats its last write, which changes nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from thinkrl.decode.paged_model import PagedModel
from thinkrl.decode.pages import Pages
from thinkrl.decode.step import RowState, eager_step
from thinkrl.run.watch import alive
from thinkrl.tokenizer import StopStrings

LOOK_EVERY = 8  # decode steps between two reads of a CUDA device by the host; on a CPU it reads after each


@dataclass
class Completion:
    """One sampled completion."""

    tokens: list[int]  # the stop token included
    logprobs: list[float]  # one per token, at the sampling temperature
    finish_reason: str  # "stop" | "length"
    hidden: Tensor | None = None  # [len(tokens), D], the state that predicted each token, if it was asked for
    prompt: int = 0  # which prompt of the call
    sample: int = 0  # which of its n


@dataclass(frozen=True)
class Request:
    """Settings of one call, the same for all its completions."""

    max_tokens: int  # the most that any completion may have
    temperature: float
    stop_ids: Sequence[int]
    stops: StopStrings | None
    on_finish: Callable[[Completion, Pages], None] | None
    on_tokens: Callable[[int, int, list[int]], None] | None = None


@dataclass
class Group:
    """The n completions of one prompt."""

    index: int
    tokens: list[int]  # prefix and prompt
    source: Pages | None  # the caller's sequence that the prompt continues
    to_admit: int
    max_tokens: int  # of each completion
    pages: Pages | None = None  # the prompt's K/V, while some of the n still wait for it


@dataclass(eq=False)
class Row:
    """One completion. What changes with every token is in `RowState` while the row is live."""

    group: Group
    sample: int
    key: int
    tokens: list[int] = field(default_factory=list)  # read back when it finishes or is preempted
    logprobs: list[float] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)
    pages: Pages | None = None
    slot: int = -1  # its part of the output buffers: fixed while live; its place in the batch may change
    admitted: int = -1  # the loop's step count when it became live
    order: int = -1  # of admission
    searched: int = 0  # tokens already searched for stop strings
    stopped: bool = False  # by one of them


class DecodeLoop:
    """Waiting completions, live rows, and the tensors of a decode step.

    step     `eager_step`, or a `GraphStep`
    hidden   [rows × (max_tokens + 1), D], buffer for hidden states; None: they are not kept
    """

    def __init__(
        self,
        paged: PagedModel,
        waiting: deque[Row],
        request: Request,
        max_rows: int,
        look_every: int,
        step: Callable = eager_step,
        hidden: Tensor | None = None,
    ):
        paged.pack_weights()
        self.paged, self.pool, self.waiting, self.request = paged, paged.pool, waiting, request
        self.look_every, self.step, self.hidden = look_every, step, hidden
        self.rows: list[Row] = []
        self.clock = 0  # decode steps so far
        self.reserved = 0  # clock up to which every live row has its pages
        self.admissions = 0

        capacity, device = min(len(waiting), max_rows), paged.device
        longest = max((len(row.group.tokens) for row in waiting), default=0) + request.max_tokens
        self.slots = list(range(capacity))
        self.stride = request.max_tokens + 1  # an ended row writes after its last token until the host reads
        self.state = RowState(torch.zeros(6, capacity, dtype=torch.int64, device=device))
        self.done = torch.zeros(capacity, dtype=torch.bool, device=device)
        self.ending = torch.zeros_like(self.done)  # its token may end a stop string
        self.page_table = torch.zeros(
            capacity, self.pool.pages_for(longest), dtype=torch.int32, device=device
        )
        self.tokens = torch.zeros(capacity * self.stride, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(capacity * self.stride, device=device)
        vocabulary = paged.model.config.vocab_size
        self.is_stop = torch.zeros(vocabulary, dtype=torch.bool, device=device)
        self.is_stop[list(request.stop_ids)] = True
        self.may_end = None  # [V] bool: the token's text may end a stop string
        if request.stops:
            self.may_end = torch.zeros_like(self.is_stop)
            self.may_end[[token for token in request.stops.endings if token < vocabulary]] = True

    def run(self) -> Iterator[Completion]:
        """Yield every completion once, in the order in which they end."""
        self.pool.preempters.append(self.preempt)
        try:
            while self.rows or self.waiting:
                self._admit()
                if self.clock == self.reserved:
                    self._reserve_ahead()
                for _ in range(min(self.look_every, self.reserved - self.clock)):
                    self._step()
                yield from self._retire()
        finally:
            self.pool.preempters.remove(self.preempt)

    def _admit(self) -> None:
        """Turn waiting completions into rows."""
        chosen = self._choose()
        if chosen:
            self._prefill(chosen)
            self._activate(chosen)

    def _choose(self) -> list[Row]:
        """Take completions that fit from the head of the queue; at least one if nothing else runs."""
        room = self.pool.free_pages - len(self.rows)  # the live rows' next pages
        chosen, prefilled = [], set()
        while self.waiting and self.slots:
            row, group = self.waiting[0], self.waiting[0].group
            cost = 2  # a copy of the shared last page, and the next one
            if row.tokens or not (group.pages or group.index in prefilled):
                cost += self.pool.pages_for(len(group.tokens) + len(row.tokens) - 1)
            if cost > room and (self.rows or chosen):
                break
            room -= cost
            if not row.tokens:
                prefilled.add(group.index)
            self.waiting.popleft()
            row.slot = self.slots.pop()
            chosen.append(row)
        return chosen

    def _prefill(self, chosen: list[Row]) -> None:
        """Fill the missing K/V of chosen rows: a preempted row's own, and a prompt's once for all its
        samples.
        """
        unfed = []
        for row in chosen:
            group = row.group
            if not row.tokens and group.pages:
                continue
            pages = group.source.fork() if group.source else self.pool.new([])
            pages.tokens = group.tokens + row.tokens
            self.pool.reserve(pages, len(pages.tokens) - 1)
            unfed.append(pages)
            if row.tokens:
                row.pages = pages
            else:
                group.pages = pages
        self.paged.feed(unfed)
        for row in chosen:
            group = row.group
            if row.pages is None:
                row.pages = group.pages.fork()
                group.to_admit -= 1
                if group.to_admit == 0:
                    group.pages.release()
                    group.pages = None

    def _activate(self, chosen: list[Row]) -> None:
        """Append the chosen to the batch."""
        columns = []
        for row in chosen:
            row.admitted, row.order = self.clock, self.admissions
            self.admissions += 1
            start, written = row.slot * self.stride, len(row.tokens)
            limit = start + row.group.max_tokens - written
            columns.append((row.pages.tokens[-1], row.pages.filled, written, row.key, start, limit))
        places = slice(len(self.rows), len(self.rows) + len(chosen))
        self.state.columns[:, places] = torch.tensor(columns, device=self.paged.device).T
        self.done[places] = False
        self.ending[places] = False
        self.rows += chosen
        self.reserved = self.clock

    def _reserve_ahead(self) -> None:
        """Reserve pages for the next `page_size` tokens of every row, the oldest row first."""
        page_size = self.pool.page_size
        for row in list(self.rows):
            if row.pages is None:  # preempted for an older row in this loop
                continue
            row.pages.filled = len(row.pages.tokens) - 1 + self.clock - row.admitted
            # the last token of a completion needs no K/V
            last = len(row.group.tokens) + row.group.max_tokens - 1
            self.pool.reserve(row.pages, min(row.pages.filled + page_size, last))
        entries = []  # a new row's whole table, else the pages that are written next: new ones or copies
        for place, row in enumerate(self.rows):
            table = row.pages.table
            first = 0 if row.admitted == self.clock else row.pages.filled // page_size
            entries += [(place, i, table[i]) for i in range(first, len(table))]
        place, column, page = torch.tensor(entries, device=self.paged.device).view(-1, 3).unbind(1)
        self.page_table[place, column] = page.int()
        self.reserved = self.clock + self.pool.page_size

    def preempt(self, pages: Pages) -> bool:
        """Free a page for `pages`: of a prompt kept for waiting samples, or the youngest row's. False if
        none.

        The youngest row may own `pages`; then these are released.
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
        alive()
        n = len(self.rows)
        state = self.state.first(n)
        new, logprob, hidden = self.step(self.paged, state, self.page_table[:n], self.request.temperature)
        self.tokens.index_copy_(0, state.cursor, new)
        self.logprobs.index_copy_(0, state.cursor, logprob)
        if self.hidden is not None:
            self.hidden.index_copy_(0, state.cursor, hidden)
        if self.may_end is not None:
            self.ending[:n].logical_or_(self.may_end[new])
        state.cursor += ~self.done[:n]
        done = self.done[:n].logical_or_(self.is_stop[new]).logical_or_(state.cursor >= state.end)
        # An ended row gets the same token at the same position until the host reads: nothing changes.
        state.columns[1:3].add_(~done)  # length and position
        torch.where(done, state.token, new, out=state.token)
        self.clock += 1
        self.paged.forwards.decode += n

    def _retire(self) -> Iterator[Completion]:
        """Remove ended rows and yield their completions; `on_finish` runs before their pages are freed."""
        n = len(self.rows)
        if self.may_end is not None:
            for place in self.ending[:n].nonzero().flatten().tolist():
                self._match(place)
        if self.request.on_tokens:
            self._show_tokens()
        ended = self.done[:n].nonzero().flatten().tolist()
        if not ended:
            return
        self._read_back(ended)
        rows = [self.rows[place] for place in ended]
        self._compact(ended)
        for row in rows:
            row.pages.tokens = row.group.tokens + row.tokens
            row.pages.filled = len(row.pages.tokens) - 1
            self.pool.idle.add(row.pages)  # may be forked, is no longer written
        for row in rows:
            completion = self._completion(row)
            if self.request.on_finish:
                with torch.inference_mode(False), torch.no_grad():
                    self.request.on_finish(completion, row.pages)
            row.pages.release()
            yield completion

    def _completion(self, row: Row) -> Completion:
        stopped = row.stopped or row.tokens[-1] in self.request.stop_ids
        hidden = None
        if self.hidden is not None:
            with torch.inference_mode(False):  # autograd refuses a tensor made in inference mode
                hidden = torch.cat([part.clone() for part in row.hidden])
        reason = "stop" if stopped else "length"
        return Completion(row.tokens, row.logprobs, reason, hidden, row.group.index, row.sample)

    def _match(self, place: int) -> None:
        """End the row at the first new token whose text completes a stop string."""
        row, start = self.rows[place], self.rows[place].slot * self.stride
        tokens = row.tokens + self.tokens[start : self.state.cursor[place]].tolist()
        found = self.request.stops.find(tokens, row.searched)
        row.searched = len(tokens)
        self.ending[place] = False
        if found is not None:
            row.stopped = True
            self.done[place] = True
            self.state.cursor[place] = start + found + 1 - len(row.tokens)

    def _show_tokens(self) -> None:
        """Pass every live row's tokens so far to `on_tokens`."""
        for row, cursor in zip(self.rows, self.state.cursor[: len(self.rows)].tolist()):
            new = self.tokens[row.slot * self.stride : cursor].tolist()
            self.request.on_tokens(row.group.index, row.sample, row.tokens + new)

    def _read_back(self, places: list[int]) -> None:
        """Copy the tokens that these rows sampled since their admission to Python lists."""
        for place, cursor in zip(places, self.state.cursor[places].tolist()):
            row = self.rows[place]
            written = slice(row.slot * self.stride, cursor)
            row.tokens += self.tokens[written].tolist()
            row.logprobs += self.logprobs[written].tolist()
            if self.hidden is not None:
                row.hidden.append(self.hidden[written].clone())

    def _compact(self, places: list[int]) -> None:
        """Remove rows from the batch; the last rows take their places, so that live rows stay first."""
        n = len(self.rows) - len(places)
        holes = [place for place in places if place < n]
        movers = [place for place in range(n, len(self.rows)) if place not in places]
        self.slots += [self.rows[place].slot for place in places]
        if movers:
            self.state.columns[:, holes] = self.state.columns[:, movers]
            self.page_table[holes] = self.page_table[movers]
            for tensor in (self.done, self.ending):
                tensor[holes] = tensor[movers]
        for hole, mover in zip(holes, movers):
            self.rows[hole] = self.rows[mover]
        del self.rows[n:]
