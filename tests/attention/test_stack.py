"""A stack: middlewares in order, over the fast kernel, limited to rows and windows, gone without a trace."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from gendiff import attention
from gendiff.attention import Kind, Middleware, Stage, Steps, Times, match, sites, stack
from gendiff.attention.kernels import KERNELS
from gendiff.attention.rebinding import running
from tests.attention.models import FLUX, FOUR, SD3, UNET, WAN, Halved, Kept, Same, build, run, said, state
from tests.zoo import QUIET, ZOO

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]


@pytest.fixture(scope="module", params=FOUR)
def four(request):
    return request.param, build(request.param)


@pytest.fixture(scope="module")
def unet():
    return build(UNET)


def text_of(model, name, times=2):
    """The same inputs, every row as often."""
    return {
        key: torch.cat([value] * times) if isinstance(value, torch.Tensor) and value.ndim else value
        for key, value in ZOO[name].inputs().items()
    }


class Said(Middleware):
    """Notes its letter."""

    def __init__(self, letter, notes, order=50):
        self.letter, self.notes = letter, notes
        type(self).order = order

    def on_qkv(self, site, context, q, k, v):
        self.notes.append(f"qkv {self.letter}")
        return q, k, v

    def on_heads(self, site, context, out, q, k, v):
        self.notes.append(f"heads {self.letter}")
        return out


# ---- exactness


def test_nothing_is_installed_before_something_is_added(unet) -> None:
    before = state(unet)
    with stack(unet) as empty:
        assert state(unet) == before
        assert attention.signature(unet) == ()
        empty.add(Same())
        assert state(unet) != before
        assert len(attention.signature(unet)) == 1
    assert state(unet) == before


def test_middlewares_that_change_nothing_are_bit_equal_and_leave_nothing(four) -> None:
    name, model = four
    plain, before = said(model, name), state(model)
    with stack(model) as one:
        one.add(Same())
        one.add(Same(), on=one.sites[:1])
        assert torch.equal(said(model, name), plain)
    assert torch.equal(said(model, name), plain)
    assert state(model) == before


def test_every_layer_is_reached_once_in_the_order_of_the_table(four) -> None:
    name, model = four
    with stack(model) as one:
        halved = Halved()
        one.add(halved)
        assert not torch.allclose(said(model, name), said(build(name), name), atol=1e-3)
    order = [site.name for site in sites(model)]
    assert sorted(halved.seen) == sorted(order)
    if name != FLUX:
        assert halved.seen == order


def test_the_slow_kernel_says_the_same(four) -> None:
    name, model = four
    plain = said(model, name)
    with stack(model) as one:
        kept = Kept()
        one.add(kept)
        torch.testing.assert_close(said(model, name), plain, rtol=1e-4, atol=1e-5)
    assert kept.probs.keys() == {site.name for site in sites(model)}
    for probs in kept.probs.values():
        torch.testing.assert_close(probs.sum(-1), torch.ones(probs.shape[:-1]))


def test_an_exception_leaves_nothing(four) -> None:
    name, model = four
    plain, before = said(model, name), state(model)

    class Broken(Middleware):
        def on_heads(self, site, context, out, q, k, v):
            raise ArithmeticError("on purpose")

    def broken():
        with stack(model) as one:
            one.add(Broken(), on=one.sites[-1:])
            said(model, name)

    with pytest.raises(ArithmeticError, match="on purpose"):
        broken()
    assert (running.layer, running.calls) == (None, 0)
    assert state(model) == before
    assert torch.equal(said(model, name), plain)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_handles_are_removed_in_any_order(unet, order) -> None:
    before, plain = state(unet), said(unet, UNET)
    first, second = stack(unet), stack(unet)
    handles = [first.add(Halved(), on=Kind.CROSS), second.add(Halved()), first.add(Halved(), on=Stage.UP)]
    for count, index in enumerate(order):
        assert not torch.equal(said(unet, UNET), plain), f"after {count} were removed"
        handles[index].remove()
        handles[index].remove()
    assert state(unet) == before
    assert torch.equal(said(unet, UNET), plain)


def test_another_model_of_the_process_is_untouched(unet) -> None:
    other = build(UNET, seed=1)
    before = said(other, UNET), said(build(FLUX), FLUX)
    function, module = nn.functional.scaled_dot_product_attention, vars(nn.functional).copy()
    with stack(unet) as one:
        one.add(Halved())
        assert torch.equal(said(other, UNET), before[0])
        assert torch.equal(said(build(FLUX), FLUX), before[1])
        assert nn.functional.scaled_dot_product_attention is function
        assert vars(nn.functional) == module
    assert torch.equal(said(other, UNET), before[0])


def test_an_object_that_two_models_share_is_stacked_in_one() -> None:
    from diffusers.models.attention_processor import AttnProcessor2_0

    shared, one, other = AttnProcessor2_0(), build(UNET), build(UNET)
    for model in (one, other):
        model.set_attn_processor(shared)
    plain = said(other, UNET)
    with stack(one) as on:
        on.add(Halved())
        assert torch.equal(said(other, UNET), plain)
        assert not torch.equal(said(one, UNET), plain)
    assert type(shared) is AttnProcessor2_0
    assert vars(shared) == {}


def test_copies_and_pickles_have_no_stack(unet) -> None:
    plain = said(unet, UNET)
    with stack(unet) as one:
        one.add(Halved())
        twin = copy.deepcopy(unet)
        assert torch.equal(said(twin, UNET), plain)
        assert isinstance(unet.state_dict(), dict)
    site = sites(build(UNET))[0]
    assert pickle.loads(pickle.dumps(site.module)).heads == site.heads


# ---- order, rows, windows


def test_order_and_onion(unet) -> None:
    notes: list[str] = []

    def letter(name, at):
        return type(name, (Said,), {})(name, notes, at)

    with stack(unet) as one:
        for name, at in (("b", 50), ("c", 50), ("a", 10)):
            one.add(letter(name, at), on=one.sites[:1])
        said(unet, UNET)
        text = one.explain().rows[0][1]
    assert notes == ["qkv a", "qkv b", "qkv c", "heads c", "heads b", "heads a"]
    assert text == "a > b > c"


def test_rows_are_changed_alone(unet) -> None:
    inputs = text_of(unet, UNET)
    with torch.no_grad():
        plain = unet(**inputs).sample
        batch = len(plain) // 2
        with stack(unet, rows=("uncond", "cond")) as one:
            one.add(Halved(), rows="cond")
            changed = unet(**inputs).sample
    assert torch.equal(changed[:batch], plain[:batch])
    assert not torch.allclose(changed[batch:], plain[batch:], atol=1e-3)
    with (
        stack(unet, rows=("uncond", "cond")) as one,
        pytest.raises(ValueError, match=r"unknown rows 'condd'"),
    ):
        one.add(Halved(), rows="condd")
    with stack(unet) as one, pytest.raises(ValueError, match=r"stack\(model, rows="):
        one.add(Halved(), rows="cond")


def test_steps_and_times(unet) -> None:
    plain = said(unet, UNET)
    with stack(unet) as one:
        one.add(Halved(), when=Steps(1, 3))
        same = [torch.equal(said(unet, UNET), plain) for _ in range(4)]
        assert same == [True, False, False, True]
        one.context.begin()
        assert torch.equal(said(unet, UNET), plain)
    with stack(unet) as one:
        one.add(Halved(), when=Times(0.4, 0.8))
        found = []
        for t in (None, 0.9, 0.8, 0.5, 0.3):
            one.context.at(t=t)
            found.append(torch.equal(said(unet, UNET), plain))
        assert found == [True, True, False, False, True]


def test_the_timestep_and_the_sizes_are_known(unet) -> None:
    class Timed(Same):
        needs = ("timestep", "step")

    with stack(unet) as one:
        one.add(Timed())
        said(unet, UNET)
        assert int(one.context.step) == 0
        inputs = ZOO[UNET].inputs()
        sample, text = inputs["sample"], inputs["encoder_hidden_states"]
        assert float(one.context.timestep) == float(torch.as_tensor(inputs["timestep"]).flatten()[0])
        assert (one.context.size, one.context.text) == ((1, *sample.shape[-2:]), text.shape[1])
        height, width = sample.shape[-2:]
        for factor in (1, 2, 4):
            tokens = (height // factor) * (width // factor)
            assert one.context.grid(one.sites[0], tokens) == (1, height // factor, width // factor)
        with pytest.raises(ValueError, match=r"7 tokens at down_blocks.* are no grid"):
            one.context.grid(one.sites[0], 7)


# ---- hooks


def test_a_bias_is_what_a_mask_of_the_kernel_is(four) -> None:
    name, model = four
    chosen = sites(model)[-1:]

    class First(Middleware):
        def on_bias(self, site, context, q, k):
            bias = torch.zeros(k.shape[-2], dtype=q.dtype)
            bias[1:] = -torch.inf
            return bias[None]

    with stack(model) as one:
        kept = Kept()
        one.add(First(), on=chosen)
        fast = said(model, name)
        one.add(kept, on=chosen)
        torch.testing.assert_close(said(model, name), fast, rtol=1e-4, atol=1e-5)
    probs = kept.probs[chosen[0].name]
    assert torch.equal(probs[..., 0], torch.ones_like(probs[..., 0]))
    assert not probs[..., 1:].any()


def test_extra_keys_are_a_second_attention(unet) -> None:
    """softmax(q k)v + w softmax(q k')v', seen in the heads."""
    keys, values = torch.randn(2, 1, 2, 3, 8).unbind()
    found = {}

    class More(Middleware):
        def extra_kv(self, site, context, q):
            batch = len(q)
            return [(keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1), 0.25, None)]

        def on_heads(self, site, context, out, q, k, v):
            own = (q @ k.mT / 8**0.5).softmax(-1) @ v
            found["heads"] = out, own + 0.25 * ((q @ keys.mT / 8**0.5).softmax(-1) @ values)
            return out

    with stack(unet) as one:
        one.add(More(), on=one.sites[:1])
        said(unet, UNET)
    torch.testing.assert_close(*found["heads"], rtol=1e-4, atol=1e-5)


def test_inputs_and_outputs(four) -> None:
    """Both streams of a joint layer, by their place in the call."""
    name, model = four
    site = next(site for site in sites(model) if site.kind in ("cross", "joint"))
    seen = {}

    class Zeroed(Middleware):
        def on_inputs(self, site, context, hidden, other):
            seen["in"] = other
            return hidden, torch.zeros_like(other)

        def on_output(self, site, context, out):
            seen["out"] = len(out) if isinstance(out, tuple) else 1
            return out

    plain = said(model, name)
    with stack(model) as one:
        one.add(Zeroed(), on=[site])
        assert not torch.equal(said(model, name), plain)
    assert seen["in"].ndim == 3
    assert seen["out"] == site.outputs


# ---- kernels


def test_a_kernel_is_used_where_it_is_chosen_and_refuses_what_it_would_drop(unet) -> None:
    plain, calls = said(unet, UNET), []

    def mine(q, k, v, call):
        calls.append(tuple(q.shape))
        return KERNELS["eager"].attend(q, k, v, call)

    attention.register_kernel("mine", mine, masks="none")
    try:
        with stack(unet) as one:
            one.kernel("mine", on=Kind.SELF)
            torch.testing.assert_close(said(unet, UNET), plain, rtol=1e-4, atol=1e-5)
            assert len(calls) == len(one.sites.on(Kind.SELF))
            with pytest.raises(ValueError, match=r"has the kernel 'mine' already, and 'sdpa' is chosen too"):
                one.kernel("sdpa")
            kernels = {row[0]: row[2] for row in one.explain().rows}
            assert {kernels[site.name] for site in one.sites.on(Kind.SELF)} == {"mine"}

            class Biased(Middleware):
                def on_bias(self, site, context, q, k):
                    return torch.zeros(1, k.shape[-2])

            one.add(Biased())
            with pytest.raises(ValueError, match=r"'mine' has no a mask or bias, which this layer asks for"):
                said(unet, UNET)
        with pytest.raises(ValueError, match=r"there is a kernel 'mine' already"):
            attention.register_kernel("mine", mine)
        with (
            stack(unet) as one,
            pytest.raises(ValueError, match=r"unknown kernel 'mime'; did you mean 'mine'"),
        ):
            one.kernel("mime")
    finally:
        del KERNELS["mine"]


def test_a_chosen_kernel_and_probabilities_are_refused_together(unet) -> None:
    before = state(unet)
    message = (
        r"Kept changes the probabilities at .*, which the kernel 'sdpa' that is chosen there does not have"
    )
    with stack(unet) as one:
        one.kernel("sdpa", on=Kind.SELF)
        one.add(Kept(), on=Kind.CROSS)
        with pytest.raises(ValueError, match=message):
            one.add(Kept())
        with pytest.raises(ValueError, match=message):
            one.kernel("sdpa", on=Kind.CROSS)
    assert state(unet) == before


def test_what_had_no_effect_is_an_error(unet) -> None:
    """A processor that calls its kernel in some cases only."""

    class Sometimes:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
            if attn.heads == 0:
                return nn.functional.scaled_dot_product_attention(hidden_states, hidden_states, hidden_states)
            return hidden_states

    with attention.set_processor(unet, Sometimes, on=Stage.MID), stack(unet) as one:
        one.add(Halved())
        with pytest.raises(
            RuntimeError, match=r"Sometimes at mid_block.* called 0 kernels, and what is stacked"
        ):
            said(unet, UNET)


def test_all_layers_are_attached_or_none() -> None:
    class Slotted:
        __slots__ = ()

        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
            return nn.functional.scaled_dot_product_attention(hidden_states, hidden_states, hidden_states)

    unet = build(UNET)
    site = sites(unet)[-1]
    site.module.processor = Slotted()
    before = [type(s.module.processor) for s in sites(unet)]
    with (
        stack(unet) as one,
        pytest.raises(TypeError, match=r"the processor Slotted of .* cannot be stacked on"),
    ):
        one.add(Halved())
    assert [type(s.module.processor) for s in sites(unet)] == before


def test_a_back_end_that_drops_masks_is_refused() -> None:
    model = build(FLUX)

    class Biased(Middleware):
        def on_bias(self, site, context, q, k):
            return torch.zeros(1, k.shape[-2])

    for site in sites(model):
        site.module.processor._attention_backend = "flash"
    with stack(model) as one:
        one.add(Biased())
        with pytest.raises(ValueError, match=r"the attention back-end 'flash' at .* drops masks"):
            said(model, FLUX)


def test_explain_says_why(unet) -> None:
    with stack(unet) as one:
        one.add(Kept(), on=one.sites[:1])
        rows = {row[0]: row[1:] for row in one.explain().rows}
    names = [site.name for site in one.sites]
    assert rows[names[0]] == ("Kept", "eager", "Kept changes the probabilities, which no fast kernel has")
    assert rows[names[1]] == ("-", "torch", "the processor's own")


# ---- what is refused


def test_what_is_no_middleware_and_where_nothing_matches(unet) -> None:
    with stack(unet) as one:
        with pytest.raises(TypeError, match=r"a stack takes middlewares, got Linear; .*set_processor"):
            one.add(nn.Linear(2, 2))  # pyright: ignore[reportArgumentType]
        with pytest.raises(
            ValueError, match=r"nothing matches match\('mid_blok.\*\*'\) among 16 sites.*'mid_block"
        ):
            one.add(Same(), on=match("mid_blok.**"))
    with pytest.raises(TypeError, match=r"got Pipe; give pipe.unet"):
        stack(type("Pipe", (), {"unet": unet})())


def test_two_that_claim_the_same_are_refused(unet) -> None:
    class Owner(Middleware):
        exclusive = ("kv",)

        def on_qkv(self, site, context, q, k, v):
            return q, k, v

    class Other(Owner): ...

    with stack(unet, rows=("a", "b")) as one:
        one.add(Owner(), rows="a")
        one.add(Other(), rows="b")
        with pytest.raises(ValueError, match=r"Owner \(rows a\) and Other at .* both claim kv"):
            one.add(Other())


def test_a_layer_whose_processor_computes_by_itself_is_refused_by_name() -> None:
    unet = build(UNET)
    unet.set_default_attn_processor()
    from diffusers.models.attention_processor import AttnProcessor

    unet.set_attn_processor(AttnProcessor())
    plain = said(unet, UNET)
    with (
        stack(unet) as one,
        pytest.raises(ValueError, match=r"AttnProcessor at down.* computes its attention in one"),
    ):
        one.add(Halved())

    class Louder(Middleware):
        def on_output(self, site, context, out):
            return out * 2

    with stack(unet) as one:
        one.add(Louder())
        assert not torch.equal(said(unet, UNET), plain)
    assert torch.equal(said(unet, UNET), plain)


def test_a_processor_replaced_under_a_stack_is_reported(unet) -> None:
    from diffusers.models.attention_processor import AttnProcessor2_0

    site = sites(unet)[0]
    old, new = site.module.processor, AttnProcessor2_0()
    one = stack(unet)
    one.add(Halved())
    site.module.set_processor(new)
    with pytest.raises(RuntimeError, match=r"was replaced by AttnProcessor2_0 while a stack is on it"):
        said(unet, UNET)
    with pytest.warns(RuntimeWarning, match=r"the new one is left in place"):
        one.remove()
    assert site.module.processor is new
    assert type(old) is AttnProcessor2_0
    site.module.set_processor(old)


# ---- training


def gradients(model, name, checkpointing=False, middlewares=(), leave=False):
    model.train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    one = stack(model)
    try:
        for middleware in middlewares:
            one.add(middleware)
        out = run(model, name)
        if leave:
            one.remove()
        out.square().mean().backward()
        found = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    finally:
        one._passes.waiting = 0
        one.remove()
        model.zero_grad()
        model.disable_gradient_checkpointing()
        model.eval()
    return found


@pytest.mark.parametrize("name", [UNET, FLUX])
def test_gradients_with_and_without_checkpointing(name) -> None:
    model = build(name)
    plain, same = gradients(model, name), gradients(model, name, middlewares=[Same()])
    halved = gradients(model, name, middlewares=[Halved()])
    again = gradients(model, name, checkpointing=True, middlewares=[Halved()])
    assert plain.keys() == same.keys() == again.keys()
    assert all(torch.equal(plain[key], same[key]) for key in plain)
    assert max(float((plain[key] - halved[key]).abs().max()) for key in plain) > 1e-5
    for key in plain:
        torch.testing.assert_close(again[key], halved[key], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", [UNET, FLUX])
def test_leaving_before_backward_under_checkpointing_is_refused(name) -> None:
    with pytest.raises(
        RuntimeError, match=r"1 forward pass\(es\) with gradient checkpointing had no backward"
    ):
        gradients(build(name), name, checkpointing=True, middlewares=[Halved()], leave=True)
    model = build(name)
    assert gradients(model, name, middlewares=[Halved()], leave=True)  # nothing is computed again


def test_weights_of_middlewares_are_the_models_while_they_are_on() -> None:
    unet = build(UNET)
    names = list(unet.state_dict())

    class Learned(Middleware, nn.Module):
        def __init__(self):
            nn.Module.__init__(self)
            self.gain = nn.Parameter(torch.tensor(1.0))

        def on_heads(self, site, context, out, q, k, v):
            return out * self.gain

    learned = Learned()
    with stack(unet) as one:
        one.add(learned, name="gain")
        assert set(unet.state_dict()) - set(names) == {"attention_middlewares.gain.gain"}
        assert sum(p is learned.gain for p in unet.parameters()) == 1
        run(unet, UNET).square().mean().backward()
        assert learned.gain.grad is not None
        assert float(learned.gain.grad) != 0
        with pytest.raises(ValueError, match=r"has a middleware 'gain' with weights already"):
            one.add(Learned(), name="gain")
    assert list(unet.state_dict()) == names


# ---- compiled


@pytest.mark.parametrize("name", [UNET, FLUX, *(pytest.param(n, marks=pytest.mark.slow) for n in (SD3, WAN))])
def test_compiled_whole_without_more_graphs(name) -> None:
    model = build(name)
    counts, results = [], []
    for middlewares in ((), (Same(),), (Scaled(0.5),)):
        torch._dynamo.reset()
        counter = CompileCounter()
        with stack(model) as one, torch.no_grad():
            for middleware in middlewares:
                one.add(middleware)
            results.append(
                (said(torch.compile(model, fullgraph=True, backend=counter), name), said(model, name))
            )
        counts.append(counter.frame_count)
    torch._dynamo.reset()
    for compiled, eager in results:
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(results[2][0], results[0][0], atol=1e-4)
    assert counts == [counts[0]] * 3


class Scaled(Middleware):
    """Queries times a number that is a buffer on the device."""

    def __init__(self, value):
        self.value = torch.tensor(value)

    def on_qkv(self, site, context, q, k, v):
        return q * self.value, k, v


def test_a_buffer_changed_in_place_is_seen_by_a_compiled_model() -> None:
    model, scaled = build(FLUX), Scaled(1.0)
    counter = CompileCounter()
    with stack(model) as one, torch.no_grad():
        one.add(scaled)
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        found = []
        for value in (1.0, 0.5, 1.0):
            scaled.value.fill_(value)
            found.append(run(compiled, FLUX))
    assert counter.frame_count == 1
    assert torch.equal(found[0], found[2])
    assert not torch.allclose(found[0], found[1], atol=1e-4)


def test_signatures_tell_stacks_apart(unet) -> None:
    middleware = Halved()
    with stack(unet, rows=("uncond", "cond")) as one:
        one.add(middleware)
        first = attention.signature(unet)
        handle = one.add(Halved(), on=Kind.CROSS)
        assert attention.signature(unet) != first
        handle.remove()
        assert attention.signature(unet) == first
        assert hash(first) == hash(attention.signature(unet))
    with stack(unet) as one:
        one.add(middleware)
        assert attention.signature(unet) != first


def test_wan_hooks_see_the_text_and_not_the_image_prompt() -> None:
    """Where a layer attends to an image prompt first, hooks are for the attention to the text."""
    model = build(WAN)
    site = next(site for site in sites(model) if site.kind == "cross")
    if site.module.add_k_proj is None:
        pytest.skip("the model of the zoo has no image prompt")
    text = ZOO[WAN].inputs()["encoder_hidden_states"].shape[1]
    seen = []

    class Length(Middleware):
        def on_qkv(self, site, context, q, k, v):
            seen.append(k.shape[-2])
            return q, k, v

    with stack(model) as one:
        one.add(Length(), on=[site])
        said(model, WAN)
    assert seen
    assert seen[0] >= text


def test_sd3_has_a_second_attention_of_the_image() -> None:
    kinds = [site.kind for site in sites(build(SD3))]
    assert {"joint", "self"} <= set(kinds)


def test_a_second_stack_over_a_first_reaches_the_same_layers(unet) -> None:
    plain, before = said(unet, UNET), state(unet)
    with stack(unet) as first:
        first.add(Halved())
        half = said(unet, UNET)
        with stack(unet) as second:
            quarter = Halved()
            second.add(quarter)
            assert len(second.sites) == len(first.sites)
            assert [site.processor for site in second.sites] == [site.processor for site in first.sites]
            assert not torch.allclose(said(unet, UNET), half, atol=1e-3)
            assert len(quarter.seen) == len(second.sites)
        assert torch.equal(said(unet, UNET), half)
    assert torch.equal(said(unet, UNET), plain)
    assert state(unet) == before


def test_keys_appended_at_a_masked_layer_take_part() -> None:
    """The layer's mask is for its own keys; those behind are seen."""
    name = "PixArtTransformer2DModel"
    model = build(name)

    class One(Middleware):
        def on_qkv(self, site, context, q, k, v):
            return q, torch.cat([k, k[:, :, :1]], 2), torch.cat([v, v[:, :, :1]], 2)

    with stack(model) as one:
        kept = Kept()
        one.add(One(), on=Kind.CROSS)
        one.add(kept, on=Kind.CROSS)
        said(model, name)
    for probs in kept.probs.values():
        assert (probs == 0).any(), "nothing is masked here"
        torch.testing.assert_close(probs[..., -1], probs[..., 0])


def test_a_keyword_that_the_processor_names_still_comes(unet) -> None:
    """Layers pass what the call names, which they ask of the stacked one."""
    seen = []

    class Asking:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, mood=None):
            seen.append(mood)
            q = hidden_states[:, None]
            return nn.functional.scaled_dot_product_attention(q, q, q)[:, 0]

    site = sites(unet)[0]
    with attention.set_processor(unet, Asking, on=[site]), stack(unet) as one:
        one.add(Same(), on=[site])
        site.module(torch.zeros(1, 4, site.module.to_q.in_features), mood="calm")
    assert seen == ["calm"]
