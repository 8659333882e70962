"""Models with two streams and two lists of blocks, and models nobody described: tiny random
instances of diffusers' own classes.
"""

import diffusers
import pytest
import torch
from torch import nn

import ditcache
from ditcache.cache.cfg.delta import CfgDelta
from ditcache.errors import ConfigError, DitcacheError
from ditcache.models.base import layout_of, layouts

STEPS, TOKENS, TEXT = 6, 16, 5  # picture tokens, text tokens


def flux():
    model = diffusers.FluxTransformer2DModel(
        in_channels=8,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=12,
        axes_dims_rope=(4, 6, 6),
    )
    return model, {
        "hidden_states": (1, TOKENS, 8),
        "encoder_hidden_states": (1, TEXT, 24),
        "pooled_projections": (1, 12),
        "img_ids": torch.zeros(TOKENS, 3),
        "txt_ids": torch.zeros(TEXT, 3),
    }


def longcat():
    model = diffusers.LongCatImageTransformer2DModel(
        in_channels=8,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=[4, 6, 6],
    )
    return model, {
        "hidden_states": (1, TOKENS, 8),
        "encoder_hidden_states": (1, TEXT, 24),
        "img_ids": torch.zeros(TOKENS, 3),
        "txt_ids": torch.zeros(TEXT, 3),
    }


def hunyuan():
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=3,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=False,
        text_embed_dim=24,
        pooled_projection_dim=12,
        rope_axes_dim=(4, 6, 6),
    )
    return model, {
        "hidden_states": (1, 4, 2, 8, 4),
        "encoder_hidden_states": (1, TEXT, 24),
        "encoder_attention_mask": torch.ones(1, TEXT),
        "pooled_projections": (1, 12),
    }


def qwen():
    model = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=8,
        out_channels=2,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
    )
    return model, {
        "hidden_states": (1, TOKENS, 8),
        "encoder_hidden_states": (1, TEXT, 24),
        "encoder_hidden_states_mask": torch.ones(1, TEXT, dtype=torch.bool),
        "img_shapes": [(1, 4, 4)],
    }


def sd3():
    model = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=12,
        out_channels=4,
        pos_embed_max_size=8,
    )
    return model, {
        "hidden_states": (1, 4, 8, 8),
        "encoder_hidden_states": (1, TEXT, 24),
        "pooled_projections": (1, 12),
    }


MODELS = {"flux": flux, "longcat": longcat, "hunyuan": hunyuan, "qwen": qwen, "sd3": sd3}
EXACT = {
    "interval": {"every": 1},
    "taylorseer": {"every": 1},
    "fbcache": {"threshold": 0.0},
    "dbcache": {"threshold": 0.0, "back": 1, "front": 1},
    "dicache": {"threshold": 0.0},
    "easycache": {"threshold": 0.0},
    "cfg_delta": {"cfg": CfgDelta(every=1)},
}
SKIPPING = {
    "interval": {"every": 2},
    "taylorseer": {"every": 2},
    "fbcache": {"threshold": 9.0, "max_skips": 1},
    "dbcache": {"threshold": 9.0, "back": 1, "front": 1, "max_skips": 1},
    "dicache": {"threshold": 9.0, "max_skips": 1},
    "easycache": {"threshold": 9.0, "max_skips": 1},
    "cfg_delta": {"cfg": CfgDelta(every=2)},
}


class Case:
    """A model and a run of it over six steps; inputs given as shapes change from step to step."""

    def __init__(self, name):
        torch.manual_seed(0)
        self.model, self.inputs = MODELS[name]()
        self.model.eval()

    def inputs_at(self, step, branch):
        generator, found = torch.Generator().manual_seed(1), {}
        for name, value in self.inputs.items():
            if isinstance(value, tuple):
                fixed, moving = (torch.randn(value, generator=generator) for _ in range(2))
                share = 0.1 * step if name == "hidden_states" else 0.0
                found[name] = fixed + share * moving
                if branch == "uncond" and name != "hidden_states":
                    found[name] = -found[name]
            else:
                found[name] = value
        return found

    @torch.no_grad()
    def run(self, cache=None):
        """Outputs per branch and step."""
        outputs = []
        for step in range(STEPS):
            for branch in ("cond", "uncond"):
                call = {**self.inputs_at(step, branch), "timestep": torch.tensor([1 - step / 10])}
                if cache is None:
                    outputs.append(self.model(**call, return_dict=False)[0])
                    continue
                with cache.at(branch, step, STEPS, sigma=1 - step / 10):
                    outputs.append(self.model(**call, return_dict=False)[0])
        return outputs


@pytest.fixture(params=MODELS)
def case(request):
    case = Case(request.param)
    yield case
    ditcache.disable_cache(case.model)


@pytest.mark.parametrize("policy", EXACT)
@pytest.mark.parametrize("granularity", ["stack", "per_block"])
def test_nothing_skipped_nothing_changed(case, policy, granularity):
    plain = case.run()
    state = {name: value.clone() for name, value in case.model.state_dict().items()}
    cache = ditcache.enable_cache(case.model, policy, granularity=granularity, **EXACT[policy])
    for _ in range(2):
        assert all(map(torch.equal, case.run(cache), plain))
    assert cache.store.stats()["bytes"] == 0
    assert all(torch.equal(case.model.state_dict()[name], value) for name, value in state.items())
    ditcache.disable_cache(case.model)
    assert all(map(torch.equal, case.run(), plain))


@pytest.mark.parametrize("policy", SKIPPING)
@pytest.mark.parametrize("granularity", ["stack", "per_block"])
def test_reuse_is_near_and_repeatable(case, policy, granularity):
    plain = case.run()
    knobs = {"head": 1, "granularity": granularity, **SKIPPING[policy]}
    cache = ditcache.enable_cache(case.model, policy, **knobs)
    first, second = case.run(cache), case.run(cache)
    assert all(map(torch.equal, first, second))
    skipped = [d for d in cache.trace.decisions if not d.computed]
    assert skipped and {d.unit for d in skipped} == {d.unit for d in cache.trace.decisions}
    for a, b in zip(first, plain, strict=True):
        assert a.isfinite().all() and (a - b).norm() < 0.5 * b.norm()
    assert any(not torch.equal(a, b) for a, b in zip(first, plain, strict=True))


def test_a_skip_adds_the_residual_of_both_streams(case):
    """Between the first block and the last, which always run, a skipped step adds what the step
    before added: to the picture's tokens and to the text's.
    """
    first, last = layout_of(case.model)[0], layout_of(case.model)[-1]
    into, out_of = [], []  # cond and uncond in turns

    def before(module, args, kwargs):
        named = dict(zip(("hidden_states", "encoder_hidden_states"), args, strict=False)) | kwargs
        into.append({"hidden": named["hidden_states"], "text": named["encoder_hidden_states"]})

    def after(module, args, output):
        out_of.append(dict(zip(first.returns, output, strict=True)))

    case.model.get_submodule(last.path)[-1].register_forward_pre_hook(before, with_kwargs=True)
    case.model.get_submodule(first.path)[0].register_forward_hook(after)
    cache = ditcache.enable_cache(
        case.model, "dbcache", threshold=9.0, front=1, back=1, head=1, max_skips=1
    )
    case.run(cache)
    cond = [d.computed for d in cache.trace.decisions if (d.branch, d.unit) == ("cond", 0)]
    assert cond[:3] == [True, False, True]
    for stream in ("hidden", "text"):
        added = into[0][stream] - out_of[0][stream]
        assert added.abs().max() > 1e-3
        assert torch.allclose(into[2][stream], out_of[2][stream] + added, atol=1e-5)


def test_poisoned_uncond_leaves_cond_alone(case):
    cache = ditcache.enable_cache(case.model, "fbcache", head=1, **SKIPPING["fbcache"])
    clean = case.run(cache)
    inputs_at = case.inputs_at

    def poisoned(step, branch):
        found = inputs_at(step, branch)
        if branch == "uncond":
            found["encoder_hidden_states"] = found["encoder_hidden_states"] * float("nan")
        return found

    case.inputs_at = poisoned
    with pytest.warns(UserWarning, match="not finite"):
        spoilt = case.run(cache)
    assert all(map(torch.equal, spoilt[::2], clean[::2]))
    assert not any(out.isfinite().all() for out in spoilt[1::2])


def test_bytes_are_those_of_both_streams(case):
    cache = ditcache.enable_cache(case.model, "interval", every=2, head=1)
    case.run(cache)
    first = case.model.get_submodule(layout_of(case.model)[0].path)[0]
    width = 32
    assert isinstance(first, nn.Module)
    held = {d.nbytes for d in cache.trace.decisions if d.step == 1}
    assert held == {(TOKENS + TEXT) * width * 4}


def test_what_makes_no_sense_is_refused(case):
    with pytest.raises(DitcacheError, match="output forecasts what one list of blocks"):
        ditcache.enable_cache(case.model, "interval", granularity="output")
    with pytest.raises(ConfigError, match="no polynomial"):
        ditcache.enable_cache(case.model, "teacache")
    cache = ditcache.enable_cache(case.model, "seacache")
    if case.inputs_at(0, "cond")["hidden_states"].dim() == 3:
        with pytest.raises(ConfigError, match="packs them as"):
            case.run(cache)
    else:
        assert case.run(cache)


def test_blocks_that_are_not_all_alike_are_refused():
    case = Case("flux")
    cache = ditcache.enable_cache(case.model, "interval")
    call = {**case.inputs_at(0, "cond"), "timestep": torch.ones(1)}
    samples = [torch.zeros(1, TOKENS, 32)]
    with (
        cache.at("cond", 0, STEPS),
        pytest.raises(DitcacheError, match="does not work with controlnet_block_samples"),
    ):
        case.model(**call, controlnet_block_samples=samples)


def test_subclasses_are_found_by_their_base():
    class Mine(diffusers.FluxTransformer2DModel):
        pass

    assert layout_of(Mine.__new__(Mine)) == layouts()["FluxTransformer2DModel"]


class Layer(nn.Module):
    """As in language models: a tuple around the hidden states."""

    def __init__(self, returns="tuple"):
        super().__init__()
        self.linear, self.returns = nn.Linear(8, 8), returns

    def forward(self, hidden_states, mask=None):
        out = hidden_states + 0.1 * torch.tanh(self.linear(hidden_states))
        return {"tuple": (out,), "pair": (out, hidden_states), "tensor": out}.get(
            self.returns, out[..., :4]
        )


class Unknown(nn.Module):
    """A backbone nobody described; iterates a slice of its layers, as language models do."""

    def __init__(self, returns="tuple", whole=True):
        super().__init__()
        inner = nn.Module()
        inner.layers = nn.ModuleList(Layer(returns) for _ in range(4))
        self.language_model = nn.Module()
        self.language_model.model, self.whole = inner, whole

    def forward(self, hidden_states, timestep=None):
        layers = self.language_model.model.layers
        for layer in layers[: len(layers)] if self.whole else [layers[i] for i in range(4)]:
            out = layer(hidden_states, mask=None)
            hidden_states = out[0] if isinstance(out, tuple) else out
        return hidden_states


PATH = "language_model.model.layers"


def unknown_run(model, cache=None):
    outputs = []
    for step in range(STEPS):
        hidden = torch.ones(1, 3, 8) * (1 + 0.1 * step)
        if cache is None:
            outputs.append(model(hidden))
        else:
            with cache.at("cond", step, STEPS):
                outputs.append(model(hidden))
    return outputs


@torch.no_grad()
@pytest.mark.parametrize("returns", ["tuple", "tensor"])
def test_a_block_list_may_be_named(returns):
    model = Unknown(returns)
    plain = unknown_run(model)
    cache = ditcache.enable_cache(model, "fbcache", threshold=0.0, blocks=PATH)
    assert all(map(torch.equal, unknown_run(model, cache), plain))
    ditcache.disable_cache(model)
    cache = ditcache.enable_cache(model, "fbcache", threshold=9.0, head=1, blocks=PATH)
    outputs = unknown_run(model, cache)
    ditcache.disable_cache(model)
    assert not torch.equal(outputs[1], plain[1]) and torch.allclose(outputs[1], plain[1], atol=0.1)
    assert all(map(torch.equal, unknown_run(model), plain))


@torch.no_grad()
def test_a_named_list_that_does_not_fit_is_an_error():
    with pytest.raises(DitcacheError, match=r"not a model ditcache knows\..*name its block list"):
        ditcache.enable_cache(Unknown(), "interval")
    with pytest.raises(DitcacheError, match=f"'layers' is not there. .*{PATH}"):
        ditcache.enable_cache(Unknown(), "interval", blocks="layers")
    with pytest.raises(DitcacheError, match="is no list of blocks"):
        ditcache.enable_cache(Unknown(), "interval", blocks="language_model.model")
    for returns in ("pair", "half"):
        model = Unknown(returns)
        cache = ditcache.enable_cache(model, "interval", blocks=PATH)
        with pytest.raises(DitcacheError, match=f"Layer in {PATH} returns"):
            unknown_run(model, cache)
    model = Unknown(whole=False)
    cache = ditcache.enable_cache(model, "interval", blocks=PATH)
    with pytest.raises(DitcacheError, match="went through none of the blocks"):
        unknown_run(model, cache)
