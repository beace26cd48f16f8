"""Attention made worse on purpose, for guidance away from what it then says."""

from typing import ClassVar, final

import torch
from torch import Tensor

from gendiff.attention.context import Context
from gendiff.attention.middleware import Middleware
from gendiff.attention.regional import image_tokens, only
from gendiff.attention.site import Site
from gendiff.attention.temperature import moved, write

WITHIN = ("self", "joint", "single", "temporal")


@final
class IdentityProbs(Middleware):
    r"""Every token of the image sees itself alone: :math:`\text{softmax}(\ldots)\,v` becomes :math:`v`.

    Tokens of text keep their attention. The kernel stays fast, since no probability is looked at.

    Perturbed-attention guidance is this at a few self sites of the middle, for a part of the batch of its
    own: `stack.add(IdentityProbs(), on=Kind.SELF & Stage.MID, rows="perturbed")`, and guidance away from it.

    Raises:
        ValueError: at cross sites, where queries and keys are different tokens, and where a layer has fewer
            values than queries.

    References:
        Ahn et al. 2024, *Self-rectifying diffusion sampling with perturbed-attention guidance*,
        arXiv 2403.17377.
    """

    exclusive: ClassVar[tuple[str, ...]] = ("probs",)

    def placed(self, sites: tuple[Site, ...], context: Context) -> None:
        only(self, sites, WITHIN)

    def on_heads(self, site: Site, context: Context, out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The values, in place of what the heads say of the image."""
        tokens = out.shape[-2]
        if v.shape[-2] < tokens:
            raise ValueError(
                f"IdentityProbs gives each query its own value, and {site.name} has {tokens} queries and "
                f"{v.shape[-2]} values; take off what removes keys there."
            )
        if v.shape[1] != out.shape[1]:  # several heads of queries share one of values
            v = v.repeat_interleave(out.shape[1] // v.shape[1], 1)
        image, own = image_tokens(site, context, tokens)
        before, behind = out[..., : image.start, :], out[..., image.stop :, :]
        return torch.cat([before, v[..., own, :].to(out.dtype), behind], -2)


@final
class BlurredQueries(Middleware):
    r"""Queries blurred over the image, so that attention loses its detail.

    .. math:: q'_{y x} = \sum_{y' x'} g(y, y')\, g(x, x')\, q_{y' x'}, \quad
        g(i, j) \propto e^{-(i - j)^2 / 2 \sigma^2}, \quad \sum_j g(i, j) = 1

    With sigma=inf every query is the mean over the image, exactly as published; with a finite one the weights
    at the border are normalised, where Hong's code reflects the image and cuts its kernel. Frames of a video
    are blurred each by itself; tokens of text are left.

    Smoothed-energy guidance is this at self sites of the middle for a part of the batch of its own:
    `stack.add(BlurredQueries(math.inf), on=Kind.SELF & Stage.MID, rows="perturbed")`.

    Args:
        sigma: standard deviation of the Gaussian in tokens, above 0; a buffer that `set` changes.

    Raises:
        ValueError: for a sigma that is not above 0, at cross and temporal sites, and where tokens are no
            grid.

    References:
        Hong 2024, *Smoothed energy guidance*, arXiv 2408.00760.
    """

    exclusive: ClassVar[tuple[str, ...]] = ("queries",)

    def __init__(self, sigma: float | int) -> None:
        self.sigma = torch.tensor(1.0)
        self.set(sigma)

    def set(self, sigma: float | int | Tensor) -> None:
        """Write another sigma into the buffer; a tensor is not read by the host, and so not checked."""
        write(self.sigma, sigma, "sigma")

    def placed(self, sites: tuple[Site, ...], context: Context) -> None:
        only(self, sites, ("self", "joint", "single"))

    def on_qkv(
        self, site: Site, context: Context, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Blur the queries of the image."""
        image, _ = image_tokens(site, context, q.shape[-2])
        grid = context.grid(site, image.stop - image.start)
        dtype = torch.promote_types(q.dtype, torch.float32)
        sigma = moved(self, "sigma", q.device).to(dtype)
        x = q[..., image, :].to(dtype).unflatten(-2, tuple(grid))
        x = torch.einsum("hy,...fywd->...fhwd", gaussian(grid.height, sigma), x)
        x = torch.einsum("wx,...fhxd->...fhwd", gaussian(grid.width, sigma), x)
        blurred = x.flatten(-4, -2).to(q.dtype)
        return torch.cat([q[..., : image.start, :], blurred, q[..., image.stop :, :]], -2), k, v


def gaussian(length: int, sigma: Tensor) -> Tensor:
    """Weights of a Gaussian blur along an axis, [length, length], each row of sum 1.

    >>> gaussian(4, torch.tensor(torch.inf))[0]
    tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    place = torch.arange(length, device=sigma.device, dtype=sigma.dtype)
    weights = (-(((place[:, None] - place) / sigma) ** 2) / 2).exp()
    return weights / weights.sum(-1, keepdim=True)
