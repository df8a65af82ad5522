"""A linear map of the state between core and coda (Parcae)."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tl_loops.errors import ConfigError
from tl_loops.mechanisms.mechanism import Config, Mechanism, Setting
from tl_loops.mechanisms.tensors import Tensors, add_parameters, matrix


class CodaInput(nn.Module):
    """The linear map ``s W`` of the state between core and coda."""

    W: nn.Parameter

    def __init__(self, cfg: Config, device: torch.device | str | None = None):
        super().__init__()
        add_parameters(self, CODA_INPUT.weights(cfg), "coda_in", cfg.dtype, device)

    def forward(self, s: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        return F.linear(s, self.W.T)


class _CodaInput(Mechanism):
    name = "linear_before_coda"
    owners = ("coda_in",)
    settings = (
        Setting(
            "linear_before_coda",
            bool,
            False,
            "The state goes through a linear map between core and coda (Parcae).",
        ),
    )

    def check(self, cfg: Config) -> None:
        if cfg.linear_before_coda and not cfg.n_coda:
            raise ConfigError("linear_before_coda needs n_coda of at least 1")

    def phrases(self, cfg: Config) -> dict[str, str]:
        return {"coda": "W"}

    def weights(self, cfg: Config) -> Tensors:
        return {"coda_in.W": matrix(cfg.d_model, cfg.d_model)}

    def modules(self, cfg: Config, device: Any) -> dict[str, nn.Module]:
        return {"coda_in": CodaInput(cfg, device)}


CODA_INPUT = _CodaInput()
