"""Patterns against a matcher that walks segments, and their errors."""

from fnmatch import fnmatchcase

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gendiff._patterns import check, match, select

NAMES = [
    "unet.conv_in.weight",
    "unet.conv_in.bias",
    "unet.block.1.attn1.to_q.weight",
    "unet.block.10.attn1.to_q.weight",
    "unet.block.1.norm.weight",
    "text_encoder.embed.weight",
]


def walks(pattern: list[str], name: list[str]) -> bool:
    """The definition, read aloud: the first segment of the pattern against the first of the name."""
    if not pattern:
        return not name
    if pattern[0] == "**":
        return walks(pattern[1:], name) or (bool(name) and walks(pattern, name[1:]))
    return bool(name) and fnmatchcase(name[0], pattern[0]) and walks(pattern[1:], name[1:])


segment = st.text("ab1_", min_size=1, max_size=3)
glob = st.one_of(
    st.just("**"),
    st.just("*"),
    st.lists(
        st.sampled_from(["a", "b", "1", "_", "*", "?", "[ab]", "[!a]", "[a-b1]"]), min_size=1, max_size=4
    )
    .map("".join)
    .filter(lambda text: "**" not in text),
)


@given(
    st.lists(st.lists(glob, min_size=1, max_size=5), min_size=1, max_size=2),
    st.lists(segment, min_size=1, max_size=5),
)
def test_a_pattern_covers_what_its_definition_says(alternatives: list[list[str]], name: list[str]) -> None:
    pattern = " | ".join(".".join(one) for one in alternatives)
    assert match(pattern, ".".join(name)) == any(walks(one, name) for one in alternatives)


@pytest.mark.parametrize(
    ("pattern", "name", "covered"),
    [
        ("block.1", "block.1", True),
        ("block.1", "block.10", False),
        ("block.1", "block.1.bias", False),
        ("block.1*", "block.10", True),
        ("*", "a.b", False),
        ("**", "a.b", True),
        ("**.bias", "bias", True),
        ("a.**", "a", True),
        ("a.**.b", "a.b", True),
        ("a.**.b", "a.x.y.b", True),
        ("a.*.b", "a.b", False),
        ("a|b", "b", True),
        ("  a  |  b  ", "b", True),
        ("a.b", "axb", False),  # a dot is a dot
        ("a+", "aa", False),  # and no sign of regular expressions means anything
        ("a$", "a$", True),
        ("to_[qkv]", "to_k", True),
        ("to_[!qkv]", "to_.", False),
        ("a", "", False),
        ("**", "", True),  # the name of a model among its own modules,
    ],
)
def test_the_language(pattern: str, name: str, covered: bool) -> None:
    assert match(pattern, name) is covered


def test_select_keeps_the_order_of_the_names() -> None:
    assert select("**.weight", reversed(NAMES)) == [n for n in reversed(NAMES) if n.endswith("weight")]
    assert select("unet.block.1.**", NAMES) == [NAMES[2], NAMES[4]]


@pytest.mark.parametrize(
    "pattern",
    [
        "",
        "  ",
        "a|",
        "|",
        "a..b",
        ".a",
        "a.",
        "a[",
        "a]",
        "[]",
        "[!]",
        "[a.b]",
        "[a|b]",
        "a**",
        "**a.b",
        "***",
    ],
)
def test_what_is_no_pattern_is_refused(pattern: str) -> None:
    for refused in (lambda: check(pattern), lambda: match(pattern, "a"), lambda: select(pattern, ["a"])):
        with pytest.raises(ValueError, match=r"pattern|segment|stands"):
            refused()


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("*.bias", r"'\*\*\.bias' would match 1"),
        ("unet.*.to_q.weight", r"'unet\.\*\*\.to_q\.weight' would match 2"),
        ("text_encoder", r"'text_encoder\.\*\*' would match 1"),
        ("conv_in.bias", r"'\*\*\.conv_in\.bias' would match 1"),
        ("to_q", r"'\*\*\.to_q\.\*\*' would match 2"),
        ("unet.conv_in.wieght", r"Nearest names: 'unet\.conv_in\.weight'"),
        ("zzz | yyy", r"matches none of 6 names\. Some names: 'unet\.conv_in\.weight'"),
    ],
)
def test_a_pattern_that_matches_nothing_says_what_would(pattern: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        select(pattern, NAMES)


def test_what_is_no_text_is_refused() -> None:
    with pytest.raises(TypeError, match=r"got list .*alternatives|Type-check"):
        check(["a", "b"])  # pyright: ignore[reportArgumentType]


def test_the_error_says_what_the_names_are_of() -> None:
    with pytest.raises(ValueError, match="'b' matches none of 1 layers"):
        select("b", ["a"], "layers")


def test_no_names_at_all() -> None:
    with pytest.raises(ValueError, match="no names were given"):
        select("**", [])


def test_many_stars_take_no_exponential_time() -> None:
    name = ".".join(["a" * 10] * 12)
    assert not match(".".join(["**", "*a*a*"] * 6) + ".b", name)
