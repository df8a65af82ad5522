"""Ouro as a Hugging Face model: Llama's parts, four norms a layer, one stack run several times."""

import torch
from torch import nn
from transformers import LlamaConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)


class OuroConfig(LlamaConfig):
    model_type = "ouro"

    def __init__(self, total_ut_steps=4, early_exit_threshold=1.0, **kwargs):
        super().__init__(**kwargs)
        self.total_ut_steps = total_ut_steps
        self.early_exit_threshold = early_exit_threshold


class OuroDecoderLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.self_attn = LlamaAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        for name in ("input_layernorm", "post_attention_layernorm"):
            setattr(self, name, LlamaRMSNorm(config.hidden_size, config.rms_norm_eps))
            setattr(self, f"{name}_2", LlamaRMSNorm(config.hidden_size, config.rms_norm_eps))

    def forward(self, hidden_states, **kwargs):
        branch, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + self.input_layernorm_2(branch)
        branch = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + self.post_attention_layernorm_2(branch)


class OuroPreTrainedModel(PreTrainedModel):
    config_class = OuroConfig
    base_model_prefix = "model"
    _supports_sdpa = True


class OuroModel(OuroPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList([OuroDecoderLayer(config, layer) for layer in layers])
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.early_exit_gate = nn.Linear(config.hidden_size, 1)
        self.total_ut_steps = config.total_ut_steps
        self.post_init()

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, **kwargs
    ):
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = torch.arange(x.shape[1], device=x.device)[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=None,
            position_ids=position_ids,
        )
        rotary = self.rotary_emb(x, position_ids=position_ids)
        states, gates = [], []
        for _ in range(self.total_ut_steps):
            for layer in self.layers:
                x = layer(x, attention_mask=mask, position_embeddings=rotary)
            x = self.norm(x)
            states.append(x)
            gates.append(self.early_exit_gate(x))
        return BaseModelOutputWithPast(last_hidden_state=x), states, gates


class OuroForCausalLM(OuroPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = OuroModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, **kwargs):
        outputs, _, _ = self.model(input_ids, attention_mask, inputs_embeds=inputs_embeds)
        return CausalLMOutputWithPast(logits=self.lm_head(outputs.last_hidden_state))
