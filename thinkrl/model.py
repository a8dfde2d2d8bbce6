"""One decoder for Qwen2/2.5, Qwen3 and Llama 3.x, and for the distillations that share their architecture.

    x = embed[tokens]
    x = x + o(attend(rotate(q), rotate(k), v))        q, k, v = split(qkv(norm(x)))       every block
    x = x + down(silu(gate) * up)                     gate, up = split(gate_up(norm(x)))
    hidden = norm(x)        logits = hidden @ head.T

Qwen2 has a bias on q, k, v. Qwen3 normalises every head of q and k instead, and its head_dim need not be
width / heads. Llama 3.x scales the low RoPE frequencies.

Departures from the implementation in transformers, none of which changes values beyond rounding:

- tokens are packed: T tokens of S sequences in one row, without padding or batch dimension;
- attention is an argument, so training, prefill, decoding and probes use one model without cache or mask;
- q, k, v are one matrix, and gate, up another (checkpoint.py splits and merges them);
- rotation and norms compute in fp32, also in a bf16 model, and round once.

Sharding, activation checkpointing and mixed precision are applied to `blocks` from outside.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.attention import packed_attention
from thinkrl import UserError
from thinkrl.run.watch import alive

SUPPORTED = ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM")

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
Rotate = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Rope:
    """Rotary frequencies theta^(-2i/head_dim), scaled by `kind` for contexts longer than in pre-training."""

    theta: float = 10000.0
    kind: str = "default"  # default | linear | llama3
    factor: float = 1.0  # divides every frequency (linear) or the low ones (llama3)
    # llama3: frequencies with wavelengths above original / low are divided by the factor, those below
    # original / high are kept, and in between they are interpolated
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """Shape and options of the decoder. `source` is the Hugging Face config.json it was read from."""

    architecture: str
    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    max_positions: int
    norm_eps: float = 1e-6
    tied: bool = False
    rope: Rope = Rope()
    source: dict = field(default_factory=dict, hash=False, compare=False, repr=False)

    @property
    def qkv_bias(self) -> bool:
        return self.architecture == "Qwen2ForCausalLM"

    @property
    def qk_norm(self) -> bool:
        return self.architecture == "Qwen3ForCausalLM"

    @staticmethod
    def from_hf(raw: dict, where: str = "config.json") -> ModelConfig:
        """Read a Hugging Face config.json, with rope_theta and rope_scaling, or newer with rope_parameters.

        Raises UserError, naming `where`, for an architecture or variant that is not supported.
        """
        architecture = (raw.get("architectures") or ["none"])[0]
        if architecture not in SUPPORTED:
            raise UserError(
                f"{where}: architecture {architecture} is not supported, only {', '.join(SUPPORTED)} are"
            )

        def need(key: str) -> int:
            if not isinstance(raw.get(key), int):
                raise UserError(f"{where}: {key} must be an integer, it is {raw.get(key, 'missing')!r}")
            return raw[key]

        refused = {
            "hidden_act": raw.get("hidden_act", "silu") != "silu",
            "attention_bias": raw.get("attention_bias", False),
            "mlp_bias": raw.get("mlp_bias", False),
            "use_sliding_window": raw.get("use_sliding_window", False),
            "layer_types": any(kind != "full_attention" for kind in raw.get("layer_types") or []),
            "num_experts": raw.get("num_experts"),
            "partial_rotary_factor": raw.get("partial_rotary_factor", 1.0) != 1.0,
        }
        for key, unsupported in refused.items():
            if unsupported:
                raise UserError(
                    f"{where}: {key} = {raw[key]!r} is a variant of {architecture} that is not supported"
                )

        width, heads = need("hidden_size"), need("num_attention_heads")
        kv_heads = raw.get("num_key_value_heads") or heads
        head_dim = raw.get("head_dim") or (128 if architecture == "Qwen3ForCausalLM" else width // heads)
        if heads % kv_heads or head_dim % 2:
            raise UserError(
                f"{where}: {heads} heads must be a multiple of {kv_heads} key-value heads, and head_dim "
                f"{head_dim} even"
            )
        return ModelConfig(
            architecture=architecture,
            vocab_size=need("vocab_size"),
            width=width,
            layers=need("num_hidden_layers"),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            mlp_width=need("intermediate_size"),
            max_positions=need("max_position_embeddings"),
            norm_eps=raw.get("rms_norm_eps", 1e-6),
            tied=raw.get("tie_word_embeddings", False),
            rope=_rope_from_hf(raw, where),
            source=dict(raw),
        )

    def to_hf(self) -> dict:
        """Make config.json of this model: `source`, updated by our fields."""
        rope = {"rope_type": self.rope.kind, "rope_theta": self.rope.theta}
        if self.rope.kind != "default":
            rope["factor"] = self.rope.factor
        if self.rope.kind == "llama3":
            rope["low_freq_factor"] = self.rope.low_freq_factor
            rope["high_freq_factor"] = self.rope.high_freq_factor
            rope["original_max_position_embeddings"] = self.rope.original_max_positions
        return self.source | {
            "architectures": [self.architecture],
            "model_type": self.architecture.removesuffix("ForCausalLM").lower(),
            "vocab_size": self.vocab_size,
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.mlp_width,
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": self.norm_eps,
            "tie_word_embeddings": self.tied,
            "hidden_act": "silu",
            "rope_parameters": rope,
            # Both forms, because readers older than rope_parameters would silently use theta = 10,000.
            "rope_theta": self.rope.theta,
            "rope_scaling": None if self.rope.kind == "default" else rope,
        }


def _rope_from_hf(raw: dict, where: str) -> Rope:
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ("default", "linear", "llama3"):
        raise UserError(
            f"{where}: rope scaling {kind!r} is not supported; supported are default, linear, llama3"
        )
    theta = scaling.get("rope_theta") or raw.get("rope_theta") or 10000.0
    if kind == "default":
        return Rope(theta)
    keys = ["factor"]
    if kind == "llama3":
        keys += ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    for key in keys:
        if not isinstance(scaling.get(key), (int, float)):
            raise UserError(
                f"{where}: rope scaling {kind!r} needs the number {key}, got {scaling.get(key, 'nothing')!r}"
            )
    return Rope(theta, kind, *(scaling[key] for key in keys))


@functools.cache
def inverse_frequencies(head_dim: int, rope: Rope, device: torch.device) -> Tensor:
    """Angle per position of each pair of dimensions, [head_dim / 2] fp32.

    Computed from the config, not a buffer, so that frequencies stay exact when a model is moved or cast.
    """
    frequency = 1.0 / rope.theta ** (
        torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    )
    if rope.kind == "default":
        return frequency
    if rope.kind == "linear":
        return frequency / rope.factor
    # llama3: by the number of turns within the original context; few turns (long wavelength) are scaled.
    turns = rope.original_max_positions * frequency / (2 * math.pi)
    keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return torch.lerp(frequency / rope.factor, frequency, keep.clamp(0.0, 1.0))


def sequence_positions(cu_seqlens: Tensor, T: int) -> Tensor:
    """Position of each of the T packed tokens in its own sequence: cu_seqlens [0 3 5] -> [0 1 2 0 1]."""
    row = torch.arange(T, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens, row, right=True) - 1  # right: an empty sequence has no token
    return row - cu_seqlens[sequence]


def make_rotate(positions: Tensor, head_dim: int, rope: Rope) -> Rotate:
    """Make the RoPE function of heads [T, *, head_dim]: rotates (x_i, x_{i + head_dim/2}) by position *
    frequency_i.

    The tables are in the closure, in fp32: as arguments, mixed precision would round them to bf16.
    """
    angle = positions.float()[:, None, None] * inverse_frequencies(head_dim, rope, positions.device)
    cos, sin = angle.cos(), angle.sin()
    cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)  # [T, 1, head_dim]

    def rotate(x: Tensor) -> Tensor:
        return torch.addcmul(x * cos, x.roll(head_dim // 2, -1), sin).to(x.dtype)

    return rotate


def fast_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute F.linear, by oneDNN in inference mode on a CPU: MKL's fp32 product takes up to twice as long on
    AMD CPUs.

    weight: [out, in], or a copy by `pack_weight`. oneDNN's product has no derivative, and of a weight that is
    not packed it is not faster for less than 8 rows. It is not used in compiled blocks, which are for
    training.
    """
    if weight.is_mkldnn or (
        not torch.compiler.is_compiling()
        and len(x) >= 8
        and weight.is_cpu
        and torch.is_inference_mode_enabled()
        and _onednn_multiplies(weight.dtype)
    ):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


PACKED_FROM = 1 << 18  # elements; with smaller weights a rollout gains nothing (BENCHMARKS.md)
PACKED_FOR = 64  # rows of the other factor, about


def pack_weight(weight: Tensor) -> Tensor:
    """Copy a weight [out, in] into the layout of oneDNN's product, on a CPU.

    Otherwise every product copies it. Where oneDNN is not used, or a copy takes no time worth saving, returns
    the weight itself.
    """
    if weight.is_cpu and weight.numel() >= PACKED_FROM and _onednn_multiplies(weight.dtype):
        return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), PACKED_FOR)
    return weight


@functools.cache
def _onednn_multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN has a fast product for the dtype; bf16 needs AVX-512."""
    return torch.backends.mkldnn.is_available() and (
        dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


class Linear(nn.Linear):
    """nn.Linear by `fast_linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return fast_linear(x, self.weight, self.bias)


class Block(nn.Module):
    """Attention and gated MLP, each added to the residual stream x [T, D]."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.heads, self.kv_heads = config.heads, config.kv_heads
        head_rows = config.heads * config.head_dim
        qkv_rows = head_rows + 2 * config.kv_heads * config.head_dim
        self.attention_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.qkv = Linear(config.width, qkv_rows, bias=config.qkv_bias)  # rows: q heads, k heads, v heads
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.o = Linear(head_rows, config.width, bias=False)
        self.mlp_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.gate_up = Linear(config.width, 2 * config.mlp_width, bias=False)  # rows: gate, then up
        self.down = Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x: Tensor, rotate: Rotate, attend: Attend) -> Tensor:
        q, k, v = self.project(x, rotate)
        return self.finish(x, attend(self.layer, q, k, v))

    def project(self, x: Tensor, rotate: Rotate) -> tuple[Tensor, Tensor, Tensor]:
        """Compute attention's inputs: x [T, D] -> q [T, H, Dh], k and v [T, Hkv, Dh]."""
        heads = self.qkv(self.attention_norm(x)).unflatten(-1, (-1, self.head_dim))
        qk, v = heads.split([self.heads + self.kv_heads, self.kv_heads], dim=1)
        if self.q_norm is not None:
            q, k = qk.split([self.heads, self.kv_heads], dim=1)
            qk = torch.cat([self.q_norm(q), self.k_norm(k)], dim=1)
        # q and k together: fewer operations per decode step
        q, k = rotate(qk).split([self.heads, self.kv_heads], dim=1)
        return q, k, v

    def finish(self, x: Tensor, o: Tensor) -> Tensor:
        """Compute the next block's x from the residual stream x [T, D] and attention's o [T, H, Dh]."""
        x = x + self.o(o.flatten(1))
        return x + self.mlp(self.mlp_norm(x))

    def mlp(self, h: Tensor) -> Tensor:
        gate, up = self.gate_up(h).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Transformer(nn.Module):
    """Decoder. Embedding, final norm and head are FSDP's root unit, so call `logits` after `forward`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.width)
        blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        # for type checkers, a ModuleList's elements are any Module
        self.blocks = cast(Sequence[Block], blocks)
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.head = None if config.tied else Linear(config.width, config.vocab_size, bias=False)

    @staticmethod
    def empty(
        config: ModelConfig, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Transformer:
        """Make a model with allocated, uninitialized parameters, for a checkpoint to fill."""
        with torch.device("meta"):
            model = Transformer(config).to(dtype)
        return model.to_empty(device=device)

    @staticmethod
    def random(config: ModelConfig, seed: int = 0) -> Transformer:
        """Make a random model, fp32 on the CPU: weights from N(0, 0.02²), o and down from N(0, 0.02²/2L)."""
        model = Transformer.empty(config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("norm.weight"):
                    parameter.fill_(1.0)
                elif name.endswith("bias"):
                    parameter.zero_()
                else:
                    shrink = (
                        math.sqrt(2 * config.layers) if name.endswith((".o.weight", "down.weight")) else 1.0
                    )
                    parameter.normal_(0.0, 0.02 / shrink, generator=generator)
        return model

    def forward(
        self,
        tokens: Tensor,
        cu_seqlens: Tensor | None = None,
        positions: Tensor | None = None,
        attend: Attend | None = None,
        longest: int | None = None,
    ) -> Tensor:
        """Compute hidden states after the final norm, [T, D], in the parameters' dtype.

        tokens      [T] int64, the tokens of S sequences in one row
        cu_seqlens  int32 [S+1]; may be None when both `positions` and `attend` are given
        positions   [T] int64, each token's position in its sequence; None: from cu_seqlens
        attend      (layer, q [T, H, Dh], k [T, Hkv, Dh], v [T, Hkv, Dh]) -> o [T, H, Dh], after rotation and
                    q/k norm; q, k and v are views into wider rows. None: causal attention within each
                    sequence of cu_seqlens
        longest     tokens of the longest sequence, for that attention; None: read back from cu_seqlens, once
        """
        alive()
        if positions is None:
            positions = sequence_positions(cu_seqlens, len(tokens))
        if attend is None:
            longest = int(cu_seqlens.diff().max()) if longest is None else longest

            def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return packed_attention(q, k, v, cu_seqlens, longest)

        rotate = make_rotate(positions, self.config.head_dim, self.config.rope)
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, rotate, attend)
        return self.norm(x)

    @property
    def head_weight(self) -> Tensor:
        """Weight of the LM head, [V, D]; the embedding's if tied."""
        return self.embed.weight if self.head is None else self.head.weight

    def logits(self, hidden: Tensor, packed: Tensor | None = None) -> Tensor:
        """Compute logits, [T, D] -> [T, V]. In inference mode on CUDA in fp32, as in the loss.

        Neighbouring bf16 values of large logits differ by 0.1, a few per cent of a probability. packed: the
        head's weight by `pack_weight`.
        """
        if torch.is_inference_mode_enabled() and hidden.is_cuda and hidden.dtype.itemsize == 2:
            return torch.mm(hidden, self.head_weight.T, out_dtype=torch.float32)
        return fast_linear(hidden, self.head_weight if packed is None else packed)
