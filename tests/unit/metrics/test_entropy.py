import math

import torch

from tl_loops.metrics.entropy import shannon_entropy


def test_closed_forms():
    p = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0, 0], [1, 0, 0, 0]])
    expected = [math.log(4), math.log(2), 0.0]
    torch.testing.assert_close(shannon_entropy(p), torch.tensor(expected))


def test_gradient_is_that_of_p_log_p_and_zero_at_zero():
    p = torch.tensor([0.7, 0.3, 0.0], requires_grad=True)
    shannon_entropy(p).backward()
    expected = torch.tensor([-math.log(0.7) - 1, -math.log(0.3) - 1, 0.0])
    torch.testing.assert_close(p.grad, expected)


def test_negative_and_nan_entries_give_nan():
    p = torch.tensor([[-0.5, 1.5], [float("nan"), 1.0]])
    assert shannon_entropy(p).isnan().all()
