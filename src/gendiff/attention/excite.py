"""Attention as a loss: the latent is moved until every word is seen somewhere."""

from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from gendiff._checks import expand_right
from gendiff.attention.context import Context, Grid
from gendiff.attention.middleware import Middleware
from gendiff.attention.perturb import gaussian
from gendiff.attention.regional import only
from gendiff.attention.site import Site


@final
class AttendAndExcite(Middleware):
    r"""How far the words of a prompt are from being seen, with the gradient that `step` follows.

    .. math:: \text{loss} = \max_{s \in \text{tokens}} \left(1 - \max_i (G * A_s)_i\right), \quad
        x_t' = x_t - \text{size}\, \nabla_{x_t} \text{loss}

    where A_s is the mean over heads and layers of the probabilities with which places i of the image see
    token s, and G a Gaussian of 3×3 cells with sigma 0.5, the image reflected at its border.

    As published: latents of 64×64, `grid=(16, 16)`, `words=(1, n)` with n the place of the end token, the row
    of the prompt alone, sizes 20·sqrt(linspace(1, 0.5, 50)) in the first 25 steps, and at some of them as
    many steps as bring the loss below 1 minus a threshold (0: 0.05, 10: 0.5, 20: 0.8).

    The maps of the last call of the network are kept until `loss` takes them: this is state in Python, and
    the call cannot be captured or compiled.

    Args:
        tokens: places of the words in the text.
        grid: height and width of the maps that count; None is that of all sites, which must then be one.
        rows: the part of the batch that has the prompt; None is all of it.
        words: first token and the one behind the last of the text itself, without those of start and end: A
            is then softmax(100 A) over them, as published. None takes the probabilities as they are.

    Raises:
        ValueError: for no tokens, tokens outside of the words or the text, unknown rows, sites that are not
            cross; `loss` without a call before, without gradients, or of maps of several grids.

    References:
        Chefer et al. 2023, *Attend-and-excite*, arXiv 2301.13826.
    """

    def __init__(
        self,
        tokens: Sequence[int],
        grid: tuple[int, int] | None = None,
        rows: str | None = None,
        words: tuple[int, int] | None = None,
    ) -> None:
        low, high = words or (0, max(tokens, default=0) + 1)
        if not len(tokens) or not all(low <= token < high for token in tokens):
            raise ValueError(
                f"words are at least one place in [{low}, {high}) of the text, got {list(tokens)}."
            )
        self.tokens, self.grid, self.rows, self.words = tuple(tokens), grid, rows, words
        self._maps: dict[str, tuple[Grid, int, Tensor]] = {}

    def placed(self, sites: tuple[Site, ...], context: Context) -> None:
        only(self, sites, ("cross",))
        if self.rows is not None:
            context.rows_of(self.rows, len(context.rows))

    def on_probs(self, site: Site, context: Context, probs: Tensor) -> Tensor:
        """Keep the sum over heads."""
        end = max(self.tokens) + 1 if self.words is None else self.words[1]
        if end > probs.shape[-1]:
            raise ValueError(
                f"words go up to token {end}, and {site.name} sees {probs.shape[-1]} tokens of text."
            )
        grid = context.grid(site, probs.shape[-2])
        if self.grid is None or self.grid == grid[1:]:
            part = slice(None) if self.rows is None else context.rows_of(self.rows, len(probs))
            self._maps[site.name] = grid, probs.shape[1], probs[part].sum(1)
        return probs

    def maps(self) -> Float[Tensor, "B tokens height width"]:
        """Smoothed maps of the words in the last call of the network, which are given away by this.

        Raises:
            ValueError: where there are none, or of several grids.
        """
        kept, self._maps = list(self._maps.values()), {}
        grids = sorted({tuple(grid) for grid, _, _ in kept})
        if len(grids) != 1:
            wanted = f"of the grid {self.grid}" if self.grid else "of one grid"
            raise ValueError(
                f"words are looked for in maps {wanted}, and the last call of the network had "
                f"{grids or 'none'}; call it with the middleware on, at sites of such a grid."
            )
        probs = torch.stack([x for _, _, x in kept]).sum(0) / sum(heads for _, heads, _ in kept)
        first = 0
        if self.words is not None:
            first = self.words[0]
            probs = (100 * probs[..., slice(*self.words)]).softmax(-1)
        found = torch.stack([probs[..., token - first] for token in self.tokens], 1)
        return _smooth(found.unflatten(-1, grids[0]).flatten(2, 3))

    def loss(self) -> Float[Tensor, "B"]:
        """How far the word that is seen least is from being seen, of each sample; 0 is seen."""
        maps = self.maps()
        if not maps.requires_grad:
            raise ValueError(
                "the maps have no gradient; call the network with gradients, on x_t.requires_grad_()."
            )
        return (1 - maps.flatten(2).amax(-1)).amax(-1)

    @staticmethod
    def step(
        x_t: Float[Tensor, "B *dims"], loss: Float[Tensor, "B"], size: float | int | Float[Tensor, "..."]
    ) -> Float[Tensor, "B *dims"]:
        """The latent, `size` against the gradient of the loss; detached.

        Args:
            x_t: what the network was called with.
            loss: what `loss` said then.
            size: of the step, a number or one of each sample.
        """
        (grad,) = torch.autograd.grad(loss.sum(), x_t)
        size = expand_right(size, x_t) if isinstance(size, Tensor) else size
        return x_t.detach() - size * grad


def _smooth(maps: Tensor) -> Tensor:
    """Maps [B, tokens, height, width] under a Gaussian of 3×3 cells, sigma 0.5; reflected at the border."""
    weights = gaussian(3, torch.full((), 0.5, dtype=maps.dtype, device=maps.device))[1]
    for axis in (-1, -2):
        pad = (1, 1, 0, 0) if axis == -1 else (0, 0, 1, 1)
        maps = functional.pad(maps, pad, mode="reflect").unfold(axis, 3, 1) @ weights
    return maps
