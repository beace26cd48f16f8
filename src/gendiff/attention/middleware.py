"""The base of what is plugged into attention: hooks between the projections, the kernel and the output."""

from typing import Any, ClassVar

from torch import Tensor

from gendiff.attention.context import Context
from gendiff.attention.site import Site

HOOKS = ("on_inputs", "on_qkv", "extra_kv", "on_bias", "on_probs", "on_heads", "on_output")
Extra = tuple[Tensor, Tensor, "Tensor | float", "Tensor | None"]


class Middleware:
    r"""What happens at an attention layer beside its own work; override the hooks that you need.

    The layer computes :math:`\text{softmax}(q k^\top \cdot \text{scale} + \text{bias})\,v`. Queries, keys and
    values come [B, heads, tokens, head_dim], after norms and rotary embedding, whatever the layer's own
    layout. Several middlewares at a layer run in their `order`, equal ones as they were added; `on_heads` and
    `on_output` run in the opposite order, so that the first is outermost.

    A subclass that is an `nn.Module` too and has parameters is registered on the model while the stack is on,
    so that optimizers, wrappers, averages and `state_dict` see it once.

    Attributes:
        order: place among the middlewares of a layer.
        shareable: whether one object may serve several layers; if not, the stack refuses a second.
        exclusive: what no second middleware of a layer may claim too, such as "kv" or "probs".
        needs: facts that it reads from the context: "rows", without which it is refused; "step" and
            "timestep", which are kept up to date where something needs them.

    >>> class Sharpen(Middleware):
    ...     def __init__(self, temperature): self.temperature = temperature
    ...     def on_qkv(self, site, context, q, k, v): return q / self.temperature, k, v
    >>> Sharpen(0.8).hooks
    ('on_qkv',)
    """

    order: ClassVar[int] = 50
    shareable: ClassVar[bool] = True
    exclusive: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[tuple[str, ...]] = ()

    @property
    def hooks(self) -> tuple[str, ...]:
        """The names of the hooks that its class overrides."""
        return tuple(name for name in HOOKS if getattr(type(self), name) is not getattr(Middleware, name))

    @property
    def signature(self) -> tuple[Any, ...]:
        """What a compiled or captured step depends on, beside the class and the tensors."""
        return ()

    def placed(self, sites: tuple[Site, ...], context: Context) -> None:
        """Called once, when it is added, with the sites it is to serve; raise what makes it impossible."""

    def on_inputs(
        self, site: Site, context: Context, hidden: Tensor, other: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Change what the layer is given: its tokens, and the other stream or None."""
        return hidden, other

    def on_qkv(
        self, site: Site, context: Context, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Change queries, keys and values; the fast kernel stays."""
        return q, k, v

    def extra_kv(self, site: Site, context: Context, q: Tensor) -> list[Extra]:
        """Further keys and values that the same queries attend to, in a softmax of their own.

        Returns:
            Each (k, v, weight, mask): weight * attention(q, k, v) is added to the heads.
        """
        return []

    def on_bias(self, site: Site, context: Context, q: Tensor, k: Tensor) -> Tensor | None:
        """What is added to the scaled scores, of a shape that spreads to [B, heads, queries, keys]."""
        return None

    def on_probs(self, site: Site, context: Context, probs: Tensor) -> Tensor:
        """Change the probabilities [B, heads, queries, keys]; takes the slow kernel at this layer."""
        return probs

    def on_heads(self, site: Site, context: Context, out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Change what the heads say [B, heads, tokens, head_dim], before the output projection."""
        return out

    def on_output(self, site: Site, context: Context, out: Any) -> Any:
        """Change what the layer returns: a tensor, or a tuple of the streams."""
        return out
