"""Published transformers under diffusers' names: on state dicts with the real names and shapes, on
the meta device, and with real numbers in small.
"""

import json

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel

import ditcache
from ditcache.errors import DitcacheError
from ditcache.models.causal import Weights
from ditcache.models.checkpoints import (
    fill,
    load_transformer,
    merge_lora,
    plain_names,
    read_state,
    to_diffusers,
)

SIZES = {"1.3B": (1536, 12, 8960, 30, 825, 1.419e9), "14B": (5120, 40, 13824, 40, 1095, 14.288e9)}
SMALL = (48, 2, 64, 3)


def published_shapes(width, heads, ffn, layers, text=4096, freq=256):
    """Names and shapes of Wan's own code, one by one."""
    square, vector = (width, width), (width,)
    shapes = {
        "patch_embedding.weight": (width, 16, 1, 2, 2),
        "patch_embedding.bias": vector,
        "text_embedding.0.weight": (width, text),
        "text_embedding.0.bias": vector,
        "text_embedding.2.weight": square,
        "text_embedding.2.bias": vector,
        "time_embedding.0.weight": (width, freq),
        "time_embedding.0.bias": vector,
        "time_embedding.2.weight": square,
        "time_embedding.2.bias": vector,
        "time_projection.1.weight": (6 * width, width),
        "time_projection.1.bias": (6 * width,),
        "head.head.weight": (64, width),
        "head.head.bias": (64,),
        "head.modulation": (1, 2, width),
    }
    for i in range(layers):
        for kind in ("self_attn", "cross_attn"):
            for part in "qkvo":
                shapes[f"blocks.{i}.{kind}.{part}.weight"] = square
                shapes[f"blocks.{i}.{kind}.{part}.bias"] = vector
            shapes[f"blocks.{i}.{kind}.norm_q.weight"] = vector
            shapes[f"blocks.{i}.{kind}.norm_k.weight"] = vector
        shapes[f"blocks.{i}.norm3.weight"] = shapes[f"blocks.{i}.norm3.bias"] = vector
        shapes[f"blocks.{i}.ffn.0.weight"], shapes[f"blocks.{i}.ffn.0.bias"] = (ffn, width), (ffn,)
        shapes[f"blocks.{i}.ffn.2.weight"], shapes[f"blocks.{i}.ffn.2.bias"] = (width, ffn), vector
        shapes[f"blocks.{i}.modulation"] = (1, 6, width)
    return shapes


def transformer(width, heads, ffn, layers, **more):
    with init_empty_weights():
        return WanTransformer3DModel(
            num_attention_heads=heads,
            attention_head_dim=width // heads,
            ffn_dim=ffn,
            num_layers=layers,
            cross_attn_norm=True,
            **more,
        )


PREFIXES = (
    "",
    "model.",
    "model._fsdp_wrapped_module.",
    "module.model.",
    "net.",
    "model.diffusion_model.",
    "_orig_mod.",
)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_every_name_finds_its_place(size, prefix):
    *shape, count, parameters = SIZES[size]
    state = {
        prefix + name.replace(".self_attn", "._checkpoint_wrapped_module.self_attn"): torch.empty(
            s, device="meta"
        )
        for name, s in published_shapes(*shape).items()
    }
    assert len(state) == count
    assert sum(x.numel() for x in state.values()) == pytest.approx(parameters, rel=1e-3)
    model = transformer(*shape)
    fill(model, to_diffusers(plain_names(state)), torch.bfloat16)
    assert model.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert (
        model.blocks[0].norm2.weight.dtype
        == model.blocks[0].scale_shift_table.dtype
        == torch.float32
    )
    if prefix == "model.":  # the pitfall: as it is, not one name fits
        names = set(model.state_dict())
        assert not names & set(to_diffusers(state))


def test_what_does_not_fit_is_listed():
    shapes = published_shapes(*SIZES["1.3B"][:4])
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    del state["blocks.3.self_attn.q.weight"]
    state["blocks.30.ffn.0.bias"] = torch.empty(8960, device="meta")
    state["head.head.bias"] = torch.empty(48, device="meta")
    with pytest.raises(DitcacheError) as error:
        fill(transformer(*SIZES["1.3B"][:4]), to_diffusers(state), torch.float32)
    text = str(error.value)
    assert "(825 tensors)" in text and "\n" not in text
    assert r"1 missing: blocks.3.attn1.to_q.weight" in text
    assert r"1 unexpected: blocks.30.ffn.net.0.proj.bias" in text
    assert r"1 of another shape: proj_out.bias (48,) for (64,)" in text
    with pytest.raises(DitcacheError, match=r"of another shape: .* \.\.\. \(\d+ more\)"):
        other = {
            n: torch.empty(s, device="meta") for n, s in published_shapes(*SIZES["14B"][:4]).items()
        }
        fill(transformer(*SIZES["1.3B"][:4]), to_diffusers(other), torch.float32)


def numbers(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = published_shapes(*SMALL, text=64, freq=32)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def folder(tmp_path):
    """A pipeline's folder, as far as its transformer's configuration."""
    small = transformer(*SMALL, text_dim=64, freq_dim=32)
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(dict(small.config)))
    return tmp_path


def test_a_pt_file_with_ema_and_lora(folder):
    """As LongLive's: numbers arrive, swapped norms included, and the update is added."""
    state, generator = numbers(), torch.Generator().manual_seed(9)
    lora, targets = (
        {},
        [
            n[:-7]
            for n in state
            if n.startswith("blocks") and n.endswith((".q.weight", ".0.weight"))
        ],
    )
    for name in targets:
        rows, columns = state[f"{name}.weight"].shape
        lora[f"base_model.model.model.{name}.lora_A.default.weight"] = torch.randn(
            4, columns, generator=generator
        )
        lora[f"base_model.model.model.{name}.lora_B.default.weight"] = torch.randn(
            rows, 4, generator=generator
        )
    torch.save(
        {"generator": {f"model.{k}": v for k, v in state.items()}, "step": 3}, folder / "base.pt"
    )
    torch.save({"generator_lora": lora}, folder / "lora.pt")
    weights = Weights(
        str(folder), "base.pt", ["generator_ema", "generator"], "lora.pt", "generator_lora", 0.5
    )
    model = load_transformer(str(folder), weights, torch.float32)
    name = "blocks.1.self_attn.q"
    update = (
        lora[f"base_model.model.model.{name}.lora_B.default.weight"]
        @ lora[f"base_model.model.model.{name}.lora_A.default.weight"]
    )
    expected = state[f"{name}.weight"] + 0.5 * update
    assert torch.allclose(model.blocks[1].attn1.to_q.weight, expected, atol=1e-6)
    assert torch.equal(model.blocks[1].attn1.to_k.weight, state["blocks.1.self_attn.k.weight"])
    assert torch.equal(model.blocks[2].norm2.weight, state["blocks.2.norm3.weight"])
    assert torch.equal(model.scale_shift_table, state["head.modulation"])
    x = torch.randn(1, 16, 2, 4, 4)
    assert (
        model(x, torch.tensor([5.0]), torch.randn(1, 7, 64), return_dict=False)[0].isfinite().all()
    )


def test_the_command_loads_weights_apart_from_their_pipeline(checkpoints, tmp_path):
    """`model=self_forcing` with local folders, end to end."""
    config = json.loads((checkpoints["wan"] / "transformer" / "config.json").read_text())
    assert config["cross_attn_norm"] and config["num_layers"] == 3
    torch.save({"generator_ema": numbers(4)}, tmp_path / "sf.pt")
    bundle = ditcache.load(
        "self_forcing", path=str(checkpoints["wan"]), device="cpu",
        weights={"path": str(tmp_path), "file": "sf.pt"},
    )  # fmt: skip
    assert bundle.pipe.transformer.dtype == torch.bfloat16
    own = bundle.pipe.transformer.blocks[0].attn1.to_v.weight
    assert torch.equal(own, numbers(4)["blocks.0.self_attn.v.weight"].bfloat16())


def test_files_that_are_something_else(folder):
    torch.save({"critic": {}, "step": 1}, folder / "a.pt")
    with pytest.raises(DitcacheError, match=r"a\.pt has none of generator.*One of: critic, step"):
        read_state(folder / "a.pt", ["generator"])
    with pytest.raises(DitcacheError, match=r"a\.pt is no state dict but holds critic, step"):
        read_state(folder / "a.pt", [])
    (folder / "b.pt").write_bytes(b"nothing")
    with pytest.raises(DitcacheError, match=r"cannot read .*b\.pt"):
        read_state(folder / "b.pt", [])
    with pytest.raises(DitcacheError, match=r"model\.weights\.file: .* has no c\.pt"):
        load_transformer(str(folder), Weights(str(folder), "c.pt"), torch.float32)
    with pytest.raises(
        DitcacheError, match=r"cannot get x\.pt of no/where.*set model\.weights\.path"
    ):
        load_transformer(str(folder), Weights("no/where", "x.pt"), torch.float32)


def test_code_in_a_file_is_not_run(folder):
    torch.save({"generator": print}, folder / "code.pt")
    with pytest.raises(DitcacheError, match=r"cannot read .*code\.pt"):
        read_state(folder / "code.pt", ["generator"])


def test_lora_without_partners():
    state = {"a.weight": torch.zeros(2, 2)}
    for lora in (
        {"a.lora_A.weight": torch.zeros(1, 2)},
        {"b.lora_A.weight": torch.zeros(1, 2), "b.lora_B.weight": torch.zeros(2, 1)},
        {"a.alpha": torch.ones(1)},
        {},
    ):
        with pytest.raises(
            DitcacheError, match=r"model\.weights\.lora: .* have no partner or no weight"
        ):
            merge_lora(state, lora, 1.0)
    assert not state["a.weight"].any()
