"""The network of a pipeline of any family, called in one way."""

from collections.abc import Mapping
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gendiff._checks import unknown
from gendiff.condition import Condition
from gendiff.denoiser import Denoiser
from gendiff.interop.diffusers.family import Family, Network
from gendiff.interop.diffusers.registry import family_for


@final
class PipelineBackbone(nn.Module):
    """A family's network as `backbone(x_t, timestep, cond) -> out`, on unpacked grids and canonical names.

    What it returns is what the family's pipeline gives its scheduler: of the sign that the prediction type
    says, and with the channels of a learned variance, if there are any.

    Args:
        module: the network, such as `pipe.unet`; kept, not copied.
        family: the row that says how it is called.

    Attributes:
        accepts: the canonical names of the conditions that this network reads.

    >>> from gendiff.interop.diffusers import family_of
    >>> from gendiff.testing import tiny_pipeline
    >>> pipe = tiny_pipeline("flux")
    >>> sorted(PipelineBackbone(pipe.transformer, family_of(pipe)).accepts)
    ['guidance', 'text', 'text_pooled']
    """

    def __init__(self, module: nn.Module, family: Family) -> None:
        super().__init__()
        self.module, self.family = module, family
        self.accepts = accepted(module, family.network)

    def forward(
        self, x_t: Float[Tensor, "B C *dims"], timestep: Float[Tensor, "B"], cond: Mapping[str, Tensor]
    ) -> Float[Tensor, "B c *dims"]:
        """What the network says.

        Args:
            x_t: noised latents or pixels, [B, C, *].
            timestep: of every sample, [B], 0 … 1000.
            cond: what `accepts` names; of it only `text_mask` may be left out, where no text is padded.

        Raises:
            TypeError: for a condition that the network does not read.
            ValueError: for one that is missing.
        """
        cond = self._checked(Condition.of(cond))
        given, back = self._keywords(x_t, timestep, cond)
        out = self.module(**given, return_dict=False)[0]
        out = back(out)
        return -out if self.family.network.sign < 0 else out

    def _checked(self, cond: Condition) -> Condition:
        for name in cond:
            if name not in self.accepts:
                raise TypeError(unknown("condition", name, sorted(self.accepts)))
        if missing := sorted(self.accepts - set(cond) - {"text_mask"}):
            raise ValueError(
                f"a network of family {self.family.name!r} needs {', '.join(map(repr, missing))} in its "
                f"condition, which has {sorted(cond)}; codec_of(pipe).cond(captions, …) makes all of it."
            )
        return cond

    def _keywords(self, x_t: Tensor, timestep: Tensor, cond: Condition) -> tuple[dict[str, Any], Any]:
        network = self.family.network
        x = torch.cat([x_t, cond["channels"].to(x_t.dtype)], dim=1) if "channels" in cond else x_t
        given: dict[str, Any] = {}
        given[network.x], back = network.layout(x)
        given[network.clock.keyword] = network.clock(timestep, x_t)
        for name, keyword in network.names.items():
            if name not in cond or keyword is None:
                continue
            value = cond[name].to(x_t.dtype) if cond[name].is_floating_point() else cond[name]
            head, _, tail = keyword.partition(".")
            if tail:
                given.setdefault(head, {})[tail] = value
            else:
                given[head] = value
        if network.derive is not None:
            given |= network.derive(self.module, x_t, cond, given)
        return given, back


def denoiser_of(pipe: Any, family: Family | str | None = None, **module: nn.Module) -> Denoiser:
    """A pipeline's network with the schedule and the prediction type of its scheduler.

    Args:
        pipe: a diffusers pipeline; its modules are shared, not copied.
        family: the row that describes it, or its name; None is the one known for its class.
        module: another network in place of the pipeline's own, by the name of the component, such as
            `unet=ema_unet`.

    Returns:
        The denoiser. Where the network has twice the channels of x_t, it has learned its variance
        (`learned_variance`), as PixArt's, which the pipeline throws away.

    Raises:
        ValueError: for a pipeline of no known family or without a network, and what the family refuses.
        TypeError: for a component other than the network.

    >>> from gendiff.testing import tiny_pipeline
    >>> denoise = denoiser_of(tiny_pipeline("sd2"))
    >>> denoise.prediction.name, denoise.schedule.size
    ('v', 1000)
    """
    from gendiff.interop.diffusers.schedules import prediction_of, schedule_of

    row = family_for(pipe, family)
    component = row.network.component
    for name in module:
        if name != component:
            raise TypeError(unknown(f"network of family {row.name!r}", name, [component]))
    net = module.get(component, getattr(pipe, component, None))
    if net is None:
        raise ValueError(
            f"{type(pipe).__name__} was loaded without its {component}; give one, {component}=…."
        )
    reason = row.refuse(pipe, bool(module)) if row.refuse is not None else None
    if reason is not None:
        raise ValueError(f"{type(pipe).__name__} cannot be one denoiser: {reason}.")
    config = config_of(net)
    learned = config.get("out_channels") is not None and config["out_channels"] == 2 * config["in_channels"]
    return Denoiser(
        PipelineBackbone(net, row),
        schedule_of(pipe.scheduler),
        prediction_of(pipe.scheduler),
        learned_variance=learned,
    )


def config_of(module: nn.Module) -> Mapping[str, Any]:
    """The configuration of a network, empty for one that has none."""
    config = getattr(module, "config", {})
    return config if isinstance(config, Mapping) else vars(config)


def accepted(module: nn.Module, network: Network) -> frozenset[str]:
    """The conditions that a network reads; `channels` among them, if it has inputs for them."""
    config = config_of(module)
    names = {
        name for name in network.names if name not in network.optional or config.get(network.optional[name])
    }
    inputs, outputs = config.get("in_channels"), config.get("out_channels")
    if network.beside and inputs is not None and outputs is not None and inputs > outputs:
        names.add("channels")
    return frozenset(names)
