"""Which mechanisms do not go together, from what each says of itself."""

from collections.abc import Sequence

from tl_loops.errors import ConfigError
from tl_loops.mechanisms import MECHANISMS
from tl_loops.mechanisms.kv_sharing import KVSharing
from tl_loops.mechanisms.mechanism import Config, Mechanism


def refuse_exclusive(cfg: Config, active: Sequence[Mechanism]) -> None:
    """Raise on two active mechanisms that decide the same thing.

    Raises:
        ConfigError: There are two; the message says what both decide.
    """
    deciding: dict[str, Mechanism] = {}
    for mechanism in active:
        for what, sentence in mechanism.decides(cfg).items():
            other = deciding.setdefault(what, mechanism)
            if other is not mechanism:
                rivals = [m.name for m in MECHANISMS if what in m.decides(cfg) and m != mechanism]
                said = mechanism.said(cfg)
                raise ConfigError(
                    f"{other.said(cfg)} and {said} exclude each other: {sentence} "
                    f"({said} exclude {' and '.join(rivals)})"
                )


def check_stacks(cfg: Config, active: Sequence[Mechanism]) -> None:
    """Raise on mechanisms that do not work with two stacks.

    Raises:
        ConfigError: There are two stacks and such a mechanism.
    """
    for mechanism in active if cfg.stacks is not None else ():
        if not mechanism.with_stacks:
            raise ConfigError(f"{mechanism.name} is not supported with stacks")


def check_shared_keys(cfg: Config, sharing: KVSharing | None) -> None:
    """Raise on shared keys where iterations do not run the same layers on the same tokens.

    Args:
        cfg: Of a model.
        sharing: How its iterations share keys and values, in a call.

    Raises:
        ConfigError: There are several loops, a mechanism has keys of its own, or the blocks are
            TransformerLens's.
    """
    if sharing is not None and cfg.own_keys is not None:
        raise ConfigError(f"kv_sharing='{sharing}' is {cfg.own_keys}")
