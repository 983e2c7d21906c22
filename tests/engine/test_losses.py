from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dcnseg.config import LOSSES
from dcnseg.engine.losses import balance_classes, build_loss


def random_case() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 4, 8, 9, requires_grad=True), torch.randint(0, 4, (2, 8, 9))


@pytest.mark.parametrize("name", LOSSES)
def test_ignored_pixels_do_not_count(name: str) -> None:
    logits, labels = random_case()
    labels[:, :3] = 255
    loss = build_loss(name, None)
    changed = logits.detach().clone()
    changed[:, :, :3] += torch.randn(2, 4, 3, 9) * 5
    assert torch.allclose(loss(logits, labels), loss(changed, labels), atol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_labeled_gives_zero_and_no_gradient(name: str) -> None:
    logits, labels = random_case()
    value = build_loss(name, None)(logits, torch.full_like(labels, 255))
    value.backward()
    assert value.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.mark.parametrize("name", LOSSES)
def test_right_answers_cost_less(name: str) -> None:
    _, labels = random_case()
    right = F.one_hot(labels, 4).permute(0, 3, 1, 2).float() * 20 - 10
    loss = build_loss(name, torch.ones(4))
    assert loss(right, labels) < 0.01 < loss(-right, labels)


def test_class_weights_reach_the_cross_entropy() -> None:
    logits, labels = random_case()
    weights = torch.tensor([1.0, 2.0, 0.5, 3.0])
    expected = F.cross_entropy(logits, labels, weight=weights)
    assert torch.equal(build_loss("ce", weights)(logits, labels), expected)


def test_balanced_weights_make_classes_equal() -> None:
    counts = torch.tensor([900, 90, 10, 0])
    assert balance_classes(counts, "none") is None
    balanced = balance_classes(counts, "balanced")
    gentle = balance_classes(counts, "sqrt")
    assert balanced is not None
    assert gentle is not None
    share = balanced * counts / counts.sum()
    torch.testing.assert_close(share, torch.tensor([1 / 3, 1 / 3, 1 / 3, 0]))
    assert balanced[2] / balanced[0] == pytest.approx(90)
    assert gentle[2] / gentle[0] == pytest.approx(90**0.5)
