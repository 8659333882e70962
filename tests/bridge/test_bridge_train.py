"""Training a bridge: what it learns from, that it resumes, and that a useless one is told so."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from random_checkpoints import small_transformer

from ditcache import cli
from ditcache.bridge.capture import capture, shape_of
from ditcache.bridge.controls import Alone, OutputAverage, TimestepSwitch, WeightAverage
from ditcache.bridge.evaluate import losses_of, measure_costs, untrained
from ditcache.bridge.fingerprint import fingerprint
from ditcache.bridge.fusion import Fusion
from ditcache.bridge.pair import Draw, Pair, lagged_state
from ditcache.bridge.projectors.full import Full
from ditcache.bridge.projectors.gating import Gating
from ditcache.bridge.samples import Caption, Samples, load_samples, save_samples
from ditcache.bridge.sampling import Sampling, sampled
from ditcache.bridge.saved import End, Header, load_net, read_header, save_bridge
from ditcache.bridge.short_text import short_text
from ditcache.bridge.students import Bridged, LowRankUpdate, Router
from ditcache.bridge.train import Recipe, train
from ditcache.bridge.verdict import Losses, deviation, judge, paired
from ditcache.clips.edits import draw_clip
from ditcache.errors import ConfigError, DitcacheError
from ditcache.video import write_mp4

FUSION = Fusion(fusion_direction="chrono_to_wan")
DOMAINS = ["motion", "edit", "composite"]


def model(cls, seed):
    torch.manual_seed(seed)
    return small_transformer(cls, 36, 16).eval().requires_grad_(False)


def caption(count, seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = 2 + torch.arange(count) % 3
    text = torch.randn(count, 4, 64, generator=generator)
    text[torch.arange(4)[None] >= lengths[:, None]] = 0
    return Caption(text, lengths, torch.randn(count, 5, 16, generator=generator), 512)


def samples(count=12):
    generator = torch.Generator().manual_seed(0)
    number = torch.arange(count)
    sides = {"wan": caption(count, 1), "chrono": caption(count, 2)}
    empty = {side: replace(caption(1, 3), image=None) for side in sides}
    return Samples(
        torch.randn(count, 16, 2, 4, 4, generator=generator).half(),
        torch.randn(count, 20, 2, 4, 4, generator=generator).half(),
        number % 3,
        torch.where(number < count // 2, 0, 1 + (number // 3) % 2),
        DOMAINS,
        sides,
        empty,
    )


TRANSFORMERS = {
    "wan": model("WanTransformer3DModel", 1),
    "chrono": model("ChronoEditTransformer3DModel", 2),
}
SHAPE = shape_of(TRANSFORMERS["wan"])


@pytest.fixture
def pair():
    pair = Pair(samples(), TRANSFORMERS, "wan", "chrono")
    with pair.opened():
        yield pair


def recipe(**settings):
    defaults = {
        "steps": 4, "batch_size": 3, "learning_rate": 1e-2, "weight_decay": 0.01, "shift": 3.0,
        "seed": 0, "preservation": 0.1, "own_domain": "motion", "max_lag": 0.2,
        "source_dropout": 0.1, "caption_dropout": 0.1, "save_every": 2, "digest": "a",
    }  # fmt: skip
    return Recipe(**{**defaults, **settings})


def students(pair):
    torch.manual_seed(0)
    concat = Full(form="concat", projector_hidden_dim=8)
    return {
        "bridge": Bridged(concat.make(SHAPE, SHAPE), FUSION),
        "self": Bridged(concat.make(SHAPE, SHAPE), FUSION, "self"),
        "shuffled": Bridged(Gating(projector_hidden_dim=8).make(SHAPE, SHAPE), FUSION, "shuffled"),
        "router": Router(16),
        "lora": LowRankUpdate(pair.target, 2),
    }


def draw(count=3, lag=0.0):
    generator = torch.Generator().manual_seed(4)
    nothing = torch.zeros(count, dtype=torch.bool)
    noise = torch.randn(count, 16, 2, 4, 4, generator=generator)
    sigma = torch.tensor([0.9, 0.5, 0.2])[:count]
    return Draw(torch.arange(count), noise, sigma, torch.full((count,), lag), nothing)


def fit(pair, found, path, accelerator=None, **settings):
    accelerator = accelerator or Accelerator(cpu=True)
    return train(accelerator, pair, found, FUSION, recipe(**settings), path, lambda *a: None)


def test_captions_without_padding_are_the_same_function():
    transformer, text = TRANSFORMERS["wan"], caption(3, 1)
    full = torch.zeros(3, 512, 64)
    full[:, :4] = text.text
    x = torch.randn(3, 36, 2, 4, 4)
    call = {"timestep": torch.full((3,), 500.0), "encoder_hidden_states_image": text.image}
    with torch.no_grad():
        stock = transformer(x, encoder_hidden_states=full, return_dict=False, **call)[0]
        with short_text(transformer) as reader:
            short = transformer(
                x, encoder_hidden_states=reader.read(text), return_dict=False, **call
            )[0]
        assert torch.equal(
            stock, transformer(x, encoder_hidden_states=full, return_dict=False, **call)[0]
        )
    assert (stock - short).abs().max() < 1e-4, (stock - short).abs().max()


def test_the_lagged_state_knows_nothing_but_the_noisy_latents(pair):
    """Another clip with other noise, but equal noisy latents: the source must see the same."""
    one = draw(lag=0.1)
    seen = pair.batch(one, {"source"}, outputs=True, fusion=FUSION)
    level = one.sigma.view(-1, 1, 1, 1, 1)
    noisy = (1 - level) * pair.samples.latents[one.rows].float() + level * one.noise
    other = pair.samples.latents.clone()
    pair.samples.latents[one.rows] = torch.randn_like(noisy).half()
    clean = pair.samples.latents[one.rows].float()
    moved = replace(one, noise=(noisy - (1 - level) * clean) / level)
    again = pair.batch(moved, {"source"}, outputs=True, fusion=FUSION)
    pair.samples.latents.copy_(other)
    assert not torch.allclose(seen.wanted, again.wanted, atol=1e-2)
    torch.testing.assert_close(again.source_velocity, seen.source_velocity, rtol=0, atol=2e-3)


def test_the_lagged_state_is_an_euler_step():
    noisy, velocity = torch.randn(2, 16, 2, 4, 4), torch.randn(2, 16, 2, 4, 4)
    later, state = lagged_state(
        noisy, torch.tensor([0.5, 0.95]), torch.tensor([0.1, 0.2]), velocity
    )
    assert later.tolist() == pytest.approx([0.6, 1.0])
    torch.testing.assert_close(state[0], noisy[0] + 0.1 * velocity[0])
    torch.testing.assert_close(state[1], noisy[1] + 0.05 * velocity[1])


def test_every_student_starts_as_the_target_and_learns(pair, tmp_path):
    found = students(pair)
    batch = pair.batch(draw(), {"source", "self", "shuffled"}, outputs=True, fusion=FUSION)
    with torch.no_grad():
        for name, student in found.items():
            with student.attached(batch, pair.target):
                assert torch.equal(student(batch, pair.target), batch.alone), name
    before = {name: p.clone() for name, p in TRANSFORMERS["wan"].named_parameters()}
    history = fit(pair, found, tmp_path / "a.pt", steps=30, learning_rate=2e-2)
    for name in found:
        gain = sum(s[name] - s["target alone"] for s in history.steps[-10:])
        assert gain < 0, name
    for name, parameter in TRANSFORMERS["wan"].named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(pair, tmp_path):
    whole, parts = students(pair), students(pair)
    straight = fit(pair, whole, tmp_path / "a.pt")

    def stop(step, losses):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(Accelerator(cpu=True), pair, parts, FUSION, recipe(), tmp_path / "b.pt", stop)
    parts = students(pair)
    resumed = fit(pair, parts, tmp_path / "b.pt")
    assert resumed.steps == straight.steps
    for name in whole:
        for a, b in zip(whole[name].parameters(), parts[name].parameters(), strict=True):
            assert torch.equal(a, b), name
    with pytest.raises(ConfigError, match=r"resume: .* was made with other settings"):
        fit(pair, students(pair), tmp_path / "b.pt", digest="b")


def test_gradient_checkpointing_changes_nothing(pair, tmp_path):
    plain, saved = students(pair), students(pair)
    one = fit(pair, plain, tmp_path / "a.pt", steps=2)
    pair.target.enable_gradient_checkpointing()
    try:
        two = fit(pair, saved, tmp_path / "b.pt", steps=2)
    finally:
        pair.target.disable_gradient_checkpointing()
    assert one.steps[1] == pytest.approx(two.steps[1], rel=1e-5)


def test_a_dropped_source_is_the_target(pair):
    found = students(pair)["bridge"]
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.normal_()
        one = replace(draw(), present=torch.tensor([True, False, True]))
        batch = pair.batch(one, {"source"}, outputs=False, fusion=FUSION)
        with found.attached(batch, pair.target):
            velocity = found(batch, pair.target)
    assert torch.equal(velocity[1], batch.alone[1])
    assert not torch.equal(velocity[0], batch.alone[0])


def test_controls_without_training(pair):
    batch = pair.batch(draw(), {"source"}, outputs=True, fusion=FUSION)
    target, alone, other = pair.target, batch.alone, batch.source_velocity
    torch.testing.assert_close(OutputAverage(0.25)(batch, target), 0.75 * alone + 0.25 * other)
    switched = TimestepSwitch(0.6, source_above=True)(batch, target)
    assert torch.equal(switched[0], other[0]) and torch.equal(switched[1:], alone[1:])
    weights = {name: p.clone() for name, p in target.named_parameters()}
    twin = WeightAverage(pair.source, 1.0)
    with torch.no_grad(), twin.attached(batch, target):
        assert not torch.equal(twin(batch, target), alone)
        for name, parameter in pair.source.named_parameters():
            torch.testing.assert_close(dict(target.named_parameters())[name], parameter)
    assert all(torch.equal(p, weights[name]) for name, p in target.named_parameters())


def test_held_out_losses_are_per_clip_and_repeatable(pair):
    from contextlib import nullcontext

    found = {"bridge": students(pair)["bridge"]}
    losses = losses_of(pair, found, FUSION, "test", nullcontext)
    assert losses["bridge"].shape == (3,) and (losses["bridge"] > 0).all()
    again = losses_of(pair, found, FUSION, "test", nullcontext)
    assert torch.equal(losses["bridge"], again["bridge"])
    chosen = untrained(pair, FUSION, nullcontext, lambda: None)
    mixes = {name: student for name, (student, _) in chosen.items()}
    assert set(mixes) == {
        "target alone", "source alone", "output averaging", "timestep switching",
        "weight average", "weighted, fixed alpha", "identity",
    }  # fmt: skip
    assert all(chosen[name][1] for name in list(mixes)[2:-1])  # settings are picked
    known = losses_of(pair, mixes, FUSION, "test", nullcontext)
    assert torch.allclose(known["target alone"], losses["bridge"])  # it is untrained
    costs = measure_costs(pair, {**mixes, **students(pair)}, FUSION, nullcontext, repeats=1)
    assert len(costs) == 12 and all(cost > 0 for cost in costs.values())


def test_whole_denoisings(pair):
    """A closed bridge ends where the target alone does, from noise that depends on the clip."""
    from contextlib import nullcontext

    closed = Bridged(Gating(projector_hidden_dim=8).make(SHAPE, SHAPE), FUSION)
    found = {
        "target": Alone(), "source": Alone(source=True), "closed": closed,
        "self": students(pair)["self"], "averaged": OutputAverage(0.5),
    }  # fmt: skip
    rows = pair.samples.rows("test")
    sampling = Sampling(steps=3, shift=3.0, guidance=4.0)
    made = sampled(pair, found, rows, FUSION, sampling, nullcontext)
    assert made["target"].shape == (len(rows), 16, 2, 4, 4)
    assert torch.equal(made["closed"], made["target"]) and torch.equal(made["self"], made["target"])
    assert not torch.equal(made["source"], made["target"])
    assert not torch.equal(made["averaged"], made["target"])
    few = sampled(pair, {"target": Alone()}, rows[1:2], FUSION, sampling, nullcontext)
    torch.testing.assert_close(few["target"][0], made["target"][1], rtol=1e-4, atol=1e-4)
    plain = sampled(pair, found, rows, FUSION, Sampling(3, 3.0, 1.0), nullcontext)
    assert not torch.equal(plain["target"], made["target"])
    assert sampling.sigmas[0] == 1 and sampling.sigmas[-1] == 0 and len(sampling.sigmas) == 4


def test_samples_round_trip_and_refuse_other_models(tmp_path):
    class Bundle:
        def __init__(self, transformer):
            self.pipe = type("Pipe", (), {"transformer": transformer})
            self.model = type("Model", (), {"path": "here"})

    made, path = samples(), tmp_path / "clips.safetensors"
    prints = {side: fingerprint(x) for side, x in TRANSFORMERS.items()}
    save_samples(made, path, prints)
    bundles = {side: Bundle(x) for side, x in TRANSFORMERS.items()}
    again = load_samples(path, bundles)
    assert torch.equal(again.latents, made.latents) and again.domains == DOMAINS
    assert torch.equal(again.sides["chrono"].text, made.sides["chrono"].text)
    assert again.rows("test").tolist() == made.rows("test").tolist()
    bundles["chrono"] = Bundle(model("ChronoEditTransformer3DModel", 9))
    with pytest.raises(ConfigError, match="was made with another chrono model"):
        load_samples(path, bundles)
    (tmp_path / "other.safetensors").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match=r"data\.path: cannot read"):
        load_samples(tmp_path / "other.safetensors", bundles)


def header_of(spec, ways=("wan",)):
    ends = {
        side: End(side, f"{side}/path", fingerprint(x), shape_of(x))
        for side, x in TRANSFORMERS.items()
    }
    return Header(ends, ways, spec, 3)


def test_a_bridge_file_round_trips_and_refuses_other_weights(tmp_path):
    spec, path = (
        Gating(projector_hidden_dim=8, gate_granularity="value"),
        tmp_path / "b.safetensors",
    )
    net = spec.make(SHAPE, SHAPE)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_()
    save_bridge(path, header_of(spec), {"wan": net})
    header = read_header(path)
    assert header == header_of(spec)
    wan, chrono = TRANSFORMERS["wan"], TRANSFORMERS["chrono"]
    again = load_net(path, header, "wan", chrono, wan)
    for a, b in zip(net.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(DitcacheError, match=r"was trained with wan/path as wan \(fingerprint"):
        load_net(path, header, "wan", chrono, model("WanTransformer3DModel", 9))
    with pytest.raises(DitcacheError, match="has a projector into wan, none into chrono"):
        load_net(path, header, "chrono", wan, chrono)
    assert fingerprint(wan.to(torch.bfloat16)) == fingerprint(wan.to(torch.float32))


def test_a_file_that_is_no_bridge(tmp_path):
    for content in (b"", b'\x08\0\0\0\0\0\0\0{"a": {}', b"\xff" * 64, b"\x02\0\0\0\0\0\0\0{}"):
        path = tmp_path / "x.safetensors"
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"bridge\.path: .* holds no bridge"):
            read_header(path)


def test_paired_differences():
    told = paired([1.0, 2.0, 3.0], [1.5, 2.5, 3.5])
    assert told.mean == -0.5 and told.error == 0 and told.better
    noisy = paired([1.0, 2.0], [2.0, 1.5])
    assert noisy.mean == -0.25 and noisy.error == pytest.approx(0.75) and not noisy.better
    with pytest.raises(ValueError, match="equal numbers of clips"):
        paired([1.0], [1.0, 2.0])


def test_the_deviation_of_what_is_no_number_is_none_either():
    assert deviation([1.0, 3.0]) == pytest.approx(2**0.5)
    assert np.isnan(deviation([float("nan"), 1.0])) and np.isnan(deviation([float("inf"), 1.0]))


def losses(bridge=0.0, self_=0.0, shuffled=0.0, router=0.0, lora=0.0, seed=0):
    """Losses around 1; each argument is how much better or worse a method is."""
    rng = np.random.default_rng(seed)
    base = rng.normal(1.0, 0.3, 60)
    near = lambda shift: (base + shift + rng.normal(0, 0.01, 60)).tolist()  # noqa: E731
    controls = {
        "self": near(self_), "shuffled": near(shuffled), "router": near(router), "lora": near(lora)
    }  # fmt: skip
    return Losses(near(bridge), near(0.0), controls, list(range(20)), list(range(40, 60)))


def words(runs, max_harm=0.02):
    return [verdict.word for verdict in judge(runs, max_harm)]


def test_the_verdict():
    good = {"bridge": -0.1, "router": -0.05, "lora": -0.05}
    assert words([losses(**good, seed=s) for s in range(3)]) == ["PASS", "PASS", "PASS"]
    # One run of three in which the shuffled source does as well: the claim falls.
    runs = [losses(**good), losses(**good, seed=1), losses(**good, shuffled=-0.1, seed=2)]
    assert words(runs) == ["FAIL", "PASS", "PASS"]
    assert words([losses(bridge=-0.1, router=-0.2, lora=-0.05)])[2] == "FAIL"
    harmful = losses(bridge=-0.1)
    harmful = replace(harmful, bridge=[x + 0.2 * (i < 20) for i, x in enumerate(harmful.bridge)])
    assert words([harmful])[1] == "FAIL" and words([harmful], max_harm=0.2)[1] == "PASS"
    untold = replace(losses(**good), controls={})
    assert words([untold]) == ["not told", "PASS", "not told"]


def test_a_useless_bridge_is_told_so():
    """Chance alone, over many draws, hardly ever passes three runs."""
    passed = [
        words([losses(seed=100 * trial + s) for s in range(3)])[0] == "PASS" for trial in range(50)
    ]
    assert not any(passed)


WRONG = [
    (["steps=0"], "steps: must be >= 1, got 0"),
    (["controls=[selv]"], "controls: no 'selv'. Did you mean 'self'?"),
    (["projector=identity"], "projector: has nothing to train"),
    (["seeds=3"], "seeds: more than one only says something with evaluate=true"),
    (["fusion.refresh_every=2"], "fusion.refresh_every: has no effect on training"),
    (["num_frames=17"], "num_frames: 17 is 5 latent frames"),
    (["model=tiny"], "partner: which model goes with zoo:wan-tiny?"),
    (["partner=tiny_i2v"], "are both on the wan side"),
    (["model=tiny", "partner=tiny_chronoedit"], "zoo:wan-tiny takes no picture"),
    (["videos=1"], "videos: a shuffled source needs another clip beside it; set >= 2"),
    (["mixed_precision=bf17"], "mixed_precision: no 'bf17'. Did you mean 'bf16'?"),
    (["data=folder", "data.path=nowhere"], "data.path: no folder 'nowhere'"),
    (["data=latents", "data.path=nothing"], "data.path: no file 'nothing'"),
    (["projector.gate_granularity=heads"], "projector.gate_granularity: no 'heads'"),
    (["fusion.fusion_direction=up"], "fusion.fusion_direction: no 'up'"),
    (["projector=gating", "projector.max_params=10"], "projector.max_params: this projector has"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[m for _, m in WRONG])
def test_wrong_settings_are_one_line_and_leave_nothing(arguments, message, tmp_path, capsys):
    folder = f"hydra.run.dir={tmp_path}/run"
    assert cli.run(["bridge-train", *arguments, folder]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and message in said[0]
    assert not (tmp_path / "run").exists()


def test_capture_under_autocast_is_for_training_only(pair):
    """Sanity of the test models: the captured layers are those of the transformer."""
    batch = pair.batch(draw(), {"self"}, outputs=False, fusion=FUSION)
    _, found = capture(pair.target, batch.seen)
    assert len(found) == SHAPE.layers == len(batch.sources["self"])


def test_bridge_train_from_the_command_line(tmp_path, capsys):
    small = ["data.train=1", "data.validation=1", "data.test=2", f"data.cache={tmp_path}/clips"]
    small += ["steps=2", "batch_size=2", "projector.projector_hidden_dim=4", "mixed_precision=no"]
    run = ["bridge-train", *small, f"hydra.run.dir={tmp_path}/run"]
    asked = ["evaluate=true", "controls=[shuffled,router,lora]", "videos=2"]
    assert cli.run([*run, *asked, "model.steps=2"]) == 0
    said = capsys.readouterr().out
    assert "P1" in said and "parameters" in said
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"bridge.safetensors", "losses.png", "losses.jsonl", "clips.safetensors"} <= names
    assert {"evaluation-wan.json", "evaluation-wan.md", "config.yaml"} <= names
    told = json.loads((tmp_path / "run" / "evaluation-wan.json").read_text())
    videos = json.loads((tmp_path / "run" / "videos-wan.json").read_text())
    assert videos.keys() == told["rows"].keys() and len(videos["target alone"]) == 2
    scores = {"colour", "shape", "direction", "all", "psnr", "latent"}
    assert all(set(one) == scores for found in videos.values() for one in found)
    assert videos["0|shuffled"] != videos["0|bridge"]
    assert {"videos-wan.md", "videos-wan.png", "controls-wan.safetensors"} <= names
    assert all(row["cost"] > 0 for row in told["rows"].values())
    assert told["domains"] == [d for d in DOMAINS for _ in range(2)]
    assert set(told["verdict"]) == {"P1", "P2", "P3"}
    header = read_header(tmp_path / "run" / "bridge.safetensors")
    assert header.ways == ("wan",) and header.ends["chrono"].model == "tiny_chronoedit"
    generate = ["generate", "model=tiny_i2v", f"+bridge={tmp_path}/run", "num_frames=29", "steps=2"]
    assert cli.run([*generate, f"hydra.run.dir={tmp_path}/video"]) == 0
    metrics = json.loads((tmp_path / "video" / "metrics.json").read_text())
    assert metrics["video"][0]["bridge"]["source_forwards"] == 4
    assert metrics["video"][0]["bridge"]["cost"] == 2.0
    # The bridge's own controls stand beside it in ab-test, each with its cost.
    compare = ["ab-test", "model=tiny_i2v", f"+bridge={tmp_path}/run", "num_frames=29"]
    compare += ["steps=2", "cache=none"]
    folder = [f"baseline.folder={tmp_path}/base", f"hydra.run.dir={tmp_path}/ab"]
    words = "prompt=['the star moves left and becomes yellow','it becomes a circle']"
    assert cli.run([*compare, *folder, words, "controls=1"]) == 0
    report = json.loads((tmp_path / "ab" / "report.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == [
        "none", "bridge", "shuffled source", "source alone", "output averaging",
        "timestep switching", "weight average", "output router", "LoRA of equal size",
        "more steps", "noise floor",
    ]  # fmt: skip
    ratios = {name: row["compute_ratio"] for name, row in rows.items()}
    half = {"bridge", "shuffled source", "output averaging", "output router", "more steps"}
    assert {name for name, ratio in ratios.items() if ratio == 0.5} == half
    assert all(ratio == 1 for name, ratio in ratios.items() if name not in half)
    assert rows["more steps"]["steps"] == 4 and not rows["bridge"]["identical"]
    assert rows["shuffled source"]["psnr"]["mean"] != rows["bridge"]["psnr"]["mean"]
    assert all(row["obeyed"] is not None for row in rows.values())
    assert {d["key"] for d in report["difference"]} >= {"bridge.path", "bridge.fusion.branches"}
    assert any("P1" in note for note in report["notes"])
    assert "as asked" in capsys.readouterr().out


def test_a_folder_of_videos_and_the_latents_of_an_earlier_run(tmp_path, capsys):
    for domain in ("motion", "composite"):
        (tmp_path / "videos" / domain).mkdir(parents=True)
        for number in range(3):
            clip = draw_clip(domain, np.random.default_rng(number))
            file = tmp_path / "videos" / domain / f"{number}.mp4"
            write_mp4(file, clip.frames / 255, fps=16)
            file.with_suffix(".txt").write_text(clip.scene.caption)
    run = ["bridge-train", "data=folder", f"data.path={tmp_path}/videos", "data.wan_domain=motion"]
    small = ["steps=1", "batch_size=2", "projector=weighted", "mixed_precision=no", "videos=2"]
    small += ["model.steps=1"]
    assert cli.run([*run, *small, f"hydra.run.dir={tmp_path}/run"]) == 0
    told = json.loads((tmp_path / "run" / "evaluation-wan.json").read_text())
    assert sorted(told["domains"]) == ["composite", "motion"]
    videos = json.loads((tmp_path / "run" / "videos-wan.json").read_text())["target alone"]
    assert all(set(video) == {"psnr", "latent"} for video in videos)  # captions of any world
    data = ["data=latents", f"data.path={tmp_path}/run/clips.safetensors", "data.wan_domain=motion"]
    assert cli.run(["bridge-train", *data, *small, f"hydra.run.dir={tmp_path}/again"]) == 0
    again = json.loads((tmp_path / "again" / "evaluation-wan.json").read_text())
    assert again["rows"]["target alone"]["losses"] == told["rows"]["target alone"]["losses"]
    (tmp_path / "videos" / "motion" / "2.mp4").write_bytes(b"nothing")
    assert cli.run([*run, *small, f"hydra.run.dir={tmp_path}/broken"]) == 2
    assert "data.path: cannot read" in capsys.readouterr().err
    (tmp_path / "videos" / "motion" / "1.txt").unlink()
    assert cli.run([*run, *small, f"hydra.run.dir={tmp_path}/none"]) == 2
    assert "1.mp4 has no caption 1.txt beside it" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
