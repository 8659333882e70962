"""The rollout loop on small random models: against recomputing the past, and what may not matter."""

import pytest
import torch

import ditcache
from ditcache.cache.policies.interval import Interval
from ditcache.cache.settings import CacheSettings, read_settings
from ditcache.errors import ConfigError
from ditcache.kv.oracle import band, masked_forward
from ditcache.kv.settings import KVSettings
from ditcache.models.attention import open_self_attention, rotate
from ditcache.pipeline.chunks import Noise, ceiling, partition, warped
from ditcache.pipeline.denoise import decode_latents
from ditcache.pipeline.rollout import Recipe, rollout
from ditcache.pipeline.stepping import check_step_cache
from ditcache.pipeline.streaming import StreamDecoder, encode_picture
from ditcache.pipeline.text import TextStates

STEPS = tuple(warped([1000, 750, 500, 250], 5.0))
SIDE = 32  # pixels: 4 latents, 4 tokens a frame
EVERYTHING = KVSettings(window=None)


@pytest.fixture(scope="module")
def causal(checkpoints):
    return ditcache.load(
        "self_forcing", path=str(checkpoints["wan"]), weights=None, device="cpu", dtype="float32"
    )


@pytest.fixture(scope="module")
def experts(checkpoints):
    path = str(checkpoints["wan2.2_t2v"])
    return ditcache.load("sfwan2.2", path=path, device="cpu", dtype="float32")


def text(seed=0):
    both = [
        torch.randn(1, 20, 64, generator=torch.Generator().manual_seed(seed + i)) for i in (0, 50)
    ]
    return TextStates(*both)


def run(bundle, lengths=(3, 3, 3, 3), texts=None, start=None, **more):
    recipe = Recipe(**{"lengths": lengths, "timesteps": STEPS, "kv": EVERYTHING, **more})
    texts = {0: text()} if texts is None else texts
    return list(rollout(bundle, recipe, texts, height=SIDE, width=SIDE, start=start))


def video(chunks):
    return torch.cat([chunk.latents for chunk in chunks], dim=2)


def test_partition():
    assert partition(12, 3) == [3, 3, 3, 3]
    assert partition(12, 3, 1) == [1, 3, 3, 3, 2]
    assert partition(2, 3) == [2] and partition(4, 3, 6) == [4] and partition(7, 8, 1) == [1, 6]


def test_warped_timesteps():
    assert warped([1000, 750, 500, 250], 5) == pytest.approx([1000, 937.5, 833.333, 625], abs=1e-3)
    assert warped([1000, 750, 500, 250], 8) == pytest.approx([1000, 960, 888.89, 727.27], abs=1e-2)
    assert warped([1000, 800, 600, 400, 200], 5) == pytest.approx(
        [1000, 952.38, 882.35, 769.23, 555.56], abs=1e-2
    )


def test_noise_depends_on_seed_frame_and_step_alone():
    def drawn(lengths, seed=1):
        noise = Noise(seed, 2, (16, 3, 3))
        return torch.cat([torch.cat([noise.draw(0, n), noise.draw(1, n)]) for n in lengths], dim=2)

    assert torch.equal(drawn([3, 3]), drawn([1, 3, 2]))
    assert not torch.equal(drawn([3]), drawn([3], seed=2))
    frames = drawn([3, 3])
    flat = frames.transpose(1, 2).flatten(0, 1).flatten(1)
    assert len({tuple(frame[:4].tolist()) for frame in flat}) == 12  # no frame twice
    assert abs(frames.mean()) < 0.1 and abs(frames.std() - 1) < 0.1


@torch.no_grad()
@pytest.mark.parametrize(("window", "sink"), [(None, 0), (6, 0), (7, 1)])
def test_against_one_masked_forward_per_step(causal, window, sink):
    """The loop written anew without a cache: every step runs over the whole video so far, its past
    clean at t=0, its newest chunk noisy, under the banded mask.
    """
    lengths, past, noise = [1, 3, 3, 2], [], Noise(0, 4, (16, 4, 4))
    transformer = causal.pipe.transformer
    for index, length in enumerate(lengths):
        x = noise.draw(0, length).double()
        mask = band(lengths[: index + 1], window, sink)
        for step, t in enumerate(STEPS):
            whole = torch.cat([*past, x], dim=2)
            times = torch.zeros(whole.shape[2])
            times[-length:] = t
            v = masked_forward(transformer, whole.float(), times, text().cond, mask)
            clean = x - t / 1000 * v[:, :, -length:].double()
            if step < 3:
                s = STEPS[step + 1] / 1000
                x = (1 - s) * clean + s * noise.draw(step + 1, length).double()
        past.append(clean)
    kv = KVSettings(window, sink)
    cached = video(run(causal, lengths, kv=kv))
    assert (cached - torch.cat(past, 2).float()).abs().max() <= 2e-5
    blind = video(run(causal, lengths, kv=KVSettings(window=3)))
    assert (cached - blind).abs().max() >= 1e-2


def test_its_length_does_not_matter_to_what_was_before(causal):
    long, short = run(causal), run(causal, (3, 3))
    for one, other in zip(long[:2], short, strict=True):
        assert torch.equal(one.latents, other.latents)
    assert [c.forwards for c in long] == [5, 5, 5, 4]  # no clean pass after the last


def test_going_on_from_given_latents(causal):
    """From whole chunks, bit for bit; they come first, marked as given."""
    whole = run(causal)
    going_on = run(causal, start=video(whole[:2]))
    assert [chunk.given for chunk in going_on] == [True, True, False, False]
    assert [chunk.forwards for chunk in going_on] == [1, 1, 5, 4]
    assert torch.equal(video(whole), video(going_on))
    with pytest.raises(
        ConfigError, match="start: 4 latent frames end within chunk 1, which is 3 to 6"
    ):
        run(causal, start=video(whole)[:, :, :4])


def test_a_switch_of_prompt_with_recache_is_a_fresh_encode(causal):
    """As if what is in the window had been given under the new prompt from the start."""
    texts = {0: text(), 2: text(5)}
    switched = run(causal, texts=texts)
    fresh = run(causal, texts={0: text(5)}, start=video(switched[:2]))
    assert torch.equal(video(switched), video(fresh))
    assert [chunk.recached for chunk in switched] == [0, 0, 6, 0]
    kept = run(causal, texts=texts, recache=False)
    assert torch.equal(video(switched[:2]), video(kept[:2]))
    same = run(causal)
    assert (switched[2].latents - kept[2].latents).abs().max() > 1e-3
    assert (same[2].latents - kept[2].latents).abs().max() > 1e-3


@pytest.mark.parametrize(("window", "sink", "held"), [(6, 0, 6), (7, 2, 7), (5, 0, 5)])
def test_recache_encodes_what_the_window_holds(causal, window, sink, held):
    chunks = run(causal, (3,) * 5, {0: text(), 4: text(5)}, kv=KVSettings(window, sink))
    assert chunks[4].recached == held
    assert sum(chunk.evicted for chunk in chunks) == 15 - window


def test_recomputing_the_window_is_the_clean_pass_while_nothing_is_evicted(causal):
    clean = run(causal, kv=KVSettings(window=12))
    again = run(causal, kv=KVSettings(window=12), context="recompute")
    assert torch.equal(video(clean), video(again))
    assert [chunk.forwards for chunk in again] == [4, 5, 6, 7]
    short = [run(causal, kv=KVSettings(window=6), context=c) for c in ("clean", "recompute")]
    assert (video(short[0]) - video(short[1])).abs().max() > 1e-4
    assert [chunk.forwards for chunk in short[1]] == [4, 5, 5, 5]


def test_guidance_keeps_two_caches(causal):
    guided = run(causal, guidance=3.0)
    assert [chunk.forwards for chunk in guided] == [10, 10, 10, 8]
    assert guided[0].kv_bytes == 2 * run(causal)[0].kv_bytes
    assert (video(guided) - video(run(causal))).abs().max() > 1e-3
    same = TextStates(text().cond, text().cond)
    assert (
        video(run(causal, texts={0: same}, guidance=3.0)) - video(run(causal))
    ).abs().max() < 1e-5


def test_two_experts_append_on_their_own_first_forward_and_both_get_a_clean_pass(experts):
    steps = tuple(warped([1000, 850, 700, 550, 350, 275, 200, 125], 12.0))
    assert sum(t >= 875 for t in steps) == 4
    calls, handles = [], []
    for name, transformer in experts.experts.items():
        handles.append(
            transformer.register_forward_pre_hook(
                lambda module, args, kwargs, name=name: calls.append(
                    (name, float(kwargs["timestep"]))
                ),
                with_kwargs=True,
            )
        )
    chunks = run(experts, (1, 3, 3), timesteps=steps)
    for handle in handles:
        handle.remove()
    assert [chunk.forwards for chunk in chunks] == [10, 10, 8]
    names = [name for name, _ in calls[:10]]
    assert names == ["transformer"] * 4 + ["transformer_2"] * 4 + ["transformer", "transformer_2"]
    assert [t for _, t in calls[8:10]] == [0, 0]
    assert all(
        not block.attn1.processor.__class__.__module__.startswith("ditcache")
        for block in experts.pipe.transformer.blocks
    )


def test_relative_positions_have_no_end(causal):
    """64 rows in the table, 84 latent frames."""
    kv = KVSettings(6, 3, "relative")
    chunks = run(causal, (3,) * 28, kv=kv, timesteps=(1000.0,))
    assert video(chunks).isfinite().all() and chunks[-1].start == 81
    sizes = {chunk.kv_bytes for chunk in chunks}
    assert len(sizes) == 1
    with pytest.raises(ValueError, match=r"latent frame 6\d is past the end"):
        run(causal, (3,) * 28, kv=KVSettings(6, 3), timesteps=(1000.0,))


def decibel(exact, coded):
    return float(10 * (exact.square().mean() / (exact - coded).square().mean()).log10())


def test_quantised_keys_and_values(bundle):
    """On trained weights: >= 40 dB for int8, of what every block attends to."""
    transformer = bundle.pipe.transformer
    latents = torch.randn(1, 16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    states, kept = torch.randn(1, 20, 64, generator=torch.Generator().manual_seed(1)), []

    def key_value(block):
        def keep(key, value, rotary):
            kept.append((rotate(key, rotary), value))
            return kept[-1]

        return keep

    with torch.no_grad(), open_self_attention(transformer, key_value):
        transformer(latents, torch.tensor([0.0]), states, return_dict=False)
    from ditcache.kv.codec import Int4, Int8

    for kind, least in ((Int8, 40), (Int4, 18)):
        for exact in (x for pair in kept for x in pair):
            coded, out = kind(exact, exact.shape[1]), torch.empty_like(exact)
            for part, codes in zip(coded.parts, coded.encode(exact), strict=True):
                part.copy_(codes)
            coded.decode(slice(None), out)
            assert decibel(exact, out) >= least, kind
    one, other = (run_tiny(bundle, KVSettings(9, codec=codec)) for codec in ("none", "int8"))
    assert decibel(video(one), video(other)) >= 30
    assert other[-1].kv_bytes < 0.75 * one[-1].kv_bytes


def run_tiny(bundle, kv):
    recipe = Recipe(lengths=(3,) * 4, timesteps=STEPS, kv=kv)
    states = TextStates(text().cond, None)
    return list(rollout(bundle, recipe, {0: states}, height=64, width=64))


def skipping(every=100, **more):
    return CacheSettings(**{"policy": Interval(every=every), "head": 1, "tail": 0, **more})


@pytest.mark.parametrize("granularity", ["stack", "per_block", "output"])
def test_a_step_cache_never_skips_the_append_nor_the_clean_pass(causal, granularity):
    """With all that may be skipped skipped, the next chunk still sees keys and values of the clean
    latents: those that a fresh encode of them has.
    """
    chunks = run(causal, cache=skipping(granularity=granularity))
    for chunk in chunks:
        computed = {d.step for d in chunk.trace.decisions if d.computed}
        assert computed == {0} and len({d.step for d in chunk.trace.decisions}) == 4
    assert (video(chunks) - video(run(causal))).abs().max() > 1e-3
    again = run(causal, start=video(chunks[:3]), cache=skipping(granularity=granularity))
    assert torch.equal(again[3].latents, chunks[3].latents)


def test_a_step_cache_that_computes_everything_changes_nothing(causal):
    exact = run(causal)
    assert torch.equal(video(exact), video(run(causal, cache=skipping(every=1))))


@pytest.mark.parametrize(
    "policy",
    ["fbcache", "dbcache", "easycache", "seacache", "dicache", "interval", "taylorseer", "scm"],
)
def test_policies_within_chunks(causal, policy):
    """State is new for every chunk; dynamic policies decide within one."""
    knobs = {"head": 1, "tail": 0}
    if policy not in ("interval", "taylorseer", "scm"):
        knobs |= {"threshold": 1e9}
    chunks = run(causal, (3, 3), cache=read_settings(policy, None, knobs))
    for chunk in chunks:
        assert chunk.trace.decisions[0].reason == "first"
        assert chunk.trace.blocks_computed < chunk.trace.blocks
    assert video(chunks).isfinite().all()


def test_step_caches_that_cannot_are_refused_with_the_reason(causal):
    for cache, message in (
        (
            read_settings("interval", None, {}),
            r"Interval computes all 4 steps of a chunk.*set cache\.head=1",
        ),
        (read_settings("planned", None, {}), "no plans"),
        (read_settings("teacache", None, {"head": 1}), "calibrat"),
        (skipping(every=1), "computes all 4 steps"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_step_cache(causal, cache, STEPS)
    check_step_cache(causal, skipping(), STEPS)
    check_step_cache(causal, CacheSettings(), STEPS)
    assert (ceiling(4), ceiling(2), ceiling(5)) == (2.5, 1.5, 3.0)


@pytest.mark.parametrize("parts", [(7,), (3, 4), (1, 3, 3), (1,) * 7])
def test_streamed_decoding_is_decoding_at_once(bundle, parts):
    """Bit for bit, also with an encode in between, which clears the VAE's own memory."""
    latents = torch.randn(1, 16, 7, 8, 8, generator=torch.Generator().manual_seed(2))
    whole = decode_latents(bundle, latents)
    decoder, begin, frames = StreamDecoder(bundle), 0, []
    for length in parts:
        frames += list(decoder.decode(latents[:, :, begin : begin + length]))
        begin += length
        if begin == 3:
            bundle.pipe.vae.encode(torch.zeros(1, 3, 1, 64, 64))
    assert len(frames) == len(whole) == 25
    assert all((one == other).all() for one, other in zip(frames, whole, strict=True))


def test_a_picture_becomes_the_first_frame(bundle):
    """Encoded and decoded it is the picture; chunks then go on from it."""
    from PIL import Image

    frames = decode_latents(
        bundle, torch.randn(1, 16, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    )
    picture = Image.fromarray((frames[0] * 255).round().astype("uint8"))
    start = encode_picture(bundle, picture, 64, 64)
    seen = decode_latents(bundle, start)
    assert ((seen[0] - frames[0]) ** 2).mean() < 1e-2
    states = TextStates(text().cond, None)
    recipe = Recipe(lengths=(1, 3), timesteps=STEPS, kv=EVERYTHING)
    chunks = list(rollout(bundle, recipe, {0: states}, height=64, width=64, start=start))
    assert torch.equal(chunks[0].latents, start) and chunks[0].given and not chunks[1].given


def test_an_abandoned_rollout_leaves_the_model_as_it_was(causal):
    before = [block.attn1.processor for block in causal.pipe.transformer.blocks]
    chunks = rollout(
        causal,
        Recipe(lengths=(3, 3), timesteps=STEPS, cache=skipping()),
        {0: text()},
        height=SIDE,
        width=SIDE,
    )
    next(chunks)
    chunks.close()
    assert [block.attn1.processor for block in causal.pipe.transformer.blocks] == before
    assert not causal.pipe.transformer.rope._forward_hooks


def test_what_the_record_says_left_the_window_left_the_cache(causal, monkeypatch):
    from ditcache.pipeline import rollout as loop

    caches = []
    make = loop.make_cache
    monkeypatch.setattr(loop, "make_cache", lambda *a: caches.append(make(*a)) or caches[-1])
    recipe = Recipe(lengths=(3,) * 6, timesteps=STEPS[:2], kv=KVSettings(7, 1))
    left = 0
    for chunk in rollout(causal, recipe, {0: text()}, height=SIDE, width=SIDE):
        left += chunk.evicted
        assert left == caches[0].evicted // 4
    assert left == 11
