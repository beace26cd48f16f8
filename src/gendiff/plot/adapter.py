"""What an adapter changes: every layer a cell, by its place in the model and by what it does."""

import re
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes

from gendiff._checks import unknown
from gendiff.lora.measures import GROUPS, Measured, Measures, stage
from gendiff.plot.figure import COLOURS, Picture, ink, legend, picture
from gendiff.plot.text import width

# up to the last member of a list of modules, as `transformer_blocks.3`, which `to_out.0` and `net.2` are not
PLACE = re.compile(r"(?:.*\.)?\w*(?:s|block|layer)\.\d+(?=\.|$)")
QUANTITIES = {
    "ratio": "‖ΔW‖ / ‖W‖",
    "norm": "‖ΔW‖",
    "effective_rank": "effective rank of ΔW",
    "highest": "share of the highest singular value",
}
SMALL = 8  # points of the names of rows and blocks


def adapter(
    measures: Measures, quantity: str | None = None, *, cmap: str = "viridis", title: str | None = None
) -> Picture:
    r"""Draw what an adapter changes: from left to right through the model, a row for each kind of layer.

    A column is a transformer block, a resnet, or what else the model has one after the other. The bars above
    and beside are of all layers of a column and of a row together: their relative change as one, or the mean
    of their effective ranks. What has no adapter is left empty.

    Args:
        measures: see `gendiff.lora.measure`.
        quantity: "ratio" is :math:`\lVert \Delta W \rVert_F / \lVert W \rVert_F`, the default where the
            weights are known; "norm" is :math:`\lVert \Delta W \rVert_F`; "effective_rank" and "highest" say
            in how many directions a weight is changed, see `gendiff.lora.measures.Measured`.
        cmap: colour map.
        title: above everything.

    Returns:
        A figure; the image of its first axes has the numbers, which are masked where there is no layer.

    Raises:
        ValueError: for an unknown quantity, and for ratios where the weights are not known.

    >>> import torch
    >>> from gendiff.lora import inject, measure, plan
    >>> net = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))})
    >>> adapter(measure(inject(net, plan(net, "**", rank=2)))).axes[0].images[0].get_array().shape
    (1, 3)
    """
    quantity = _checked(measures, quantity)
    columns = measures.apart(_place, stage)
    lines = measures.apart(_role, lambda row: GROUPS.index(row.group))
    values = np.full((len(lines), len(columns)), np.nan)
    down, along = {key: i for i, key in enumerate(lines)}, {key: i for i, key in enumerate(columns)}
    for row in measures.rows:
        values[down[_role(row)], along[_place(row)]] = getattr(row, quantity)

    wide = min(11.0, max(2.5, 0.16 * len(columns)))
    high = max(0.8, 0.19 * len(lines))
    figure = picture(wide + 4.2, high + 2.3, title)
    grid = figure.add_gridspec(2, 2, width_ratios=[wide, 1.6], height_ratios=[0.8, high])
    heat = figure.add_subplot(grid[1, 0])
    above = figure.add_subplot(grid[0, 0], sharex=heat)
    beside = figure.add_subplot(grid[1, 1], sharey=heat)
    top = float(np.nanmax(values)) or 1.0  # an adapter that changes nothing
    image = heat.imshow(
        np.ma.masked_invalid(values), cmap, vmin=0, vmax=top, aspect="auto", interpolation="nearest"
    )
    heat.set_facecolor("0.92")
    _name_rows(heat, list(lines))
    _name_columns(heat, list(columns), wide)
    _bars(above, beside, columns, lines, quantity)
    legend(figure, beside)
    figure.colorbar(
        image, ax=[above, heat, beside], label=QUANTITIES[quantity], fraction=0.05, pad=0.01, aspect=30
    )
    return figure


def _checked(measures: Measures, quantity: str | None) -> str:
    known = measures.total.weight_norm is not None
    quantity = quantity or ("ratio" if known else "norm")
    if quantity not in QUANTITIES:
        raise ValueError(unknown("quantity", quantity, QUANTITIES))
    if quantity == "ratio" and not known:
        raise ValueError("ratios need the weights that the adapter changes: measure(adapter, model).")
    return quantity


def _place(row: Measured) -> tuple[str, str]:
    """The block of a layer, and the innermost member of a list of modules that it is in."""
    found = PLACE.match(row.name)
    return row.block, found.group() if found else row.block


def _role(row: Measured) -> tuple[str, str]:
    """What a layer does, and its name there."""
    found = PLACE.match(row.name)
    rest = row.name[found.end() + 1 :] if found else row.name
    return row.group, rest or row.name.rpartition(".")[0]  # a member of a list that is a layer itself


def _name_rows(heat: Axes, roles: list[tuple[str, str]]) -> None:
    heat.set_yticks(range(len(roles)), [name for _, name in roles], fontsize=SMALL, parse_math=False)
    for i, (one, other) in enumerate(pairwise(roles)):
        if one[0] != other[0]:
            heat.axhline(i + 0.5, color="white", lw=2)


def _name_columns(heat: Axes, columns: list[tuple[str, str]], wide: float) -> None:
    """The blocks below their columns; a row of blocks of one column each is named as one."""
    blocks = [block for block, _ in columns]
    stems = [block.rpartition(".")[0] or block for block in blocks]
    several = {stem for block, stem in zip(blocks, stems, strict=True) if blocks.count(block) > 1}
    sections: dict[str, list[int]] = {}
    for i, (block, stem) in enumerate(zip(blocks, stems, strict=True)):
        sections.setdefault(block if stem in several else stem, []).append(i)
    named: dict[str, list[int]] = {}
    for name, members in sections.items():
        if members[0]:
            heat.axvline(members[0] - 0.5, color="white", lw=1.5)
        first, last = (blocks[i].rpartition(".")[2] for i in (members[0], members[-1]))
        alone = columns[members[0]][1] == name  # a module by itself, which the name of its row says
        if not alone:
            named[name if first == last else f"{name} {first}…{last}"] = members
    fits = all(width(name, SMALL) < len(members) * wide / len(columns) for name, members in named.items())
    heat.set_xticks(
        [sum(members) / len(members) for members in named.values()],
        list(named),
        fontsize=SMALL,
        rotation=0 if fits else 40,
        rotation_mode="anchor",
        ha="center" if fits else "right",
        parse_math=False,
    )


def _bars(
    above: Axes,
    beside: Axes,
    columns: dict[tuple[str, str], Measures],
    lines: dict[tuple[str, str], Measures],
    quantity: str,
) -> None:
    """The quantity of all layers of each column, and of each row, whose colour says what the layers do."""
    above.bar(range(len(columns)), [getattr(part.total, quantity) for part in columns.values()], color="0.5")
    for i, group in enumerate(dict.fromkeys(group for group, _ in lines)):
        members = {j: part for j, (key, part) in enumerate(lines.items()) if key[0] == group}
        found = [getattr(part.total, quantity) for part in members.values()]
        drawn = beside.barh(list(members), found, color=COLOURS[i % len(COLOURS)], label=group)
        beside.bar_label(drawn, [f" {value:.2g}" for value in found], fontsize=7, color=ink())
    beside.margins(x=0.25)
    above.tick_params(labelbottom=False, bottom=False, labelsize=7)
    beside.tick_params(labelleft=False, left=False, labelbottom=False, bottom=False)
    above.set_ylim(bottom=0)
    beside.set_xlim(left=0)
    for axes in (above, beside):
        axes.spines[["top", "right"]].set_visible(False)
