"""What runs at each layer of a stacked model, and why, as a table."""

from collections.abc import Sequence
from typing import final

from gendiff._tables import as_text
from gendiff.attention.run import Layer, layer_of
from gendiff.attention.site import Site


@final
class Explanation:
    """A table: site, middlewares in their order, kernel, reason."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self.rows: list[tuple[str, str, str, str]] = []
        for site in sites:
            layer = layer_of(site.module)
            ones = layer.attachments if layer is not None else ()
            self.rows.append((site.name, " > ".join(map(str, ones)) or "-", *_kernel_at(site, layer)))

    def __repr__(self) -> str:
        return as_text(("site", "middlewares", "kernel", "why"), self.rows)


def _kernel_at(site: Site, layer: Layer | None) -> tuple[str, str]:
    if not site.kernels:
        return "its own", f"{site.processor} computes attention itself"
    if layer is not None and layer.by_hook["on_probs"]:
        names = ", ".join(type(one.middleware).__name__ for one in layer.by_hook["on_probs"])
        return "eager", f"{names} changes the probabilities, which no fast kernel has"
    if layer is not None and layer.kernel is not None:
        return layer.kernel.name, "chosen"
    own = "torch" if "scaled_dot_product_attention" in site.kernels else "diffusers' dispatch"
    biased = layer is not None and bool(layer.by_hook["on_bias"])
    return own, "the processor's own" + (", with a mask" if biased else "")
