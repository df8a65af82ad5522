"""Names for what public functions take where each checks it itself, with messages of its own.

Readers and type checkers see what is taken; at run time the names say nothing, but for prompts,
which are several.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor
from transformer_lens import ActivationCache

if TYPE_CHECKING:
    TextOrTokens: TypeAlias = str | Sequence[str] | Tensor
    Prompts: TypeAlias = Iterable[str | Sequence[int] | Tensor]
    Cache: TypeAlias = ActivationCache | Mapping[str, Tensor]
    PromptsShown: TypeAlias = int | str | Sequence[Any] | Tensor
else:
    TextOrTokens = Cache = PromptsShown = Any
    Prompts = Iterable[Any]
