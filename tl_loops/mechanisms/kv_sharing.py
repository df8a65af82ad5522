"""Which keys and values iterations share, as data."""

from dataclasses import dataclass

from tl_loops.errors import ConfigError
from tl_loops.mechanisms.mechanism import Config, Mechanism, Setting

_KINDS = {
    "latest": None,
    "shared": None,
    "ring": "a number of iterations",
    "anchor": "a number of iterations",
    "first": None,
    "window": "a number of tokens",
}
"""Kinds of sharing, and what the number after the colon is."""


@dataclass(frozen=True)
class KVSharing:
    """Which keys and values an iteration sees, written ``"latest"``, ``"ring:4"``, ``"window:64"``.

    Every layer of the core has slots, each of which holds keys and values of all tokens. Without
    sharing, iteration t writes and reads slot t. Prelude and coda are never shared.

    - ``"latest"``: as without, and tokens that ran fewer iterations than the present one show
      those of their latest (Huginn's ``latest-m4``). This is what lets one cache serve calls with
      different numbers of iterations; the other kinds do the same.
    - ``"ring:k"``: slot t mod k (Huginn's ``compress-s``, whose number counts blocks).
    - ``"anchor:k"``: the first k iterations have slots of their own, all later ones share one
      (Huginn's ``compress-anchor``, with k = 8).
    - ``"shared"``: one slot (nanochat; MELT, 2605.07721, keeps one slot, too, with a trained gate).
      ``"shared:g"`` writes g times the new plus 1 - g times the old keys and values, a fixed gate
      in the place of MELT's, whose equations were not released.
    - ``"first"``: all iterations read those of iteration 0 (recursive sharing of 2507.10524).
    - ``"window:W"``: an iteration after the first reads its own within the last W tokens (with the
      token itself), and those of iteration 0 beyond. IQuest-Coder's loop attends to both and mixes
      the results by a trained gate; here each key is seen once.

    In ``"latest"``, ``"ring"``, ``"anchor"`` and ``"shared"`` an iteration writes before it reads,
    so tokens of one call see each other as without sharing: the effect is on tokens that were
    cached by an earlier call. ``"first"``, ``"window"`` and ``"shared:g"`` act within a call, too.

    Attributes:
        kind: One of the names above.
        size: k or W.
        gate: g, above 0 and at most 1.
    """

    kind: str
    size: int | None = None
    gate: float = 1.0

    @classmethod
    def parse(cls, text: str | None) -> "KVSharing | None":
        """The sharing that a text names; ``None`` and ``"none"``: no sharing.

        Raises:
            ConfigError: The text names none.
        """
        if text in (None, "none"):
            return None
        kind, colon, number = str(text).partition(":")
        known = ", ".join(f"{name}:N" if number else name for name, number in _KINDS.items())
        if kind not in _KINDS:
            raise ConfigError(f"kv_sharing must be 'none' or one of {known}, got {text!r}")
        if kind == "shared" and colon:
            return cls(kind, gate=_gate(number, str(text)))
        needs = _KINDS[kind]
        if (needs is not None) != bool(colon) or (needs and not number.isdigit()):
            wanted = f"{kind}:N, N {needs}" if needs else f"{kind!r} without a number"
            raise ConfigError(f"kv_sharing={text!r}: expected {wanted}")
        if needs is None:
            return cls(kind)
        if int(number) < 1:
            raise ConfigError(f"kv_sharing={text!r}: the number must be at least 1")
        return cls(kind, int(number))

    @property
    def within_call(self) -> bool:
        """Whether it also acts among the tokens of one call."""
        return self.kind in ("first", "window") or self.gate != 1.0

    def slot(self, iteration: int) -> int:
        """The slot that an iteration writes and reads."""
        if self.kind in ("shared", "first"):
            return 0
        if self.kind == "ring":
            return iteration % (self.size or 1)
        return min(iteration, self.size or 1) if self.kind == "anchor" else iteration

    def __str__(self) -> str:
        if self.size is not None:
            return f"{self.kind}:{self.size}"
        return self.kind if self.gate == 1.0 else f"{self.kind}:{self.gate:g}"


def _gate(number: str, text: str) -> float:
    try:
        gate = float(number)
    except ValueError:
        gate = float("nan")
    if not 0.0 < gate <= 1.0:
        raise ConfigError(f"kv_sharing={text!r}: the gate must be above 0 and at most 1")
    return gate


class _KVSharing(Mechanism):
    name = "kv_sharing"
    settings = (
        Setting(
            "kv_sharing",
            str | None,
            None,
            "Which keys and values the iterations share; see :class:`tl_loops.KVSharing`. "
            "``None``: each has its own.",
            of_the_weights=False,
        ),
    )

    def check(self, cfg: Config) -> None:
        KVSharing.parse(cfg.kv_sharing)

    def describe(self, cfg: Config) -> list[str]:
        return [f"keys     and values are shared across iterations: {cfg.kv_sharing}"]

    def carries(self, cfg: Config) -> str:
        return "shared keys"


KV_SHARING = _KVSharing()
