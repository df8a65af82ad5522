"""Training on tasks: targets by position and iteration, curricula, looks, exact resume."""

import json
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F

from tests.closeness import assert_close
from tests.unit.training.small import counting_corpus, settings, small_model
from tl_loops import CheckpointError, LoopedSemanticsError
from tl_loops.training import (
    UNTRAINED,
    ConstantIterations,
    Corpus,
    NotFiniteError,
    TrainingBatch,
    UniformIterations,
    evaluate_batches,
    step_losses,
    target_losses,
    train,
    training_pass,
)

N_PEOPLE = 5


@dataclass
class Hops:
    """``x0 p0 ... p4``: after iteration t the last position is to say where t + 1 hops lead."""

    n_hops: int = 3
    iterations: int | None = None

    def draw(self, n, generator):
        leads = torch.stack([torch.randperm(N_PEOPLE, generator=generator) for _ in range(n)])
        at = torch.randint(N_PEOPLE, (n, 1), generator=generator)
        tokens = torch.cat([leads, at], 1)
        targets = torch.full((self.n_hops, *tokens.shape), UNTRAINED)
        for t in range(self.n_hops):
            at = leads.gather(1, at)
            targets[t, :, -1:] = at
        return TrainingBatch(tokens, targets, self.iterations)

    def identity(self):
        return {"task": "hops", "n_hops": self.n_hops}


def task_settings(**changes):
    return settings(n_context=None, **changes)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(weights(a), weights(b), strict=True))


def by_hand(logits, targets):
    """Cross entropy at the trained positions of one exit."""
    wanted = targets != UNTRAINED
    return F.cross_entropy(logits[wanted], targets[wanted])


# --- batches


def test_targets_hold_past_the_last_row():
    batch = Hops(2).draw(3, generator())
    assert torch.equal(batch.after(0), batch.targets[0])
    assert all(torch.equal(batch.after(t), batch.targets[1]) for t in (1, 2, 50))
    flat = TrainingBatch(batch.tokens, batch.targets[0])
    assert torch.equal(flat.after(7), flat.targets)


def test_a_corpus_predicts_the_next_tokens():
    data = Corpus(counting_corpus(), 12)
    batch = data.draw(2, generator())
    assert batch.targets[:, :-1].tolist() == batch.tokens[:, 1:].tolist()
    assert (batch.targets[:, -1] == UNTRAINED).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(targets=torch.zeros(1, 1, 2, 4).long()), r"must be .*, got \[1, 1, 2, 4\]"),
        (dict(targets=torch.full((2, 4), UNTRAINED)), "no position is trained"),
        (dict(n_iterations=0), "n_iterations must be at least 1"),
        (dict(n_gradient=0), "n_gradient must be at least 1"),
    ],
)
def test_batches_are_checked(fields, message):
    plain = dict(tokens=torch.zeros(2, 4).long(), targets=torch.zeros(2, 4).long())
    with pytest.raises(ValueError, match=message):
        TrainingBatch(**{**plain, **fields})
    with pytest.raises(ValueError, match="no position is trained"):
        TrainingBatch.next_tokens(torch.zeros(2, 1).long())


# --- losses


@pytest.mark.parametrize("n_gradient", [None, 2])
def test_the_losses_are_cross_entropies_of_each_exits_targets(n_gradient):
    model, batch = small_model(), Hops().draw(4, generator())
    run = training_pass(model, batch.tokens, 3, n_gradient)
    exits = [by_hand(model(batch.tokens, n_iterations=t + 1), batch.targets[t]) for t in range(3)]
    for exit_loss, expected in (
        ("last", exits[2]),
        ("mean", sum(exits[run.first :]) / len(run.states)),
    ):
        of = task_settings(exit_loss=exit_loss, n_gradient=n_gradient)
        found = step_losses(model, batch.tokens, run, of, targets=batch.targets)["loss"]
        assert_close(found.detach(), expected.detach())


def test_the_expected_loss_weighs_the_exits_at_the_trained_positions():
    shape = dict(injection=None, initial_state="embed", norm_between_iterations=True)
    model, batch = small_model(exit_gate=True, **shape), Hops().draw(4, generator())
    run = training_pass(model, batch.tokens, 3)
    halt = torch.stack(run.gates)[:, :, -1, 0].sigmoid()
    leaving = torch.stack([halt[0], (1 - halt[0]) * halt[1], (1 - halt[0]) * (1 - halt[1])])
    losses = torch.stack(
        [
            F.cross_entropy(
                model(batch.tokens, n_iterations=t + 1)[:, -1],
                batch.targets[t, :, -1],
                reduction="none",
            )
            for t in range(3)
        ]
    )
    expected = ((leaving * losses).sum(0) + 0.1 * (leaving * leaving.log()).sum(0)).mean()
    of = task_settings(exit_loss="expected", entropy_weight=0.1)
    found = step_losses(model, batch.tokens, run, of, targets=batch.targets)["loss"]
    assert_close(found.detach(), expected.detach())
    shifted = batch.targets.roll(1, -1)[2:]
    mixed = torch.cat([batch.targets[:2], shifted])
    with pytest.raises(ValueError, match="iteration 2 are at other positions"):
        step_losses(model, batch.tokens, run, of, targets=mixed)


def test_exits_without_a_target_are_left_out_of_the_mean():
    model, batch = small_model(), Hops().draw(4, generator())
    run = training_pass(model, batch.tokens, 3)
    targets = batch.targets.clone()
    targets[0] = UNTRAINED
    found = step_losses(model, batch.tokens, run, task_settings(exit_loss="mean"), targets=targets)
    exits = [by_hand(model(batch.tokens, n_iterations=t + 1), targets[t]) for t in (1, 2)]
    assert_close(found["loss"].detach(), (sum(exits) / 2).detach())
    targets[1:], targets[0] = UNTRAINED, batch.targets[0]
    with pytest.raises(ValueError, match="exits after iteration 2"):
        step_losses(model, batch.tokens, run, task_settings(), targets=targets)
    cut = training_pass(model, batch.tokens, 3, n_gradient=2)
    with pytest.raises(ValueError, match="exits after iterations 1 to 2"):
        step_losses(model, batch.tokens, cut, task_settings(exit_loss="mean"), targets=targets)


def test_masked_positions_have_no_gradient():
    logits = torch.randn(3, 6, 9, generator=generator()).requires_grad_()
    targets = torch.randint(9, (3, 6), generator=generator())
    untrained = torch.rand(3, 6, generator=generator()) < 0.5
    target_losses(logits, targets.masked_fill(untrained, UNTRAINED)).sum().backward()
    has = logits.grad.abs().sum(-1) > 0
    assert torch.equal(has, ~untrained)
    with pytest.raises(IndexError, match=r"targets holds -1, but the logits are of 9 ids"):
        target_losses(logits, torch.full((3, 6), -1))


# --- runs


def test_a_tensor_a_corpus_and_targets_by_hand_give_the_same_weights():
    """What is said about next tokens is one thing: of three ways, bit for bit."""

    class ByHand:
        def draw(self, n, generator):
            tokens = Corpus(counting_corpus(), 12).draw(n, generator).tokens
            targets = F.pad(tokens[:, 1:], (0, 1), value=UNTRAINED)
            return TrainingBatch(tokens, targets[None])

        def identity(self):
            return {}

    models = [small_model(state_seed=None) for _ in range(3)]
    of = dict(exit_loss="mean", n_gradient=2, iterations=UniformIterations(1, 4))
    train(models[0], counting_corpus(), settings(**of), progress=False)
    train(models[1], Corpus(counting_corpus(), 12), task_settings(**of), progress=False)
    train(models[2], ByHand(), task_settings(**of), progress=False)
    assert same(models[0], models[1]) and same(models[0], models[2])


def test_it_learns_a_task_and_evaluates_it():
    model = small_model()
    log = train(
        model,
        Hops(1),
        task_settings(
            n_steps=100, batch_size=16, learning_rate=1e-2, iterations=ConstantIterations(1)
        ),
        evaluation=Hops(1),
        evaluate_every=50,
        evaluation_iterations=(1, 2),
        n_evaluation=40,
        progress=False,
    )
    frame = log.evaluation_frame()
    assert frame[["step", "n_iterations"]].values.tolist() == [[50, 1], [50, 2], [100, 1], [100, 2]]
    assert frame["accuracy"].iloc[2] > 0.7 > 0.3 > log.column("accuracy")[0]  # 0.2 by chance
    batches = [Hops(1).draw(16, generator())]
    found = evaluate_batches(model, batches, (2,))[2]
    logits = model(batches[0].tokens, n_iterations=2)[:, -1]
    answers = batches[0].targets[0, :, -1]
    assert found.accuracy == pytest.approx(float((logits.argmax(-1) == answers).float().mean()))
    assert found.loss == pytest.approx(F.cross_entropy(logits, answers).item(), rel=1e-5)


def test_evaluations_read_the_targets_of_their_iteration():
    model, batch = small_model(), Hops(2).draw(8, generator())
    for n, of in evaluate_batches(model, [batch], (1, 2, 4)).items():
        expected = by_hand(model(batch.tokens, n_iterations=n), batch.targets[min(n, 2) - 1])
        assert of.loss == pytest.approx(expected.item(), rel=1e-5)
    with pytest.raises(ValueError, match="batches is empty"):
        evaluate_batches(model, [])


def test_a_batch_says_how_it_is_run():
    log = train(small_model(), Hops(iterations=4), task_settings(n_steps=2), progress=False)
    assert log.column("n_iterations") == [4, 4]
    with pytest.raises(LoopedSemanticsError, match="exit_gate=True"):
        train(small_model(), Hops(), task_settings(exit_loss="expected"), progress=False)


def test_memory_does_not_grow_with_the_iterations_without_gradient():
    """Bytes that the graph keeps: as many after 40 iterations as after 6."""
    model, batch = small_model(), Hops().draw(4, generator())

    def kept(n):
        found = []
        with (
            model.iterations(n),
            torch.autograd.graph.saved_tensors_hooks(
                lambda tensor: found.append(tensor.nbytes) or tensor, lambda tensor: tensor
            ),
        ):
            run = training_pass(model, batch.tokens, n, 4)
            step_losses(
                model, batch.tokens, run, task_settings(exit_loss="mean"), targets=batch.targets
            )
        return sum(found), len(run.states), len(run.entering)

    assert kept(6) == kept(40)


# --- curricula, looks and resume


@dataclass
class Curriculum:
    """One more hop after every two steps with an answer that is right."""

    hops: int = 1
    heard: list = field(default_factory=list)

    def draw(self, n, generator):
        return Hops(self.hops).draw(n, generator)

    def identity(self):
        return {"task": "curriculum"}

    def after_step(self, batch, right):
        assert right.shape == batch.tokens.shape and not right[:, :-1].any()
        self.heard.append(int(right.sum()))
        self.hops += len(self.heard) % 2 == 0

    def state(self):
        return {"hops": self.hops, "heard": self.heard}

    def load_state(self, state):
        self.hops, self.heard = state["hops"], list(state["heard"])


def looked(n_done):
    return {"step": n_done, "drawn": torch.rand(()).item()} if n_done % 2 else None


@pytest.mark.parametrize("stopped_after", [1, 3, 4])
def test_a_resumed_task_has_the_same_weights_log_and_state(tmp_path, stopped_after):
    of = task_settings(n_steps=5, n_gradient=2, exit_loss="mean", state_radius=0.4)
    more = dict(
        evaluation=Hops(),
        evaluate_every=2,
        evaluation_iterations=(1, 2),
        look=looked,
        progress=False,
    )
    whole, data = small_model(state_seed=None), Curriculum()
    log = train(whole, data, of, **more)
    more |= dict(checkpoint=tmp_path / "run.ckpt", checkpoint_every=1)
    if stopped_after == 4:  # by an error in the middle of the fifth step
        with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
            after = Curriculum.after_step

            def interrupted(self, batch, right):
                if len(self.heard) == 4:
                    raise KeyboardInterrupt
                after(self, batch, right)

            patch.setattr(Curriculum, "after_step", interrupted)
            train(small_model(state_seed=None), Curriculum(), of, **more)
    else:
        train(small_model(state_seed=None), Curriculum(), of, stop_after=stopped_after, **more)
    again, resumed = small_model(state_seed=None), Curriculum()
    found = train(again, resumed, of, **more)
    assert same(again, whole)
    assert resumed == data and data.hops == 3
    assert found.column("accuracy") == log.column("accuracy")
    assert found.looks == log.looks and [step for step, _ in log.looks] == [1, 3, 5]
    for name in ("evaluations", "accuracies"):  # a stopped run evaluates where it stops, too
        assert dict(getattr(log, name)).items() <= dict(getattr(found, name)).items()


def test_a_look_sees_a_model_at_rest():
    model, seen = small_model(state_seed=None), []

    def look(n_done):
        seen.append((model.training, torch.is_grad_enabled(), model.cfg.state_seed))
        return torch.ones(()) if n_done == 2 else None

    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with pytest.raises(TypeError, match="look gave Tensor after step 2"):
        train(model, Hops(), task_settings(), look=look, progress=False)
    assert seen == [(False, False, 0)] * 2
    assert torch.equal(torch.rand(2), expected) and model.cfg.state_seed is None


def test_data_that_cannot_go_on_are_refused_with_a_checkpoint(tmp_path):
    path = tmp_path / "run.ckpt"

    class Stream(Hops):
        """Its random numbers are its own."""

        own = torch.Generator().manual_seed(0)

        def draw(self, n, generator):
            return super().draw(n, self.own)

    class Forgetful(Hops):
        def after_step(self, batch, right):
            pass

    for data, message in (
        (Stream(), "take every random number from the generator"),
        (Forgetful(), r"has no state\(\) and load_state"),
    ):
        with pytest.raises(ValueError, match=message):
            train(small_model(), data, task_settings(), checkpoint=path, progress=False)
    assert not list(tmp_path.iterdir())
    train(small_model(), Stream(), task_settings(n_steps=1), progress=False)


def test_a_checkpoint_of_another_task_is_not_mixed_in(tmp_path):
    more = dict(checkpoint=tmp_path / "run.ckpt", progress=False)
    train(small_model(), Hops(2), task_settings(), **more)
    for data in (Hops(1), Curriculum()):
        with pytest.raises(CheckpointError, match="belongs to another run: data"):
            train(small_model(), data, task_settings(), **more)
    train(small_model(), Hops(2), task_settings(), **more)


def test_data_must_give_what_the_model_can_read():
    class Wrong(Hops):
        change: staticmethod

        def draw(self, n, generator):
            return self.change(super().draw(n, generator))

    def changed(change):
        data = Wrong()
        data.change = change
        return data

    for change, error, message in (
        (lambda b: (b.tokens, b.targets), TypeError, "must give a TrainingBatch, got tuple"),
        (lambda b: TrainingBatch(b.tokens + 60, b.targets), ValueError, "drew tokens with 6"),
        (
            lambda b: TrainingBatch(b.tokens, b.targets.clamp(max=-1)),
            ValueError,
            "drew targets with -1, .* UNTRAINED",
        ),
        (
            lambda b: TrainingBatch.next_tokens(b.tokens.repeat(1, 20)),
            ValueError,
            r"drew 120 positions, above the model's cfg\.n_ctx=64",
        ),
    ):
        model = small_model()
        before = weights(model)
        with pytest.raises(error, match=message):
            train(model, changed(change), task_settings(), progress=False)
        assert all(torch.equal(p, q) for p, q in zip(weights(model), before, strict=True))
    with pytest.raises(ValueError, match=r"settings\.n_context=12 says how a line of tokens"):
        train(small_model(), Hops(), settings(), progress=False)
    with pytest.raises(ValueError, match=r"data is a line of tokens.*give TrainingData"):
        train(small_model(), counting_corpus(), task_settings(), progress=False)
    with pytest.raises(ValueError, match="or a TrainingData, got"):
        train(small_model(), object(), task_settings(), progress=False)


def test_a_loss_of_a_task_that_is_nan_leaves_the_weights():
    model = small_model()
    with torch.no_grad():
        model.unembed.W_U[:] = float("inf")
    before = weights(model)
    with pytest.raises(NotFiniteError, match="step 1 of 4 is not finite"):
        train(model, Hops(), task_settings(state_radius=0.5), progress=False)
    assert all(torch.equal(p, q) for p, q in zip(weights(model), before, strict=True))


def test_a_log_holds_what_json_holds():
    log = train(
        small_model(),
        Hops(),
        task_settings(n_steps=1),
        look=lambda n: (n, {1: 2.5}),
        progress=False,
    )
    assert log.looks == [(1, [1, {"1": 2.5}])] and json.dumps(log.looks)
