"""Images as prompts: keys and values of their own beside those of the text."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, final

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional

from gendiff import _patterns
from gendiff._checks import unknown
from gendiff.attention.context import Context
from gendiff.attention.ip_layout import (
    PLAIN,
    State,
    check_layout,
    flattened,
    linears_of,
    published_order,
)
from gendiff.attention.middleware import Extra, Middleware
from gendiff.attention.selectors import Kind, On
from gendiff.attention.site import Site
from gendiff.attention.table import Sites

Embeds: TypeAlias = Tensor | Mapping[str, Tensor]
Scale: TypeAlias = float | int | Sequence[float | int]
_numbers = itertools.count()


@final
class ImageTokens(nn.Module):
    """From the embedding of an image to tokens: a linear layer, cut into tokens, and a norm of each.

    Args:
        embed: numbers of an embedding.
        tokens: how many tokens it becomes.
        dim: numbers of a token.
    """

    def __init__(self, embed: int, tokens: int, dim: int) -> None:
        super().__init__()
        self.proj, self.norm = nn.Linear(embed, tokens * dim), nn.LayerNorm(dim)

    def forward(self, x: Float[Tensor, "*images embed"]) -> Float[Tensor, "*images tokens dim"]:
        """The tokens of each image."""
        return self.norm(self.proj(x.to(self.proj.weight.dtype)).unflatten(-1, (-1, len(self.norm.weight))))


@final
class ImageKeys(nn.Module):
    """The keys and values of an image at one site, and how much they count there.

    Args:
        dim: numbers of a token.
        width: numbers of a key, of all heads.
        images: for how many images a factor is kept.

    Attributes:
        scale: a factor for each image, on the device; it is no part of the `state_dict`.
    """

    scale: Tensor

    def __init__(self, dim: int, width: int, images: int) -> None:
        super().__init__()
        self.to_k_ip, self.to_v_ip = (nn.Linear(dim, width, bias=False) for _ in range(2))
        self.register_buffer("scale", torch.ones(images), persistent=False)


@final
class IPAdapter(nn.Module, Middleware):
    r"""Image prompts by decoupled cross-attention: a second attention of the same queries, to the image.

    .. math:: z = \text{softmax}(q k^\top / \sqrt{d})\,v
        + \text{scale} \cdot \text{softmax}(q k_i^\top / \sqrt{d})\,v_i,
        \qquad k_i = c_i W'_k,\ v_i = c_i W'_v

    with the tokens :math:`c_i` of the image. Several images without masks are one sequence of tokens; with
    masks each is attended to by itself, and counts where its mask is. At joint and single sites only the
    image's queries are given it. (The adapters published for Flux and SD3 work otherwise, on queries before
    the rotary embedding and behind the output projection, and are not read.)

    Its `state_dict` has the published layout: `safetensors.torch.save_file(adapter.state_dict(), path)` is a
    file that diffusers reads, where it serves every cross-attention of a UNet.

    Args:
        names: of the sites that it has weights for, in the order of the published files.
        widths: numbers of a key at each of them.
        dim: numbers of a token.
        embeds: of the images, [images, embed] for every row of the batch, or [rows, images, embed] with rows
            that divide the batch, as pipelines lay out guidance (zeros first for its negative half); or for
            names of the context's rows [images, embed] each, where a name that is missing has zeros. Without
            a projection they are tokens: [..., tokens, dim].
        projection: from embeddings to tokens.
        scale: how much the images count: a factor, or one for each where there are masks; see `set_scale`.
        masks: where each image counts, [images, H, W] in [0, 1]; brought to the grid of each site, bicubic.

    Raises:
        ValueError: for shapes that do not fit each other.

    Ye et al., "IP-Adapter: Text Compatible Image Prompt Adapter for Text-to-Image Diffusion Models" (2023),
    arXiv 2308.06721, section "decoupled cross-attention".

    >>> adapter = IPAdapter(["mid_block.attn2"], [32], 8, torch.zeros(1, 4, 8), scale=0.5)
    >>> sorted(adapter.state_dict())
    ['ip_adapter.1.to_k_ip.weight', 'ip_adapter.1.to_v_ip.weight']
    """

    embeds: Tensor
    masks: Tensor | None

    def __init__(
        self,
        names: Sequence[str],
        widths: Sequence[int],
        dim: int,
        embeds: Embeds,
        projection: ImageTokens | None = None,
        *,
        scale: Scale | Mapping[str, Scale] = 1.0,
        masks: Float[Tensor, "images height width"] | None = None,
    ) -> None:
        super().__init__()
        self.names, self._mark = tuple(names), f"_ip_adapter{next(_numbers)}"
        images = 1 if masks is None else len(masks)
        keys = {str(2 * i + 1): ImageKeys(dim, width, images) for i, width in enumerate(widths)}
        self.ip_adapter, self.image_proj = nn.ModuleDict(keys), projection
        self.register_buffer("masks", None if masks is None else masks.float(), persistent=False)
        self._inner = (dim,) if projection is None else (projection.proj.in_features,)
        self._inner = (-1, *self._inner) if projection is None else self._inner
        self.set_embeds(embeds)
        self.set_scale(scale)

    # ---- making one

    @classmethod
    def new(
        cls,
        model: nn.Module | Sites,
        embeds: Embeds,
        *,
        on: On = Kind.CROSS,
        tokens: int = 4,
        seed: int = 0,
        scale: Scale | Mapping[str, Scale] = 1.0,
        masks: Tensor | None = None,
    ) -> "IPAdapter":
        """One to be trained: keys and values begin as those of the text, as in the paper; float32.

        Args:
            model: the network, or its sites.
            embeds: see the class.
            on: the sites it is for; the same are given to `stack.add`.
            tokens: tokens of an image.
            seed: of the projection's random weights.
            scale: see the class.
            masks: see the class.

        Raises:
            ValueError: for sites whose tokens differ in size, or without linear keys and values.
        """
        found = published_order(model, on)
        pairs = [linears_of(site) for site in found]
        dims = {k.in_features for k, _ in pairs}
        if len(dims) > 1:
            raise ValueError(f"the sites read tokens of different sizes, {sorted(dims)}; select others.")
        first = next(iter(embeds.values())) if isinstance(embeds, Mapping) else embeds
        projection = ImageTokens(first.shape[-1], tokens, dim := dims.pop())
        names, widths = [site.name for site in found], [k.out_features for k, _ in pairs]
        made = cls(names, widths, dim, embeds, projection, scale=scale, masks=masks)
        drawn = torch.rand(projection.proj.weight.shape, generator=torch.Generator().manual_seed(seed))
        state = {PLAIN[0]: (2 * drawn - 1) * first.shape[-1] ** -0.5}
        state |= {PLAIN[1]: torch.zeros(tokens * dim), PLAIN[2]: torch.ones(dim), PLAIN[3]: torch.zeros(dim)}
        for i, (k, v) in enumerate(pairs):
            state[f"ip_adapter.{2 * i + 1}.to_k_ip.weight"] = k.weight
            state[f"ip_adapter.{2 * i + 1}.to_v_ip.weight"] = v.weight
        made.load_state_dict(state)
        return made

    @classmethod
    def from_state_dict(
        cls,
        state: State,
        model: nn.Module | Sites,
        embeds: Embeds,
        *,
        scale: Scale | Mapping[str, Scale] = 1.0,
        masks: Tensor | None = None,
        trainable: bool = False,
    ) -> "IPAdapter":
        """One from published weights, of a UNet's cross-attention.

        Args:
            state: weights by name, flat or as {"image_proj": ..., "ip_adapter": ...}.
            model: the UNet, or its sites.
            embeds: see the class. Where the weights have another projection than the plain one (a linear
                layer and a norm), as Plus and FaceID have, they are the tokens that this projection made.
            scale: see the class.
            masks: see the class.
            trainable: whether it is to be trained: float32 and with gradients, else as precise as the model.

        Raises:
            ValueError: for names or sizes that are not those of the model.
        """
        flat, found = flattened(state), published_order(model, Kind.CROSS)
        dim = check_layout({name: tuple(value.shape) for name, value in flat.items()}, found)
        projection = None
        if PLAIN[0] in flat:
            out, embed = flat[PLAIN[0]].shape
            projection = ImageTokens(embed, out // dim, dim)
        names, widths = [site.name for site in found], [site.heads * site.head_dim for site in found]
        made = cls(names, widths, dim, embeds, projection, scale=scale, masks=masks)
        made.load_state_dict({name: flat[name] for name in made.state_dict()})
        if not trainable:
            made.requires_grad_(False)
            for part in (made.ip_adapter, made.image_proj):
                if part is not None:
                    part.to(next(found[0].module.parameters()).dtype)
        return made

    @classmethod
    def from_file(
        cls, path: str | Path, model: nn.Module | Sites, embeds: Embeds, **settings: Any
    ) -> "IPAdapter":
        """One from a published file, `ip-adapter_sd15.safetensors` for instance; see `from_state_dict`.

        Names and sizes are checked before a tensor is read.

        Raises:
            ValueError: for a file of another format, and for names or sizes that are not those of the model.
        """
        if Path(path).suffix != ".safetensors":
            raise ValueError(
                f"{Path(path).name} is no .safetensors file; other formats can run code, and are not read."
            )
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
                check_layout(shapes, published_order(model, Kind.CROSS))
                state = {name: file.get_tensor(name) for name in names}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{Path(path).name} cannot be read as safetensors: {error}.") from error
        return cls.from_state_dict(state, model, embeds, **settings)

    # ---- what is looked at, and how much

    def set_embeds(self, embeds: Embeds) -> None:
        """Look at other images; in place where the shape is the same, so that a captured step sees them.

        Raises:
            ValueError: for a shape that is none of theirs.
        """
        self.parts = tuple(embeds) if isinstance(embeds, Mapping) else ()
        if isinstance(embeds, Mapping):
            given = list(embeds.values())
            embeds = torch.stack([*given, torch.zeros_like(given[0])])
        rank, shape = len(self._inner), tuple(embeds.shape)
        embeds = embeds[None] if embeds.ndim == rank + 1 else embeds
        images = 0 if self.masks is None else len(self.masks)
        sizes = zip(embeds.shape[-rank:], self._inner, strict=False)
        if embeds.ndim != rank + 2 or any(want not in (-1, got) for got, want in sizes):
            inner = (
                f"embed = {self._inner[0]}"
                if self.image_proj is not None
                else f"tokens, dim = {self._inner[-1]}"
            )
            raise ValueError(
                f"images are [images, {inner}] or [rows, images, {inner}], got {shape}; the "
                f"weights have {'a' if self.image_proj is not None else 'no'} projection of their own."
            )
        if images and embeds.shape[1] != images:
            raise ValueError(
                f"there is a mask for each image, got {images} masks and {embeds.shape[1]} images."
            )
        old: Tensor | None = getattr(self, "embeds", None)
        if old is not None and old.shape == embeds.shape:
            old.copy_(embeds)
            return
        device = next(self.parameters()).device
        self.register_buffer("embeds", embeds.detach().to(device, copy=True), persistent=False)

    def set_scale(self, scale: Scale | Mapping[str, Scale]) -> None:
        """Say how much the images count, in place: a step that is compiled or captured sees it.

        Args:
            scale: a factor for all sites, or for the names that a pattern covers; later patterns win, and
                what none covers keeps what it had. With masks it may be a factor for each image. 0 is the
                model alone.

        Raises:
            ValueError: for a pattern that covers no site, or more or fewer factors than images.
        """
        for pattern, one in (scale if isinstance(scale, Mapping) else {"**": scale}).items():
            for name in _patterns.select(pattern, self.names, "sites of the adapter"):
                held = self._keys(name).scale
                value = torch.as_tensor(one, dtype=held.dtype)
                if value.ndim and value.shape != held.shape:
                    raise ValueError(
                        f"{len(held)} factor(s) are kept for the images, got {one}; give masks first."
                    )
                held.copy_(value)

    def _keys(self, name: str) -> ImageKeys:
        return self.ip_adapter[str(2 * self.names.index(name) + 1)]  # pyright: ignore[reportReturnType]

    # ---- at work

    def placed(self, sites: tuple[Site, ...], context: Context) -> None:
        """Bring the weights to the sites' device.

        Raises:
            ValueError: for a site without weights, or rows that the context has not.
        """
        missing = [site.name for site in sites if site.name not in self.names]
        if missing:
            raise ValueError(
                f"the adapter has no weights for {missing[0]!r}, nor for {len(missing) - 1} more sites; it "
                f"is for {len(self.names)}, such as {self.names[0]!r}: choose on=Kind.CROSS, for instance."
            )
        for name in self.parts:
            if name not in context.rows:
                raise ValueError(unknown("rows", name, context.rows))
        self.to(next(sites[0].module.parameters()).device)
        for site in sites:
            site.state[self._mark] = self._keys(site.name)  # a look-up by name is a graph for every layer

    def extra_kv(self, site: Site, context: Context, q: Tensor) -> list[Extra]:
        """The images' keys and values, and how much they count at each query."""
        keys: ImageKeys = site.state[self._mark]
        tokens = self.embeds if self.image_proj is None else self.image_proj(self.embeds)
        tokens = tokens.to(keys.to_k_ip.weight.dtype)  # [rows, images, tokens, dim]
        pair = [
            self._spread(linear(tokens), context, len(q)).unflatten(-1, (q.shape[1], -1)).to(q.dtype)
            for linear in (keys.to_k_ip, keys.to_v_ip)
        ]
        if self.masks is None:
            k, v = (one.flatten(1, 2).transpose(1, 2) for one in pair)
            return [(k, v, self._weight(site, context, q, keys.scale[0], None), None)]
        masks: list[Tensor] = list(self.masks)
        extras: list[Extra] = []
        for i, mask in enumerate(masks):
            k, v = (one[:, i].transpose(1, 2) for one in pair)
            extras.append((k, v, self._weight(site, context, q, keys.scale[i], mask), None))
        return extras

    def _spread(self, x: Tensor, context: Context, batch: int) -> Tensor:
        """What the rows of the embeddings have, for the rows of the batch."""
        if not self.parts:
            if batch % len(x):
                raise ValueError(f"the images have {len(x)} rows, which do not divide a batch of {batch}.")
            times = batch // len(x)
            return x.expand(batch, *x.shape[1:]) if len(x) == 1 else x.repeat_interleave(times, 0)
        places = sorted((context.rows_of(name, batch).indices(batch), name) for name in context.rows)
        ends = [0, *(stop for (_, stop, _), _ in places)]
        if ends[:-1] != [start for (start, _, _), _ in places] or ends[-1] != batch:
            raise ValueError(f"the context's rows {context.rows} do not cover a batch of {batch} once.")
        numbers = [self.parts.index(name) if name in self.parts else len(x) - 1 for _, name in places]
        return torch.cat([
            x[i].expand(stop - start, *x.shape[1:])
            for i, ((start, stop, _), _) in zip(numbers, places, strict=True)
        ])  # fmt: skip

    def _weight(self, site: Site, context: Context, q: Tensor, scale: Tensor, mask: Tensor | None) -> Tensor:
        """The factor, spread over the queries where these differ: a region, or a sequence with text in it."""
        both = site.kind == "single" or (site.kind == "joint" and site.outputs > 1)
        if mask is None and not both:
            return scale
        text = (context.text or 0) if both else 0
        if both and not text:
            raise ValueError(
                f"text and image are in one sequence at {site.name}, and the text's length is unknown."
            )
        image = q.shape[2] - text
        share = q.new_ones(image)
        if mask is not None:
            grid = context.grid(site, image)
            share = functional.interpolate(mask[None, None], (grid.height, grid.width), mode="bicubic")
            share = share.to(q.dtype).flatten().repeat(grid.frames)
        share = functional.pad(share, (text, 0) if site.text == "first" else (0, text))
        return scale * share[:, None]
