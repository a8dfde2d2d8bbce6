"""Values that presets, --profile, --method and --length set."""

from __future__ import annotations

from typing import Any

EPISODES_SYSTEM = (
    "Think before you answer. Write all of your thinking between <think> and </think>, divided into numbered "
    "episodes, at most 30, each of them one complete step of reasoning: "
    "<think><episode_1>…</episode_1><episode_2>…</episode_2></think>. Then state the answer."
)

# docs/l2t.md and docs/longshort.md list the values that the papers do not give.
PRESET_VALUES: dict[str, dict] = {
    "grpo": dict(),
    "l2t": dict(
        lr=1e-6,
        schedule="cosine",
        warmup=0.1,
        weight_decay=0.01,
        problems_per_step=64,
        group_size=4,
        max_tokens=16384,
        kl_coef=0.001,
        episodes="tags",
        system=EPISODES_SYSTEM,
    ),
    "longshort": dict(
        lr=5e-6,
        schedule="cosine",
        warmup=0.1,
        kl_coef=0.04,
        temperature=0.9,
        group_size=8,
        problems_per_step=96,
        max_tokens=1024,
    ),
    "sft": dict(lr=1e-5, schedule="cosine", warmup=0.1, problems_per_step=64, data="", epochs=3),
    # with l2t's system prompt, so that it is trained on completions like l2t's
    "prm": dict(
        lr=1e-5, schedule="cosine", warmup=0.1, problems_per_step=32, group_size=8, system=EPISODES_SYSTEM
    ),
}
_EMBEDDED_RL = dict(
    steps=200,
    problems_per_step=16,
    group_size=8,
    max_tokens=200,
    lr=2e-4,
    warmup=0.05,
    schedule="constant",
    weight_decay=0.0,
    kl_coef=0.0,
    micro_batch_tokens=4096,
    save_every=0,
    rank_share=0.5,
    refresh_every=10,
    system="",
)
EMBEDDED_VALUES: dict[str, dict] = {
    "grpo": _EMBEDDED_RL,
    "l2t": _EMBEDDED_RL,
    # the partner is sampled as in evaluation; a small µ, so that right answers score more than short ones
    # (LOG.md)
    "longshort": _EMBEDDED_RL
    | dict(
        steps_per_round=20,
        max_tokens=160,
        partner_max_tokens=160,
        temperature=1.0,
        partner_temperature=1.0,
        length_coef=0.3,
    ),
    "sft": dict(
        epochs=0,
        steps=300,
        problems_per_step=64,
        lr=1e-3,
        micro_batch_tokens=8192,
        weight_decay=0.0,
        save_every=0,
    ),
    "prm": _EMBEDDED_RL | dict(steps=100),
}
PROFILE_VALUES: dict[str, dict] = {
    "": {},
    "paper": dict(statistic="token_trunc_mean", credit="paper", compression="rank1", aggregate="sequence"),
    "code": dict(
        alpha=1.0,
        beta=0.0,
        gain="prm",
        compression="none",
        statistic="return_sum",
        credit="uniform",
        released_sum=True,
        malformed_penalty=0.01,
    ),
    "grpo": dict(alpha=0.0, statistic="return_sum", credit="uniform", gain="none", compression="none"),
}

# Values of --method, as far as the papers give them; tests/l2t/test_methods.py has their formulas.
_NO_PENALTY = dict(beta=0.0, compression="none")
METHOD_VALUES: dict[str, dict] = {
    "": {},
    # 2503.07572: the outcome plus 0.2 times the gain in accuracy of a forced answer, per completion
    "mrt": _NO_PENALTY | dict(alpha=0.2, gain="mc", credit="uniform", statistic="return_sum"),
    # 2410.01679: an episode's change of value, by 9 continuations; no group
    "vineppo": _NO_PENALTY | dict(gain="continue", gain_samples=9, credit="local", credit_lambda=0.0),
    # 2510.14967: gains of the geometric mean, normalized with the outcome, summed to the end (γ = 1)
    "igpo": _NO_PENALTY
    | dict(alpha=1.0, gain="forced", gain_scale="geometric", credit="step", credit_lambda=1.0),
    # 2510.22255, by its abstract: the same on log p
    "pacr": _NO_PENALTY | dict(alpha=1.0, gain="forced", gain_scale="log", credit="step", credit_lambda=1.0),
    # 2505.07686: no J; the forced answers are trained on, see thinkrl/l2t/exits.py
    "s-grpo": _NO_PENALTY | dict(alpha=0.0, gain="none", advantage_std="none"),
}


# Values of --length: the options that a method reads, with published values; 0 and "" mean "must be given".
LENGTH_VALUES: dict[str, dict] = {
    "": {},
    "truncation": dict(length_limit=0),
    "overlong": dict(length_limit=0, length_cache=0),
    "l1_exact": dict(length_target="", length_prompt=" Think for {target} tokens.", length_alpha=3e-4),
    "l1_max": dict(length_target="", length_prompt=" Think for maximum {target} tokens.", length_alpha=2e-3),
    "kimi": dict(length_weight=1.0),
    "arora_zanette": dict(length_alpha=0.2, advantage_std="none"),
    "laser": dict(length_limit=0, length_weight=0.5),
    "laser_d": dict(length_weight=0.5),
    "shorter_better": dict(length_alpha=2.0, length_beta=1e-3),
    "gfpo": dict(length_keep=0),
    "gr3": dict(length_alpha=0.33),
    "prime_linear": dict(length_weight=0.25, advantage_std="none"),
    "priced": dict(length_price=0.0),
}


def preset_values(
    preset: str, tiny: bool = False, profile: str = "", length: str = "", method: str = ""
) -> dict[str, Any]:
    """Values that a preset sets, with those of the embedded model if `tiny`, and of named settings."""
    small = EMBEDDED_VALUES[preset] if tiny else {}
    named = PROFILE_VALUES[profile] | METHOD_VALUES[method] | LENGTH_VALUES[length]
    return PRESET_VALUES[preset] | small | named


def embedded(model: str) -> bool:
    """Whether a checkpoint is the embedded model or was trained from it, by its config.json."""
    if model == "tiny":
        return True
    try:
        with open(f"{model}/config.json") as file:
            return '"thinkrl_embedded": true' in file.read()
    except OSError:
        return False
