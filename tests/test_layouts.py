"""How tensors of layers are maps, and how maps are put back."""

import pytest
import torch

from casn_plugin.layouts import (
    Layout,
    by_reshape,
    layout_by_gradient,
    layouts_by_size,
    token_grid,
)

SIZE = (64, 32)
TOKENS = torch.arange(2 * 11 * 5.0).reshape(2, 11, 5)


def reshape(tokens: torch.Tensor) -> torch.Tensor:
    return tokens[:, 3:].reshape(len(tokens), 4, 2, 5).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("layout", "value"),
    [
        (Layout(), torch.rand(2, 5, 4, 2)),
        (Layout("channels last"), torch.rand(2, 4, 2, 5)),
        (Layout("tokens", 3, (16.0, 16.0)), TOKENS),
        (by_reshape(reshape, TOKENS), TOKENS),
    ],
    ids=lambda each: getattr(each, "kind", ""),
)
def test_a_map_is_read_and_another_put_in_its_place(layout, value):
    maps = layout.map_of(value, SIZE)
    assert maps.shape == (2, 5, 4, 2)
    torch.testing.assert_close(layout.put_back(value, maps), value, rtol=0, atol=0)
    other = torch.rand(2, 5, 4, 2, requires_grad=True)
    changed = layout.put_back(value, other)
    torch.testing.assert_close(layout.map_of(changed, SIZE), other, rtol=0, atol=0)
    if value is TOKENS:
        torch.testing.assert_close(changed[:, :3], TOKENS[:, :3], rtol=0, atol=0)
        torch.testing.assert_close(maps, reshape(TOKENS), rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(changed.square().sum(), other, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), other)
    torch.testing.assert_close(second, torch.full_like(other, 2.0))


def test_tokens_of_other_sizes_follow_the_image():
    layout = token_grid(1 + 14 * 14, (224, 224))
    assert layout == Layout("tokens", 1, (16.0, 16.0))
    assert layout.map_of(torch.rand(1, 1 + 16 * 8, 5), (256, 128)).shape[2:] == (16, 8)
    with pytest.raises(ValueError, match=r"127 tokens are no map of an image of 256x128.*reshape"):
        layout.map_of(torch.rand(1, 128, 5), (256, 128))


@pytest.mark.parametrize(
    ("number", "size", "hint", "prefix", "stride"),
    [
        (197, (224, 224), None, 1, 16), (198, (224, 224), None, 2, 16), (201, (224, 224), 5, 5, 16),
        (129, (256, 128), None, 1, 16), (49, (224, 224), 1, 0, 32), (9, (32, 32), 5, 5, 16),
    ],
)  # fmt: skip
def test_patches_are_a_grid_of_the_shape_of_the_image(number, size, hint, prefix, stride):
    assert token_grid(number, size, hint) == Layout(
        "tokens", prefix, (float(stride), float(stride))
    )


def test_numbers_that_are_no_grid():
    for number in (0, 1, 2, 3, 195):
        assert token_grid(number, (224, 224)) is None


def test_pooling_tells_the_channels():
    for dims, kind in (((2, 5, 1, 1), "channels first"), ((2, 1, 1, 5), "channels last")):
        assert layout_by_gradient(torch.rand(dims).expand(2, 5, 5, 5)).kind == kind
    assert layout_by_gradient(torch.ones(2, 5, 5, 5)) is None


def test_sizes_tell_the_channels_unless_both_fit():
    assert [each.kind for each in layouts_by_size(torch.Size([2, 64, 8, 4]), (256, 128))] == [
        "channels first"
    ]
    assert len(layouts_by_size(torch.Size([2, 8, 8, 8]), (64, 64))) == 2
    assert layouts_by_size(torch.Size([2, 8, 50, 32]), (224, 224)) == []  # heads of an attention


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: 2 * reshape(x), lambda x: torch.cat([reshape(x)] * 2, 1),
        lambda x: reshape(x).flip(0) if len(x) > 1 else reshape(x), lambda x: reshape(x).relu() - 1,
    ],
)  # fmt: skip
def test_a_reshape_that_computes_is_refused(wrong):
    with pytest.raises(ValueError, match="must only move values"):
        by_reshape(wrong, TOKENS)


def test_a_reshape_that_gives_no_map_is_refused():
    with pytest.raises(ValueError, match=r"\(B, C, H, W\), got \(1, 8, 5\) of .*\(1, 11, 5\)"):
        by_reshape(lambda x: x[:, 3:], TOKENS)
    with pytest.raises(ValueError, match="got NoneType"):
        by_reshape(lambda x: None, TOKENS)


def test_another_rank_is_refused():
    for layout, shape in ((Layout(), "B, C, H, W"), (Layout("channels last"), "B, H, W, C")):
        with pytest.raises(ValueError, match=rf"\({shape}\), but gave \(2, 11, 5\)"):
            layout.map_of(TOKENS, SIZE)
