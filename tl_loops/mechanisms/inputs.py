"""What a model may take besides tokens of its vocabulary: a prefix mask, extra tokens."""

from tl_loops.errors import ConfigError
from tl_loops.mechanisms.mechanism import Config, Mechanism, Setting
from tl_loops.mechanisms.tensors import PhysicalTensor, Tensors


class _PrefixMask(Mechanism):
    name = "prefix_mask"
    settings = (
        Setting(
            "prefix_mask",
            bool,
            False,
            "The forward pass takes ``prefix_mask``, whose positions see each other in both "
            "directions (HRM-Text).",
            of_the_weights=False,
        ),
    )

    def check(self, cfg: Config) -> None:
        if cfg.prefix_mask and cfg.attention_dir != "causal":
            raise ConfigError("prefix_mask needs attention_dir='causal'")

    def describe(self, cfg: Config) -> list[str]:
        return ["prefix   positions of prefix_mask see each other in both directions"]


class _ExtraTokens(Mechanism):
    name = "n_extra_tokens"
    settings = (
        Setting(
            "n_extra_tokens",
            int,
            0,
            "Embeddings after the vocabulary that no logit stands for, such as names of puzzles "
            "(HRM); the token after them is a row of zeros.",
            at_least=0,
        ),
        Setting(
            "extra_token_slices",
            int,
            1,
            "How many of them are stored as one row.",
            at_least=1,
            computes=False,
        ),
    )

    def check(self, cfg: Config) -> None:
        slices = cfg.extra_token_slices
        if cfg.n_extra_tokens < 0 or slices < 1 or cfg.n_extra_tokens % slices:
            raise ConfigError(
                f"n_extra_tokens={cfg.n_extra_tokens} must be a multiple of "
                f"extra_token_slices={slices}, and neither negative"
            )

    def describe(self, cfg: Config) -> list[str]:
        first = cfg.d_vocab
        last = first + cfg.n_extra_tokens - 1
        return [f"extra    tokens {first} to {last} have embeddings W_extra and no logits"]

    def weights(self, cfg: Config) -> Tensors:
        return {"embed.W_extra": PhysicalTensor((cfg.n_extra_tokens, cfg.d_model))}


PREFIX_MASK = _PrefixMask()
EXTRA_TOKENS = _ExtraTokens()
