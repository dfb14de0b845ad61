"""Every equation of the CASN paper once more, slowly: what the package is checked against.

Zheng, Karanam, Wu, Radke: Re-Identification with Consistent Attentive Siamese Networks, CVPR 2019.

Nothing of the package is imported here. Sums are written as loops over images, pairs, rows and
pixels, and gradients come from autograd for one image or one pair at a time. Functions of numbers
take and return NumPy float64; those that need a gradient take and return torch tensors.
Attention maps are (height, width), activations (channels, height, width).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

Array = np.ndarray
Function = Callable[[torch.Tensor], torch.Tensor]


# Losses


def log_softmax(scores: Array) -> Array:
    """log(exp(y_c) / sum_j exp(y_j)) for every c of one score vector: the term of Eqs. 1 and 3."""
    scores = np.asarray(scores, dtype=np.float64)
    largest = max(float(score) for score in scores)  # subtracted so that exp cannot overflow
    total = 0.0
    for score in scores:
        total += math.exp(score - largest)
    return np.array([score - largest - math.log(total) for score in scores])


def cross_entropy(logits: Array, pids: Sequence[int], label_smoothing: float = 0.0) -> float:
    """Eq. 1, L_ide, as the mean over images.

    The target of class c is (1 - eps) [c is the identity] + eps / num_classes, as in torchreid.
    """
    num_classes = len(logits[0])
    total = 0.0
    for scores, pid in zip(logits, pids, strict=True):
        log_probabilities = log_softmax(scores)
        for c in range(num_classes):
            target = label_smoothing / num_classes
            if c == pid:
                target += 1.0 - label_smoothing
            total -= target * log_probabilities[c]
    return float(total / len(pids))


def identification_attention_loss(
    masked_logits: Array, pids: Sequence[int], score: str = "logit"
) -> float:
    """Eq. 2, L_ia = y_c of the masked image, as the mean over images.

    y_c is the true identity's logit, its softmax probability p, the log-odds of p, or how far
    log p is above that of guessing.
    """
    total = 0.0
    for scores, pid in zip(masked_logits, pids, strict=True):
        log_p = log_softmax(scores)[pid]
        p = math.exp(log_p)
        readings = {
            "logit": float(scores[pid]),
            "probability": p,
            "log-odds": math.log(p / (1 - p)),
            "above-chance": max(0.0, log_p - math.log(1 / len(scores))),
        }
        total += readings[score]
    return float(total / len(pids))


def pair_loss(pair_scores: Array, same: Sequence[bool]) -> float:
    """Eq. 3, L_bce, as the mean over pairs: column 1 is the same identity, column 0 different."""
    total = 0.0
    for scores, is_same in zip(pair_scores, same, strict=True):
        total -= log_softmax(scores)[1 if is_same else 0]
    return float(total / len(pair_scores))


def siamese_attention_loss(
    pair_scores: Array, distances: Array, same: Sequence[bool], attention_weight: float
) -> float:
    """Eq. 5, L_sa = L_bce + alpha ||M*_m1 - M*_m2||_2, its second term averaged over positives.

    Only pairs of the same identity have a second term; without any it is zero.
    """
    total, positives = 0.0, 0
    for distance, is_same in zip(distances, same, strict=True):
        if is_same:
            total += float(distance)
            positives += 1
    consistency = total / positives if positives > 0 else 0.0
    return pair_loss(pair_scores, same) + attention_weight * consistency


def pairs_of_a_batch(pids: Sequence[int]) -> list[tuple[int, int, bool]]:
    """Every pair of two images of a batch, and whether it shows one identity.

    An identity of -1 is unknown, so nothing can be said of its pairs.
    """
    found = []
    for i in range(len(pids)):
        for j in range(i + 1, len(pids)):
            if pids[i] != -1 and pids[j] != -1:
                found.append((i, j, pids[i] == pids[j]))
    return found


def in_batch_loss(
    head: Function,
    pair_classifier: Function,
    activations: torch.Tensor,
    pids: Sequence[int],
    pairs: Sequence[Sequence[int]],
    *,
    attention_weight: float,
    threshold: float,
) -> float:
    """Eq. 5 over listed pairs of a batch, each computed by itself from its two images alone.

    The pair classifier is shown f1 - f2 and f2 - f1 of each pair. Without a pair it is zero.
    """
    scores, distances, same = [], [], []
    for i, j in pairs:
        f1 = head(activations[i].unsqueeze(0))[0]
        f2 = head(activations[j].unsqueeze(0))[0]
        for difference in (f1 - f2, f2 - f1):
            scores.append(pair_classifier(difference.unsqueeze(0))[0].detach().numpy())
        maps = siamese_maps(head, pair_classifier, activations[i], activations[j])
        distances.append(attention_distance(*(each.numpy() for each in maps), threshold))
        same.append(pids[i] == pids[j])
    if not distances:
        return 0.0
    both_orders = [is_same for is_same in same for _ in range(2)]
    total, positives = 0.0, 0
    for distance, is_same in zip(distances, same, strict=True):
        total += distance if is_same else 0.0
        positives += is_same
    consistency = total / positives if positives else 0.0
    return pair_loss(scores, both_orders) + attention_weight * consistency


def casn_loss(ide: float, ia: float, sa: float, lambda_ia: float, lambda_sa: float) -> float:
    """Eq. 6, L = L_ide + lambda_1 L_ia + lambda_2 L_sa."""
    return ide + lambda_ia * ia + lambda_sa * sa


# Identification attention


def grad_cam(
    score: torch.Tensor, activations: torch.Tensor, index: int | None = None
) -> torch.Tensor:
    """Grad-CAM (section 3.1.2): M = ReLU(sum_k w_k A_k) with w_k = GAP(d score / d A_k).

    `score` is one number of one image and `activations` that image's A (C, H, W). If `score` was
    computed from a batch, give the whole batch (B, C, H, W) and the image's index in it.
    The map (H, W) is returned without a graph; the graph of `score` is kept.
    """
    (gradient,) = torch.autograd.grad(score, activations, retain_graph=True)
    image = activations.detach()
    if index is not None:
        gradient, image = gradient[index], image[index]
    channels, height, width = image.shape
    attention = torch.zeros(height, width, dtype=image.dtype, device=image.device)
    for k in range(channels):
        weight = gradient[k].sum() / (height * width)
        attention = attention + weight * image[k]
    return torch.relu(attention)


def scale_map(attention: Array) -> Array:
    """A map, which is nowhere negative, divided by its own maximum; a blank map stays zero."""
    attention = np.asarray(attention, dtype=np.float64)
    largest = attention.max()
    if largest <= 0:
        return np.zeros_like(attention)
    return attention / largest


def source_position(target: int, source_length: int, target_length: int) -> tuple[int, int, float]:
    """Where an element of a resized line lies in the original one, with half-pixel centres.

    Returns its two neighbours there and the share of the second. The centre of element i is at
    i + 1/2, so i lies at (i + 1/2) source_length / target_length - 1/2; what falls outside the
    first and the last centre is moved onto it.
    """
    position = (target + 0.5) * source_length / target_length - 0.5
    position = min(max(position, 0.0), source_length - 1.0)
    before = math.floor(position)
    after = min(before + 1, source_length - 1)
    return before, after, position - before


def bilinear_resize(attention: Array, height: int, width: int) -> Array:
    """Bilinear interpolation, half-pixel centres: torch's with align_corners=False."""
    attention = np.asarray(attention, dtype=np.float64)
    resized = np.zeros((height, width))
    for y in range(height):
        above, below, down = source_position(y, attention.shape[0], height)
        for x in range(width):
            left, right, across = source_position(x, attention.shape[1], width)
            resized[y, x] = (
                (1 - down) * (1 - across) * attention[above, left]
                + (1 - down) * across * attention[above, right]
                + down * (1 - across) * attention[below, left]
                + down * across * attention[below, right]
            )
    return resized


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)), in the form whose exp cannot overflow."""
    if x >= 0:
        return 1.0 / (1.0 + math.exp(-x))
    return math.exp(x) / (1.0 + math.exp(x))


def soft_mask(attention: Array, height: int, width: int, scale: float, threshold: float) -> Array:
    """Section 3.1.2, Sigma(M) = sigmoid(alpha (M - beta)): alpha is `scale`, beta `threshold`.

    M is first resized to the image and only then scaled to [0, 1].
    """
    scaled = scale_map(bilinear_resize(attention, height, width))
    mask = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            mask[y, x] = sigmoid(scale * (scaled[y, x] - threshold))
    return mask


def masked_image(img: Array, mask: Array, fill: float = 0.0) -> Array:
    """Section 3.1.2, I (1 - Sigma(M)), with `fill` in the place of what is masked."""
    img = np.asarray(img, dtype=np.float64)
    masked = np.zeros_like(img)
    channels, height, width = img.shape
    for c in range(channels):
        for y in range(height):
            for x in range(width):
                masked[c, y, x] = img[c, y, x] * (1 - mask[y, x]) + fill * mask[y, x]
    return masked


# Siamese attention


def indicator(pair_classifier: Function, f1: torch.Tensor, f2: torch.Tensor) -> torch.Tensor:
    """Eq. 4 for one pair: alpha_i = 1 where d z_1 / d f-_i > 0, else 0, with f- = f1 - f2.

    `pair_classifier` maps (P, D) to (P, 2), f1 and f2 are (D,); so is the result, without a graph.
    """
    difference = (f1 - f2).detach().clone().requires_grad_()
    z = pair_classifier(difference.unsqueeze(0))[0]
    (gradient,) = torch.autograd.grad(z[1], difference)
    alpha = torch.zeros_like(gradient)
    alpha[gradient > 0] = 1
    return alpha


def siamese_maps(
    head: Function, pair_classifier: Function, a1: torch.Tensor, a2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Section 3.2.2, the maps M1 and M2 of one pair, by autograd.

    f = head(A), s = (alpha, f), w_k = GAP(d s / d A_k), M = ReLU(sum_k w_k A_k). `head` maps
    (1, C, H, W) to (1, D) and is in eval mode; a1 and a2 are (C, H, W).
    """
    a1 = a1.detach().clone().requires_grad_()
    a2 = a2.detach().clone().requires_grad_()
    f1 = head(a1.clone().unsqueeze(0))[0]  # a clone, since a head may begin with an in-place ReLU
    f2 = head(a2.clone().unsqueeze(0))[0]
    alpha = indicator(pair_classifier, f1, f2)
    s1 = (alpha * f1).sum()
    s2 = (alpha * f2).sum()
    return grad_cam(s1, a1), grad_cam(s2, a2)


def cosine(f1: torch.Tensor, f2: torch.Tensor) -> torch.Tensor:
    """f1 . f2 / (|f1| |f2|) of one pair, (D,) each, with its graph."""
    product = squares1 = squares2 = torch.zeros((), dtype=f1.dtype)
    for value1, value2 in zip(f1, f2, strict=True):
        product = product + value1 * value2
        squares1 = squares1 + value1 * value1
        squares2 = squares2 + value2 * value2
    return product / (squares1.sqrt() * squares2.sqrt())


def similarity_maps(
    head: Function, a1: torch.Tensor, a2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Grad-CAM of the cosine of both features of one pair, in both images, by autograd."""
    a1 = a1.detach().clone().requires_grad_()
    a2 = a2.detach().clone().requires_grad_()
    f1 = head(a1.clone().unsqueeze(0))[0]
    f2 = head(a2.clone().unsqueeze(0))[0]
    s = cosine(f1, f2)
    return grad_cam(s, a1), grad_cam(s, a2)


def similarity_distmat(
    head: Function,
    query_activations: torch.Tensor,
    gallery_activations: torch.Tensor,
    threshold: float,
    unit: bool = False,
) -> Array:
    """The attention distance of every query to every gallery image by their similarity, (Q, G)."""
    distmat = np.zeros((len(query_activations), len(gallery_activations)))
    for q, query in enumerate(query_activations):
        for g, gallery in enumerate(gallery_activations):
            maps = similarity_maps(head, query, gallery)
            distmat[q, g] = attention_distance(
                *(each.double().cpu().numpy() for each in maps), threshold, unit
            )
    return distmat


def row_profile(attention: Array) -> Array:
    """Section 3.2.2, M_m: the highest response across each row of pixels, (H,)."""
    return np.array([max(row) for row in attention], dtype=np.float64)


def span(profile: Array, threshold: float) -> tuple[int, int]:
    """Section 3.2.2: the first and the last row larger than t; all rows if there is none."""
    larger = [row for row, value in enumerate(profile) if value > threshold]
    if len(larger) == 0:
        return 0, len(profile) - 1
    return larger[0], larger[-1]


def resize_linear(segment: Array, length: int) -> Array:
    """Linear interpolation, half-pixel centres: torch's with align_corners=False."""
    resized = np.zeros(length)
    for i in range(length):
        before, after, share = source_position(i, len(segment), length)
        resized[i] = (1 - share) * segment[before] + share * segment[after]
    return resized


def align(profile: Array, threshold: float) -> Array:
    """Section 3.2.2, M*_m: the rows from the first to the last above t, resized to all H rows."""
    first, last = span(profile, threshold)
    return resize_linear(profile[first : last + 1], len(profile))


def attention_distance(map1: Array, map2: Array, threshold: float, unit: bool = False) -> float:
    """Eq. 5's second term, ||M*_m1 - M*_m2||_2, of the scaled maps.

    With `unit` each aligned profile is first brought to length 1 (a zero profile stays zero).
    """
    aligned = []
    for attention in (map1, map2):
        profile = align(row_profile(scale_map(attention)), threshold)
        norm = math.sqrt(sum(value * value for value in profile))
        if unit and norm > 0:
            profile = profile / norm
        aligned.append(profile)
    total = 0.0
    for value1, value2 in zip(aligned[0], aligned[1], strict=True):
        total += (value1 - value2) ** 2
    return math.sqrt(total)


def distance_of_rows(
    pair_classifier: Function,
    features: torch.Tensor,
    activations: torch.Tensor,
    first: int,
    second: int,
    threshold: float,
) -> float:
    """Eq. 5 of two rows of a batch that went through a whole network: features (B, D) of A."""
    alpha = indicator(pair_classifier, features[first].detach(), features[second].detach())
    maps = [
        grad_cam((alpha * features[row]).sum(), activations, row).numpy() for row in (first, second)
    ]
    return attention_distance(*maps, threshold=threshold)


def attention_distmat(
    head: Function,
    pair_classifier: Function,
    query_activations: torch.Tensor,
    gallery_activations: torch.Tensor,
    threshold: float,
    unit: bool = False,
) -> Array:
    """Section 4, the attention distance (Eq. 5) of every query to every gallery image, (Q, G).

    Pair by pair: the maps of an image depend on what it is paired with. f- = f_query - f_gallery.
    """
    distmat = np.zeros((len(query_activations), len(gallery_activations)))
    for q, query in enumerate(query_activations):
        for g, gallery in enumerate(gallery_activations):
            map1, map2 = siamese_maps(head, pair_classifier, query, gallery)
            distmat[q, g] = attention_distance(
                map1.double().cpu().numpy(), map2.double().cpu().numpy(), threshold, unit
            )
    return distmat


def pcb_embedding(activations: torch.Tensor, parts: int) -> torch.Tensor:
    """PCB's f in eval mode, as torchreid makes it: (B, C, H, W) to (B, C * parts).

    Part p averages the rows floor(p H / parts) to ceil((p + 1) H / parts), the end excluded
    (adaptive average pooling), and is brought to length 1 over its channels. Parts vary fastest.
    """
    height = activations.shape[2]
    embeddings = []
    for image in activations:
        pooled = []
        for p in range(parts):
            first = (p * height) // parts
            end = ((p + 1) * height + parts - 1) // parts
            part = image[:, first:end, :].mean(dim=(1, 2))
            pooled.append(part / part.norm().clamp(min=1e-12))
        values = [pooled[p][c] for c in range(image.shape[0]) for p in range(parts)]
        embeddings.append(torch.stack(values))
    return torch.stack(embeddings)


# Ranking


def min_max_values(values: Array) -> Array:
    """(d - min) / (max - min) of an array of distances; zero where they are all the same."""
    smallest, largest = values.min(), values.max()
    if largest == smallest:
        return np.zeros_like(values)
    return (values - smallest) / (largest - smallest)


def min_max(distmat: Array, per_query: bool) -> Array:
    """Section 4, "normalized": to [0, 1] in each query's row, or over the whole matrix."""
    distmat = np.asarray(distmat, dtype=np.float64)
    if not per_query:
        return min_max_values(distmat)
    return np.array([min_max_values(row) for row in distmat])


def fuse(
    feature_distmat: Array, attention_distmat: Array, normalization: str, attention_weight: float
) -> Array:
    """Section 4, "normalized and summed": feature distance + weight * attention distance.

    Each is normalized by itself: in each query's row ("query"), whole ("global") or not ("none").
    """
    if normalization not in ("none", "query", "global"):
        raise ValueError(f"normalization must be none, query or global, not {normalization!r}")
    feature = np.asarray(feature_distmat, dtype=np.float64)
    attention = np.asarray(attention_distmat, dtype=np.float64)
    if normalization != "none":
        feature = min_max(feature, per_query=normalization == "query")
        attention = min_max(attention, per_query=normalization == "query")
    return feature + attention_weight * attention


def reranked(
    distmat: Array,
    queries: int,
    k1: int,
    k2: int,
    original_weight: float,
    greatest: Sequence[float] | None = None,
) -> Array:
    """k-reciprocal re-ranking (Zhong et al., CVPR 2017), Eqs. 1 to 12, from all N x N distances.

    d is squared and divided by its row's greatest square (or that of `greatest`).
    """
    images = range(len(distmat))
    d = np.zeros(distmat.shape)
    for i in images:
        most = max(distmat[i]) if greatest is None else greatest[i]
        for j in images:
            d[i, j] = min((distmat[i, j] / most) ** 2, 1.0)
    order = [sorted(images, key=lambda j: (d[i, j], j)) for i in images]

    def reciprocal(i: int, k: int) -> set[int]:  # with the image itself: k + 1
        return {j for j in order[i][: k + 1] if i in order[j][: k + 1]}

    encoding = []
    for i in images:
        own = reciprocal(i, k1)
        expanded = set(own)
        for j in own:
            its = reciprocal(j, round(k1 / 2))
            if 3 * len(its & own) > 2 * len(its):
                expanded |= its
        weights = {j: math.exp(-d[i, j]) for j in expanded}
        encoding.append({j: weight / sum(weights.values()) for j, weight in weights.items()})
    averaged = []
    for i in images:
        near = order[i][:k2] if k2 > 1 else [i]
        mean: dict[int, float] = {}
        for j in near:
            for k, weight in encoding[j].items():
                mean[k] = mean.get(k, 0.0) + weight / len(near)
        averaged.append(mean)
    final = np.zeros((queries, len(distmat) - queries))
    for q in range(queries):
        for g in range(queries, len(distmat)):
            keys = averaged[q].keys() | averaged[g].keys()
            least = sum(min(averaged[q].get(k, 0.0), averaged[g].get(k, 0.0)) for k in keys)
            most = sum(max(averaged[q].get(k, 0.0), averaged[g].get(k, 0.0)) for k in keys)
            jaccard = 1 - least / most if most else 1.0
            final[q, g - queries] = (1 - original_weight) * jaccard + original_weight * d[q, g]
    return final


def cmc_map(
    distmat: Array,
    q_pids: Sequence[int],
    g_pids: Sequence[int],
    q_camids: Sequence[int],
    g_camids: Sequence[int],
) -> tuple[list[float], float]:
    """Section 4's measures in the Market-1501 protocol: CMC at ranks 1 to G, and mAP.

    A query's gallery leaves out the images of its own identity from its own camera. A query
    without a true match in what remains does not count. Equal distances keep the gallery's order.
    """
    num_gallery = len(g_pids)
    hits = [0] * num_gallery
    average_precisions = []
    for q in range(len(q_pids)):
        matches = []  # of the remaining gallery, nearest first: is it the query's identity?
        for g in sorted(range(num_gallery), key=lambda g, q=q: distmat[q][g]):
            if g_pids[g] == q_pids[q] and g_camids[g] == q_camids[q]:
                continue
            matches.append(g_pids[g] == q_pids[q])
        if not any(matches):
            continue
        precisions = []
        for rank, match in enumerate(matches, start=1):
            if match:
                precisions.append((len(precisions) + 1) / rank)
        average_precisions.append(sum(precisions) / len(precisions))
        first_match = matches.index(True)
        for rank in range(first_match, num_gallery):
            hits[rank] += 1
    if len(average_precisions) == 0:
        raise ValueError("no query has a true match in the gallery")
    num_queries = len(average_precisions)
    return [hit / num_queries for hit in hits], sum(average_precisions) / num_queries


def ranked_list(
    distances: np.ndarray,
    q_pid: int,
    g_pids: Sequence[int],
    q_camid: int,
    g_camids: Sequence[int],
) -> list[tuple[int, int]]:
    """One query's gallery rows, nearest first, without junk, each with its rank from 1."""
    order = np.argsort(distances).tolist()
    kept = [g for g in order if not (g_pids[g] == q_pid and g_camids[g] == q_camid)]
    return [(g, 1 + place) for place, g in enumerate(kept)]


# Quality of attention maps


def attention_quality(
    attention: Array, mask: Array, threshold: float, row_threshold: float
) -> tuple[float, float, float, float]:
    """Energy on the person, IoU, pointing game and coverage of the body's rows, pixel by pixel.

    NaN where the map is blank or no pixel belongs to the person.
    """
    rows, columns = mask.shape
    pixels = scale_map(bilinear_resize(attention, rows, columns))
    total = on_person = 0.0
    both = either = 0
    body_rows = attended_rows = 0
    for y in range(rows):
        is_body = attends = False
        for x in range(columns):
            total += pixels[y, x]
            on_person += pixels[y, x] * mask[y, x]
            person, attended = mask[y, x] >= 0.5, pixels[y, x] > threshold
            both += person and attended
            either += person or attended
            is_body = is_body or person
            attends = attends or pixels[y, x] > row_threshold
        body_rows += is_body
        attended_rows += is_body and attends
    if total == 0 or body_rows == 0:
        return math.nan, math.nan, math.nan, math.nan
    height, width = attention.shape
    peak, where = -1.0, (0, 0)
    for y in range(height):
        for x in range(width):
            if attention[y, x] > peak:
                peak, where = attention[y, x], (y, x)
    centre = (
        math.floor((where[0] + 0.5) / height * rows),
        math.floor((where[1] + 0.5) / width * columns),
    )
    return (
        on_person / total,
        both / either,
        1.0 if mask[centre] >= 0.5 else 0.0,
        attended_rows / body_rows,
    )


def imputed(img, removed):
    """ROAD's linear imputation of one (channels, rows, columns) image, as one dense system.

    Every removed pixel is the mean of its neighbours that are in the image: 1/6 for those that
    share a side with it, 1/12 for those that share a corner.
    """
    channels, rows, columns = img.shape
    places = [(r, c) for r in range(rows) for c in range(columns) if removed[r, c]]
    matrix = np.zeros((len(places), len(places)))
    right = np.zeros((len(places), channels))
    for i, (r, c) in enumerate(places):
        for down in (-1, 0, 1):
            for across in (-1, 0, 1):
                y, x = r + down, c + across
                if (down, across) == (0, 0) or not (0 <= y < rows and 0 <= x < columns):
                    continue
                weight = 1 / 12 if down and across else 1 / 6
                matrix[i, i] += weight
                if removed[y, x]:
                    matrix[i, places.index((y, x))] -= weight
                else:
                    right[i] += weight * img[:, y, x]
    found = np.array(img, dtype=np.float64)
    for (r, c), values in zip(places, np.linalg.solve(matrix, right), strict=True):
        found[:, r, c] = values
    return found


def removal_curves(score, img, order, shares):
    """Deletion and insertion curves of one image, pixel by pixel; the image's mean is put in.

    `order` lists (row, column) of all pixels, the most attended first.
    """
    mean, total, curves = img.mean((1, 2)), len(order), ([], [])
    for share in shares:
        count = round(share * total)
        for curve, gone in zip(curves, (order[:count], order[count:]), strict=True):
            changed = img.copy()
            for row, column in gone:
                changed[:, row, column] = mean
            curve.append(score(changed))
    return curves
