"""Edited rows attend as their source does: the published edits as formulas, and the alignment of texts."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gendiff.attention import Kind, Middleware, Steps, stack
from gendiff.attention.prompt import PromptToPrompt, SharedQK, align
from tests.attention.models import UNET, Kept, build, said
from tests.attention.test_perturb import Seen, graphs
from tests.attention.test_shared import PARTS, four, ran


def probabilities(middleware, on, **how):
    """Of the first site: without it, with it, and the values."""
    model = build(UNET)
    with stack(model, rows=PARTS) as one:
        kept, seen = one.add(Kept(), on).middleware, one.add(Seen(), on).middleware
        ran(model, UNET)
        site = one.sites.on(on)[0].name
        own = kept.probs[site]
        one.add(middleware, on, **how)
        after = one.add(Kept(), on).middleware
        ran(model, UNET)
    return own, after.probs[site], seen, site


# ---- edits of cross-attention


def test_a_swap_takes_the_sources_attention() -> None:
    """Row by row and token by token, as the replacement of the paper has it."""
    mapper = align([9, 1, 2, 3, 8], [9, 1, 5, 3, 8], swap=True)
    own, after, seen, site = probabilities(PromptToPrompt(mapper), Kind.CROSS)
    assert torch.equal(mapper, torch.eye(5))
    for row in range(4):
        torch.testing.assert_close(after[row], own[row // 2 * 2])
    torch.testing.assert_close(seen.out[site], after @ seen.raw[site][2])


def test_a_refinement_keeps_the_new_words_own_attention() -> None:
    """Source a b c . . to target a x b c . : x keeps its own, all others take the source's."""
    mapper = align([1, 2, 3, 8, 8], [1, 7, 2, 3, 8])
    own, after, _, _ = probabilities(PromptToPrompt(mapper), Kind.CROSS)
    for source, edited in ((0, 1), (2, 3)):
        assert torch.equal(after[source], own[source])
        torch.testing.assert_close(after[edited][..., 1], own[edited][..., 1])
        for target, at in {0: 0, 2: 1, 3: 2, 4: 3}.items():
            torch.testing.assert_close(after[edited][..., target], own[source][..., at])


def test_weights_scale_words_in_the_edited_rows_alone() -> None:
    weights = torch.tensor([1.0, 1.0, 4.0, 0.0, 1.0])
    own, after, _, _ = probabilities(PromptToPrompt(weights=weights), Kind.CROSS)
    torch.testing.assert_close(after, own * torch.stack([torch.ones(5), weights] * 2)[:, None, None])
    own, after, _, _ = probabilities(PromptToPrompt(torch.eye(5), weights), Kind.CROSS)
    torch.testing.assert_close(after[1], own[0] * weights)
    torch.testing.assert_close(after[3], own[2] * weights)


def test_each_edit_has_its_own_mapper() -> None:
    """Three samples of one part: the source, one that takes all, one that takes nothing."""
    model = build(UNET)
    rows = {"cond": slice(0, 3)}
    mappers = torch.stack([torch.eye(5), torch.zeros(5, 5)])
    with stack(model, rows=rows) as one:
        kept = one.add(Kept(), Kind.CROSS).middleware
        one.add(PromptToPrompt(mappers), Kind.CROSS)
        after = one.add(Kept(), Kind.CROSS).middleware
        ran(model, UNET)
        site = one.sites.on(Kind.CROSS)[0].name
    own, after = kept.probs[site], after.probs[site]
    torch.testing.assert_close(after[1], own[0])
    assert torch.equal(after[[0, 2, 3]], own[[0, 2, 3]])


def test_edits_end_with_their_window_and_keep_other_rows() -> None:
    model = build(UNET)
    stock = ran(model, UNET)
    with stack(model, rows=PARTS) as one:
        edit = PromptToPrompt(torch.eye(5), torch.ones(5))
        one.add(edit, Kind.CROSS, rows="cond", when=Steps(0, 1))
        changed = ran(model, UNET)
        torch.testing.assert_close(ran(model, UNET), stock)
        buffer = edit.weights
        edit.set(torch.zeros(5))
        assert edit.weights is buffer
        one.context.begin()
        without = ran(model, UNET)
        torch.testing.assert_close(without[2], changed[2])  # the source keeps its weights of 1
        assert not torch.allclose(without[3], changed[3], atol=1e-4)
    torch.testing.assert_close(changed[:3], stock[:3])
    assert not torch.allclose(changed[3], stock[3], atol=1e-4)


def test_undo_is_exact() -> None:
    four(UNET, PromptToPrompt(torch.eye(5)), Kind.CROSS)
    four(UNET, SharedQK(), Kind.SELF)


# ---- the layout


class Replaced(Middleware):
    """The source's probabilities in the place of the row's own, literally."""

    def on_probs(self, site, context, probs):
        return probs[[0, 0, 2, 2]]


def test_shared_queries_and_keys_are_the_sources_probabilities() -> None:
    _, changed, seen, site = four(UNET, SharedQK(), Kind.SELF)
    _, expected, _, _ = four(UNET, Replaced(), Kind.SELF)
    torch.testing.assert_close(changed, expected, atol=2e-5, rtol=1e-4)
    assert torch.equal(seen.used[site.name][2], seen.raw[site.name][2])


def test_large_layers_keep_their_own_layout() -> None:
    """Of 96 tokens and of 24."""
    _, _, seen, _ = four(UNET, SharedQK(tokens=24), Kind.SELF)
    same = {q.shape[-2]: torch.equal(seen.used[name][0], q) for name, (q, _, _) in seen.raw.items()}
    assert same == {96: True, 24: False}
    stock, changed, _, _ = four(UNET, SharedQK(tokens=24), Kind.SELF)
    assert torch.equal(changed[::2], stock[::2])
    assert not torch.allclose(changed[1::2], stock[1::2], atol=1e-4)


# ---- alignment

TEXTS = st.lists(st.integers(0, 3), min_size=6, max_size=6)


@given(TEXTS, TEXTS)
def test_aligned_tokens_are_a_longest_common_subsequence(source, target) -> None:
    mapper = align(source, target)
    pairs = mapper.nonzero().tolist()
    assert all(source[i] == target[j] for i, j in pairs)
    assert all(a[0] < b[0] and a[1] < b[1] for a, b in pairwise(pairs))
    table = [[0] * 7 for _ in range(7)]  # of prefixes; the code works on suffixes
    for i in range(6):
        for j in range(6):
            common = table[i][j] + 1 if source[i] == target[j] else 0
            table[i + 1][j + 1] = max(common, table[i][j + 1], table[i + 1][j])
    assert len(pairs) == table[6][6]


@given(TEXTS, TEXTS)
def test_a_swap_gives_all_attention_that_has_somewhere_to_go(source, target) -> None:
    """What a source token had is given to the target once, or, where it was deleted, not at all."""
    refined, swapped = align(source, target), align(source, target, swap=True)
    sums = swapped.sum(-1)
    assert (torch.isclose(sums, torch.ones(6)) | (sums == 0)).all()
    assert torch.equal(swapped[refined == 1], refined[refined == 1])


def test_more_tokens_share_and_equal_ones_pair() -> None:
    mapper = align([9, 1, 8, 8, 8], [9, 4, 5, 8, 8], swap=True)
    assert mapper.tolist() == [
        [1, 0, 0, 0, 0],
        [0, 0.5, 0.5, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 0, 1],
        [0, 0, 0, 0, 0],
    ]
    assert torch.equal(align([9, 1, 2, 8], [9, 3, 4, 8], swap=True), torch.eye(4))


def test_layers_share_a_compiled_graph() -> None:
    assert graphs(PromptToPrompt(torch.eye(5), torch.ones(5)), Kind.CROSS) == 1


def test_what_is_refused() -> None:
    for mapper, weights in ((None, None), (torch.ones(4, 5), None), (torch.eye(5), torch.ones(4))):
        with pytest.raises(ValueError, match="edits have a square mapper"):
            PromptToPrompt(mapper, weights)
    with pytest.raises(ValueError, match="has no weights"):
        PromptToPrompt(torch.eye(5)).set(torch.ones(5))
    with pytest.raises(ValueError, match="got 2 and 3 tokens"):
        align([1, 2], [1, 2, 3])
    model = build(UNET)
    with stack(model) as one, pytest.raises(ValueError, match="works on rows of the batch"):
        one.add(PromptToPrompt(torch.eye(5)), Kind.CROSS)
    with stack(model, rows=PARTS) as one:
        with pytest.raises(ValueError, match="attn1 is self"):
            one.add(PromptToPrompt(torch.eye(5)))
        handle = one.add(PromptToPrompt(torch.eye(4)), Kind.CROSS)
        with pytest.raises(ValueError, match=r"edits are of 4 tokens of text, and .* sees 5"):
            ran(model, UNET)
        handle.remove()
        one.add(PromptToPrompt(torch.eye(5)), Kind.CROSS)
        with pytest.raises(ValueError, match="the source and 1 edited samples, got 1"):
            said(model, UNET)
