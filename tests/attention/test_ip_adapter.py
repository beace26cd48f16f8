"""Image prompts: what diffusers' own processor says with the same weights, and gone without a trace."""

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from gendiff.attention import Grid, Kind, Stage, stack
from gendiff.attention.ip_adapter import IPAdapter
from gendiff.attention.ip_layout import PLAIN
from tests.attention.models import FLUX, SD3, UNET, build, run, said, state
from tests.zoo.core import noise

DIM, EMBED, TOKENS = 12, 10, 4
TWO = Kind.JOINT | Kind.SINGLE
MASKS = torch.zeros(2, 16, 24)
MASKS[0, :, :12], MASKS[1, :, 8:] = 1, 0.5


def published(model) -> dict[str, dict[str, Tensor]]:
    """Weights of the published layout; the layers are numbered as diffusers' loader numbers them."""
    names = [name for name in model.attn_processors if name.endswith("attn2.processor")]
    widths = [model.get_submodule(name.removesuffix(".processor")).to_k.out_features for name in names]
    return {
        "image_proj": {
            "proj.weight": 0.3 * noise(TOKENS * DIM, EMBED),
            "proj.bias": 0.3 * noise(TOKENS * DIM),
            "norm.weight": 1 + 0.1 * noise(DIM),
            "norm.bias": 0.1 * noise(DIM),
        },
        "ip_adapter": {
            f"{2 * i + 1}.to_{part}_ip.weight": 0.3 * noise(width, DIM, seed=i + 100 * (part == "v"))
            for i, width in enumerate(widths)
            for part in "kv"
        },
    }


@pytest.fixture(scope="module")
def unet():
    return build(UNET)


@pytest.fixture(scope="module")
def weights(unet):
    return published(unet)


@pytest.fixture(scope="module")
def theirs(weights):
    """What diffusers says, by embeddings, scales and masks."""
    model = build(UNET)
    model._load_ip_adapter_weights(weights, low_cpu_mem_usage=False)

    def say(embeds, scale, masks=None) -> Tensor:
        for processor in model.attn_processors.values():
            if hasattr(processor, "scale"):
                processor.scale = [scale]
        more = {} if masks is None else {"cross_attention_kwargs": {"ip_adapter_masks": [masks[None]]}}
        with torch.no_grad():
            return run(model, UNET, added_cond_kwargs={"image_embeds": [embeds]}, **more)

    return say


def ours(model, adapter, name=UNET, on=Kind.CROSS, parts=None, **where) -> Tensor:
    with stack(model, rows=parts) as one:
        one.context.size = Grid(1, 4, 6)
        one.add(adapter, on=on, **where)
        return said(model, name)


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-5)


# ---- the same as diffusers


@pytest.mark.parametrize("images", [1, 2])
def test_it_says_what_diffusers_says(unet, weights, theirs, images: int) -> None:
    embeds = noise(2, images, EMBED)
    adapter = IPAdapter.from_state_dict(weights, unet, embeds, scale=0.7)
    plain, truth = said(unet, UNET), theirs(embeds, 0.7)
    assert close(ours(unet, adapter), truth)
    assert not close(plain, truth)
    adapter.set_scale(0.3)
    assert close(ours(unet, adapter), theirs(embeds, 0.3))


def test_regions_and_their_factors_are_those_of_diffusers(unet, weights, theirs) -> None:
    embeds = noise(2, 2, EMBED)
    adapter = IPAdapter.from_state_dict(weights, unet, embeds, scale=[0.7, 0.4], masks=MASKS)
    assert close(ours(unet, adapter), theirs(embeds, [0.7, 0.4], MASKS))
    assert not close(theirs(embeds, [0.7, 0.4], MASKS), theirs(embeds, [0.7, 0.4], MASKS.flip(0)))


def test_rows_are_laid_out_as_in_guidance(unet, weights, theirs) -> None:
    image = noise(1, EMBED)
    halves = torch.stack([torch.zeros_like(image), image])
    truth = theirs(halves, 1.0)
    for embeds, parts in (
        (halves, None),
        ({"cond": image}, ("uncond", "cond")),
        ({"cond": image, "uncond": 0 * image}, ("uncond", "cond")),
        ({"cond": image}, {"cond": slice(1, 2), "uncond": slice(0, 1)}),
    ):
        assert close(ours(unet, IPAdapter.from_state_dict(weights, unet, embeds), parts=parts), truth)
    every = IPAdapter.from_state_dict(weights, unet, image)
    assert close(ours(unet, every), theirs(torch.stack([image, image]), 1.0))
    half = ours(unet, every, parts=("uncond", "cond"), rows="cond")
    assert close(half[1:], theirs(torch.stack([image, image]), 1.0)[1:])
    assert torch.equal(half[:1], said(unet, UNET)[:1])


def test_tokens_may_be_given_where_the_projection_is_another(unet, weights, theirs) -> None:
    embeds = noise(2, 1, EMBED)
    first = IPAdapter.from_state_dict(weights, unet, embeds)
    tokens = first.image_proj(embeds).detach()
    plus = {"image_proj": {"latents": noise(1, 4, 8)}, "ip_adapter": weights["ip_adapter"]}
    assert close(ours(unet, IPAdapter.from_state_dict(plus, unet, tokens)), theirs(embeds, 1.0))


def test_a_factor_of_zero_is_the_model_and_factors_go_by_name(unet, weights) -> None:
    plain, embeds = said(unet, UNET), noise(1, EMBED)
    adapter = IPAdapter.from_state_dict(weights, unet, embeds, scale=0.0)
    assert torch.equal(ours(unet, adapter), plain)
    adapter.set_scale({"**": 0.0, "up_blocks.**": 0.6})
    by_name = ours(unet, adapter)
    adapter.set_scale(0.6)
    assert close(by_name, ours(unet, adapter, on=Kind.CROSS & Stage.UP))
    assert not close(by_name, ours(unet, adapter))
    with pytest.raises(ValueError, match="matches none of 8 sites of the adapter"):
        adapter.set_scale({"middle.**": 1.0})


# ---- attached and detached


def test_it_leaves_nothing(unet, weights) -> None:
    plain, before, names = said(unet, UNET), state(unet), list(unet.state_dict())
    for trainable in (False, True):
        ours(unet, IPAdapter.from_state_dict(weights, unet, noise(1, EMBED), trainable=trainable))
        assert state(unet) == before
        assert list(unet.state_dict()) == names
        assert torch.equal(said(unet, UNET), plain)


def test_what_trains_is_seen_once_and_gets_gradients() -> None:
    unet = build(UNET).requires_grad_(False)
    adapter = IPAdapter.new(unet, noise(2, 1, EMBED))
    own = len(list(adapter.parameters()))
    assert own == 2 * 8 + 4
    before = len(list(unet.parameters())), len(unet.state_dict())
    with stack(unet) as one:
        one.add(adapter, on=Kind.CROSS)
        assert (len(list(unet.parameters())), len(unet.state_dict())) == (before[0] + own, before[1] + own)
        assert len({id(p) for p in unet.parameters()}) == before[0] + own
        run(unet, UNET).square().mean().backward()
        grads = {name: p.grad for name, p in adapter.named_parameters()}
        assert all(grad is not None and grad.abs().max() > 0 for grad in grads.values()), grads
    assert (len(list(unet.parameters())), len(unet.state_dict())) == before
    assert not any(p.requires_grad for p in unet.parameters())


def test_a_new_one_begins_with_the_keys_of_the_text_and_is_a_function_of_its_seed(unet) -> None:
    one, two, other = (IPAdapter.new(unet, noise(1, EMBED), seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.image_proj.proj.weight, other.image_proj.proj.weight)
    down = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    assert torch.equal(one.ip_adapter["1"].to_k_ip.weight, down.to_k.weight)
    assert torch.equal(one.ip_adapter["1"].to_v_ip.weight, down.to_v.weight)


def test_compiled_a_factor_and_an_image_changed_in_place_are_seen(unet, weights) -> None:
    torch._dynamo.reset()
    adapter, plain = IPAdapter.from_state_dict(weights, unet, noise(1, EMBED), scale=0.7), said(unet, UNET)
    truth, counter = ours(unet, adapter), CompileCounter()
    compiled = torch.compile(unet, fullgraph=True, backend=counter)
    with stack(unet) as one, torch.no_grad():
        one.add(adapter, on=Kind.CROSS)
        assert close(run(compiled, UNET), truth)
        adapter.set_scale(0.0)
        assert torch.equal(run(compiled, UNET), plain)
        adapter.set_scale(0.7)
        adapter.set_embeds(noise(1, EMBED, seed=1))
        other = run(compiled, UNET)
    assert counter.frame_count == 1
    assert close(
        other, ours(unet, IPAdapter.from_state_dict(weights, unet, noise(1, EMBED, seed=1), scale=0.7))
    )
    assert not close(other, truth)


def test_what_is_changed_is_changed_where_it_lies(unet, weights) -> None:
    adapter = IPAdapter.from_state_dict(weights, unet, noise(1, EMBED), masks=MASKS[:1])
    before = {name: one.data_ptr() for name, one in adapter.named_buffers()}
    assert sum(name.endswith("scale") for name in before) == 8
    adapter.set_scale({"**": [0.4], "mid_block.**": 0.2})
    adapter.set_embeds(noise(1, EMBED, seed=1))
    assert {name: one.data_ptr() for name, one in adapter.named_buffers()} == before
    assert torch.equal(adapter.embeds[0], noise(1, EMBED, seed=1))


def test_layers_alike_share_their_graphs() -> None:
    counts = []
    for attached in (False, True):
        torch._dynamo.reset()
        model, counter = build(FLUX), CompileCounter()
        for block in (*model.transformer_blocks, *model.single_transformer_blocks):
            block.compile(fullgraph=True, backend=counter)
        with stack(model) as one:
            if attached:
                one.add(IPAdapter.new(model, noise(1, EMBED), on=TWO), on=TWO)
            said(model, FLUX)
        counts.append(counter.frame_count)
    assert 0 < counts[0] == counts[1]


@pytest.mark.parametrize(
    ("name", "on", "first"), [(FLUX, Kind.JOINT, True), (FLUX, Kind.SINGLE, True), (SD3, Kind.JOINT, False)]
)
def test_where_text_and_image_are_one_the_images_queries_alone_are_given_it(name, on, first: bool) -> None:
    model = build(name)
    adapter = IPAdapter.new(model, noise(1, EMBED), on=on, scale=0.7)
    seen: dict[str, Tensor] = {}

    def note(key):
        from gendiff.attention import Middleware

        class Note(Middleware):
            order = 1  # outermost, so that it sees the sum

            def on_heads(self, site, context, out, q, k, v):
                seen.setdefault(key, out)
                seen.setdefault(f"{key} q", q)
                return out

        return Note()

    for key in ("without", "with"):
        with stack(model) as one:
            if key == "with":
                one.add(adapter, on=one.sites.on(on)[:1])
            one.add(note(key), on=one.sites.on(on)[:1])
            said(model, name)
    change, q = seen["with"] - seen["without"], seen["with q"]
    image, text = (slice(5, None), slice(5)) if first else (slice(-5), slice(-5, None))
    keys = next(iter(adapter.ip_adapter.values()))
    tokens = adapter.image_proj(adapter.embeds)[0, 0]
    k, v = (
        one(tokens).unflatten(-1, (q.shape[1], -1)).transpose(0, 1) for one in (keys.to_k_ip, keys.to_v_ip)
    )
    scores = torch.einsum("bhqd,hkd->bhqk", q, k) / q.shape[-1] ** 0.5
    truth = 0.7 * torch.einsum("bhqk,hkd->bhqd", scores.softmax(-1), v)
    assert not change[:, :, text].any()
    assert close(change[:, :, image], truth[:, :, image])


# ---- files


def test_the_published_file_is_read_and_written(unet, weights, tmp_path) -> None:
    flat = {f"{part}.{name}": one for part, held in weights.items() for name, one in held.items()}
    save_file(flat, tmp_path / "ip.safetensors")
    embeds = noise(1, EMBED)
    read = IPAdapter.from_file(tmp_path / "ip.safetensors", unet, embeds, scale=0.5)
    assert {name: one.tolist() for name, one in read.state_dict().items()} == {
        name: one.tolist() for name, one in flat.items()
    }
    assert torch.equal(ours(unet, read), ours(unet, IPAdapter.from_state_dict(flat, unet, embeds, scale=0.5)))
    assert not any(p.requires_grad for p in read.parameters())


def changed(flat: dict[str, Tensor], name: str, value: Tensor | None) -> dict[str, Tensor]:
    return {key: one for key, one in {**flat, name: value}.items() if one is not None}


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("ip_adapter.5.to_v_ip.weight", None, "missing.*5.to_v_ip"),
        ("ip_adapter.99.to_v_ip.weight", torch.zeros(2, 2), "unknown.*99"),
        ("ip_adapter.0.to_q_lora.down.weight", torch.zeros(2, 2), "FaceID"),
        ("ip_adapter.1.to_k_ip.weight", torch.zeros(16, 13), r"\(16, 13\).*another model"),
        ("image_proj.proj.bias", torch.zeros(5), "projection"),
        ("image_proj.norm.bias", None, "projection"),
        ("image_proj.proj.weight", torch.zeros(47, EMBED), "projection"),
        ("image_proj.proj.weight", None, "tokens, dim = 12.*no projection"),
    ],
)
def test_files_of_other_names_and_sizes_are_refused(unet, weights, tmp_path, name, value, says) -> None:
    flat = {f"{part}.{key}": one for part, held in weights.items() for key, one in held.items()}
    wrong = changed(flat, name, value)
    with pytest.raises(ValueError, match=says):
        IPAdapter.from_state_dict(wrong, unet, noise(1, EMBED))
    save_file(wrong, tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError, match=says):
        IPAdapter.from_file(tmp_path / "wrong.safetensors", unet, noise(1, EMBED))


def test_what_is_no_safetensors_file_is_not_read(unet, tmp_path) -> None:
    (tmp_path / "ip.safetensors").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        IPAdapter.from_file(tmp_path / "ip.safetensors", unet, noise(1, EMBED))
    with pytest.raises(ValueError, match="can run code"):
        IPAdapter.from_file(tmp_path / "ip.bin", unet, noise(1, EMBED))
    with pytest.raises(ValueError, match="no tensor of real numbers"):
        IPAdapter.from_state_dict(dict.fromkeys(PLAIN, torch.zeros(2).long()), unet, noise(1, EMBED))


def test_what_is_wrong_is_named(unet, weights) -> None:
    adapter = IPAdapter.from_state_dict(weights, unet, noise(3, 1, EMBED))
    with stack(unet, rows=("uncond", "cond")) as one:
        with pytest.raises(ValueError, match=r"no weights for .*attn1.*choose on=Kind\.CROSS"):
            one.add(adapter)
        with pytest.raises(ValueError, match="unknown rows 'con'; did you mean 'cond'"):
            one.add(IPAdapter.from_state_dict(weights, unet, {"con": noise(1, EMBED)}), on=Kind.CROSS)
        one.add(adapter, on=Kind.CROSS)
        with pytest.raises(ValueError, match="3 rows, which do not divide a batch of 2"):
            said(unet, UNET)
    with pytest.raises(ValueError, match=r"embed = 10.*\(1, 11\)"):
        adapter.set_embeds(noise(1, 11))
    with pytest.raises(ValueError, match="2 masks and 1 images"):
        IPAdapter.from_state_dict(weights, unet, noise(1, EMBED), masks=MASKS)
    with pytest.raises(ValueError, match="give masks first"):
        adapter.set_scale([1.0, 2.0])
