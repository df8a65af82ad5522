"""Labels that clients read: heads and neurons are told apart from everything else."""

import pytest

from tests.models import tiny_model, tiny_tokens
from tl_loops import PartLabel, read_part_label


def test_every_head_and_neuron_of_a_decomposition_is_found():
    model = tiny_model("retrofitted")
    _, cache = model.run_with_cache(tiny_tokens())
    _, labels = cache.get_full_resid_decomposition(expand_neurons=True, return_labels=True)
    parts = [part for part in map(read_part_label, labels) if part is not None]
    depth = model.cfg.n_layers
    assert sum(part.kind == "head" for part in parts) == depth * model.cfg.n_heads
    assert sum(part.kind == "neuron" for part in parts) == depth * model.cfg.d_mlp
    assert {part.iteration for part in parts} == {None, 0, 1, 2}
    assert len(set(parts)) == len(parts) < len(labels)


@pytest.mark.parametrize(
    ("label", "found"),
    [
        ("r3.L1N7", PartLabel("neuron", "r3", 3, 1, 7)),
        ("p.L0H12", PartLabel("head", "p", None, 0, 12)),
        ("L3H4", PartLabel("head", None, None, 3, 4)),
        ("r0L.L1H0", PartLabel("head", "r0L", 0, 1, 0)),
        ("embed", None),
        ("r3.1_mlp_out", None),
        ("r0_injection", None),
        ("remainder", None),
    ],
)
def test_a_label(label, found):
    assert read_part_label(label) == found
