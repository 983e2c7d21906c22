from __future__ import annotations

import pytest
import torch

from dcnseg.config import ModelConfig
from dcnseg.errors import ConfigError
from dcnseg.models.offset_ablation import replace_offsets
from dcnseg.models.segmenter import Segmenter, build_segmenter


def make_model(*, modulated: bool = False) -> Segmenter:
    torch.manual_seed(0)
    config = ModelConfig(
        encoder="resnet18", encoder_depth=3, architecture="plain", modulated=modulated
    )
    model = build_segmenter(config, 3).eval()
    for layer in model.deformable_layers().values():
        torch.nn.init.normal_(layer.conv_offset.weight, std=0.05)
    return model


@pytest.mark.parametrize("modulated", [False, True])
def test_zeroed_offsets_give_a_plain_grid(modulated: bool) -> None:
    model, x = make_model(modulated=modulated), torch.randn(1, 3, 64, 96)
    taps = 9
    expected = make_model(modulated=modulated)
    for layer in expected.deformable_layers().values():
        layer.conv_offset.weight.data[: 2 * taps] = 0  # not the modulation
        layer.conv_offset.bias.data[: 2 * taps] = 0
    before = model(x)
    with replace_offsets(model, "zeroed"):
        torch.testing.assert_close(model(x), expected(x))
    torch.testing.assert_close(model(x), before)
    assert not torch.allclose(before, expected(x))


def test_shuffled_offsets_are_those_of_other_positions() -> None:
    model, x = make_model(), torch.randn(2, 3, 64, 96)
    seen: dict[str, list[torch.Tensor]] = {}
    layer = next(iter(model.deformable_layers().values()))
    for how in ("learned", "shuffled"):
        outputs = seen.setdefault(how, [])

        def record(_module: object, _inputs: object, output: torch.Tensor) -> None:
            outputs.append(output)  # noqa: B023 (called before the next turn)

        if how == "learned":
            handle = layer.conv_offset.register_forward_hook(record)
            model(x)
        else:
            with replace_offsets(model, how):
                handle = layer.conv_offset.register_forward_hook(record)
                model(x)
        handle.remove()
    learned, shuffled = (outputs[0].flatten(2) for outputs in seen.values())
    assert not torch.equal(learned, shuffled)
    torch.testing.assert_close(learned.sort(-1).values, shuffled.sort(-1).values)


def test_other_replacements_are_refused() -> None:
    expected = pytest.raises(ConfigError, match="expected one of zeroed, shuffled")
    with expected, replace_offsets(make_model(), "halved"):
        pass
