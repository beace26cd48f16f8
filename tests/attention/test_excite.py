"""Words that are not seen are made seen: the loss is its formula, and its gradient raises attention."""

import math

import pytest
import torch

from gendiff.attention import Kind, stack
from gendiff.attention.excite import AttendAndExcite
from tests.attention.models import UNET, Kept, build, said
from tests.attention.test_perturb import limited
from tests.zoo import ZOO, main

TOKENS = (1, 3)


def called(model, x):
    return main(model(**{**ZOO[UNET].inputs(), "sample": x}))


def smoothed(image):
    """A Gaussian of 3×3 cells with sigma 0.5, mirrored at the border, one cell at a time."""
    height, width = image.shape
    weights = {d: math.exp(-(d**2) / 0.5) for d in (-1, 0, 1)}
    total = sum(weights.values()) ** 2

    def mirrored(i, length):
        return -i if i < 0 else 2 * length - 2 - i if i >= length else i

    out = torch.zeros_like(image)
    for y in range(height):
        for x in range(width):
            for b in (-1, 0, 1):
                for a in (-1, 0, 1):
                    cell = image[mirrored(y + b, height), mirrored(x + a, width)]
                    out[y, x] += weights[a] * weights[b] / total * cell
    return out


@pytest.mark.parametrize("words", [None, (1, 4)])
def test_the_loss_is_its_formula(words) -> None:
    """From the probabilities of all layers of the grid, sample by sample and cell by cell."""
    model = build(UNET)
    x = ZOO[UNET].inputs()["sample"].requires_grad_()
    with stack(model) as one:
        excite = one.add(AttendAndExcite(TOKENS, grid=(4, 6), words=words), Kind.CROSS).middleware
        kept = one.add(Kept(), Kind.CROSS).middleware
        called(model, x)
        loss = excite.loss()
    assert loss.shape == (2,)
    mean = torch.stack([p for p in kept.probs.values() if p.shape[-2] == 24]).mean((0, 2)).detach()
    if words is not None:
        mean = torch.cat([mean[..., :1], (100 * mean[..., 1:4]).softmax(-1)], -1)
    for sample in range(2):
        worst = max(1 - smoothed(mean[sample, :, t].reshape(4, 6)).max() for t in TOKENS)
        torch.testing.assert_close(loss[sample].detach(), worst)


def test_steps_raise_the_word_that_is_seen_least() -> None:
    """Gradient descent on the latent, from the loss as it is kept by the layers."""
    model = build(UNET).requires_grad_(False)
    x = ZOO[UNET].inputs()["sample"]
    with stack(model) as one:
        excite = one.add(AttendAndExcite(TOKENS, grid=(8, 12)), Kind.CROSS).middleware
        losses = []
        for _ in range(5):
            x = x.requires_grad_()
            called(model, x)
            loss = excite.loss()
            losses.append(loss.detach())
            x = excite.step(x, loss, 50.0)
            assert not x.requires_grad
    losses = torch.stack(losses)
    assert (losses[1:] < losses[:-1]).all()
    assert (losses[0] - losses[-1] > 0.01).all()


def test_a_step_is_gradient_descent() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    moved = AttendAndExcite.step(x, (x**2).sum(1), torch.tensor([0.5, 0.25]))
    torch.testing.assert_close(moved, torch.stack([0 * x[0], 0.5 * x[1]]).detach())


def test_rows_have_a_loss_of_their_own() -> None:
    """The conditional row's is that of both, cut."""
    model = build(UNET)
    x = ZOO[UNET].inputs()["sample"].requires_grad_()
    with stack(model, rows=("uncond", "cond")) as one:
        both = one.add(AttendAndExcite(TOKENS, (8, 12)), Kind.CROSS).middleware
        cond = one.add(AttendAndExcite(TOKENS, (8, 12), rows="cond"), Kind.CROSS).middleware
        called(model, x)
        loss = cond.loss()
        torch.testing.assert_close(loss, both.loss()[1:])
        (grad,) = torch.autograd.grad(loss.sum(), x)
    assert not grad[0].any()
    assert grad[1].any()


def test_it_changes_nothing_and_keeps_the_last_call_alone() -> None:
    stock, changed, _, _ = limited(UNET, AttendAndExcite(TOKENS), Kind.CROSS)
    torch.testing.assert_close(changed, stock)
    model = build(UNET)
    x = ZOO[UNET].inputs()["sample"]
    with stack(model) as one:
        excite = one.add(AttendAndExcite(TOKENS, (8, 12)), Kind.CROSS).middleware
        with torch.no_grad():
            for scale in (3.0, 1.0):
                called(model, scale * x)
            twice = excite.maps()
            called(model, x)
            torch.testing.assert_close(twice, excite.maps())
        assert not excite._maps


def test_what_is_refused() -> None:
    for tokens, words in (((), None), ((5,), (1, 4)), ((0,), (1, 4))):
        with pytest.raises(ValueError, match="words are at least one place in"):
            AttendAndExcite(tokens, words=words)
    model = build(UNET)
    with stack(model, rows=("uncond", "cond")) as one:
        with pytest.raises(ValueError, match="attn1 is self"):
            one.add(AttendAndExcite(TOKENS))
        with pytest.raises(ValueError, match="unknown rows 'con'"):
            one.add(AttendAndExcite(TOKENS, rows="con"), Kind.CROSS)
        excite = one.add(AttendAndExcite(TOKENS), Kind.CROSS).middleware
        with pytest.raises(ValueError, match="of one grid, and the last call of the network had none"):
            excite.loss()
        said(model, UNET)
        with pytest.raises(ValueError, match=r"had \[\(1, 4, 6\), \(1, 8, 12\)\]"):
            excite.loss()
        small = one.add(AttendAndExcite(TOKENS, (4, 6)), Kind.CROSS).middleware
        said(model, UNET)
        with pytest.raises(ValueError, match="the maps have no gradient"):
            small.loss()
        other = one.add(AttendAndExcite(TOKENS, (5, 5)), Kind.CROSS).middleware
        said(model, UNET)
        with pytest.raises(
            ValueError, match=r"of the grid \(5, 5\), and the last call of the network had none"
        ):
            other.loss()
        one.add(AttendAndExcite((9,)), Kind.CROSS)
        with pytest.raises(ValueError, match=r"words go up to token 10, and .* sees 5"):
            said(model, UNET)
