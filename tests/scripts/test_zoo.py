"""The embedded model and how it is made: world, judge, tokenizer, training that resumes."""

import json
import math

import eval_zoo
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import train_zoo

from ditcache.clips import judge, world
from ditcache.models.base import ZOO
from zoo import dit, text, training, vae


def scenes(seed, count):
    rng = np.random.default_rng(seed)
    return [world.draw_scene(rng) for _ in range(count)]


def test_a_clip_is_a_function_of_its_seed():
    (a,), (b,), (c,) = scenes(3, 1), scenes(3, 1), scenes(4, 1)
    assert a == b and np.array_equal(world.render(a), world.render(b))
    assert not np.array_equal(world.render(a), world.render(c))
    assert world.render(a).shape == (17, 64, 64, 3)


def test_the_judge_is_right_on_true_clips():
    drawn = scenes(8, 60)
    verdicts = [judge.judge(world.render(scene) / 255) for scene in drawn]
    assert all(
        right == asked
        for right, asked in judge.score(list(zip(drawn, verdicts, strict=True))).values()
    )


def test_the_judge_is_wrong_on_wrong_clips():
    """The counterpart: another scene's clip does not pass for this one."""
    drawn = scenes(8, 60)
    verdicts = [judge.judge(world.render(scene) / 255) for scene in drawn[1:] + drawn[:1]]
    score = judge.score(list(zip(drawn, verdicts, strict=True)))
    assert all(right / asked < 0.5 for right, asked in score.values())


def test_most_backgrounds_are_textured():
    assert np.mean([scene.texture != "plain" for scene in scenes(1, 400)]) > 0.6


def test_the_tokenizer_never_splits_a_caption_word_and_knows_every_text():
    tokenizer = text.make_tokenizer()
    for scene in scenes(2, 50):
        pieces = tokenizer.tokenize(scene.caption)
        assert pieces == [f"▁{word}" for word in scene.caption.split()]
    ids = tokenizer("A fox's TAIL (night), schön 东京").input_ids
    assert tokenizer.unk_token_id not in ids and ids[-1] == tokenizer.eos_token_id


def test_one_padding_token_stands_for_all_of_them():
    torch.manual_seed(0)
    tokenizer = text.make_tokenizer()
    model = dit.Denoiser(tokenizer).eval()
    captions = [scene.caption for scene in scenes(5, 2)]
    tokens = tokenizer(captions, padding="max_length", max_length=28, return_tensors="pt").input_ids
    latents, sigma = torch.randn(2, 16, 5, 8, 8), torch.tensor([0.3, 0.9])
    with torch.no_grad():
        short = model.text_states(tokens)
        padded = F.pad(short[:, :-1], (0, 0, 0, 512 - 28))
        expected = model.transformer(latents, sigma * 1000, padded, return_dict=False)[0]
        attention = model.use_training_attention()
        attention.bias = dit.padding_bias(tokens, torch.tensor([512, 512]))
        assert attention.bias[0, 0, 0, -1] == pytest.approx(
            math.log(512 - int((tokens[0] != 0).sum()))
        )
        actual = model.transformer(latents, sigma * 1000, short, return_dict=False)[0]
    assert (actual - expected).abs().max() < 1e-5


def test_training_passes_equal_diffusers():
    torch.manual_seed(0)
    model, video = vae.make_vae().eval(), torch.rand(1, 3, 9, 32, 32) * 2 - 1
    with torch.no_grad():
        latents = model.encode(video).latent_dist.mode()
        decoded = model.decode(latents).sample
        vae.use_training_norm(model)
        assert (vae.encode(model, video)[0] - latents).abs().max() < 1e-5
        assert (vae.decode(model, latents).clamp(-1, 1) - decoded).abs().max() < 1e-5


def test_stray_words_never_touch_the_meaning():
    tokenizer, rng = text.make_tokenizer(), np.random.default_rng(0)
    captions = [scene.caption for scene in scenes(6, 300)]
    tokens = tokenizer(captions, padding="max_length", max_length=28, return_tensors="pt").input_ids
    edited = dit.add_stray_words(tokens.clone(), rng, tokenizer)
    changed = (edited != tokens).any(1)
    assert 5 < changed.sum() < 60
    words = dit.caption_words(tokenizer)
    for before, after in zip(tokens, edited, strict=True):
        assert (
            after[torch.isin(after, words)].tolist() == before[torch.isin(before, words)].tolist()
        )


def test_training_resumes_as_if_it_had_not_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(train_zoo, "render_clips", lambda seed, count: clips(seed, 4))
    save, fit = training.save, training.fit
    often = {"log_every": 2, "save_every": 2, "eval_every": 2}
    monkeypatch.setattr(training, "fit", lambda *a, **k: fit(*a, **{**k, **often}))
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    whole.mkdir(), halved.mkdir()
    train_zoo.train_vae(whole, torch.device("cpu"), 4)

    def save_and_stop(state, path):
        save(state, path)
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        train_zoo.train_vae(halved, torch.device("cpu"), 4)
    monkeypatch.setattr(training, "save", save)
    assert torch.load(halved / "vae.pt", weights_only=True)["step"] == 2
    train_zoo.train_vae(halved, torch.device("cpu"), 4)
    a, b = (torch.load(folder / "vae.pt", weights_only=True)["model"] for folder in (whole, halved))
    assert all(torch.equal(a[name], b[name]) for name in a)
    steps = [json.loads(line)["step"] for line in (halved / "vae.jsonl").read_text().splitlines()]
    assert steps == [2, 4]


def clips(seed, count):
    return np.stack([world.render(scene) for scene in scenes(seed, count)])


def test_the_zoo_is_small_and_has_a_card():
    folder = ZOO / "wan-tiny"
    weights = sum(
        p.stat().st_size for p in folder.rglob("*") if p.suffix in (".safetensors", ".json")
    )
    assert weights <= 8_000_000
    card = (folder / "CARD.md").read_text()
    for word in ("Recipe", "seed", "Accuracy", "background", "sample.png", "flow loss"):
        assert word in card
    assert (folder / "sample.png").is_file()
    assert not list(folder.rglob("*.bin")) and not list(folder.rglob("*.pt"))


def test_the_embedded_model_follows_captions(bundle):
    """A handful of captions; `scripts/eval_zoo.py` measures hundreds."""
    results, videos, _ = eval_zoo.evaluate(bundle.pipe, 8, seed=77)
    shares = {
        name: right / asked for name, (right, asked) in results["scores"]["generated"].items()
    }
    assert all(share >= 0.75 for share in shares.values()), shares
    assert results["scores"]["true clips"]["shape"] == (8, 8)
    assert results["vae_psnr"] >= eval_zoo.GOALS["psnr"]
    assert videos.shape == (8, 17, 64, 64, 3)
