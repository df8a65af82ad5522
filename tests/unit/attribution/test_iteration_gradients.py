"""Gradients by iteration: they sum to the plain gradient, and each is that of its iteration."""

import pytest
import torch
from torch import nn

import tl_loops
from tests.feedforward import only_before_4, plain_model
from tests.models import ARCHITECTURES, MECHANISMS, STACKS, tiny_model, tiny_tokens
from tl_loops.attribution import iteration_gradients, split_weights, step_influence
from tl_loops.errors import NoLoopError

TOKENS = tiny_tokens()
ALL = [*ARCHITECTURES, *MECHANISMS, *STACKS]


def metric(logits):
    return logits[:, -1].double().square().mean() + logits[:, 2, :7].double().mean()


def plain_gradients(model, value):
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    return {id(p): g for p, g in zip(parameters.values(), found, strict=True)}


def close(found, expected, tolerance=1e-5):
    assert bool(expected.isfinite().all())
    assert float((found - expected).norm()) <= tolerance * float(expected.norm()) + 1e-12


@pytest.mark.parametrize("name", ALL)
def test_the_sum_is_the_plain_gradient(name):
    model = tiny_model(name)
    expected = plain_gradients(model, metric(model(TOKENS)))
    before = dict(model.named_parameters())
    with split_weights(model, "all") as uses:
        found = uses.gradients(metric(model(TOKENS)))
        parameters = {name: uses._originals[name] for name in uses.names}
    assert dict(model.named_parameters()) == before  # the very same objects are back
    assert all(p.grad is None for p in model.parameters())
    for weight, total in found.total().items():
        plain = expected[id(parameters[weight])]
        close(total, torch.zeros_like(total) if plain is None else plain)
    core = [weight for weight in found.names if weight.startswith("core")]
    assert core and not set(core) & set(found.outside)


@pytest.mark.parametrize("name", ["retrofitted", "ouro", "parcae", "act", "recursions", "hrm_text"])
def test_each_part_is_that_of_untied_weights(name):
    """Give every unrolled block weights of its own: their gradients are the parts."""
    model = tiny_model(name)
    found = iteration_gradients(model, TOKENS, metric)
    untied = {}
    layout = model.layout
    for index, block in enumerate(model.blocks):
        at = layout.coordinate(index)
        if at.iteration is None:
            continue
        for path, module in block.named_modules():
            for attribute, parameter in module._parameters.items():
                if parameter is not None:
                    own = nn.Parameter(parameter.detach().clone())
                    module._parameters[attribute] = own
                    inner = ".".join(filter(None, [path, attribute]))
                    untied[f"{layout.physical_name(index)}.{inner}", at.iteration] = own
    grads = torch.autograd.grad(metric(model(TOKENS)), list(untied.values()))
    for (weight, t), grad in zip(untied, grads, strict=True):
        close(found.by_iteration[weight][t], grad)
    # With two stacks an iteration does not touch the weights of the other.
    for weight in found.names:
        for t in range(layout.n_iterations):
            if (weight, t) not in untied:
                assert not found.by_iteration[weight][t].any()


def test_a_module_that_all_iterations_call():
    """The map of the state before each iteration, moved in one iteration alone by a hook."""
    model = tiny_model("retrofitted").double()
    d = model.cfg.d_model
    found = iteration_gradients(model, TOKENS, metric, "injection.W")
    change = torch.randn(d, d, dtype=torch.float64)
    for t in range(3):
        size = torch.zeros((), dtype=torch.float64, requires_grad=True)
        kept = {}

        def keep(state, hook, kept=kept):
            kept["s"] = state

        def move(x, hook, kept=kept, size=size):
            return x + size * kept["s"] @ change

        hooks = [(f"iter.{t}.hook_state_in", keep), (f"iter.{t}.hook_injected", move)]
        value = metric(model.run_with_hooks(TOKENS, fwd_hooks=hooks))
        (along,) = torch.autograd.grad(value, size)
        part = (found.by_iteration["injection.W"][t][:d] * change).sum()
        assert float(part) == pytest.approx(float(along), rel=1e-8)
        assert not found.by_iteration["injection.W"][t][d:].any()  # e's half is made once
    assert found.outside["injection.W"][d:].any()


def test_gates_after_an_iteration_belong_to_it():
    model = tiny_model("act")
    found = iteration_gradients(model, TOKENS, metric, ["exit_gate.W", "exit_gate.b"])
    assert not found.outside
    assert (found.norms() > 0).sum() >= 2
    last = tiny_model("ouro", norm_between_iterations=True)
    norms = iteration_gradients(last, TOKENS, metric, "ln_final.w").norms()
    assert (norms > 0).all()  # the norm between iterations, and the final norm in the last one


def test_gram_norms_and_cosines():
    model = tiny_model("ouro")
    found = iteration_gradients(model, TOKENS, metric)
    flat = torch.cat([rows.flatten(1) for rows in found.by_iteration.values()], dim=1)
    close(found.gram(), flat @ flat.T)
    close(found.norms(), flat.norm(dim=1))
    expected = torch.nn.functional.normalize(flat, dim=1)
    close(found.cosines(), expected @ expected.T)
    total = torch.cat([g.flatten() for g in found.total().values()])
    assert float(found.gram().sum()) == pytest.approx(float(total.square().sum()), rel=1e-4)
    some = found.gram(["core.0.attn.W_Q"])
    rows = found.by_iteration["core.0.attn.W_Q"].flatten(1)
    close(some, rows @ rows.T)
    frame = found.to_frame()
    assert len(frame) == len(found.names) * 4 and set(frame.columns) >= {"norm", "cosine_to_sum"}
    with pytest.raises(ValueError, match=r"did you mean core\.0\.attn\.W_Q"):
        found.norms(["core.0.attn.WQ"])


def test_frozen_weights_other_scalars_and_several_runs():
    model = tiny_model("retrofitted").requires_grad_(False)
    with split_weights(model) as uses:
        states = []
        keep = ("iter.1.hook_state_out", lambda state, hook: states.append(state))
        model.run_with_hooks(TOKENS, fwd_hooks=[keep])
        first = uses.gradients(states[0].square().sum())
        both = uses.gradients(metric(model(TOKENS)) + metric(model(TOKENS[:1])))
    assert not first.by_iteration["core.0.attn.W_Q"][2].any()  # iteration 2 comes after
    assert first.by_iteration["core.0.attn.W_Q"][1].any()
    parts = [iteration_gradients(model, tokens, metric) for tokens in (TOKENS, TOKENS[:1])]
    for name in both.names:
        close(both.by_iteration[name], parts[0].by_iteration[name] + parts[1].by_iteration[name])
    assert not any(p.requires_grad for p in model.parameters())


def test_no_weight_is_copied_and_an_error_takes_all_back():
    model = tiny_model("huginn")
    before = dict(model.named_parameters())
    with pytest.raises(RuntimeError, match="in between"):
        with split_weights(model, "all") as uses:
            model(TOKENS)
            memory = {p.data_ptr() for p in before.values()}
            assert {alias.data_ptr() for alias in uses._aliases.values()} <= memory
            raise RuntimeError("in between")
    assert dict(model.named_parameters()) == before
    assert not any(point._forward_hooks for point in model.hook_dict.values())
    assert not model._forward_pre_hooks


def test_other_numbers_of_iterations():
    model = tiny_model("retrofitted")
    with model.iterations(5):
        found = iteration_gradients(model, TOKENS, metric)
    assert found.n_iterations == 5
    with split_weights(model) as uses:
        with pytest.raises(ValueError, match="split for 3 iterations"):
            model(TOKENS, n_iterations=5)
        with pytest.raises(ValueError, match="run the model inside"):
            uses.gradients(torch.zeros((), requires_grad=True) * 2)
        with pytest.raises(ValueError, match="must be a scalar tensor"):
            uses.gradients(model(TOKENS))


@only_before_4
def test_a_looped_feedforward_model():
    plain = plain_model(
        n_layers=4, d_model=16, d_head=4, n_heads=4, n_ctx=32, d_vocab=50, act_fn="gelu", seed=0
    )
    model = tl_loops.loop(plain, repeats={1: 2, 2: 3})
    expected = plain_gradients(model, metric(model(TOKENS)))
    with split_weights(model, "all") as uses:
        found = uses.gradients(metric(model(TOKENS)))
        parameters = {name: uses._originals[name] for name in uses.names}
    for name, total in found.total().items():
        close(total, expected[id(parameters[name])])
    with pytest.raises(NoLoopError):
        iteration_gradients(plain, TOKENS, metric)


def test_bad_weights():
    model = tiny_model("ouro")
    with pytest.raises(ValueError, match=r"no weight 'core\.0\.attn\.WQ': did you mean"):
        iteration_gradients(model, TOKENS, metric, "core.0.attn.WQ")
    with pytest.raises(ValueError, match="weights is empty"):
        iteration_gradients(model, TOKENS, metric, [])


class TestInfluence:
    TRAIN = (TOKENS[0], TOKENS[1, :6], TOKENS[1])
    QUERIES = (TOKENS[1, :7], TOKENS[0, :5])

    @pytest.mark.parametrize("name", ["retrofitted", "ouro", "hrm_text"])
    def test_the_sum_over_iterations_is_tracin(self, name):
        model = tiny_model(name)
        found = step_influence(model, self.TRAIN, self.QUERIES)
        core = [p for name, p in model.physical_named_parameters() if name.startswith("core")]

        def gradient(tokens):
            loss = model(tokens[None], return_type="loss")
            return torch.cat([g.flatten() for g in torch.autograd.grad(loss, core)])

        train, queries = (
            torch.stack([gradient(t) for t in tokens]) for tokens in (self.TRAIN, self.QUERIES)
        )
        expected = train @ queries.T
        T = model.cfg.n_iterations
        assert found.matrix.shape == (3, 2, T, T)
        close(found.sdi.sum(-1), expected)
        close(found.tracin, expected)
        close(found.by_training_iteration.sum(-1), expected)

    def test_each_entry_and_the_size_of_groups(self):
        model = tiny_model("ouro")

        def loss(logits, tokens):
            return logits[0, -1, tokens[0, 0]]

        found = step_influence(model, self.TRAIN, self.QUERIES, loss)
        one = step_influence(model, self.TRAIN, self.QUERIES, loss, n_queries_at_once=1)
        close(one.matrix, found.matrix)
        parts = [
            iteration_gradients(model, t[None], lambda logits, t=t: loss(logits, t[None]))
            for t in (self.TRAIN[1], self.QUERIES[0])
        ]
        flat = [torch.cat([g.flatten(1) for g in p.by_iteration.values()], 1) for p in parts]
        close(found.matrix[1, 0], flat[0] @ flat[1].T)
        assert repr(found) == "StepInfluence(3 examples on 2 queries, 4 iterations)"

    def test_an_example_on_itself(self):
        """M[i, i] is the Gram matrix of its gradients, and TracIn its squared length."""
        model = tiny_model("huginn")
        found = step_influence(model, self.TRAIN[:1], self.TRAIN[:1])
        M = found.matrix[0, 0]
        close(M, M.T)
        assert float(torch.linalg.eigvalsh(M).min()) > -1e-5 * float(M.norm())
        assert float(found.tracin) > 0

    def test_bad_input(self):
        model = tiny_model("retrofitted")
        with pytest.raises(ValueError, match=r"'injection\.W' is used outside"):
            step_influence(model, self.TRAIN, self.QUERIES, weights=["injection.W"])
        with pytest.raises(ValueError, match="prompt 0 has 1 token"):
            step_influence(model, [TOKENS[0, :1]], self.QUERIES)
        with pytest.raises(ValueError, match="batch_size must be at least 1"):
            step_influence(model, self.TRAIN, self.QUERIES, n_queries_at_once=0)
