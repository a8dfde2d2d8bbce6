"""The bar that shows how far sampling is."""

import io
import sys

import pytest

from helpers import PRM_CONFIG
from thinkrl.model import Transformer
from thinkrl.rollout import completions_bar
from thinkrl.sampler import Sampler


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("shown, terminal", [(True, True), (True, False), (False, True)])
def test_the_bar_counts_completions_on_a_terminal_of_rank_0(shown, terminal, monkeypatch):
    """3 prompts with 2 completions each; what a probe samples behind a fork is none of them."""
    monkeypatch.setattr(sys, "stderr", out := Terminal() if terminal else io.StringIO())
    sampler = Sampler(Transformer.random(PRM_CONFIG), num_pages=64)

    def probe(completion, pages):
        fork = pages.fork(1)
        sampler.generate([[2]], max_tokens=2, prefix=[fork])
        fork.release()

    with completions_bar([sampler], 6, "evaluate", shown, delay=0) as bar:
        sampler.generate([[1], [2], [3]], n=2, max_tokens=4, on_finish=probe)
        counted = bar.n
    assert sampler.on_completion is None
    if shown and terminal:
        assert counted == 6 and "evaluate:   0%" in out.getvalue() and "0/6" in out.getvalue()
    else:
        assert out.getvalue() == ""
