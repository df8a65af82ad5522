"""Huginn as a Hugging Face model: prelude, core with injection, coda; norms on the sums."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class RavenConfig(PretrainedConfig):
    model_type = "huginn_raven"
    keys_to_ignore_at_inference = ("",)

    def __init__(self, n_embd=48, n_heads=3, **kwargs):
        self.n_embd = self.hidden_size = n_embd
        self.n_heads = self.num_attention_heads = self.num_key_value_heads = n_heads
        for name, default in dict(
            intermediate_size=80,
            vocab_size=96,
            block_size=64,
            norm_eps=1e-6,
            rope_base=50_000,
            n_layers_in_prelude=2,
            n_layers_in_recurrent_block=4,
            n_layers_in_coda=2,
            mean_recurrence=3,
            qk_bias=True,
            tie_embeddings=True,
        ).items():
            setattr(self, name, kwargs.pop(name, default))
        self.n_layers = (
            self.n_layers_in_prelude + self.n_layers_in_recurrent_block + self.n_layers_in_coda
        )
        self.num_hidden_layers = self.n_layers
        self.max_position_embeddings = self.block_size
        self.head_dim = n_embd // n_heads
        kwargs.pop("tie_word_embeddings", None)
        super().__init__(tie_word_embeddings=self.tie_embeddings, **kwargs)


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return normed.type_as(x) * self.weight


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, self.n_heads = config.n_embd, config.n_heads
        self.Wqkv = nn.Linear(width, 3 * width, bias=False)
        self.qk_bias = nn.Parameter(torch.zeros(2, 1, config.n_heads, config.head_dim))
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, x, freqs_cis, block_idx=None, mask=None, past_key_values=None):
        q, k, v = (part.unflatten(-1, (self.n_heads, -1)) for part in self.Wqkv(x).chunk(3, dim=-1))
        q, k = rotate(q + self.qk_bias[0], freqs_cis), rotate(k + self.qk_bias[1], freqs_cis)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(z.transpose(1, 2).flatten(2))


def rotate(x, freqs_cis):
    pairs = x.float().unflatten(-1, (-1, 2))
    cos, sin = freqs_cis[..., 0], freqs_cis[..., 1]
    real, imaginary = pairs[..., 0], pairs[..., 1]
    turned = torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1)
    return turned.flatten(-2).type_as(x)


class GatedMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc = nn.Linear(config.n_embd, 2 * config.intermediate_size, bias=False)
        self.proj = nn.Linear(config.intermediate_size, config.n_embd, bias=False)

    def forward(self, x):
        gate, up = self.fc(x).chunk(2, dim=-1)
        return self.proj(F.silu(gate) * up)


class SandwichBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        for name in ("norm_1", "norm_2", "norm_3", "norm_4"):
            setattr(self, name, RMSNorm(config.n_embd, config.norm_eps))
        self.attn = CausalSelfAttention(config)
        self.mlp = GatedMLP(config)

    def forward(self, x, freqs_cis, step_idx=None, mask=None, past_key_values=None):
        x = self.norm_2(self.attn(self.norm_1(x), freqs_cis, step_idx, mask, past_key_values) + x)
        return self.norm_4(self.mlp(self.norm_3(x)) + x)


@dataclass
class RavenOutput(CausalLMOutputWithPast):
    latent_states: torch.Tensor | None = None


class RavenForCausalLM(PreTrainedModel):
    config_class = RavenConfig
    _tied_weights_keys: ClassVar = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config):
        super().__init__(config)

        def blocks(n):
            return nn.ModuleList([SandwichBlock(config) for _ in range(n)])

        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                prelude=blocks(config.n_layers_in_prelude),
                adapter=nn.Linear(2 * config.n_embd, config.n_embd, bias=False),
                core_block=blocks(config.n_layers_in_recurrent_block),
                coda=blocks(config.n_layers_in_coda),
                ln_f=RMSNorm(config.n_embd, config.norm_eps),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.emb_scale = math.sqrt(config.n_embd)
        half = torch.arange(0, config.head_dim, 2).float() / config.head_dim
        angles = torch.outer(torch.arange(config.block_size), config.rope_base**-half)
        table = torch.stack([angles.cos(), angles.sin()], dim=-1)[None, :, None]
        self.register_buffer("freqs_cis", table, persistent=True)
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.1)

    def get_input_embeddings(self):
        return self.transformer.wte

    def get_output_embeddings(self):
        return self.lm_head

    def initialize_state(self, like):
        std = math.sqrt(2 / (5 * self.config.n_embd))
        state = torch.randn_like(like)
        nn.init.trunc_normal_(state, mean=0.0, std=std, a=-3 * std, b=3 * std)
        return state * self.emb_scale

    def forward(
        self,
        input_ids=None,
        input_embeds=None,
        input_states=None,
        attention_mask=None,
        num_steps=None,
        past_key_values=None,
        **kwargs,
    ):
        freqs = self.freqs_cis[:, : input_ids.shape[1]]
        e = self.transformer.wte(input_ids) * self.emb_scale
        for block in self.transformer.prelude:
            e = block(e, freqs)
        state = self.initialize_state(e) if input_states is None else input_states.clone()
        if num_steps is None:
            num_steps = self.config.mean_recurrence
        # As in the released code, a plain number of steps runs them all without gradients.
        frozen, trained = num_steps if hasattr(num_steps, "__len__") else (num_steps, 0)
        with torch.no_grad():
            for _ in range(int(frozen)):
                state = self._core(state, e, freqs)
        for _ in range(int(trained)):
            state = self._core(state, e, freqs)
        x = latent = self.transformer.ln_f(state)
        for block in self.transformer.coda:
            x = block(x, freqs)
        logits = self.lm_head(self.transformer.ln_f(x)).float()
        return RavenOutput(logits=logits, latent_states=latent)

    def _core(self, state, e, freqs):
        state = self.transformer.adapter(torch.cat([state, e], dim=-1))
        for block in self.transformer.core_block:
            state = block(state, freqs)
        return state
