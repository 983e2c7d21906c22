from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import resnet18

from dcnseg.errors import CheckpointError, ConfigError
from dcnseg.models import pretrained
from dcnseg.models.encoder import build_encoder, make_deformable
from dcnseg.models.pretrained import load_encoder_weights


@pytest.fixture(scope="module")
def torchvision_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return dict(resnet18(weights=None).state_dict())


def load(
    weights: Path | str, name: str = "resnet18", deform_layers: int = 0
) -> dict[str, torch.Tensor]:
    """Load weights into an encoder and return its state dict."""
    encoder = build_encoder(name, output_stride=16)
    make_deformable(encoder, deform_layers)
    load_encoder_weights(encoder, name, str(weights))
    return encoder.state_dict()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_load_torchvision_weights_into_a_deformable_encoder(
    suffix: str, tmp_path: Path, torchvision_state: dict[str, torch.Tensor]
) -> None:
    path = tmp_path / f"resnet{suffix}"
    if suffix == ".pth":
        torch.save(torchvision_state, path)
    else:
        save_file(torchvision_state, path)
    own = load(path, deform_layers=3)
    for name in ("conv1.weight", "layer4.1.conv2.weight", "layer4.1.bn2.running_mean"):
        assert torch.equal(own[name], torchvision_state[name])


@pytest.mark.parametrize("prefix", ["", "encoder.", "module.", "module.backbone.", "_orig_mod."])
@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict"])
def test_load_encoder_from_a_whole_network(
    prefix: str, wrapper: str, tmp_path: Path, torchvision_state: dict[str, torch.Tensor]
) -> None:
    path = tmp_path / "network.pth"
    state = {f"{prefix}{k}": v for k, v in torchvision_state.items()}
    torch.save({"epoch": 3, wrapper: state | {"head.weight": torch.ones(1)}}, path)
    assert torch.equal(load(path)["conv1.weight"], torchvision_state["conv1.weight"])


def test_weights_of_another_encoder_are_an_error(
    tmp_path: Path, torchvision_state: dict[str, torch.Tensor]
) -> None:
    path = tmp_path / "resnet18.pth"
    torch.save(torchvision_state, path)
    text = (
        r"resnet18\.pth does not fit the encoder resnet50: of 265 tensors, 165 are missing "
        r"\(for example layer1\.0\.conv3\.weight\) and 23 have a wrong shape \(for example "
        r"layer1\.0\.conv1\.weight \[64, 64, 3, 3\] instead of \[64, 64, 1, 1\]\); the file has "
        r"122 tensors"
    )
    with pytest.raises(CheckpointError, match=text):
        load(path, "resnet50")
    torch.save({"other": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match=r"265 tensors, 265 are missing .* and 0 have"):
        load(path, "resnet50")


def test_file_without_a_state_dict_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"net": {"conv1.weight": torch.ones(1)}, "epoch": 1}, path)
    with pytest.raises(CheckpointError, match=r"found a dictionary with \['net', 'epoch'\]\. Save"):
        load(path)
    torch.save(torch.ones(1), path)
    with pytest.raises(
        CheckpointError, match=r"model_state_dict; found a Tensor\. Save only the st"
    ):
        load(path)


def test_weights_that_are_not_finite_are_an_error(
    tmp_path: Path, torchvision_state: dict[str, torch.Tensor]
) -> None:
    path = tmp_path / "resnet18.pth"
    broken = torchvision_state["conv1.weight"].clone()
    broken[0, 0, 0, :2] = torch.tensor([float("nan"), float("inf")])
    torch.save(torchvision_state | {"conv1.weight": broken}, path)
    with pytest.raises(CheckpointError, match=r"2 of the 9408 values of conv1\.weight are not fin"):
        load(path)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"\x80\x04garbage"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_file_is_an_error(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"weights{suffix}"):
        load(path)


def test_missing_file_or_unknown_name_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"--encoder-weights is no/such\.pth, which does not"):
        load("no/such.pth")
    with pytest.raises(ConfigError, match="for resnet18, one of none, imagenet, ssl, swsl"):
        load("coco")


@pytest.mark.parametrize("status", [None, 403, 503])
def test_unreachable_hub_is_an_error(monkeypatch: pytest.MonkeyPatch, status: int | None) -> None:
    class Session:
        def head(self, url: str, timeout: float) -> SimpleNamespace:
            assert url.endswith("model.safetensors")
            if status is None:
                raise OSError("no route to host")
            return SimpleNamespace(status_code=status)

    monkeypatch.setattr(pretrained, "get_session", Session)
    monkeypatch.setattr(pretrained, "try_to_load_from_cache", lambda *_args, **_kwargs: None)
    with pytest.raises(CheckpointError, match=r"cannot be reached.*--encoder-weights none"):
        load("imagenet")
