"""Looping a feedforward model: repeat some of its blocks, over the weights that it has."""

from collections.abc import Mapping, Sequence
from typing import Any

from tl_loops.arguments import checked
from tl_loops.config.ranges import check_depth
from tl_loops.errors import ConfigError, LoopedSemanticsError
from tl_loops.layout.layout import LoopLayout
from tl_loops.layout.segments import Segment
from tl_loops.model.bridged.unrolled import UnrolledBridge
from tl_loops.model.looped import LoopedTransformer
from tl_loops.model.repeated.over_bridge import bridge_to_loop, loop_over_bridge
from tl_loops.model.repeated.over_own_blocks import loop_over_own_blocks
from tl_loops.model.repeated.transformer import RepeatedTransformer
from tl_loops.upstream import HAS_HOOKED_TRANSFORMER, HookedTransformer
from tl_loops.upstream.bridges import is_bridge


@checked
def loop(
    model: Any,
    start: int | None = None,
    stop: int | None = None,
    n_iterations: int | None = None,
    *,
    repeats: Mapping[int, int] | None = None,
    loops: Sequence[Sequence[int]] | None = None,
) -> RepeatedTransformer | LoopedTransformer:
    """A looped model that runs some blocks of a feedforward one several times.

    The result shares every weight with ``model``: Parameters are the same objects, so that nothing
    is copied, training one trains the other, and with one iteration every activation and logit is
    the original's, bit for bit. It has the hook names, aliases and ``layout`` of a looped model,
    and everything that takes one takes it. ``model`` itself stays as it is.

    Say what repeats in one of three ways:

        loop(model, 7, 11, 4)                       # blocks 7 to 10 as one loop, four times
        loop(model, repeats={5: 2, 6: 3})           # block 5 twice, then block 6 three times
        loop(model, loops=[(2, 4, 3), (6, 8, 2)])   # two loops, with blocks 4 and 5 in between

    The first is Encode-Think-Decode (2510.07358) and other loops without training. It gives a
    layout of one loop, and ``set_iterations`` changes its number of iterations. The others give
    one of several loops (:meth:`LoopLayout.of_segments`), whose coordinates name the loop
    (``"A"``, ``"B"``, ...).

    Of a bridge the Hugging Face model stays what runs: its layers are called again, and each pass
    has the names of its iteration (:class:`tl_loops.UnrolledBridge`).

    Args:
        model: Any HookedTransformer, of any config. Or a TransformerBridge of a
            feedforward family (GPT-2, GPT-NeoX, Llama, Mistral, Qwen2, Qwen3, OLMo-2), or a
            LoopedTransformer of one iteration, such as a feedforward checkpoint. Not one that is
            looped already.
        start: First block that repeats.
        stop: The block after the last one that repeats.
        n_iterations: How often they run, at least 1.
        repeats: How often each of these blocks runs, alone, one run after the other.
        loops: Several ``(start, stop, n_iterations)``, in order, not overlapping.

    Returns:
        The looped model, in the original's training or evaluation mode.

    Raises:
        ConfigError: Blocks out of range, in the wrong order, overlapping or none; more than one way
            of saying what repeats.
        LoopedSemanticsError: A model that cannot be looped: none of these, looped already,
            spread over devices, or quantised to four bits; a bridge whose weights were processed;
            or a LoopedTransformer with more than its blocks between prelude and coda.
    """
    _check_model(model)
    bridged = bridge_to_loop(model) if is_bridge(model) else None
    depth = len(model.blocks)
    single = (start, stop, n_iterations)
    given = [any(x is not None for x in single), repeats is not None, loops is not None]
    if sum(given) != 1 or (given[0] and None in single):
        raise ConfigError(
            "say what repeats by start, stop and n_iterations, or by repeats={block: times}, or by "
            "loops=[(start, stop, n_iterations), ...]"
        )
    if repeats is not None:
        loops = [(layer, layer + 1, repeats[layer]) for layer in sorted(repeats, key=_whole)]
    segments = _filled([_segment(given, depth) for given in ([single] if loops is None else loops)])
    runs = sum(segment.n_layers * segment.n_iterations for segment in segments)
    n_coda = depth - segments[-1].stop
    check_depth(segments[0].start + runs + n_coda, "blocks of the loops times iterations")
    if loops is None:
        (one,) = segments
        layout = LoopLayout(one.start, one.n_layers, n_coda, one.n_iterations)
    else:
        layout = LoopLayout.of_segments(segments, n_coda)
    if bridged is not None:
        return loop_over_bridge(model, bridged, layout)
    if isinstance(model, LoopedTransformer):
        return loop_over_own_blocks(model, layout)
    return RepeatedTransformer(model, layout)


def _check_model(model: Any) -> None:
    """Raise for a model whose blocks cannot repeat, whichever these are.

    Raises:
        LoopedSemanticsError: It is one.
    """
    if isinstance(model, (RepeatedTransformer, UnrolledBridge)):
        original = "the original" if isinstance(model, RepeatedTransformer) else "model.bridge"
        raise LoopedSemanticsError(
            f"this model repeats blocks already: change its number of iterations with "
            f"model.set_iterations(n), or loop {original} with other arguments, which copies no "
            "weight"
        )
    if isinstance(model, LoopedTransformer) or is_bridge(model):
        return
    if hasattr(model, "layout"):
        raise LoopedSemanticsError(
            "this model is looped already: change its number of iterations with "
            "model.set_iterations(n)"
        )
    if not isinstance(model, HookedTransformer):
        instead = "load the model with HookedTransformer.from_pretrained"
        if not HAS_HOOKED_TRANSFORMER:
            instead = (
                "load the model with TransformerBridge.boot_transformers(name), or with "
                "LoopedTransformer.from_pretrained(name)"
            )
        raise LoopedSemanticsError(
            "loop() repeats the blocks of a HookedTransformer, a TransformerBridge, or a "
            f"LoopedTransformer of one iteration, got {type(model).__name__}: {instead}"
        )
    if model.cfg.n_devices != 1:
        raise LoopedSemanticsError(
            f"the model is spread over {model.cfg.n_devices} devices, but blocks that share "
            "weights share one device: load it with n_devices=1"
        )
    if model.cfg.load_in_4bit:
        raise LoopedSemanticsError(
            "weights quantised to four bits cannot be shared: load the model with load_in_4bit off"
        )


def _whole(number: Any) -> int:
    if isinstance(number, bool) or not isinstance(number, int):
        raise ConfigError(f"blocks and iterations are whole numbers, got {number!r}")
    return number


def _segment(given: Sequence[Any], depth: int) -> Segment:
    if len(given) != 3:
        raise ConfigError(f"a loop is (start, stop, n_iterations), got {tuple(given)!r}")
    start, stop, n_iterations = (_whole(number) for number in given)
    if not 0 <= start < stop <= depth:
        raise ConfigError(
            f"a loop over blocks {start} to {stop} (exclusive) needs 0 <= start < stop <= {depth}, "
            "the number of blocks"
        )
    if n_iterations < 1:
        raise ConfigError(f"a loop runs at least once, got n_iterations={n_iterations}")
    return Segment(start, stop, n_iterations)


def _filled(loops: list[Segment]) -> tuple[Segment, ...]:
    """The loops with the blocks between them, which run once."""
    if not loops:
        raise ConfigError("nothing repeats: name at least one loop")
    filled = loops[:1]
    for segment in loops[1:]:
        last = filled[-1].stop
        if segment.start < last:
            raise ConfigError(
                f"loops come in order and do not overlap, but one starts at block {segment.start} "
                f"before the one that ends at block {last}"
            )
        if segment.start > last:
            filled.append(Segment(last, segment.start))
        filled.append(segment)
    return tuple(filled)
