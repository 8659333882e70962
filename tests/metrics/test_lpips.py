"""LPIPS against torchmetrics' network, with a random AlexNet in both."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torchmetrics
from alexnet import backbone, random_alexnet, random_heads
from safetensors.torch import save_file
from torchmetrics.functional.image import lpips as theirs

from ditcache.metrics.lpips import SHAPES, load_weights, lpips, lpips_per_frame

PUBLISHED_HEADS = Path(torchmetrics.__file__).parent / "functional/image/lpips_models/alex.pth"
RNG = np.random.default_rng(0)
CLIP = RNG.random((3, 64, 80, 3)).astype(np.float32)
NOISE = RNG.standard_normal(CLIP.shape)


def noisy(strength):
    return np.clip(CLIP + strength * NOISE, 0, 1).astype(np.float32)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("lpips") / "weights.safetensors"
    save_file({**backbone(random_alexnet()), **random_heads()}, path)
    return path


def test_agrees_with_torchmetrics_and_the_published_heads(tmp_path, monkeypatch):
    net = random_alexnet()
    torch.save({**backbone(net), "classifier.1.weight": torch.zeros(2)}, tmp_path / "alexnet.pth")
    (tmp_path / "heads.pth").write_bytes(PUBLISHED_HEADS.read_bytes())
    (tmp_path / "README.md").write_text("not weights")
    monkeypatch.setattr(theirs, "_get_tv_model_features", lambda name, pretrained: net)
    monkeypatch.setattr(
        torch, "load", lambda *a, load=torch.load, **k: load(*a, **{**k, "weights_only": True})
    )
    judge = theirs._LPIPS(net="alex", pnet_rand=True)
    for other in (noisy(0.05), 1 - CLIP):
        a, b = (torch.from_numpy(video).permute(0, 3, 1, 2) for video in (CLIP, other))
        expected = judge(a, b, normalize=True).flatten().tolist()
        assert min(expected) > 1e-4
        assert lpips_per_frame(CLIP, other, tmp_path) == pytest.approx(expected, rel=1e-5)
        assert lpips(CLIP, other, tmp_path) == pytest.approx(np.mean(expected), rel=1e-5)


def test_agrees_with_the_formula(weights):
    """Written out once more, in float64 and by torch's modules."""
    heads, x, total = random_heads(), {}, 0.0
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    for name, frame in (("a", CLIP[0]), ("b", noisy(0.2)[0])):
        pixels = (torch.from_numpy(frame).double() * 2 - 1 - shift.double()) / scale.double()
        x[name] = pixels.permute(2, 0, 1)[None]
    with torch.no_grad():
        for index, layer in enumerate(random_alexnet().double()):
            x = {name: layer(value) for name, value in x.items()}
            if index in (1, 4, 7, 9, 11):
                unit = {name: torch.nn.functional.normalize(v) for name, v in x.items()}
                head = heads[f"lin{(1, 4, 7, 9, 11).index(index)}.model.1.weight"].double()
                total += (
                    ((unit["a"] - unit["b"]) ** 2 * head.view(1, -1, 1, 1)).sum(1).mean().item()
                )
    assert lpips(CLIP[:1], noisy(0.2)[:1], weights) == pytest.approx(total, rel=1e-4)


def test_identical_bad_and_symmetric(weights):
    assert lpips(CLIP, CLIP, weights) == 0
    values = [lpips(CLIP, noisy(strength), weights) for strength in (0.02, 0.1, 0.4)]
    assert 0 < values[0] < values[1] < values[2]
    assert lpips(noisy(0.1), CLIP, weights) == pytest.approx(values[1], rel=1e-6)
    bad = CLIP.copy()
    bad[1] = noisy(0.4)[1]
    assert np.argmax(lpips_per_frame(CLIP, bad, weights)) == 1


def test_frames_are_refused(weights):
    with pytest.raises(
        ValueError, match=r"lpips: reference is \(3, .*compare videos of equal shape"
    ):
        lpips(CLIP, CLIP[:2], weights)
    with pytest.raises(ValueError, match=r"lpips: .* at least 31 pixels a side, got \(30, 80\)"):
        lpips(CLIP[:, :30], CLIP[:, :30], weights)
    assert lpips(CLIP[:, :31, :31], CLIP[:, :31, :31], weights) == 0


def test_weights_are_refused_in_one_line(tmp_path):
    def refused(path, message):
        with pytest.raises(ValueError, match=message) as error:
            load_weights(path)
        assert "\n" not in str(error.value)

    refused(tmp_path / "nowhere", "lpips: no file or folder .*nowhere; give its weights or leave")
    refused(tmp_path, f"lacks {len(SHAPES)} of {len(SHAPES)} tensors, first features.0.weight")
    save_file(backbone(random_alexnet()), tmp_path / "alexnet.safetensors")
    refused(tmp_path, r"lacks 5 of 15 tensors, first lin0.model.1.weight; needs torchvision's")
    save_file(random_heads(), tmp_path / "a.safetensors")
    assert list(load_weights(tmp_path)) and set(load_weights(tmp_path)) == set(SHAPES)
    save_file(random_heads(), tmp_path / "b.safetensors")
    refused(
        tmp_path, r"lin\d.model.1.weight is in .*a.safetensors and in .*b.safetensors; keep one"
    )
    save_file({"lin1.model.1.weight": torch.zeros(1, 128, 1, 1)}, tmp_path / "vgg.safetensors")
    refused(tmp_path / "vgg.safetensors", r"is \(1, 128, 1, 1\), AlexNet's is \(1, 192, 1, 1\)")
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    refused(tmp_path / "torn.safetensors", "lpips: cannot read .*torn.safetensors: ")
    (tmp_path / "torn.pth").write_bytes(b"torn")
    refused(tmp_path / "torn.pth", "lpips: cannot read .*torn.pth: ")
    torch.save([1, 2], tmp_path / "list.pth")
    refused(tmp_path / "list.pth", "list.pth holds a list, not named tensors")
    torch.save(Path("x"), tmp_path / "code.pth")
    refused(tmp_path / "code.pth", "lpips: cannot read .*code.pth: ")
