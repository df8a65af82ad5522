"""What tells an iteration which one it is: an embedding added to the state that enters it."""

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_loops.errors import ConfigError
from tl_loops.layout.names import spec
from tl_loops.mechanisms.iteration_weights import n_rows
from tl_loops.mechanisms.mechanism import Config, Mechanism, OnPath, Part, Run, Setting
from tl_loops.mechanisms.tensors import PhysicalTensor, Tensors, add_parameters

TIMESCALE = 10000.0
"""Longest wavelength of the sinusoids, over 2π."""


def sinusoids(values: Int[Tensor, "*batch"], width: int) -> Float[Tensor, "*batch width"]:
    """Sines (even dimensions) and cosines (odd ones) of integers, over geometric wavelengths.

    ``out[2j] = sin(value / 10000^(2j / width))``, ``out[2j + 1]`` the cosine.

    Source: Vaswani et al. 2017 (1706.03762), section 3.5.
    """
    steps = torch.arange(0, width, 2, dtype=torch.float32, device=values.device)
    exponents = steps / width
    angles = values.unsqueeze(-1) * torch.exp(-math.log(TIMESCALE) * exponents)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)


class StepEmbedding(nn.Module):
    """The embedding of an iteration, by ``cfg.step_embedding``.

    ``"position_and_step"`` is the Universal Transformer's: sinusoids of the position plus those of
    the iteration, which counts from 1. ``"sinusoidal"`` leaves the position out. ``"learned"`` has
    a trained vector for each of ``cfg.max_iterations``.

    Source: Dehghani et al. 2018 (1807.03819), equations 4 and 5.
    """

    W_E: nn.Parameter

    def __init__(self, cfg: Config, device: torch.device | str | None = None):
        super().__init__()
        self.kind = cfg.step_embedding
        add_parameters(self, STEP_EMBEDDING.weights(cfg), "step_embedding", cfg.dtype, device)

    def forward(
        self,
        state: Float[Tensor, "batch pos d_model"],
        iteration: int,
        positions: Int[Tensor, "batch pos"],
    ) -> Float[Tensor, "batch pos d_model"]:
        if self.kind == "learned":
            return self.W_E[iteration].expand_as(state).contiguous()
        step = torch.tensor(iteration + 1, device=state.device)
        embedding = sinusoids(step, state.shape[-1]).expand(state.shape)
        if self.kind == "position_and_step":
            embedding = embedding + sinusoids(positions, state.shape[-1])
        return embedding.to(state).contiguous()


class _Add(Part):
    def enter(self, t: int, state: Tensor) -> Tensor:
        model = self.run.model
        embedding = model.step_embedding(state, t, self.run.context.positions)
        return state + model.iter[t].hook_step_embedding(embedding)


class _StepEmbedding(Mechanism):
    name = "step_embedding"
    owners = ("step_embedding",)
    settings = (
        Setting(
            "step_embedding",
            str | None,
            None,
            'What is added to the state before each iteration. ``"sinusoidal"``: a sinusoid of the '
            'iteration. ``"position_and_step"``: of the position and the iteration (Universal '
            'Transformer). ``"learned"``: a trained vector per iteration.',
            choices=(None, "sinusoidal", "position_and_step", "learned"),
        ),
    )
    points = (spec("hook_step_embedding", "iteration", "batch pos d_model", moment="before"),)
    with_stacks = False

    def check(self, cfg: Config) -> None:
        if cfg.step_embedding in ("sinusoidal", "position_and_step") and cfg.d_model % 2:
            raise ConfigError(f"step_embedding={cfg.step_embedding!r} needs an even d_model")

    def has_rows(self, cfg: Config) -> bool:
        return cfg.step_embedding == "learned"

    def describe(self, cfg: Config) -> list[str]:
        what = {
            "sinusoidal": "sinusoids of t + 1",
            "position_and_step": "sinusoids of the position plus sinusoids of t + 1",
            "learned": "W_E[t]",
        }[cfg.step_embedding]
        return [f"step     s += {what}, before each iteration t"]

    def weights(self, cfg: Config) -> Tensors:
        if cfg.step_embedding != "learned":
            return {}
        return {"step_embedding.W_E": PhysicalTensor((n_rows(cfg), cfg.d_model))}

    def modules(self, cfg: Config, device: Any) -> dict[str, nn.Module]:
        return {"step_embedding": StepEmbedding(cfg, device)}

    def part(self, run: Run) -> Part:
        return _Add(run)

    def path(self, cfg: Config) -> OnPath:
        return OnPath(adds=("step_embedding",))


STEP_EMBEDDING = _StepEmbedding()
