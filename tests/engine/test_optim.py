from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dcnseg.config import LOSSES, ModelConfig
from dcnseg.engine.optim import (
    balance_classes,
    build_loss,
    build_loss_weight,
    build_optimizer,
    build_schedule,
    parameter_groups,
)
from dcnseg.models.segmenter import build_segmenter
from dcnseg.ops import DeformPSRoIPool, DeformRoIPool

PARTS = {
    "plain": torch.nn.Linear(2, 2),
    "pool": DeformRoIPool(1, 1.0, 1, hidden_channels=2),
    "sensitive": DeformPSRoIPool(1, 1.0, 1),
}
SEGMENTER = build_segmenter(ModelConfig(encoder="resnet18", decoder_channels=16), 3)


# A layer may be the whole model; its branch has no dot before its name then.
@pytest.mark.parametrize("model", [SEGMENTER, torch.nn.ModuleDict(PARTS), *PARTS.values()])
def test_offset_branches_have_their_own_rate(model: torch.nn.Module) -> None:
    groups = parameter_groups(model, lr=0.5, offset_lr=0.05, weight_decay=1e-3)
    options = {id(p): g for g in groups for p in g["params"]}  # type: ignore[attr-defined]
    assert len(options) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        is_offset = "conv_offset." in name or "offset_branch" in name
        group = options[id(parameter)]
        assert group["lr"] == pytest.approx(0.05 if is_offset else 0.5), name
        assert group["weight_decay"] == (1e-3 if parameter.dim() > 1 else 0), name


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_schedule_warms_up_and_falls_to_zero(name: str) -> None:
    layer = torch.nn.Linear(2, 2)
    optimizer = build_optimizer(layer, name, lr=1.0, offset_lr=0.1, weight_decay=0)
    schedule = build_schedule(optimizer, total_steps=100, warmup_steps=9, power=0.9)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx((1 - 9 / 100) ** 0.9)
    assert rates[50] == pytest.approx(0.5**0.9)
    assert optimizer.param_groups[0]["lr"] == 0


def test_warm_up_longer_than_training_still_moves() -> None:
    layer = torch.nn.Linear(2, 2)
    optimizer = build_optimizer(layer, "sgd", lr=1.0, offset_lr=1, weight_decay=0)
    build_schedule(optimizer, total_steps=1, warmup_steps=50, power=0.9)
    assert optimizer.param_groups[0]["lr"] == 1


def random_case() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 4, 8, 9, requires_grad=True), torch.randint(0, 4, (2, 8, 9))


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str) -> None:
    """Ignored pixels do not count; nothing labeled is zero; right answers cost less."""
    logits, labels = random_case()
    loss = build_loss(name, None)
    value = loss(logits, torch.full_like(labels, 255))
    value.backward()
    assert value.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()
    right = F.one_hot(labels, 4).permute(0, 3, 1, 2).float() * 20 - 10
    weighted = build_loss(name, torch.ones(4))
    assert weighted(right, labels) < 0.01 < weighted(-right, labels)
    labels[:, :3] = 255
    changed = logits.detach().clone()
    changed[:, :, :3] += torch.randn(2, 4, 3, 9) * 5
    assert torch.allclose(loss(logits, labels), loss(changed, labels), atol=1e-5)


def test_class_weights_reach_the_cross_entropy() -> None:
    logits, labels = random_case()
    weights = torch.tensor([1.0, 2.0, 0.5, 3.0])
    expected = F.cross_entropy(logits, labels, weight=weights)
    assert torch.equal(build_loss("ce", weights)(logits, labels), expected)


@pytest.mark.parametrize("name", ["ce", "focal"])
def test_the_loss_of_a_batch_is_the_weighted_mean_of_its_parts(name: str) -> None:
    logits, labels = random_case()
    labels[0, :4] = 255
    weights = torch.tensor([1.0, 2.0, 0.5, 3.0])
    loss, weigh = build_loss(name, weights), build_loss_weight(name, weights)
    parts = [(logits[i : i + 1], labels[i : i + 1]) for i in range(len(labels))]
    total = sum(loss(*part) * weigh(part[1]) for part in parts)
    torch.testing.assert_close((total / weigh(labels)).float(), loss(logits, labels))
    assert weigh(torch.full((1, 2, 2), 255)) == 0
    assert build_loss_weight("ce", None)(labels) == (labels != 255).sum()


def test_balanced_weights_make_classes_equal() -> None:
    counts = torch.tensor([900, 90, 10, 0])
    assert balance_classes(counts, "none") is None
    balanced, gentle = balance_classes(counts, "balanced"), balance_classes(counts, "sqrt")
    assert balanced is not None
    assert gentle is not None
    share = balanced * counts / counts.sum()
    torch.testing.assert_close(share, torch.tensor([1 / 3, 1 / 3, 1 / 3, 0]))
    assert balanced[2] / balanced[0] == pytest.approx(90)
    assert gentle[2] / gentle[0] == pytest.approx(90**0.5)
