"""How ranking bears queries that a camera or a detector got wrong; the gallery is left as it is."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float
from measurements import by_query, distances, masks_of
from torch import Tensor
from torchvision.transforms.functional import resized_crop

from casn_plugin import ImageCASNEngine
from casn_plugin.imputation import without_pixels
from casn_plugin.loading import encode_loader

Imgs = Float[Tensor, "queries 3 rows columns"]
Masks = Float[Tensor, "queries rows columns"]
STRENGTHS: dict[str, tuple[float, ...]] = {
    "shift": (0.05, 0.1, 0.2),
    "crop": (0.1, 0.2, 0.3),
    "block": (0.1, 0.2, 0.4),
    "person": (0.3, 0.5, 0.7),
    "background": (0.5, 1.0),
}
"""By what is done, how much of it; of 0 the queries are as they are."""
LABELS = {
    "shift": "shifted up or down\n(share of the height)",
    "crop": "cropped\n(share of height and width)",
    "block": "block in front\n(share of the area)",
    "person": "other person in front\n(share of the height)",
    "background": "other camera's background\n(share of the colour)",
}


def shifted(imgs: Imgs, share: float, generator: torch.Generator) -> Imgs:
    """Returns images moved up or down by a share of their height; the edge's row fills the gap.

    Example:
        >>> img = torch.arange(4.0).view(1, 1, 4, 1)
        >>> shifted(img, 0.25, torch.Generator().manual_seed(1)).flatten().tolist()
        [0.0, 0.0, 1.0, 2.0]
    """
    rows = imgs.shape[2]
    signs = 2 * torch.randint(2, (len(imgs), 1), generator=generator) - 1
    at = (torch.arange(rows) - signs * round(share * rows)).clamp(0, rows - 1)
    return imgs.gather(2, at[:, None, :, None].expand_as(imgs))


def cropped(imgs: Imgs, share: float, generator: torch.Generator) -> Imgs:
    """Returns images without a share of their height and width, drawn anew at their size.

    Example:
        >>> cropped(torch.ones(1, 3, 8, 4), 0.25, torch.Generator()).shape
        torch.Size([1, 3, 8, 4])
    """
    size = rows, columns = imgs.shape[2], imgs.shape[3]
    kept = [round((1 - share) * length) for length in size]
    found = []
    for img in imgs:
        top, left = (
            int(torch.randint(length - keep + 1, (), generator=generator))
            for length, keep in zip((rows, columns), kept, strict=True)
        )
        found.append(resized_crop(img, top, left, *kept, [rows, columns]))
    return torch.stack(found)


def behind_block(imgs: Imgs, share: float, generator: torch.Generator) -> Imgs:
    """Returns images behind a block of the mean colour, of a share of their area, anywhere.

    Example:
        >>> behind_block(torch.ones(1, 1, 8, 4), 0.25, torch.Generator()).mean()
        tensor(0.7500)
    """
    found = imgs.clone()
    rows, columns = (round(share**0.5 * length) for length in imgs.shape[2:])
    for img in found:
        top = int(torch.randint(img.shape[1] - rows + 1, (), generator=generator))
        left = int(torch.randint(img.shape[2] - columns + 1, (), generator=generator))
        img[:, top : top + rows, left : left + columns] = 0
    return found


def others(differ: Tensor, generator: torch.Generator) -> Tensor:
    """Returns for each query one other that differs from it, drawn at random.

    Args:
        differ: (queries, queries) whether two differ.
        generator: draws.

    Raises:
        ValueError: a query that none differs from.

    Example:
        >>> others(~torch.eye(2, dtype=torch.bool), torch.Generator()).tolist()
        [1, 0]
    """
    if not bool(differ.any(1).all()):
        raise ValueError("there is no other query to take a person or a background from")
    return torch.rand(differ.shape, generator=generator).masked_fill(~differ, -1).argmax(1)


def behind_person(
    imgs: Imgs, masks: Masks, other: Tensor, share: float, generator: torch.Generator
) -> Imgs:
    """Returns images with the person of another one in front, at the lower edge, anywhere across.

    Args:
        imgs: of the queries.
        masks: of the person in each, in [0, 1].
        other: the row of the picture whose person is put in front of each.
        share: size of that picture, of the height and of the width.
        generator: draws where it stands.
    """
    found, (rows, columns) = imgs.clone(), (round(share * n) for n in imgs.shape[2:])
    small = F.interpolate(imgs[other], (rows, columns), mode="bilinear", antialias=True)
    alpha = F.interpolate(masks[other][:, None], (rows, columns), mode="bilinear", antialias=True)
    for img, person, mask in zip(found, small, alpha, strict=True):
        left = int(torch.randint(img.shape[2] - columns + 1, (), generator=generator))
        there = img[:, -rows:, left : left + columns]
        there.copy_(mask * person + (1 - mask) * there)
    return found


def on_background(imgs: Imgs, masks: Masks, backgrounds: Imgs, share: float) -> Imgs:
    """Returns images whose background is blended into another one's.

    Args:
        imgs: of the queries.
        masks: of the person in each, in [0, 1].
        backgrounds: what comes there.
        share: of the other background's colour.
    """
    alpha = share * (1 - masks[:, None])
    return (1 - alpha) * imgs + alpha * backgrounds


def changed(
    imgs: Imgs, masks: Masks | None, pids: Tensor, camids: Tensor, *, seed: int = 0
) -> dict[str, dict[float, Imgs]]:
    """Returns the queries changed in every way, by its name and its strength.

    Without masks, what needs them is left out.
    """

    def draw() -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    simple: dict[str, Callable[[Imgs, float, torch.Generator], Imgs]]
    simple = {"shift": shifted, "crop": cropped, "block": behind_block}
    found = {
        name: {share: change(imgs, share, draw()) for share in STRENGTHS[name]}
        for name, change in simple.items()
    }
    if masks is None:
        return found
    generator = draw()
    differ = pids[:, None] != pids
    persons = others(differ, generator)
    elsewhere = others(differ & (camids[:, None] != camids), generator)
    empty = without_pixels(imgs, masks > 0.1, seed=seed)[elsewhere]
    return found | {
        "person": {
            share: behind_person(imgs, masks, persons, share, draw())
            for share in STRENGTHS["person"]
        },
        "background": {
            share: on_background(imgs, masks, empty, share) for share in STRENGTHS["background"]
        },
    }


def robustness(engine: ImageCASNEngine, name: str) -> dict[str, Any]:
    """Returns how well a trained model ranks changed queries, by both rankings.

    Of each change and strength, what :func:`measurements.by_query` returns.
    """
    model, loaders = engine.casn, engine.test_loader[name]
    batches = list(loaders["query"])
    imgs = torch.cat([batch["img"] for batch in batches])
    pids, camids = (torch.cat([batch[key] for batch in batches]) for key in ("pid", "camid"))
    gallery = encode_loader(model, loaders["gallery"])
    masks = masks_of(loaders["query"].dataset, (imgs.shape[2], imgs.shape[3]))

    def ranked(imgs: Imgs) -> dict[str, Any]:
        parts = zip(imgs.split(64), pids.split(64), camids.split(64), strict=True)
        query = encode_loader(
            model, [{"img": img, "pid": pid, "camid": camid} for img, pid, camid in parts]
        )
        pairs = distances(engine, query.encoding, gallery.encoding, "unit")
        return by_query(engine, pairs, (query.pids, gallery.pids, query.camids, gallery.camids))

    return {
        kind: {str(share): ranked(each) for share, each in by_strength.items()}
        for kind, by_strength in changed(imgs, masks, pids, camids).items()
    }
