"""Training: it learns, goes on exactly after a kill, and says what went wrong."""

import math
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from tests.unit.training.small import counting_corpus, settings, small_model
from tl_loops import CheckpointError, LoopedSemanticsError
from tl_loops.training import (
    LogNormalPoissonIterations,
    NotFiniteError,
    TrainingSettings,
    UniformIterations,
    cut_contexts,
    draw_contexts,
    evaluate,
    token_losses,
    train,
)
from tl_loops.training.corpus import check_corpus
from tl_loops.writing import FileInUseError, in_use


def weights(model):
    return {name: p.detach().clone() for name, p in model.physical_named_parameters()}


def assert_same_weights(model, expected):
    for name, p in model.physical_named_parameters():
        assert torch.equal(p, expected[name]), name


CHANGING = dict(
    n_steps=6,
    iterations=LogNormalPoissonIterations(2.0, most=4),
    n_gradient=2,
    growth_weight=0.1,
    jacobian_weight=0.01,
)


def test_it_learns_and_the_log_tells():
    model = small_model(state_seed=None)
    corpus = counting_corpus()
    log = train(
        model,
        corpus,
        settings(n_steps=60, batch_size=4, learning_rate=5e-3, iterations=UniformIterations(1, 3)),
        evaluation=corpus[:60],
        evaluate_every=30,
        evaluation_iterations=(1, 3),
        progress=False,
    )
    assert log.column("loss")[-1] < 0.3 < 3.0 < log.column("loss")[0]
    assert [step for step, _ in log.evaluations] == [30, 60]
    assert log.evaluations[-1][1][3] < 0.3
    frame = log.to_frame()
    assert frame["step"].tolist() == list(range(1, 61))
    assert {1, 2, 3} == set(frame["n_iterations"])
    assert (frame["tokens_per_second"] > 0).all() and frame["growth"].isna().all()
    assert [len(row) for row in log.state_gradients] == frame["n_iterations"].tolist()
    assert all(norm > 0 for row in log.state_gradients for norm in row)
    assert log.evaluation_frame().shape == (4, 4)
    assert log.accuracies[-1][1][3] == log.column("accuracy")[-1] == 1.0
    with pytest.raises(ValueError, match="known: step"):
        log.column("perplexity")


def test_the_state_gradients_are_those_of_the_loss():
    """Also where the Jacobian's penalty differentiates on its own, with next to no weight."""
    plain = train(small_model(), counting_corpus(), settings(n_steps=1), progress=False)
    with_penalty = train(
        small_model(),
        counting_corpus(),
        settings(n_steps=1, jacobian_weight=1e-9),
        progress=False,
    )
    assert with_penalty.state_gradients[0] == pytest.approx(plain.state_gradients[0], rel=1e-4)


@pytest.mark.parametrize("stopped_after", [2, 3, 6])
def test_a_resumed_run_has_the_same_weights(tmp_path, stopped_after):
    """The run is stopped by an error in the middle of a later step, as a kill would stop it."""
    whole = small_model(state_seed=None)
    log = train(whole, counting_corpus(), settings(**CHANGING), progress=False)
    part = small_model(state_seed=None)
    path = tmp_path / "run.ckpt"
    options = dict(checkpoint=path, checkpoint_every=1, progress=False)
    if stopped_after < 6:
        draw = small_model(state_seed=None)
        with pytest.raises(KeyboardInterrupt):
            _interrupted(draw, counting_corpus(), settings(**CHANGING), stopped_after, options)
    else:
        train(part, counting_corpus(), settings(**CHANGING), **options)
    again = small_model(state_seed=None)
    resumed = train(again, counting_corpus(), settings(**CHANGING), **options)
    assert_same_weights(again, weights(whole))
    assert resumed.column("loss") == log.column("loss")
    assert resumed.column("n_iterations") == log.column("n_iterations")
    flat = [x for row in log.state_gradients for x in row]
    assert [x for row in resumed.state_gradients for x in row] == pytest.approx(flat, nan_ok=True)


def _interrupted(model, corpus, of, stopped_after, options):
    """Train until the number of iterations of step ``stopped_after`` is drawn."""
    drawn = 0
    draw = LogNormalPoissonIterations.draw

    def counted(self, generator):
        nonlocal drawn
        drawn += 1
        if drawn > stopped_after:
            raise KeyboardInterrupt
        return draw(self, generator)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LogNormalPoissonIterations, "draw", counted)
        train(model, corpus, of, **options)


@pytest.fixture
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_one_thread")
def test_a_killed_process_goes_on_to_the_same_weights(tmp_path):
    """SIGKILL of another process at some moment, then the same call here."""
    path, script = tmp_path / "run.ckpt", tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys
            import torch
            from tests.unit.training.small import counting_corpus, settings, small_model
            from tl_loops.training import train

            torch.set_num_threads(1)
            train(small_model(state_seed=None), counting_corpus(), settings(n_steps=40),
                  checkpoint=sys.argv[1], checkpoint_every=1, progress=False)
            """
        )
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.Popen([sys.executable, str(script), str(path)], env=environment)
    while not path.exists() and killed.poll() is None:
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, "it was done before it could be killed"
    resumed, whole = small_model(state_seed=None), small_model(state_seed=None)
    options = dict(checkpoint=path, progress=False)
    train(resumed, counting_corpus(), settings(n_steps=40), **options)
    train(whole, counting_corpus(), settings(n_steps=40), progress=False)
    assert_same_weights(resumed, weights(whole))


def test_a_checkpoint_of_another_run_is_not_mixed_in(tmp_path):
    path = tmp_path / "run.ckpt"
    train(small_model(), counting_corpus(), settings(), checkpoint=path, progress=False)
    other = small_model(seed=1)
    before = weights(other)
    for model, corpus, of in (
        (other, counting_corpus(), settings()),
        (small_model(), counting_corpus(599), settings()),
        (small_model(), counting_corpus(), settings(learning_rate=2e-3)),
    ):
        with pytest.raises(CheckpointError, match="belongs to another run"):
            train(model, corpus, of, checkpoint=path, progress=False)
    assert_same_weights(other, before)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        train(small_model(), counting_corpus(), settings(), checkpoint=path, progress=False)
    with in_use(path), pytest.raises(FileInUseError):
        train(small_model(), counting_corpus(), settings(), checkpoint=path, progress=False)


def test_the_random_state_and_the_mode_stay():
    model = small_model(state_seed=None).eval()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(model, counting_corpus(), settings(), evaluation=counting_corpus(30), progress=False)
    assert torch.equal(torch.rand(3), expected)
    assert not model.training and model.cfg.n_iterations == 3 and model.cfg.state_seed is None


def test_a_loss_that_is_nan_names_step_and_iteration():
    model = small_model()
    with torch.no_grad():
        model.blocks[1].mlp.W_out[:] = 1e38  # core block 0: infinite after its first pass
    before = weights(model)
    with pytest.raises(NotFiniteError, match=r"step 1 of 4 is not finite.*after iteration 0"):
        train(model, counting_corpus(), settings(), progress=False)
    with pytest.raises(NotFiniteError, match=r"not finite before iteration 2"):
        train(model, counting_corpus(), settings(n_gradient=1), progress=False)
    assert_same_weights(model, before)
    model = small_model()
    with torch.no_grad():
        model.unembed.W_U[:] = math.inf
    with pytest.raises(NotFiniteError, match="what follows the loop"):
        train(model, counting_corpus(), settings(), progress=False)


def test_a_corpus_must_hold_a_context_of_the_models_tokens():
    for corpus, message in (
        (counting_corpus(11), "has 11 tokens, fewer than one context of 12"),
        (counting_corpus(60, period=55), "holds token 54, but the model's vocabulary"),
        (counting_corpus(60) - 1, "holds token -1"),
    ):
        with pytest.raises(ValueError, match=message):
            train(small_model(), corpus, settings(), progress=False)
    for odd in (counting_corpus(60).view(5, 12), counting_corpus(60).float()):
        with pytest.raises(ValueError, match="in one line, an integer tensor"):
            check_corpus(odd, 12, 50)
    with pytest.raises(ValueError, match="evaluation has 5 tokens"):
        train(
            small_model(),
            counting_corpus(),
            settings(),
            evaluation=counting_corpus(5),
            progress=False,
        )
    with pytest.raises(ValueError, match=r"above the model's cfg\.n_ctx=64"):
        train(small_model(), counting_corpus(), settings(n_context=65), progress=False)


def test_a_corpus_of_one_context_is_enough():
    corpus = counting_corpus(12)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(draw_contexts(corpus, 3, 12, generator), corpus.expand(3, -1))
    assert draw_contexts(corpus, 1, 12, generator, first_token=9).tolist() == [[9, *corpus[:-1]]]


def test_contexts_are_cut_evenly():
    corpus = torch.arange(25)
    assert cut_contexts(corpus, 5)[:, 0].tolist() == [0, 5, 10, 15, 20]
    assert cut_contexts(corpus, 5, most=2)[:, 0].tolist() == [0, 10]
    assert cut_contexts(corpus, 6, first_token=99)[-1].tolist() == [99, 18, 19, 20, 21, 22]


def test_evaluation_is_the_models_own_loss():
    model, corpus = small_model(), counting_corpus(50)
    found = evaluate(model, corpus, 12, (1, 3), batch_size=3)
    contexts = cut_contexts(corpus, 12)
    for n, loss in found.items():
        own = model(contexts, return_type="loss", n_iterations=n).item()
        assert loss == pytest.approx(own, rel=1e-5)


def test_the_expected_loss_trains_the_gate():
    shape = dict(n_prelude=0, n_coda=0, injection=None, initial_state="embed")
    model = small_model(**shape, exit_gate=True, norm_between_iterations=True)
    gate = [name for name, _ in model.physical_named_parameters() if "gate" in name]
    before = weights(model)
    train(model, counting_corpus(), settings(exit_loss="expected"), progress=False)
    assert gate and all(
        not torch.equal(p, before[name])
        for name, p in model.physical_named_parameters()
        if name in gate
    )
    with pytest.raises(LoopedSemanticsError, match="exit_gate=True"):
        train(small_model(), counting_corpus(), settings(exit_loss="expected"), progress=False)


def test_the_mean_loss_is_the_mean_over_exits():
    model, corpus = small_model(), counting_corpus(12)
    tokens = corpus[None].expand(2, -1)
    expected = [token_losses(model(tokens, n_iterations=n), tokens).mean() for n in (1, 2, 3)]
    log = train(model, corpus, settings(n_steps=1, exit_loss="mean"), progress=False)
    assert log.column("loss")[0] == pytest.approx(float(sum(expected)) / 3, rel=1e-5)


def test_autocast_computes_in_bfloat16_and_keeps_the_weights():
    model = small_model()
    log = train(model, counting_corpus(), settings(autocast="bfloat16"), progress=False)
    plain = train(small_model(), counting_corpus(), settings(), progress=False)
    assert log.column("loss") != plain.column("loss")
    assert log.column("loss") == pytest.approx(plain.column("loss"), rel=0.02)
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_the_learning_rate_warms_up_and_decays():
    of = settings(n_steps=100, warmup_steps=10, decay=0.5, learning_rate=1.0)
    assert [of.learning_rate_at(s) for s in (0, 9, 49, 50, 75, 99)] == pytest.approx(
        [0.1, 1.0, 1.0, 1.0, 0.5, 0.02]
    )
    of = settings(n_steps=100, decay=1.0, decay_shape="cosine", learning_rate=1.0)
    assert of.learning_rate_at(50) == pytest.approx(0.5)
    assert settings(decay=0.0, learning_rate=2.0).learning_rate_at(3) == 2.0


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("n_steps", 0, "n_steps must be a number above 0"),
        ("learning_rate", math.nan, "learning_rate must be"),
        ("growth_weight", -1.0, "growth_weight must be a number at least 0"),
        ("n_context", 1, "at least 2"),
        ("n_gradient", 0, "n_gradient must be at least 1"),
        ("decay", 1.5, "share of the steps"),
        ("exit_loss", "lost", "did you mean last"),
        ("autocast", "bf16", "did you mean bfloat16"),
    ],
)
def test_settings_are_checked(field, value, message):
    fields = dict(n_steps=4, batch_size=2, n_context=12)
    with pytest.raises(ValueError, match=message):
        TrainingSettings(**{**fields, field: value})
    with pytest.raises(ValueError, match="leave n_gradient=2 out"):
        TrainingSettings(**fields, exit_loss="expected", n_gradient=2)
    number = TrainingSettings(**fields)
    object.__setattr__(number, "iterations", 4)  # past the type checks of the tests
    with pytest.raises(ValueError, match=r"for example ConstantIterations\(4\), got 4"):
        number.__post_init__()
