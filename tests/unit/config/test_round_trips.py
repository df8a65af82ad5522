"""``from_dict(to_dict())`` is the identity for every config that the package makes."""

import json

import pytest
import torch

from tests.feedforward import only_before_4, plain_model
from tests.models import ARCHITECTURES, MECHANISMS, STACKS, tiny_config
from tl_loops import loop
from tl_loops.config.config import dtype_name
from tl_loops.loading.catalogue import catalogue

DTYPES = {dtype_name(dtype): dtype for dtype in (torch.float32, torch.bfloat16)}


def same(cfg):
    """Through a dictionary, and through JSON with the dtype by its name."""
    fields = cfg.to_dict()
    again = type(cfg).from_dict(fields)
    assert again == cfg and again.to_dict() == fields and again.layout == cfg.layout
    assert again.describe() == cfg.describe()
    text = json.dumps({**fields, "dtype": dtype_name(fields["dtype"])})
    read = json.loads(text)
    assert type(cfg).from_dict({**read, "dtype": DTYPES[read["dtype"]]}) == cfg


@pytest.mark.parametrize("name", sorted({**ARCHITECTURES, **MECHANISMS, **STACKS}))
def test_of_every_architecture(name):
    same(tiny_config(name))


@pytest.mark.parametrize("entry", catalogue(), ids=lambda entry: entry.name)
def test_of_every_known_model(entry):
    same(entry.config())


@only_before_4
@pytest.mark.parametrize(
    "how",
    [
        dict(start=1, stop=3, n_iterations=4),
        dict(repeats={0: 2, 2: 3}),
        dict(loops=[(0, 2, 2), (3, 4, 3)]),
    ],
    ids=["one", "repeats", "several"],
)
def test_of_a_looped_feedforward_model(how):
    sizes = dict(n_layers=4, d_model=16, n_ctx=8, d_head=4, d_vocab=11, act_fn="relu", seed=0)
    same(loop(plain_model(**sizes), **how).cfg)
