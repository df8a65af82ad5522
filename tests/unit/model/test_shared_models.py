"""One model in several hands: threads, interrupts, nested and crossed contexts."""

import random
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.testing import assert_close

from tests.models import tiny_model, tiny_tokens

COUNTS = (1, 2, 3, 5, 7)


def consistent(model, expected, tokens):
    """The model is whole: names, blocks, layout and numbers belong together."""
    assert len(model.blocks) == model.cfg.n_layers == model.layout.n_layers
    assert len(model.iter) == model.cfg.n_iterations
    for name, point in model.hook_dict.items():
        assert point.name == name
    assert f"blocks.{model.cfg.n_layers - 1}.hook_resid_post" in model.hook_dict
    assert f"blocks.{model.cfg.n_layers}.hook_resid_post" not in model.hook_dict
    assert torch.equal(model(tokens), expected)


@pytest.mark.parametrize("name", ["huginn", "ouro", "hrm_text"])
def test_threads_with_their_own_iterations_get_their_own_numbers(name):
    model, tokens = tiny_model(name), tiny_tokens()
    cycle = len(model.cfg.stacks or (0,))
    counts = [n * cycle for n in COUNTS]
    with torch.no_grad():
        alone = {n: model(tokens, n_iterations=n) for n in counts}
        asked = [counts[i % len(counts)] for i in range(40)]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda n: model(tokens, n_iterations=n), asked))
    for n, logits in zip(asked, found, strict=True):
        assert torch.equal(logits, alone[n])


def test_a_call_with_other_iterations_leaves_the_model_untouched():
    model, tokens = tiny_model("huginn"), tiny_tokens()
    blocks, names, n = model.blocks, list(model.hook_dict), model.cfg.n_iterations
    seen = []

    def look(value, hook):
        seen.append((hook.name, len(model.blocks), model.cfg.n_iterations))

    last = model.cfg.n_prelude + 6 * model.cfg.n_core + model.cfg.n_coda - 1
    model.run_with_hooks(
        tokens, n_iterations=6, fwd_hooks=[(f"blocks.{last}.hook_resid_post", look)]
    )
    assert seen == [(f"blocks.{last}.hook_resid_post", len(blocks), n)]
    assert model.blocks is blocks and list(model.hook_dict) == names
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_hooks_of_the_model_act_in_a_call_with_other_iterations():
    model, tokens = tiny_model("huginn"), tiny_tokens()
    names = []

    def double(value, hook):
        names.append(hook.name)
        return 2 * value

    with torch.no_grad():
        model.add_hook("coda.0.hook_mlp_out", double)
        model.add_hook("iter.0.0.hook_mlp_out", double)
        called = model(tokens, n_iterations=6)
        seen = list(names)
        with model.iterations(6):
            inside = model(tokens)
            coda = model.layout.coda_start
    assert torch.equal(called, inside)
    assert seen == [f"blocks.{model.cfg.n_prelude}.hook_mlp_out", f"blocks.{coda}.hook_mlp_out"]


class _Stop(BaseException):
    pass


@pytest.mark.parametrize("how", ["context", "call", "hooks", "in place"])
def test_an_interrupt_at_any_moment_leaves_the_model_whole(how):
    model, tokens = tiny_model("huginn"), tiny_tokens()
    rng, n_before = random.Random(0), model.cfg.n_iterations

    def nothing(value, hook):
        return None

    def context():
        with model.iterations(6):
            model(tokens)

    def in_place():
        model.set_iterations(6)

    run = {
        "context": context,
        "call": lambda: model(tokens, n_iterations=6),
        "hooks": lambda: model.run_with_hooks(
            tokens, n_iterations=6, fwd_hooks=[("iter.5.0.hook_resid_pre", nothing)]
        ),
        "in place": in_place,
    }[how]

    def stop(number, frame):
        raise _Stop

    before = signal.signal(signal.SIGALRM, stop)
    try:
        with torch.no_grad():
            expected = model(tokens)
            after = model(tokens, n_iterations=6)
            for _ in range(60):
                try:
                    signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-4, 3e-2))
                    run()
                    signal.setitimer(signal.ITIMER_REAL, 0)
                except _Stop:
                    pass
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                if how == "in place":
                    n = model.cfg.n_iterations
                    consistent(model, after if n == 6 else expected, tokens)
                    model.set_iterations(n_before)
                else:
                    consistent(model, expected, tokens)
    finally:
        signal.signal(signal.SIGALRM, before)


def test_contexts_that_end_in_another_order_take_back_their_own_change():
    model, tokens = tiny_model("huginn"), tiny_tokens()
    n = model.cfg.n_iterations
    with torch.no_grad():
        expected = model(tokens)
        first, second = model.iterations(2), model.iterations(6)
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert model.cfg.n_iterations == 6
        second.__exit__(None, None, None)
    assert model.cfg.n_iterations == n
    consistent(model, expected, tokens)


def test_an_impossible_number_changes_nothing():
    model, tokens = tiny_model("learned_steps"), tiny_tokens()
    with torch.no_grad():
        expected = model(tokens)
        for bad in (10**9, 0, -1, 2.5, "4", True, None):
            with pytest.raises((ValueError, TypeError)):
                model.set_iterations(bad)
            consistent(model, expected, tokens)


def test_whole_numbers_of_any_type_are_iterations():
    import numpy as np

    model, tokens = tiny_model("huginn"), tiny_tokens()
    with torch.no_grad():
        for three in (np.int64(3), np.uint8(3), torch.tensor(3)):  # SupportsIndex
            assert torch.equal(model(tokens, n_iterations=three), model(tokens, n_iterations=3))


def test_threads_while_one_has_hooks():
    model, tokens = tiny_model("ouro"), tiny_tokens()
    with torch.no_grad():
        expected = model(tokens, n_iterations=2)
    results = []

    def work():
        with torch.no_grad():
            results.extend(model(tokens, n_iterations=2) for _ in range(10))

    thread = threading.Thread(target=work)
    thread.start()
    with torch.no_grad():
        for _ in range(10):
            model.run_with_cache(tokens, n_iterations=3)
    thread.join()
    for logits in results:
        assert_close(logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
