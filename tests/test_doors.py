"""One check for each kind of thing, and that public functions have them at their doors."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TinyBackbone, tiny_forward
from torch import nn

from casn_plugin import (
    CASN,
    Encoding,
    SiameseAttentionLoss,
    attention,
    batch_pairs,
    evidence,
    faithfulness,
    identities,
    imputation,
    losses,
    retrieval,
    sampler,
    scores,
)
from casn_plugin.doors import (
    check_choice,
    check_count,
    check_finite,
    check_flag,
    check_images,
    check_kind,
    check_lengths,
    check_matrix,
    check_names,
    check_number,
    check_settings,
    check_share,
    check_size,
    check_tensor,
    check_weight,
)
from casn_plugin.explanation.pictures import overlay, pair_mosaic


@pytest.mark.parametrize(
    ("value", "dims", "error", "message"),
    [
        (np.zeros(3), "pairs", TypeError, "it must be a float tensor, got ndarray"),
        (None, "pairs", TypeError, "got NoneType"),
        (torch.zeros(3, dtype=torch.uint8), "pairs", TypeError, "a float tensor, got torch.uint8"),
        (torch.zeros(3, dtype=torch.complex64), "pairs", TypeError, "got torch.complex64"),
        (torch.zeros(3), "pairs dim", ValueError, r"of shape \(pairs, dim\), got \(3,\)"),
        (torch.zeros(3, 4), "pairs", ValueError, r"of shape \(pairs,\), got \(3, 4\)"),
        (torch.zeros(3, 4), "pairs 2", ValueError, r"of shape \(pairs, 2\), got \(3, 4\)"),
        (torch.zeros(3), "*batch height width", ValueError, r"got \(3,\)"),
    ],
)
def test_tensors_of_another_kind_are_refused(value, dims, error, message):
    with pytest.raises(error, match=message):
        check_tensor("it", value, dims)


def test_tensors_of_the_kind_come_back():
    for value, dims in (
        (torch.zeros(3, 2), "pairs 2"), (torch.zeros(()), ""), (torch.zeros(4, 3), "*b h w"),
        (torch.zeros(1, 2, 4, 3).half(), "*b h w"),
    ):  # fmt: skip
        assert check_tensor("it", value, dims) is value
    ids = torch.arange(3)
    assert check_tensor("it", ids, "batch", floating=False) is ids
    for wrong in (ids.float(), ids.bool()):
        with pytest.raises(TypeError, match="a tensor of integers"):
            check_tensor("it", wrong, "batch", floating=False)


ONES = torch.ones(2, 4, 2)


@pytest.mark.parametrize(
    "seeded",
    [
        lambda seed: evidence.PairClassifier(4, 4, seed=seed),
        lambda seed: batch_pairs.BatchPairs(seed=seed),
        lambda seed: sampler.PairSampler([0, 0, 1, 1], batch_size=2, seed=seed),
        lambda seed: imputation.without_pixels(
            torch.ones(1, 3, 2, 2), torch.ones(1, 2, 2, dtype=torch.bool), seed=seed
        ),
        lambda seed: faithfulness.pixel_ranks(ONES, (8, 4), seed=seed),
        lambda seed: faithfulness.faithfulness(
            lambda imgs: imgs.mean((1, 2, 3)), torch.rand(2, 3, 8, 4), ONES, seed=seed
        ),
        lambda seed: faithfulness.pair_faithfulness(
            CASN(TinyBackbone(), forward=tiny_forward, input_size=(48, 24), hidden_dim=4),
            *torch.rand(2, 2, 3, 48, 24), ONES, ONES, shares=(0.0, 1.0), fill="mean", seed=seed,
        ),
        lambda seed: retrieval.calibrate_gallery(
            nn.ModuleDict({"pair_classifier": evidence.PairClassifier(4, 4)}),
            retrieval.LabelledEncodings(
                Encoding(torch.rand(4, 4), basis=torch.rand(4, 4, 6, 2)), [0, 0, 1, 1], [0, 1] * 2
            ),
            0.5, seed=seed,
        ),
    ],
)  # fmt: skip
def test_whatever_is_seeded_takes_the_same_seeds(unchecked, seeded):
    for bad, error, message in (
        ("a", TypeError, "an integer, got str"), (1.0, TypeError, "an integer, got float"),
        (-1, ValueError, ">= 0, got -1"), (2**70, ValueError, "at most 9223372036854775807, got"),
    ):  # fmt: skip
        with pytest.raises(error, match=f"^seed must be {message}"):
            seeded(bad)
    seeded(np.int64(3))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, -1e-9])
def test_weights_are_finite_and_not_negative(value):
    with pytest.raises(ValueError, match="it must be >= 0 and finite, got"):
        check_weight("it", value)
    assert check_weight("it", 0) == 0 and check_weight("it", np.float32(2)) == 2


@pytest.mark.parametrize("value", [float("nan"), 1.0, 2, -1e-9])
def test_shares_lie_below_one(value):
    with pytest.raises(ValueError, match=r"it must lie in \[0, 1\), got"):
        check_share("it", value)
    assert check_share("it", 0) == 0


@pytest.mark.parametrize("value", ["0.2", None, True, [0.2]])
def test_numbers_are_numbers(value):
    for check in (check_share, check_weight):
        with pytest.raises(TypeError, match="it must be a number, got"):
            check("it", value)


def test_counts_are_whole():
    assert check_count("it", np.int64(3)) == 3 and check_count("it", 0, least=0) == 0
    for value in (1.0, "3", None, True):
        with pytest.raises(TypeError, match="it must be an integer, got"):
            check_count("it", value)
    with pytest.raises(ValueError, match="it must be at least 1, got 0"):
        check_count("it", 0)
    with pytest.raises(ValueError, match="it must be at most 2147483647, got 1000000000000000000"):
        check_count("it", 10**30)
    with pytest.raises(ValueError, match="rows of it must be at most 65535, got 65536"):
        check_size("it", (65536, 1))


def test_sizes_numbers_and_flags_become_pythons_own():
    for size in ((np.int64(8), 4), [8, 4], np.array([8, 4]), torch.tensor([8, 4])):
        assert [type(each) for each in check_size("it", size)] == [int, int]
    assert type(check_number("it", np.float64(-1))) is float and check_flag("it", np.True_) is True
    for size in (np.array([8.0, 4.0]), np.int64(8), torch.ones(2, 2, dtype=torch.int64), "84"):
        with pytest.raises(TypeError, match="it must be"):
            check_size("it", size)
    with pytest.raises(TypeError, match="it must be True or False, got 1"):
        check_flag("it", 1)


def test_kinds_are_named():
    assert check_kind("it", 1.5, int, float) == 1.5
    with pytest.raises(TypeError, match="it must be a int or float, got str"):
        check_kind("it", "1.5", int, float)
    assert check_settings("it", None, dict) == {} and check_settings("it", {1: 2}, dict) == {1: 2}
    with pytest.raises(TypeError, match="it must be a dict, got list"):
        check_settings("it", [], dict)


def test_names_are_text_one_an_image():
    assert check_names("it", ("a", Path("b"), np.array("c")[()])) == ["a", "b", "c"]
    assert {type(each) for each in check_names("it", np.array(["a", "b"]), 2)} == {str}
    for wrong in ("ab", b"ab", 7, {"a": 1}, {"a"}, np.array("a"), torch.tensor(1)):
        with pytest.raises(TypeError, match="it must be a list of text, one an image, got "):
            check_names("it", wrong)
    for wrong in ([1], [b"a"], ["a", None], torch.arange(2), np.arange(2), [["a"]]):
        with pytest.raises(TypeError, match="it must be text, one an image, got .* in them"):
            check_names("it", wrong)
    with pytest.raises(ValueError, match="it must be 2, one an image, got 1"):
        check_names("it", ["a"], 2)


def test_what_has_no_length_is_named():
    with pytest.raises(TypeError, match="pids must be several, one an image, got Tensor"):
        check_lengths(imgs=[1], pids=torch.tensor(3))


def test_pair_classifiers_of_another_width_are_refused():
    features, maps = torch.rand(4, 6, requires_grad=True), torch.rand(4, 6, 2, 2)
    for call in (
        lambda: attention.indicator(torch.nn.Linear(3, 2), features),
        lambda: attention.siamese_attention(torch.nn.Linear(3, 2), features, maps),
    ):
        with pytest.raises(ValueError, match="takes differences of dimension 3, got features of 6"):
            call()
    with pytest.raises(ValueError, match="it must be >= 0, got -1"):
        check_count("it", -1, least=0)


def test_lengths_choices_images_and_matrices():
    assert check_lengths(a=[1, 2], b=None, c=torch.zeros(2)) == 2 and check_lengths() == 0
    with pytest.raises(ValueError, match="a and b must be of one length, got 1 and 2"):
        check_lengths(a=[1], b=[1, 2])
    with pytest.raises(ValueError, match="it must be 'a', 'b' or 'c', got 'd'"):
        check_choice("it", "d", ("a", "b", "c"))
    for imgs in (torch.zeros(0, 3, 8, 4), torch.zeros(2, 3, 0, 4)):
        with pytest.raises(ValueError, match="at least one image"):
            check_images(imgs)
    for imgs in (torch.zeros(2, 4, 8, 4), torch.zeros(3, 8, 4)):
        with pytest.raises(ValueError, match=r"imgs must be of shape \(batch, 3, rows, columns\)"):
            check_images(imgs)
    with pytest.raises(ValueError, match="it must not be NaN, but 1 of 2 are"):
        check_matrix("it", torch.tensor([[0.0, torch.nan]]))
    assert check_finite("it", torch.zeros(0)).shape == (0,)


A, M = torch.rand(4, 3, 6, 2, requires_grad=True), torch.rand(4, 6, 2)
SAME, PIDS = torch.tensor([True, False]), torch.tensor([0, 1, 2, 3])
NET = torch.nn.Linear(3, 2)
MODEL = CASN(TinyBackbone(), forward=tiny_forward, input_size=(48, 24), hidden_dim=4)
NAN = float("nan")
LOSS = losses.IdentificationAttentionLoss()


@pytest.mark.parametrize(
    "call",
    [
        lambda: attention.grad_cam(A.sum((1, 2, 3))[:3], A),
        lambda: attention.grad_cam(A.sum((1, 2, 3)), A[0]),
        lambda: attention.indicator(NET, torch.rand(3)),
        lambda: attention.indicator(torch.nn.Linear(3, 5), torch.rand(2, 3)),
        lambda: attention.siamese_attention(NET, A.mean((2, 3)), A[:2]),
        lambda: attention.siamese_attention(NET, A.mean((2, 3))[0], A),
        lambda: attention.soft_mask(M, (0, 4)),
        lambda: attention.soft_mask(M, (8, 4), mask_scale=NAN),
        lambda: attention.soft_mask(M, (8, 4), mask_threshold=NAN),
        lambda: attention.soft_mask(M[0], (8, 4)),
        lambda: attention.soft_mask(M.long(), (8, 4)),
        lambda: attention.scale_maps(M[0, 0]),
        lambda: attention.row_profiles(M.numpy()),
        lambda: attention.attended_span(M[0], NAN),
        lambda: attention.align_profiles(M[0], 2.0),
        lambda: attention.align_profiles(M[0].long()),
        lambda: attention.attention_distance(M[0], M[0, :2]),
        lambda: attention.attention_distance(M[0], M[0], row_threshold=-1),
        lambda: scores.identity_scores(torch.rand(4, 5), PIDS[:3]),
        lambda: scores.identity_scores(torch.rand(4, 5), PIDS.float()),
        lambda: losses.identification_loss(torch.rand(4, 5), PIDS[:3]),
        lambda: losses.pair_loss(torch.rand(3, 2), SAME),
        lambda: losses.pair_loss(torch.rand(2, 3), SAME),
        lambda: losses.siamese_attention_loss(torch.rand(2, 2), torch.rand(2, 1), SAME),
        lambda: losses.siamese_attention_loss(torch.rand(3, 2), torch.rand(2), SAME),
        lambda: losses.siamese_attention_loss(
            torch.rand(2, 2), torch.rand(2), SAME, consistency_weight=NAN
        ),
        lambda: losses.consistency(torch.rand(3), SAME),
        lambda: identities.split_pairs(3),
        lambda: attention.soft_mask(M, "ab"),
        lambda: attention.soft_mask(M, (8.0, 4)),
        lambda: attention.scale_maps(M.to_sparse()),
        lambda: attention.scale_maps(M[..., :0]),
        lambda: attention.align_profiles([0.5]),
        lambda: attention.attention_distance([0.5], M[0]),
        lambda: scores.identity_scores([[0.5]], PIDS[:1]),
        lambda: losses.identification_loss(torch.rand(4, 2), PIDS),
        lambda: losses.identification_loss(torch.rand(4, 5), PIDS, label_smoothing=2),
        lambda: losses.pair_loss(torch.rand(2, 2), SAME.long()),
        lambda: losses.consistency(torch.rand(2), [True, False]),
        lambda: losses.casn_loss(A.sum(), A.sum(), A.sum(), lambda_ia=10**30),
        lambda: losses.casn_loss(A.sum(), A.sum(), A.sum(), lambda_ia=NAN),
        lambda: losses.casn_loss(A.sum(), A.sum(), A.sum(), lambda_sa=-1),
        lambda: losses.IdentificationAttentionLoss(mask_scale=NAN),
        lambda: losses.IdentificationAttentionLoss(mask_threshold=NAN),
        lambda: losses.IdentificationAttentionLoss(fill=NAN),
        lambda: SiameseAttentionLoss(consistency_weight=-1),
        lambda: SiameseAttentionLoss(row_threshold=NAN),
        lambda: MODEL.encode(torch.zeros(0, 3, 48, 24)),
        lambda: MODEL.encode(torch.zeros(2, 1, 48, 24)),
        lambda: MODEL.encode(torch.zeros(2, 3, 48, 24, dtype=torch.uint8)),
        lambda: MODEL.encode(torch.zeros(2, 3, 48, 24).half()),
        lambda: MODEL.encode(np.zeros((2, 3, 48, 24), np.float32)),
        lambda: MODEL.encode(torch.zeros(3, 48, 24)),
        lambda: MODEL.train()(torch.zeros(2, 3, 48, 24), PIDS[:1], LOSS),
        lambda: MODEL.train()(torch.zeros(2, 3, 48, 24).long()),
        lambda: Encoding(torch.rand(2, 4)),
        lambda: Encoding(torch.rand(2, 4), torch.rand(3, 4, 6, 2)),
        lambda: Encoding(torch.rand(2, 4), torch.rand(2, 4, 6)),
        lambda: Encoding(torch.arange(4).view(2, 2), torch.rand(2, 2, 6, 2)),
        lambda: Encoding.cat([torch.rand(2, 4)]),
        lambda: Encoding.cat([
            Encoding(torch.rand(2, 4), torch.rand(2, 4, 6, 2)),
            Encoding(torch.rand(2, 4), torch.rand(2, 4, 5, 2)),
        ]),
    ],
)  # fmt: skip
def test_public_functions_say_what_they_expect(unchecked, call):
    """A ValueError or TypeError of ours, with words of ours: never of somebody deep inside."""
    with pytest.raises((ValueError, TypeError), match=r"must|expected|got") as raised:
        call()
    frame = raised.tb
    while frame.tb_next is not None:
        frame = frame.tb_next
    assert "casn_plugin" in frame.tb_frame.f_code.co_filename, "raised elsewhere"


SCORES = A.sum((1, 2, 3))
PAIRS, ROWS = torch.rand(2, 2), torch.rand(2)
# a function, what it takes, and the shape of each tensor as its errors have it
SHAPES = [
    (attention.grad_cam, (SCORES, A), {0: "scores (batch,)",
                                       1: "activations (batch, channels, height, width)"}),
    (attention.indicator, (NET, M[:, 0, :1].repeat(1, 3)), {1: "differences (pairs, dim)"}),
    (attention.siamese_attention, (NET, A.mean((2, 3)), A), {1: "features (batch, dim)"}),
    (attention.similarity_attention, (A.mean((2, 3)), A), {0: "features (batch, dim)"}),
    (attention.scale_maps, (M,), {0: "maps (*batch, height, width)"}),
    (attention.soft_mask, (M, (8, 4)), {0: "maps (batch, height, width)"}),
    (attention.attended_span, (M[0], 0.2), {0: "profiles (*batch, height)"}),
    (attention.align_profiles, (M[0],), {0: "profiles (*batch, height)"}),
    (attention.attention_distance, (M[0], M[1]), {0: "first (*batch, height)",
                                                  1: "second (*batch, height)"}),
    (losses.identification_attention_loss, (SCORES,), {0: "masked_scores (batch,)"}),
    (losses.pair_loss, (PAIRS, SAME), {0: "pair_scores (pairs, 2)"}),
    (losses.siamese_attention_loss, (PAIRS, ROWS, SAME), {0: "pair_scores (rows, 2)",
                                                          1: "distances (pairs,)"}),
    (losses.siamese_attention_loss, (PAIRS[:0], ROWS[:0], SAME[:0]), {0: "pair_scores (pairs, 2)"}),
    (losses.consistency, (ROWS, SAME), {0: "distances (pairs,)"}),
    (losses.casn_loss, (A.sum(), A.sum(), A.sum()), {0: "loss_ide ()", 1: "loss_ia ()",
                                                     2: "loss_sa ()"}),
    (LOSS.scores, (NET, A, PIDS, SCORES, A), {2: "pids (batch,)"}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("function", "arguments", "place", "said"),
    [(function, arguments, place, said) for function, arguments, shapes in SHAPES
     for place, said in shapes.items()],
)  # fmt: skip
def test_errors_name_the_tensor_and_its_shape(unchecked, function, arguments, place, said):
    name, _, shape = said.partition(" ")
    right = arguments[place]
    for wrong, error, message in (
        ([0.5], TypeError, rf"^{name} must be a (float )?tensor.*, got list$"),
        (right.new_zeros([] if "*" in shape else (*right.shape[:1], 2, 2, 2, 2)), ValueError,
         rf"^{name} must be of shape {re.escape(shape)}, got \("),
    ):  # fmt: skip
        given = (*arguments[:place], wrong, *arguments[place + 1 :])
        with pytest.raises(error, match=message):
            function(*given)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attention.grad_cam(SCORES[:3], A),
         "^scores and activations must be of one length, got 3 and 4$"),
        (lambda: attention.grad_cam(SCORES.detach(), A),
         "^the scores do not depend on the activations: expected scores computed, with gradients "
         "enabled, from the very tensor that is given as activations$"),
        (lambda: attention.indicator(torch.nn.Linear(3, 5), torch.rand(2, 3)),
         r"^scores of the pair classifier must be of shape \(pairs, 2\), got \(2, 5\)$"),
        (lambda: attention.soft_mask(M, (8, 4), mask_threshold=1), "^mask_threshold must lie in"),
        (lambda: attention.soft_mask(M, "ab"), "^size must"),
        (lambda: attention.soft_mask(M, (8, 4), mask_scale=-1), "^mask_scale must be >= 0"),
        (lambda: attention.soft_mask(M, (8, 4), mask_scale=0), "^mask_scale must be positive, got"),
        (lambda: attention.attended_span(M[0], 1.0), "^row_threshold must lie in"),
        (lambda: attention.attention_distance(M[0], M[0, :2]),
         r"^expected as many first as second profiles of one height, got \(6, 2\) and \(2, 2\)$"),
        (lambda: losses.identification_loss(torch.rand(4, 5), PIDS, label_smoothing=-1),
         "^label_smoothing must be >= 0"),
        (lambda: losses.identification_loss(torch.rand(4, 5), PIDS, label_smoothing=1.5),
         r"^label_smoothing must lie in \[0, 1\], got 1.5$"),
        (lambda: losses.identification_loss(torch.rand(4, 2), PIDS),
         r"^pids must lie in \[0, 2\), the classes of the logits, but they go"),
        (lambda: losses.pair_loss(PAIRS, PIDS[:2]), "^same must be a bool tensor"),
        (lambda: losses.consistency(ROWS, PIDS[:2]), "^same must be a bool tensor"),
        (lambda: losses.siamese_attention_loss(PAIRS, ROWS, PIDS[:2]), "^same must be a bool"),
        (lambda: losses.siamese_attention_loss(PAIRS, ROWS, SAME, consistency_weight=-1),
         "^consistency_weight must be >= 0"),
        (lambda: losses.casn_loss(A.sum(), A.sum(), A.sum(), lambda_ia=-1), "^lambda_ia must be"),
        (lambda: losses.casn_loss(A.sum(), A.sum(), A.sum(), lambda_sa=-1), "^lambda_sa must be"),
        (lambda: losses.IdentificationAttentionLoss("x"), "^score must be"),
        (lambda: losses.IdentificationAttentionLoss(trains="x"), "^trains must be"),
        (lambda: losses.IdentificationAttentionLoss(statistics="x"), "^statistics must be"),
        (lambda: losses.IdentificationAttentionLoss(mask_scale=-1), "^mask_scale must be >= 0"),
        (lambda: losses.IdentificationAttentionLoss(mask_threshold=1), "^mask_threshold must lie"),
        (lambda: losses.IdentificationAttentionLoss(fill=NAN), "^fill must be finite, got nan$"),
        (lambda: LOSS(abs, A, PIDS, torch.rand(4, 5), A),
         "^training attention alone needs the module that classify runs: name it, network=..., as "
         "classify is none but a builtin_function_or_method; or use trains='network'$"),
    ],
)  # fmt: skip
def test_errors_name_the_setting_and_what_came(unchecked, call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


PICTURES = np.zeros((2, 6, 2, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: identities.as_ids("pids", "ab"), "^pids must be integers, one an image, got str$"),
        (lambda: identities.as_ids("pids", 3), "^pids must be integers, one an image, got int$"),
        (lambda: identities.as_ids("pids", [[1], [1, 2]]), "^pids must be integers, one an image:"),
        (lambda: identities.as_ids("pids", np.array([2**63], np.uint64)),
         r"^pids must be below 2\*\*63, got 9223372036854775808$"),
        (lambda: check_weight("it", np.zeros(2)), "^it must be one number: "),
        (lambda: overlay(PICTURES.astype(np.uint8), M[:2]),
         "^pictures must be an array of floats, got uint8$"),
        (lambda: overlay(torch.zeros(2, 6, 2, 3), M[:2]), "an array of floats, got Tensor$"),
        (lambda: overlay(PICTURES[0], M[:2]),
         r"^pictures must be of shape \(batch, rows, columns, 3\), got \(6, 2, 3\)$"),
        (lambda: overlay(PICTURES[:, :0], M[:2]), r"columns, 3\), got \(2, 0, 2, 3\)$"),
        (lambda: overlay(PICTURES, M[:2], opacity=1.5),
         r"^opacity must lie in \[0, 1\], got 1.5$"),
        (lambda: pair_mosaic(PICTURES, PICTURES, M[:2], M[:2], [True]),
         "^expected as many first as second pictures of one size, and as many verdicts, got "),
        (lambda: MODEL.train()(torch.rand(2, 3, 48, 24), None, LOSS),
         "^the identification attention loss needs pids$"),
    ],
)  # fmt: skip
def test_what_no_picture_and_no_identity_is_is_named(unchecked, call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
