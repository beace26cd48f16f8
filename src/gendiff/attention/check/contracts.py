"""The contracts that a hand-written processor has to keep, and the sentence that mends each."""

import re
from dataclasses import dataclass
from typing import NamedTuple, final


class Contract(NamedTuple):
    """One thing a processor has to get right.

    Attributes:
        number: which of the 18 contracts it belongs to.
        fix: what to write.
    """

    number: int
    fix: str


CONTRACTS: dict[str, Contract] = {
    "context": Contract(
        1,
        "write `encoder_hidden_states if encoder_hidden_states is not None else hidden_states` for what keys "
        "and values are made of.",
    ),
    "output layer": Contract(
        2,
        "`attn.to_out` is a list: write `attn.to_out[0](x)`, then `attn.to_out[1](x)`; single blocks "
        "(`pre_only`) have none.",
    ),
    "dropout": Contract(3, "call `attn.to_out[1]`, the dropout, behind `attn.to_out[0]`."),
    "heads": Contract(
        4,
        "split into heads: `q.unflatten(-1, (attn.heads, -1)).transpose(1, 2)`; keys and values may have "
        "fewer heads of the same width, `k.unflatten(-1, (-1, head_dim))` with `enable_gqa=True`.",
    ),
    "transposes": Contract(
        5,
        "split with `unflatten(-1, (attn.heads, -1)).transpose(1, 2)` and join with `transpose(1, 2)"
        ".flatten(2)`, in this order; use `reshape` in place of `view`.",
    ),
    "residual": Contract(6, "add the layer's input at the end `if attn.residual_connection`."),
    "rescale": Contract(6, "divide by `attn.rescale_output_factor` last, after the residual is added."),
    "image": Contract(
        6,
        "make an image [B, C, H, W] tokens with `flatten(2).transpose(1, 2)`, and tokens an image with "
        "`transpose(1, 2).reshape(B, C, H, W)` before the residual.",
    ),
    "group norm": Contract(
        6,
        "if `attn.group_norm` is not None, write `attn.group_norm(x.transpose(1, 2)).transpose(1, 2)` before "
        "the projections.",
    ),
    "spatial norm": Contract(
        6, "if `attn.spatial_norm` is not None, write `attn.spatial_norm(hidden_states, temb)` first."
    ),
    "context norm": Contract(
        7,
        "if `attn.norm_cross` is set and a context was given, and only then, use "
        "`attn.norm_encoder_hidden_states(encoder_hidden_states)`.",
    ),
    "norms": Contract(
        8,
        "after the split into heads, apply `attn.norm_q` and `attn.norm_k` where they are not None, and "
        "`attn.norm_added_q`, `attn.norm_added_k` to the second stream.",
    ),
    "rotation": Contract(
        8,
        "rotate queries and keys of both streams by `image_rotary_emb`, after the norms and after the "
        "streams are joined, text first.",
    ),
    "mask": Contract(
        9,
        "hand the mask to the kernel: `attn.prepare_attention_mask(attention_mask, keys, batch)`, viewed as "
        "[B, heads, S or 1, K].",
    ),
    "empty rows": Contract(
        9,
        "a query whose keys are all masked gives NaN in `softmax`: use `F.scaled_dot_product_attention`, or "
        "`probs.nan_to_num(0)`.",
    ),
    "scale": Contract(
        10,
        "scale the scores once, by `attn.scale`: queries that are scaled already go to "
        "`scaled_dot_product_attention` with `scale=1.0`.",
    ),
    "dtype": Contract(
        11, "what is computed in float32 goes back with `.to(hidden_states.dtype)` before `attn.to_out[0]`."
    ),
    "streams": Contract(
        12,
        "return what the layer's own processor returns: (image, text) where a second stream came in, one "
        "tensor where none did; join and split in one order (SD3: image first; Flux and added keys: text).",
    ),
    "rows": Contract(
        13, "let every row of the batch be computed alike: assume no number of rows and no order of them."
    ),
    "keywords": Contract(
        14,
        "name what the layer passes in the call: `encoder_hidden_states=None, attention_mask=None, "
        "temb=None` (and `image_rotary_emb=None` for Flux); `**kwargs` alone loses it.",
    ),
    "inputs": Contract(
        15, "change no tensor that came in: write `x = x * 2`, not `x *= 2`, and `clone()` before writing."
    ),
    "gradients": Contract(
        15, "keep the graph: no `detach`, `no_grad`, `.data` or in-place write on the way to the output."
    ),
    "resolutions": Contract(
        16, "keep nothing from one call for another that depends on its sizes or inputs, nor on its layer."
    ),
    "determinism": Contract(16, "give equal outputs for equal inputs: no counter and no noise of its own."),
    "errors": Contract(
        16, "leave nothing behind when a call ends in an error: set state last, or `finally`."
    ),
    "copies": Contract(16, "make it copyable: no lambdas, hooks, modules or open files as attributes."),
    "pickling": Contract(
        16, "define the class at the top of a module, and keep no lambdas or local functions as attributes."
    ),
    "sharing": Contract(16, "keep nothing of one layer, as one processor may serve several."),
    "adapters": Contract(
        17, "call the layers, `attn.to_q(x)`, or `gendiff.attention.project`; never use `attn.to_q.weight`."
    ),
    "fusing": Contract(17, "use `gendiff.attention.project`, or the single projections, which stay."),
    "checkpointing": Contract(
        17, "let a second computation of the same call give the same numbers: no state that counts calls."
    ),
    "compile": Contract(
        17, "no `.item()`, print or branch on the values of tensors: it must compile with fullgraph=True."
    ),
    "layer": Contract(18, "leave the layer as it was: set no attribute, weight or hook of `attn`."),
}

KNOWN: tuple[tuple[str, str], ...] = (
    ("Boolean value of Tensor", "context"),
    ('missing the required "forward"', "output layer"),
    ("ModuleList.*not callable|has no attribute 'to_out'", "output layer"),
    (
        r"unexpected keyword argument|positional arguments? but|required positional|multiple values",
        "keywords",
    ),
    ("view size is not compatible", "transposes"),
    ("dtype", "dtype"),
    ("Inference tensors cannot be saved", "resolutions"),
    ("in-?place|inference tensor", "inputs"),
    ("pickle|picklable", "pickling"),
)


@final
@dataclass(frozen=True)
class Finding:
    """A broken contract.

    Attributes:
        contract: which.
        where: in what setting.
        seen: what was seen.
    """

    contract: str
    where: str
    seen: str


def of_error(error: BaseException, contract: str, where: str) -> Finding:
    """What an exception says about a contract."""
    text = str(error).strip().splitlines()
    text = text[0] if text else ""
    named = next((name for pattern, name in KNOWN if re.search(pattern, str(error))), contract)
    return Finding(named, where, f"{type(error).__name__}: {text[:160]}")


def report(name: str, findings: list[Finding], asked: str) -> str:
    """The table of what is broken, one contract a row."""
    first: dict[str, Finding] = {}
    for finding in findings:
        first.setdefault(finding.contract, finding)
    rows: list[str] = []
    for contract in sorted(first, key=lambda one: list(CONTRACTS).index(one)):
        finding = first[contract]
        more = len({one.where for one in findings if one.contract == contract}) - 1
        also = f" (and in {more} more)" if more else ""
        head = f"{CONTRACTS[contract].number:2d} {contract:14s}"
        rows += [
            f"{head}{finding.where}{also}: {finding.seen}",
            f"{'':17s}the fix: {CONTRACTS[contract].fix}",
        ]
    count = len({CONTRACTS[contract].number for contract in first})
    return "\n".join([f"{name} breaks {count} of 18 contracts, {asked}.", *rows])
