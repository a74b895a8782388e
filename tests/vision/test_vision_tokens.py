"""What stands for pictures in a prompt: the library's text, positions, prefixes."""

from types import SimpleNamespace

import pytest

from moecli.errors import MoecliError
from moecli.prompt import Prompt, first_difference, place
from moecli.vision.tokens import IMAGE, expansion, spread

PATCH = 9


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (2, 1), (3, 4), (16, 1), (4, 4)])
@pytest.mark.parametrize("tile_tokens", [1, 4, 144])
def test_a_picture_has_the_library_s_text(grid: tuple[int, int], tile_tokens: int) -> None:
    from transformers.models.llama4.processing_llama4 import Llama4Processor

    expected = Llama4Processor._prompt_split_image(None, grid, tile_tokens)
    assert expansion(grid, tile_tokens) == expected


def test_placeholders_are_replaced_one_by_one() -> None:
    text = f"a{IMAGE}b{IMAGE}{IMAGE}"
    assert spread(text, [f"<{IMAGE}1>", "<2>", "<3>"]) == f"a<{IMAGE}1>b<2><3>"


@pytest.mark.parametrize("count", [0, 1, 3])
def test_as_many_placeholders_as_pictures(count: int) -> None:
    with pytest.raises(MoecliError, match=r"names `<\|image\|>` 2 times"):
        spread(f"{IMAGE} and {IMAGE}", ["x"] * count)


def picture(num_patches: int, digest: str) -> SimpleNamespace:
    return SimpleNamespace(num_patches=num_patches, digest=digest)


def test_patches_belong_to_the_pictures_in_order() -> None:
    prompt = place([1, 9, 9, 2, 9, 3, 9, 9, 4], [picture(3, "a"), picture(2, "b")], patch_id=PATCH)
    assert [placed.positions for placed in prompt.pictures] == [(1, 2, 4), (6, 7)]
    for begin, end, expected in [
        *[(0, 1, []), (0, 2, ["a"]), (3, 4, []), (4, 7, ["a", "b"]), (5, 6, []), (7, 9, ["b"])]
    ]:
        assert [p.picture.digest for p in prompt.within(begin, end)] == expected, (begin, end)
    assert list(prompt.pictures[0].inside(2, 5)) == [1, 2]


@pytest.mark.parametrize("tokens", [[1, 9, 2], [9, 9, 9, 9], []])
def test_as_many_patches_as_the_pictures_have(tokens: list[int]) -> None:
    with pytest.raises(
        MoecliError, match=f"{tokens.count(PATCH)} patches for pictures that take 3"
    ):
        place(tokens, [picture(3, "a")], patch_id=PATCH)


def placed(*digests: str, first: int = 1) -> Prompt:
    """Pictures of two patches, with a token before each."""
    tokens = [*[0] * (first - 1), *[0, PATCH, PATCH] * len(digests)]
    return place(tokens, [picture(2, digest) for digest in digests], patch_id=PATCH)


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        (placed(), placed(), None),
        (placed("a", "b"), placed("a", "b"), None),
        (placed("a", "b"), placed("a", "c"), 4),
        (placed("a", "b"), placed("c", "b"), 1),
        (placed("a"), placed("a", "b"), 4),
        (placed("a", "b"), placed(), 1),
        (placed("a"), placed("a", first=3), 1),
    ],
)
def test_where_the_pictures_of_two_prompts_part(ours, theirs, expected) -> None:
    assert first_difference(ours.pictures, theirs.pictures) == expected
    assert first_difference(theirs.pictures, ours.pictures) == expected
