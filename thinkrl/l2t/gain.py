"""Fitting gain from J_0, …, J_K, the gold answer's probability if thinking is cut off after episode k.

                                                                                         L2T §4.2, App. D.1

    J_k  = p(answer, terminator | prompt, z_1 … z_k, answer-forcing text)
    ΔI_k = J_k - J_{k-1}, which sums to J_K - J_0

The terminator is the text that ends the answer. A real vocabulary may merge it with the text beside it: a
model that writes `}.` as one token gives the token `}` almost no probability. So at every token of the
answer, p sums over the ids whose text begins with the rest of answer and terminator. z_1 includes a sampled
`<think>`, and J_0 is measured after it.

When the sampler finishes a completion, its KV pages still exist. A probe is a page table forked at the end of
an episode plus a short suffix, so J costs K+1 suffixes, not K+1 forwards of the completion.
`predicted_correctness_ref` runs those forwards. `python -m thinkrl.l2t.gain [REWARD_MODEL]` prints J along a
few completions of the embedded model, by each estimator.
"""

from __future__ import annotations

import re
import sys
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from thinkrl import UserError
from thinkrl.checkpoint import load_model
from thinkrl.data.problems import messages
from thinkrl.decode.pages import Pages
from thinkrl.grading import grade, rule_set
from thinkrl.l2t.episodes import Episodes, segment
from thinkrl.l2t.prm import load_prm, score_completions
from thinkrl.model import Transformer
from thinkrl.sampler import Completion, Sampler
from thinkrl.tokenizer import Tokenizer
from thinkrl.types import Problem
from thinkrl.visible import visible

FORCING = {  # by grading rule: text before the answer and after it; "": any end of a number
    "arith": ("</think><answer>", "</answer>"),
    "gsm8k": ("\n</think>\n\n#### ", ""),
    "last_number": ("\n</think>\n\nThe answer is ", ""),
    "gym": ("\n</think>\n\n<answer>", "</answer>"),
    "math": ("\n</think>\n\nThe final answer is \\boxed{", "}"),
}
# 4 may go on as 4.2, 4,200, 4/2 or 4e2; a # may begin #### and with it another answer; the grader drops \
NUMBER_ENDS = re.compile(r"\.?(?:\s*\n|\s+[^\s\d/#\\])|[.,/]+[^\s\d.,/#\\]|[eE][^\d+-]|[^\s\d.,/eE#\\]")

SCALES = ("p", "geometric", "log")


@dataclass(frozen=True)
class Probe:
    """Tokens appended to a prefix: `forced` ends the thinking and asks for the answer, `gold` is scored.

    gold      the answer and its terminator: without the terminator, 1 would count the probability of 12
    endings   (i, ids): other tokens than gold[i] that, in its place, complete answer and terminator at once
    """

    forced: list[int]
    gold: list[int]
    endings: tuple[tuple[int, tuple[int, ...]], ...] = ()

    @property
    def suffix(self) -> list[int]:
        """All tokens after the prefix."""
        return self.forced + self.gold

    @property
    def choices(self) -> list[tuple[int, tuple[int, ...]]]:
        """`endings` by their place in `suffix`, for `Sampler.score`."""
        return [(len(self.forced) + i, ids) for i, ids in self.endings]


def forcing(problem: Problem, prefix: str = "", suffix: str = "") -> tuple[str, str]:
    """Text before and after the problem's gold answer; "" stands for the default of its grading rule.

    Raises UserError if the gold answer in that text is not graded right, since no sampled answer would be
    either.
    """
    rule = rule_set(problem.source)
    prefix, suffix = prefix or FORCING[rule][0], suffix or FORCING[rule][1]
    forced = prefix + problem.answer + suffix
    if not grade(forced, problem.answer, problem.source):
        raise UserError(
            f"problem {problem.id} (counted from 0): {rule} grading does not find the gold answer in the "
            f"forced {forced!r}; choose --probe_prefix and --probe_suffix that it reads, such as "
            f"{FORCING[rule]}"
        )
    return prefix, suffix


def make_probe(tokenizer: Tokenizer, answer: str, prefix: str, suffix: str) -> Probe:
    """Make the probe of one problem: `prefix` forces the answer, `suffix` or else the end of a number ends
    it.

    Prefix and answer are encoded together, as a model would write them: if they share a token, such as ` 42`
    after `####`, that token is scored.

    Raises UserError for an answer without tokens.
    """
    if not tokenizer.encode(answer):
        raise UserError(
            f"the gold answer {answer!r} tokenizes to nothing: a fitting gain needs an answer to score"
        )
    forced, written = tokenizer.encode(prefix), tokenizer.encode(prefix + answer)
    shared = next((i for i, (a, b) in enumerate(zip(forced, written)) if a != b), len(forced))
    forced, gold = written[:shared], written[shared:]
    gold += tokenizer.encode(suffix) or [tokenizer.eos_id]
    text = (prefix + answer + suffix)[len(tokenizer.continuation(forced)) :]
    return Probe(forced, gold, _endings(tokenizer, gold, text, ends_number=not suffix))


def _endings(tokenizer: Tokenizer, gold: list[int], text: str, ends_number: bool) -> tuple:
    """`Probe.endings`: `text` is that of the answer and its terminator, gold their ids."""
    endings = []
    for i, token in enumerate(gold):
        begun = tokenizer.continuation(gold[:i])
        if not text.startswith(begun):
            continue  # inside a character that takes several tokens
        rest = text[len(begun) :]
        if rest:
            ids = _ids_beginning_with(tokenizer, rest) if not ends_number else ()
        else:
            ids = _ids_ending_a_number(tokenizer)
        if i == len(gold) - 1:
            ids = tuple(other for other in ids if other != token)
        if ids:
            endings.append((i, ids))
    return tuple(endings)


def endings_ref(tokenizer: Tokenizer, gold: list[int], text: str) -> tuple:
    """Specification of `_endings` for an answer with a terminator: try every id at every position."""
    found = []
    for i in range(len(gold)):
        texts = (tokenizer.continuation([*gold[:i], v]) for v in range(len(tokenizer.pieces)))
        ids = tuple(v for v, t in enumerate(texts) if t.startswith(text) and [v] != gold[i:])
        found += [(i, ids)] if ids else []
    return tuple(found)


@lru_cache(maxsize=8)
def _sorted_pieces(tokenizer: Tokenizer) -> list[tuple[str, int]]:
    return sorted((piece, i) for i, piece in enumerate(tokenizer.pieces))


@lru_cache(maxsize=4096)
def _ids_beginning_with(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """All ids whose text begins with `text`, ascending."""
    pieces = _sorted_pieces(tokenizer)
    first = last = bisect_left(pieces, (text, -1))
    while last < len(pieces) and pieces[last][0].startswith(text):
        last += 1
    return tuple(sorted(i for _, i in pieces[first:last]))


@lru_cache(maxsize=8)
def _ids_ending_a_number(tokenizer: Tokenizer) -> tuple[int, ...]:
    """All ids that end a number: stop ids, and tokens that cannot continue it. Ascending."""
    ends = {i for i, piece in enumerate(tokenizer.pieces) if NUMBER_ENDS.match(piece)}
    return tuple(sorted(ends | set(tokenizer.stop_ids)))


def ids_ending_a_number_ref(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Specification of `_ids_ending_a_number`: ids after which the grader reads the same number whatever
    follows.

    The regular expression misses some ids without a letter: separators, and digits after a space, as in 42
    000.
    """
    more = ("", "0", "3", ".5", ",000", ",3", "/2", "e3", "-3", "+3", " 000", " 1/2", "\n", " x")
    return tuple(
        i
        for i, piece in enumerate(tokenizer.pieces)
        if i in tokenizer.stop_ids or all(grade(f"#### 42{piece}{m}", "42", "gsm8k") for m in more)
    )


def room_behind(kind: str, probes: Sequence[Probe], max_tokens: int) -> int:
    """Largest number of tokens that an estimator appends to a prefix, forcing text included."""
    if kind == "continue":
        return max_tokens
    answer = _answer_limit(probes) if kind == "mc" else max((len(probe.gold) for probe in probes), default=0)
    return max((len(probe.forced) for probe in probes), default=0) + answer


def _answer_limit(probes: Sequence[Probe]) -> int:
    """Length limit of a sampled forced answer: a wrong one may be longer than the gold answer."""
    return 2 * max((len(probe.gold) for probe in probes), default=0) + 8


def answer_probability(logprob: Tensor, probe: Probe, scale: str = "p") -> Tensor:
    """Compute J from the probability p of the gold answer and its terminator. Scalar fp64.

    logprob is what `Sampler.score` returns for the probe: first for the tokens of its suffix, then for its
    choices. scale: "p", in [0, 1]; "log", log p (PACR); "geometric", p^(1/n) with n the number of tokens of
    answer and terminator (IGPO).
    """
    tokens, choices = logprob.double().split([len(probe.suffix), len(probe.endings)])
    tokens = tokens[len(probe.forced) :]
    paths = [tokens.sum()] + [tokens[:i].sum() + choice for (i, _), choice in zip(probe.endings, choices)]
    log_p = torch.stack(paths).logsumexp(0)
    if scale == "log":
        return log_p
    return (log_p / (len(probe.gold) if scale == "geometric" else 1)).exp()  # L2T Prop. D.1


@torch.no_grad()
def predicted_correctness_ref(
    model: Transformer, prompt: list[int], completion: list[int], episodes: Episodes, probe: Probe
) -> Tensor:
    """Specification of `Gain`: J_0, …, J_K, [K+1] fp64, by a full forward of every prefix with its probe."""
    J = []
    for n in episodes.prefixes:
        tokens = torch.tensor(prompt + completion[:n] + probe.suffix, device=model.embed.weight.device)
        hidden = model(tokens, torch.tensor([0, len(tokens)], dtype=torch.int32, device=tokens.device))
        p = model.logits(hidden[-1 - len(probe.gold) : -1]).double().softmax(-1)
        endings, written = dict(probe.endings), torch.ones((), dtype=torch.float64, device=p.device)
        total = torch.zeros_like(written)
        for i, token in enumerate(probe.gold):
            total += written * p[i, list(endings.get(i, ()))].sum()
            written = written * p[i, token]
        J.append(total + written)
    return torch.stack(J).cpu()


@dataclass(frozen=True)
class _Prefix:
    """First tokens of a completion, up to cut k, that wait for their J."""

    prompt: int
    sample: int
    k: int
    tokens: list[int]
    fork: Pages


def _ungraded(prompt: int, text: str) -> bool:
    raise ValueError("mc and continue need `grade`")


class Gain:
    """Measure J_0, …, J_K of every completion of a `Sampler.generate` call, from forks of its pages.

    Pass the object's `on_finish` to that call, then read `results`.

    forced     probability of the gold answer after each prefix, teacher-forced: K+1 short suffixes; prompt
               and completion are not computed again, and a prefix that samples share (always J_0's) is scored
               once
    mc         share of right answers among `samples` that are sampled after the forcing text, up to a stop id
               or the length limit
    continue   share of right answers among `samples` continuations, each with a completion's length limit

    The forks wait until a forward of forced answers is full, free pages run low or `results` is called. They
    lose their pages when a running completion finds no free page. The order does not change what is sampled:
    random numbers are drawn by key.

    probes     one per prompt of the call; none for continue
    segment    completion tokens -> Episodes
    scale      of a forced answer's probability, see `answer_probability`
    grade      (prompt index, text of an answer or of a completion) -> bool, for mc and continue
    temperature   of what is sampled, for mc and continue
    keys       per prompt, the key of its random numbers; what is sampled adds (sample, k, m)

    `seconds` and `forwards` (tokens that went through the model) are the cost so far.
    """

    def __init__(
        self,
        sampler: Sampler,
        probes: Sequence[Probe],
        segment: Callable[[list[int]], Episodes],
        kind: str = "forced",
        *,
        scale: str = "p",
        samples: int = 4,
        max_tokens: int = 256,
        temperature: float = 1.0,
        grade: Callable[[int, str], bool] = _ungraded,
        seed: int = 0,
        keys: Sequence[tuple[int, ...]] = (),
    ):
        if kind not in ("forced", "mc", "continue"):
            raise ValueError(f"kind must be forced, mc or continue, not {kind!r}")
        if scale not in SCALES or scale != "p" and kind != "forced":
            raise ValueError(f"scale must be one of {', '.join(SCALES)}, only p if not forced: {scale!r}")
        self.sampler, self.probes, self.segment, self.kind = sampler, probes, segment, kind
        self.samples, self.max_tokens, self.temperature = samples, max_tokens, temperature
        self.scale, self.grade, self.seed, self.keys = scale, grade, seed, keys
        self.seconds, self.forwards = 0.0, 0
        # (prompt, sample) -> episodes, keys of J_0, …, J_K
        self._seen: dict[tuple[int, int], tuple[Episodes, list]] = {}
        self._J: dict[tuple[int, ...], float] = {}
        self._waiting: dict[tuple[int, ...], _Prefix] = {}

    def on_finish(self, completion: Completion, pages: Pages) -> None:
        with self._metered():
            self._see(completion, pages)

    def _see(self, completion: Completion, pages: Pages) -> None:
        prompt, sample, tokens = completion.prompt, completion.sample, completion.tokens
        episodes, keys = self.segment(tokens), []
        for k, n in enumerate(episodes.prefixes):
            keys.append((prompt, *tokens[:n]) if self.kind == "forced" else (prompt, sample, k))
            if keys[-1] not in self._J and keys[-1] not in self._waiting:
                fork = pages.fork(len(pages.tokens) - len(tokens) + n)
                self.sampler.idle.add(fork)
                self._waiting[keys[-1]] = _Prefix(prompt, sample, k, tokens[:n], fork)
        self._seen[prompt, sample] = episodes, keys
        pool = self.sampler.pool
        suffixes = 0  # tokens of forced answers; what is to be sampled gains by waiting for more
        if self.kind == "forced":
            suffixes = len(self._waiting) * len(self.probes[prompt].suffix)
        if suffixes >= self.sampler.max_tokens_per_forward or 4 * pool.free_pages < pool.num_pages:
            self._flush()

    def results(self) -> list[tuple[Episodes, Tensor]]:
        """(Episodes, J [K+1] fp64) of all completions seen, prompt by prompt, sample by sample."""
        if self._waiting:
            with self._metered():
                self._flush()
        J = {
            place: torch.tensor([self._J[key] for key in keys], dtype=torch.float64)
            for place, (_, keys) in self._seen.items()
        }
        return [(self._seen[place][0], J[place]) for place in sorted(J)]

    @contextmanager
    def _metered(self) -> Iterator[None]:
        start, forwards = time.perf_counter(), self.sampler.forwards.total
        yield
        self.seconds += time.perf_counter() - start
        self.forwards += self.sampler.forwards.total - forwards

    def _flush(self) -> None:
        """Compute J of all waiting prefixes."""
        self._score() if self.kind == "forced" else self._sample()

    def _score(self) -> None:
        waiting, self._waiting = self._waiting, {}
        probes = [self.probes[prefix.prompt] for prefix in waiting.values()]
        logprobs = self.sampler.score(
            [prefix.fork for prefix in waiting.values()],
            [probe.suffix for probe in probes],
            [probe.choices for probe in probes],
        )
        read = torch.cat(logprobs).cpu()  # one wait for all probes
        for key, probe, logprob in zip(waiting, probes, read.split([len(x) for x in logprobs])):
            self._J[key] = float(answer_probability(logprob, probe, self.scale))

    def _sample(self) -> None:
        waiting, self._waiting = self._waiting, {}
        prefixes = list(waiting.values())
        if self.kind == "mc":
            # no stop string: the "}" that ends an answer also stands inside it
            forced, longest = [self.probes[p.prompt].forced for p in prefixes], _answer_limit(self.probes)
        else:
            forced, longest = [[] for _ in prefixes], self.max_tokens
        keys = [(*self.keys[p.prompt], p.sample, p.k, m) for p in prefixes for m in range(self.samples)]
        try:
            answers = self.sampler.generate(
                forced,
                self.samples,
                max_tokens=longest,
                temperature=self.temperature,
                seed=self.seed,
                keys=keys,
                prefix=[p.fork for p in prefixes],
            )
        finally:
            for p in prefixes:
                p.fork.release()
        for key, p, ids, group in zip(waiting, prefixes, forced, answers):
            # a forced answer is graded with the text that forced it, a continuation with the completion it
            # continues
            start = ids if self.kind == "mc" else p.tokens
            correct = [
                self.grade(p.prompt, self.sampler.tokenizer.decode(start + answer.tokens)) for answer in group
            ]
            self._J[key] = sum(correct) / len(correct)  # L2T Prop. D.1


def show(model_folder: str, problems: Sequence[Problem], samples: int = 8, prm_folder: str = "") -> None:
    """Print J_0 … J_K along one completion of each problem, by every estimator or by a given reward model."""
    tokenizer = Tokenizer(model_folder)
    sampler = Sampler(load_model(model_folder), tokenizer)
    probes = [make_probe(tokenizer, p.answer, *forcing(p)) for p in problems]
    keys = [(p.id,) for p in problems]
    prompts, rows = [tokenizer.encode_chat(messages(p)) for p in problems], {}
    for kind in ("forced", "mc", "continue"):
        gain = Gain(
            sampler,
            probes,
            lambda tokens: segment(tokens, tokenizer),
            kind,
            samples=samples,
            keys=keys,
            grade=lambda i, text: grade(text, problems[i].answer, problems[i].source),
        )
        groups = sampler.generate(prompts, max_tokens=200, seed=1, keys=keys, on_finish=gain.on_finish)
        rows[kind] = [J for _, J in gain.results()]
    if prm_folder:
        completions = [c.tokens for [c] in groups]
        prefixes = [segment(tokens, tokenizer).prefixes for tokens in completions]
        rows["prm"] = score_completions(load_prm(prm_folder), prompts, completions, prefixes)
    for i, [completion] in enumerate(groups):
        print(visible(f"{problems[i].question} {tokenizer.decode(completion.tokens)}"))
        for kind, J in rows.items():
            print(f"    {kind:9}", " ".join(f"{j:.2f}" for j in J[i].tolist()))


if __name__ == "__main__":
    from thinkrl.arith import heldout

    show(
        str(Path(__file__).parent.parent / "assets" / "tiny"),
        heldout()[150:500:90],
        prm_folder="".join(sys.argv[1:]),
    )
