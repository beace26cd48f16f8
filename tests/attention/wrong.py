"""Processors as tutorials have them: right, or with one mistake each that is told by its name."""

import torch
import torch.nn.functional as F
from torch import nn


class Base:
    """A processor with one mistake, or with none."""

    def __init__(self, mistake=""):
        self.mistake, self.kept, self.calls = mistake, None, 0
        if mistake == "a lambda":
            self.act = lambda x: x
        if mistake == "a generator":
            self.rows = (row for row in range(3))

    def wrong(self, mistake):
        return self.mistake == mistake

    def linear(self, layer, x):
        return F.linear(x, layer.weight, layer.bias) if self.wrong("weights used directly") else layer(x)

    def heads(self, x, count):
        if self.wrong("no head split"):
            count = 1
        if self.wrong("split without a transpose"):
            return x.reshape(len(x), count, -1, x.shape[-1] // count)
        return x.unflatten(-1, (count, -1)).transpose(1, 2)

    def joined(self, x):
        if self.wrong("joined without a transpose"):
            return x.reshape(len(x), x.shape[2], -1)
        return x.transpose(1, 2).flatten(2)

    def attend(self, q, k, v, mask, scale):
        scale = {"scaled twice": scale**2, "not scaled": 1.0}.get(self.mistake, scale)
        if self.wrong("scores without the mask"):
            mask = None
        if self.wrong("softmax by hand"):
            scores = q @ k.transpose(-1, -2) * scale
            return (scores if mask is None else scores + mask).softmax(-1) @ v
        if self.wrong("a tensor kept from the first call"):
            self.kept = torch.ones(()) if self.kept is None else self.kept
            q = q * self.kept
        if self.wrong("float32 out"):
            q, k, v = q.float(), k.float(), v.float()
        if self.wrong("a branch on values") and q.mean().item() > 1e9:
            q = q * 2
        if self.wrong("detached"):
            k = k.detach()
        if self.wrong("no gradient for values"):
            v = v.data
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)


class Unet(Base):
    """For the layers of a UNet."""

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, **kwargs
    ):
        wrong, x = self.wrong, hidden_states
        self.early(attn, x)
        if wrong("written into the input"):
            x *= 1.5
        if attn.spatial_norm is not None and not wrong("no spatial norm"):
            x = attn.spatial_norm(x, temb)
        image = x.ndim == 4 and not wrong("images are not known")
        if image:
            x = x.flatten(2) if wrong("an image's axes") else x.flatten(2).transpose(1, 2)
        if attn.group_norm is not None and not wrong("no group norm"):
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        context = self.context(attn, x, encoder_hidden_states)
        if wrong("fused by its flag") and attn.fused_projections:
            q, k, v = attn.to_qkv(x).chunk(3, dim=-1)
        else:
            q, k, v = (
                self.linear(part, y)
                for part, y in ((attn.to_q, x), (attn.to_k, context), (attn.to_v, context))
            )
        q, k, v = self.heads(q, attn.heads), self.heads(k, attn.heads), self.heads(v, attn.heads)
        if attn.norm_q is not None and not wrong("no norms of queries and keys"):
            q, k = attn.norm_q(q), attn.norm_k(k)
        mask = self.mask(attn, attention_mask, k.shape[-2], len(q))
        out = self.out(attn, self.joined(self.attend(q, k, v, self.moody(mask, q, k), attn.scale)))
        if image and not wrong("an image comes back as tokens"):
            out = (
                out.reshape(hidden_states.shape)
                if wrong("an image's axes back")
                else (out.transpose(1, 2).reshape(hidden_states.shape))
            )
        return self.end(attn, out, hidden_states)

    def early(self, attn, x):
        self.calls += 1
        if self.wrong("a row per guidance branch") and len(x) != 2:
            raise ValueError("wants uncond and cond")
        if self.wrong("an attribute of the layer"):
            attn.seen = x
        if self.wrong("a buffer in a projection"):
            attn.to_q.register_buffer("seen", torch.zeros(1))
        if self.wrong("the layer's scale is changed"):
            attn.scale = 0.3
        if self.wrong("broken by an error"):
            if self.kept is not None:
                raise RuntimeError("already running")
            self.kept = x
            if x.shape[1 if x.ndim == 4 else -1] in (11, 31):
                raise ValueError("wrong width")
            self.kept = None

    def context(self, attn, x, given):
        wrong = self.wrong
        if wrong("or"):
            return given or x
        if wrong("the context is forgotten"):
            return x if x.shape[-1] == attn.to_k.in_features else given
        if wrong("a zero is no context"):
            given = None if given is not None and not given.any() else given
        if attn.norm_cross is not None and not wrong("no norm of the context"):
            if given is not None:
                return attn.norm_encoder_hidden_states(given)
            if wrong("a norm of no context"):
                return attn.norm_encoder_hidden_states(x)
        return x if given is None else given

    def mask(self, attn, mask, keys, batch):
        if mask is None:
            return None
        mask = attn.prepare_attention_mask(mask, keys, batch)
        return mask.view(batch, attn.heads, -1, mask.shape[-1])

    def moody(self, mask, q, k):
        """A bias that depends on what it should not."""
        if self.wrong("a bias kept from the first call"):
            if self.kept is None:
                self.kept = torch.zeros(q.shape[-2], k.shape[-2])
            return self.kept if mask is None else mask
        if self.wrong("counted calls"):
            return torch.linspace(0, self.calls, k.shape[-2]).expand(q.shape[-2], -1)
        if self.wrong("counted gradients") and torch.is_grad_enabled():
            self.kept = (self.kept or 0) + 1
            return torch.linspace(0, 1 if self.kept % 2 else 2, k.shape[-2]).expand(q.shape[-2], -1)
        return mask

    def out(self, attn, x):
        if self.wrong("the list is called"):
            return attn.to_out(x)
        if self.wrong("no output layer"):
            return x
        if self.wrong("keys of the first layer"):
            self.kept = attn.to_out[0] if self.kept is None else self.kept
            return attn.to_out[1](self.kept(x))
        x = (
            self.linear(attn.to_out[0], x)
            if not self.wrong("float32 out")
            else attn.to_out[0](x.to(attn.to_out[0].weight.dtype)).float()
        )
        return x if self.wrong("no dropout") else attn.to_out[1](x)

    def end(self, attn, out, residual):
        if self.wrong("rescaled before the residual"):
            return out / attn.rescale_output_factor + (residual if attn.residual_connection else 0)
        if attn.residual_connection and not self.wrong("no residual"):
            out = out + residual
        return out if self.wrong("not rescaled") else out / attn.rescale_output_factor


class Lossy(Base):
    """What every wrapper gets wrong: the layer sees no names."""

    def __call__(self, attn, hidden_states, *args, **kwargs):
        return Unet()(attn, hidden_states, *args, **kwargs)


class Nameless(Base):
    """No word of masks."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, temb=None):
        return Unet()(attn, hidden_states, encoder_hidden_states, None, temb)


class Forward(nn.Module):
    """A module with `forward`, whose call names nothing."""

    def forward(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        return Unet()(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


class Temperature(Base):
    """Right, but for softer scores."""

    def attend(self, q, k, v, mask, scale):
        return super().attend(q / 1.5, k, v, mask, scale)


class Soft(Temperature, Unet):
    """Softer scores in a UNet."""


class Joint(Base):
    """For SD3."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        wrong, text = self.wrong, encoder_hidden_states
        own = [
            self.heads(self.linear(part, hidden_states), attn.heads)
            for part in (attn.to_q, attn.to_k, attn.to_v)
        ]
        if attn.norm_q is not None and not wrong("no norms of queries and keys"):
            own = [attn.norm_q(own[0]), attn.norm_k(own[1]), own[2]]
        if text is not None:
            added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            more = [self.heads(self.linear(part, text), attn.heads) for part in added]
            if attn.norm_added_q is not None and not wrong("no norms of the text"):
                more = [attn.norm_added_q(more[0]), attn.norm_added_k(more[1]), more[2]]
            first = wrong("text first, split as if last")
            own = [torch.cat([b, a] if first else [a, b], dim=2) for a, b in zip(own, more, strict=True)]
        out = self.joined(self.attend(*own, None, attn.scale))
        if text is None:
            return self.image(attn, out)
        image, text = out[:, : hidden_states.shape[1]], out[:, hidden_states.shape[1] :]
        if not attn.context_pre_only and not wrong("no output layer of the text"):
            text = attn.to_add_out(text)
        if wrong("the image alone"):
            return self.image(attn, image)
        return (text, self.image(attn, image)) if wrong("text and image") else (self.image(attn, image), text)

    def image(self, attn, x):
        return attn.to_out[0](x) if self.wrong("no dropout") else attn.to_out[1](attn.to_out[0](x))


class Flux(Base):
    """For Flux."""

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None
    ):
        from diffusers.models.embeddings import apply_rotary_emb

        wrong, text = self.wrong, encoder_hidden_states

        def turned(q, k):
            if image_rotary_emb is None or wrong("no rotation"):
                return q, k
            return apply_rotary_emb(q, image_rotary_emb), apply_rotary_emb(k, image_rotary_emb)

        q, k, v = (self.heads(part(hidden_states), attn.heads) for part in (attn.to_q, attn.to_k, attn.to_v))
        if not wrong("no norms of queries and keys"):
            if wrong("rotated before the norms") and text is None:
                q, k = turned(q, k)
            q, k = attn.norm_q(q), attn.norm_k(k)
        if text is not None:
            added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            more = [self.heads(part(text), attn.heads) for part in added]
            more = [attn.norm_added_q(more[0]), attn.norm_added_k(more[1]), more[2]]
            last = wrong("image first")
            q, k, v = (
                torch.cat([a, b] if last else [b, a], dim=2) for a, b in zip((q, k, v), more, strict=True)
            )
        if not (wrong("rotated before the norms") and text is None):
            q, k = turned(q, k)
        out = self.joined(self.attend(q, k, v, attention_mask, q.shape[-1] ** -0.5))
        if text is None:
            return attn.to_out[0](out) if wrong("an output layer everywhere") else out
        sizes = (text.shape[1], hidden_states.shape[1])
        text, image = (
            out.split(sizes, dim=1) if not wrong("image first") else out.split(sizes[::-1], dim=1)[::-1]
        )
        return attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(text)
