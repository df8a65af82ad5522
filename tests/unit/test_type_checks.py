"""What the tests check of annotations while they run: kinds, axes, and what is returned."""

import jaxtyping
import pytest
import torch
from beartype import beartype
from jaxtyping import Float, TypeCheckError
from torch import Tensor

from tests.type_checks import _checked

check = _checked(getattr(jaxtyping.jaxtyped, "args", [jaxtyping.jaxtyped])[0], typechecker=beartype)


@check
def product(
    x: Float[Tensor, "a b"], y: Float[Tensor, "b c"], turned: bool = False
) -> Float[Tensor, "a c"]:
    return (x @ y).T if turned else x @ y


def test_axes_of_one_name_agree_within_a_call():
    x, y = torch.ones(2, 3), torch.ones(3, 4)
    assert product(x, y).shape == (2, 4)
    assert product(y, torch.ones(4, 5)).shape == (3, 5)  # each call has lengths of its own
    for wrong in ((x, torch.ones(2, 4)), (x.int(), y), (x[0], y), (x, y, "no flag")):
        with pytest.raises(TypeCheckError):
            product(*wrong)
    with pytest.raises(TypeCheckError):
        product(x, y, turned=True)
    assert product(x, y).shape == (2, 4)


def test_a_call_within_a_call_has_axes_of_its_own():
    @check
    def outer(a: Float[Tensor, "a b"]) -> Float[Tensor, "a b"]:
        assert product(a.T, a).shape == (a.shape[1],) * 2
        return a if a.shape[0] == 2 else a.T

    assert outer(torch.ones(2, 3)).shape == (2, 3)
    with pytest.raises(TypeCheckError):
        outer(torch.ones(3, 2))


def test_shapes_are_not_read_where_jaxtyping_is_off(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        product(torch.ones(2, 3), torch.ones(2, 4))


def test_annotations_without_axes_are_checked():
    @check
    def repeated(text: str, times: int) -> str:
        return text * times if times else None  # type: ignore[return-value]

    assert repeated("a", 2) == "aa"
    for wrong in (("a", "2"), (1, 2), ("a", 0)):
        with pytest.raises(TypeCheckError):
            repeated(*wrong)
