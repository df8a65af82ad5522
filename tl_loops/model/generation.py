"""Sampling: decoding with one key-value slot for every unrolled block.

Cached decoding equals the uncached forward pass. TransformerLens's own loop starts after the
embedding with positions of its own making, which leaves out learned positions and hooks on the
embedding; so tokens go through ``forward`` here.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, SupportsIndex

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_loops.arguments import check_at_least, checked
from tl_loops.model.checks import key_value_sharing
from tl_loops.model.exits import SampledExits
from tl_loops.model.iterations import at_iterations
from tl_loops.model.start import read_text_or_tokens
from tl_loops.nn.kv_cache import SharedKeyValueCache
from tl_loops.upstream import (
    USE_DEFAULT_VALUE,
    KeyValueCache,
    LocallyOverridenDefaults,
    check_ids,
    check_length,
    check_mask,
    left_as_it_was,
    sample_logits,
)

_EVERY_STEP = ("exit_at", "exit_threshold", "weighted_exit", "kv_sharing", "prefix_mask")
"""Arguments of the forward pass that generation passes on."""


@partial(checked, integers_as_floats=False)
@left_as_it_was
@torch.no_grad()
def generate(
    self: Any,
    input: str | list[str] | Int[Tensor, "batch pos"] | Float[Tensor, "batch pos d_model"] = "",
    max_new_tokens: int = 10,
    stop_at_eos: bool = True,
    eos_token_id: int | Sequence[int] | None = None,
    do_sample: bool = True,
    top_k: int | None = None,
    top_p: float | None = None,
    temperature: float = 1.0,
    freq_penalty: float = 0.0,
    use_past_kv_cache: bool = True,
    prepend_bos: bool | None = USE_DEFAULT_VALUE,
    padding_side: str | None = USE_DEFAULT_VALUE,
    return_type: str | None = "input",
    verbose: bool = True,
    *,
    n_iterations: SupportsIndex | None = None,
    attention_mask: Int[Tensor, "batch pos"] | Bool[Tensor, "batch pos"] | None = None,
    return_exits: bool = False,
    **forward_kwargs: Any,
) -> str | list[str] | Tensor | tuple[Any, Tensor]:
    """Sample tokens until the end-of-sequence token or ``max_new_tokens``.

    Args:
        self: The looped model.
        input: Text, several texts (padded on the left), tokens, or embeddings.
        max_new_tokens: Number of tokens at most.
        stop_at_eos: Whether a sequence ends with ``eos_token_id``; it is then padded with it.
        eos_token_id: One or several ids; ``None``: the tokenizer's.
        do_sample: Sample, or take the most likely token.
        top_k: Sample among the k most likely tokens.
        top_p: Sample among the most likely tokens that hold this probability.
        temperature: Divides the logits.
        freq_penalty: Lowers the logits of tokens by their count so far.
        use_past_kv_cache: Keep keys and values, one slot an unrolled block.
        prepend_bos: Overrides ``cfg.default_prepend_bos`` for text.
        padding_side: Overrides the tokenizer's side for a single text.
        return_type: ``"input"`` (as the input), ``"str"``, ``"tokens"`` or ``"embeds"``.
        verbose: Show a progress bar.
        n_iterations: Number of iterations for this call.
        attention_mask: 1 for tokens, 0 for padding, for token input.
        return_exits: Also return the iteration whose state each sampled token was read from.
        **forward_kwargs: Passed on to each forward pass, e.g. ``exit_threshold`` or
            ``kv_sharing``. A ``prefix_mask`` [batch, pos] is of the prompt.

    Returns:
        The input with what was sampled after it; with ``return_exits`` a pair of that and the
        exits [batch, sampled], counted from 0: by ``exit_at``, by ``exit_threshold``, else the last
        iteration; -1 for what pads a sequence that has ended.

    Raises:
        ValueError: An argument that does not fit; see the message.
        LoopedSemanticsError: ``return_exits`` where a token is read from several states.
    """
    if return_type not in ("input", "str", "tokens", "embeds"):
        raise ValueError(
            f"return_type must be 'input', 'str', 'tokens' or 'embeds', got {return_type!r}"
        )
    _check_forward_arguments(forward_kwargs)
    self = at_iterations(self, n_iterations)
    stops = _stop_tokens(self, eos_token_id) if stop_at_eos else []
    self.eval()
    with LocallyOverridenDefaults(self, prepend_bos=prepend_bos, padding_side=padding_side):
        prompt, attention_mask, kind = _prompt(self, input, attention_mask)
        exits = SampledExits(self, forward_kwargs) if return_exits else None
        steps = _decode(
            self,
            prompt,
            attention_mask,
            max_new_tokens,
            stops,
            use_past_kv_cache,
            verbose,
            forward_kwargs,
            exits,
            dict(
                do_sample=do_sample,
                top_k=top_k,
                top_p=top_p,
                temperature=temperature,
                freq_penalty=freq_penalty,
            ),
        )
        sampled = torch.stack(list(steps), dim=1)
        return_type = kind if return_type == "input" else return_type
        found = _returned(self, prompt, sampled, return_type)
        return found if exits is None else (found, torch.stack(exits.found, dim=1))


def _returned(model: Any, prompt: Tensor, sampled: Tensor, return_type: str | None) -> Any:
    """The prompt with what was sampled, as embeddings, tokens or text."""
    if return_type == "embeds":
        start = prompt if prompt.is_floating_point() else model.embed(prompt)
        return torch.cat([start, model.embed(sampled)], dim=1)
    tokens = sampled if prompt.is_floating_point() else torch.cat([prompt, sampled], 1)
    if return_type == "tokens":
        return tokens
    assert model.tokenizer is not None
    texts = [str(model.tokenizer.decode(row, skip_special_tokens=True)) for row in tokens]
    return texts[0] if len(texts) == 1 else texts


@checked
@torch.no_grad()
def generate_stream(
    self: Any,
    input: str | Int[Tensor, "batch pos"] = "",
    max_new_tokens: int = 10,
    max_tokens_per_yield: int = 25,
    stop_at_eos: bool = True,
    eos_token_id: int | Sequence[int] | None = None,
    do_sample: bool = True,
    top_k: int | None = None,
    top_p: float | None = None,
    temperature: float = 1.0,
    freq_penalty: float = 0.0,
    use_past_kv_cache: bool = True,
    prepend_bos: bool | None = USE_DEFAULT_VALUE,
    padding_side: str | None = USE_DEFAULT_VALUE,
    return_type: str | None = "input",
    verbose: bool = True,
    *,
    n_iterations: SupportsIndex | None = None,
    return_exits: bool = False,
    **forward_kwargs: Any,
) -> Iterator[Any]:
    """The tokens that :meth:`generate` gives, in pieces as they are sampled.

    Args:
        self: The looped model.
        input: Text, or tokens.
        max_new_tokens: As for :meth:`generate`.
        max_tokens_per_yield: A piece is given once it holds as many tokens; the first one
            begins with the prompt, whose tokens count.
        stop_at_eos: As for :meth:`generate`.
        eos_token_id: Likewise.
        do_sample: Likewise.
        top_k: Likewise.
        top_p: Likewise.
        temperature: Likewise.
        freq_penalty: Likewise.
        use_past_kv_cache: Likewise.
        prepend_bos: Likewise.
        padding_side: Likewise.
        return_type: Accepted for TransformerLens's sake; pieces are tokens, as there.
        verbose: Show a progress bar.
        n_iterations: As for :meth:`generate`.
        return_exits: As for :meth:`generate`.
        **forward_kwargs: As for :meth:`generate`.

    Yields:
        Tokens [batch, piece]; joined, they are what ``generate(return_type="tokens")`` gives. With
        ``return_exits`` pairs of these and of exits [batch, piece], -1 for the prompt's tokens.

    Raises:
        ValueError: An argument that does not fit; see the message.
    """
    if isinstance(input, Tensor) and input.is_floating_point():
        raise ValueError("generate_stream gives tokens: give text or tokens, or call generate")
    check_at_least(1, max_tokens_per_yield=max_tokens_per_yield)
    _check_forward_arguments(forward_kwargs)
    self = at_iterations(self, n_iterations)
    stops = _stop_tokens(self, eos_token_id) if stop_at_eos else []
    self.eval()
    with LocallyOverridenDefaults(self, prepend_bos=prepend_bos, padding_side=padding_side):
        prompt, mask, _ = _prompt(self, input, None)
    exits = SampledExits(self, forward_kwargs) if return_exits else None
    steps = _decode(
        self,
        prompt,
        mask,
        max_new_tokens,
        stops,
        use_past_kv_cache,
        verbose,
        forward_kwargs,
        exits,
        dict(
            do_sample=do_sample,
            top_k=top_k,
            top_p=top_p,
            temperature=temperature,
            freq_penalty=freq_penalty,
        ),
    )
    piece, left = prompt, torch.full_like(prompt, -1)
    for new in steps:
        piece = torch.cat([piece, new[:, None]], dim=1)
        if exits is not None:
            left = torch.cat([left, exits.found[-1][:, None]], dim=1)
        if piece.shape[1] >= max_tokens_per_yield:
            yield piece if exits is None else (piece, left)
            piece, left = piece[:, :0], left[:, :0]
    if piece.shape[1]:
        yield piece if exits is None else (piece, left)


def _stop_tokens(model: Any, eos_token_id: int | Sequence[int] | None) -> list[int]:
    given = eos_token_id is not None
    if not given and model.tokenizer is not None:
        eos_token_id = model.tokenizer.eos_token_id
    if eos_token_id is None:
        raise ValueError(
            "stop_at_eos=True needs eos_token_id, or a tokenizer that has one; "
            "or pass stop_at_eos=False"
        )
    stops = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    if given:
        check_ids("eos_token_id", stops, model.cfg.d_vocab_out, "the model can give")
    return stops


def _prompt(model: Any, input: Any, attention_mask: Tensor | None) -> tuple[Tensor, Tensor, str]:
    """Tokens or embeddings of the prompt, its mask, and what to return by default."""
    device = model.embed.W_E.device
    if isinstance(input, (str, list)):
        side = "left" if isinstance(input, list) and len(input) > 1 else USE_DEFAULT_VALUE
        read = read_text_or_tokens(model, input, side)
        mask = torch.ones_like(read.tokens) if read.mask is None else read.mask.long()
        return read.tokens, mask, "str"
    prompt = input.to(device)
    kind = "embeds" if prompt.is_floating_point() else "tokens"
    if prompt.ndim != (3 if kind == "embeds" else 2):
        raise ValueError(
            "input must be text, tokens [batch, pos] or embeddings [batch, pos, d_model], "
            f"got a tensor of shape {tuple(prompt.shape)}"
        )
    if attention_mask is not None:
        attention_mask = check_mask(attention_mask, prompt.shape[:2])
    elif kind == "tokens":
        attention_mask = read_text_or_tokens(model, prompt).mask
    if attention_mask is None:
        attention_mask = torch.ones(prompt.shape[:2], dtype=torch.int, device=device)
    return prompt, attention_mask.to(device).int(), kind


def _decode(
    model: Any,
    prompt: Tensor,
    mask: Tensor,
    max_new_tokens: int,
    stops: list[int],
    use_cache: bool,
    verbose: bool,
    forward_kwargs: dict[str, Any],
    exits: SampledExits | None,
    sampling: dict[str, Any],
) -> Iterator[Int[Tensor, "batch"]]:
    """Sample step by step; gives the new tokens of every step."""
    batch, device = prompt.shape[0], prompt.device
    check_at_least(1, max_new_tokens=max_new_tokens, top_k=sampling["top_k"])
    # The last token is only given, not run.
    check_length(model.cfg, max_new_tokens - 1, prompt.shape[1])
    sharing = forward_kwargs.get("kv_sharing")
    past = model.make_kv_cache(batch, sharing) if use_cache else None
    finished = torch.zeros(batch, dtype=torch.bool, device=device)
    given = prompt if not prompt.is_floating_point() else prompt.new_zeros(batch, 0).long()
    do_sample, penalty = sampling.pop("do_sample"), sampling.pop("freq_penalty")
    temperature = sampling.pop("temperature")
    sampled = given[:, :0]
    step, step_mask = prompt, mask
    prefix = forward_kwargs.pop("prefix_mask", None)
    for _ in tqdm(range(max_new_tokens), disable=not verbose):
        start = 0 if step.is_floating_point() else None
        if start == 0 and past is not None:
            step_mask = past.append_attention_mask(step_mask)
        with nullcontext() if exits is None else exits.watching():
            logits = model.forward(
                step,
                start_at_layer=start,
                attention_mask=step_mask,
                past_kv_cache=past,
                **(forward_kwargs if prefix is None else {**forward_kwargs, "prefix_mask": prefix}),
            )[:, -1]
        if exits is not None:
            exits.note(finished)
        if do_sample:
            seen = torch.cat([given, sampled], 1)
            logits = _less_frequent(logits, seen, mask[:, -seen.shape[1] :], penalty, temperature)
            new = sample_logits(logits, temperature=temperature, **sampling)
        else:
            new = logits.argmax(-1)
        new = new.to(device)
        if stops:
            new = torch.where(finished, stops[0], new)
            finished |= torch.isin(new, torch.tensor(stops, device=device))
        yield new
        sampled = torch.cat([sampled, new[:, None]], dim=1)
        if bool(finished.all()):
            break
        mask = torch.cat([mask, mask.new_ones(batch, 1)], dim=1)
        if prefix is not None:  # What is sampled is not part of the prefix.
            prefix = None if past is not None else F.pad(prefix, (0, 1))
        if past is not None:
            step, step_mask = new[:, None], mask.new_ones(batch, 1)
        elif prompt.is_floating_point():
            step, step_mask = torch.cat([prompt, model.embed(sampled)], 1), mask
        else:
            step, step_mask = torch.cat([prompt, sampled], 1), mask


def _less_frequent(
    logits: Float[Tensor, "batch d_vocab"],
    tokens: Int[Tensor, "batch pos"],
    mask: Tensor,
    penalty: float,
    temperature: float,
) -> Float[Tensor, "batch d_vocab"]:
    """Logits minus the penalty for each time that a token occurs; padding is no token.

    As TransformerLens does it, the penalty is of the logits after their division by temperature.
    """
    if not penalty or not tokens.shape[1]:
        return logits
    counts = torch.zeros_like(logits).scatter_add_(1, tokens, mask.to(logits))
    return logits - temperature * penalty * counts


def _check_forward_arguments(given: Mapping[str, Any]) -> None:
    """Raise for arguments of the forward pass that have no meaning step by step.

    Raises:
        ValueError: There is one.
    """
    for name in given:
        if name not in _EVERY_STEP:
            raise ValueError(
                f"generate() cannot pass {name!r} to every step; it takes "
                f"{', '.join(_EVERY_STEP)}. A state before iteration 0 follows from the config "
                "(initial_state, state_seed), or edit hook_initial_state with a hook"
            )


@checked
def make_kv_cache(self: Any, batch: int = 1, kv_sharing: str | None = None) -> KeyValueCache:
    """An empty key-value cache for ``past_kv_cache``.

    Args:
        self: The looped model.
        batch: Number of texts.
        kv_sharing: Which keys and values the iterations share; ``None``: ``cfg.kv_sharing``;
            ``"none"``: each block has its own.

    Raises:
        ConfigError: ``kv_sharing`` names no sharing, or the model routes its tokens or has two
            stacks.
    """
    sharing = key_value_sharing(self, kv_sharing, None)
    device = self.embed.W_E.device
    if sharing is None:
        return KeyValueCache.init_cache(self.cfg, device, batch)
    cache = SharedKeyValueCache(self.cfg, sharing, device, batch)
    cache.unroll(self.layout)
    return cache
