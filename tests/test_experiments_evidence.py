"""What the laboratory measures as evidence, and what it says that is known of it."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import cells, run_here
from scipy import stats

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")
SMALL = ["--", "--height", "64", "--width", "32", "--batch-size", "8"]


def test_an_interval_is_the_quantiles_of_resampled_means(lab):
    values = np.random.default_rng(0).normal(size=(5, 40))
    values[:, 3] = np.nan
    found = lab("intervals").interval(values)
    kept = np.delete(values, 3, 1)
    assert found.mean == pytest.approx(kept.mean())
    generator = np.random.default_rng(7)
    means = [
        kept[generator.integers(5, size=5)][:, generator.integers(39, size=39)].mean()
        for _ in range(4000)
    ]
    low, high = np.quantile(means, [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=0.03) and found.high == pytest.approx(high, abs=0.03)
    # queries that all seeds know to be alike leave the spread of the seeds
    constant = np.repeat([[0.1], [0.2], [0.3]], 50, axis=1)
    found = lab("intervals").interval(constant)
    assert found.low == pytest.approx(0.1, abs=0.04) and found.high == pytest.approx(0.3, abs=0.04)
    with pytest.raises(ValueError, match="with all seeds, or with none"):
        lab("intervals").interval(np.array([[1.0, np.nan], [1.0, 2.0]]))
    with pytest.raises(ValueError, match="expected values, got none"):
        lab("intervals").interval(np.full((2, 2), np.nan))


def test_the_seeds_that_are_needed_see_the_effect_as_often_as_is_said(lab):
    spread = np.array([-0.02, 0.0, 0.02])
    number = lab("intervals").seeds_needed(spread, effect=0.01, power=0.8)
    generator = np.random.default_rng(0)
    seen = [
        stats.ttest_1samp(generator.normal(0.01, 0.02, size), 0, axis=1).pvalue < 0.05
        for size in ((4000, number), (4000, number - 2))
    ]
    assert seen[0].mean() == pytest.approx(0.8, abs=0.02) and seen[1].mean() < seen[0].mean()
    assert lab("intervals").seeds_needed(np.array([0.5, 0.5])) == 2
    with pytest.raises(ValueError, match="two differences or more"):
        lab("intervals").seeds_needed(np.array([0.5]))


def test_changed_queries(lab):
    robustness = lab("robustness")
    imgs = torch.rand(6, 3, 20, 10)
    masks = torch.zeros(6, 20, 10)
    masks[:, 2:18, 3:7] = 1
    pids, camids = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 1, 0, 1, 0, 1])
    found = robustness.changed(imgs, masks, pids, camids)
    assert {name: tuple(by) for name, by in found.items()} == robustness.STRENGTHS
    again = robustness.changed(imgs, masks, pids, camids)
    other = robustness.changed(imgs, masks, pids, camids, seed=1)
    for name, by_strength in found.items():
        for strength, each in by_strength.items():
            assert each.shape == imgs.shape and torch.equal(each, again[name][strength])
            assert not torch.equal(each, imgs)
        assert not torch.equal(each, other[name][strength])
    assert list(robustness.changed(imgs, None, pids, camids)) == ["shift", "crop", "block"]

    moved = found["shift"][0.2]  # by four rows, up or down
    for img, it in zip(imgs, moved, strict=True):
        up, down = (
            torch.cat([img[:, 4:], img[:, -1:].expand(3, 4, 10)], 1),
            torch.cat([img[:, :1].expand(3, 4, 10), img[:, :16]], 1),
        )
        assert torch.equal(it, up) != torch.equal(it, down)
    hidden = (found["block"][0.4] == 0).all(1).sum((1, 2))
    assert hidden.tolist() == [13 * 6] * 6  # √0.4 of 20 rows, and of 10 columns

    # the person stays in front of what comes from a picture of another camera
    person = masks[0].bool()
    whole = found["background"][1.0]
    assert torch.equal(whole[:, :, person], imgs[:, :, person])
    assert not torch.isclose(whole[:, :, ~person], imgs[:, :, ~person]).all(1).any()
    half = found["background"][0.5]
    torch.testing.assert_close(half, (imgs + whole) / 2)


def test_a_person_in_front_is_somebody_else_at_the_lower_edge(lab):
    robustness = lab("robustness")
    imgs = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 20, 10).clone()
    masks = torch.ones(4, 20, 10)
    differ = torch.tensor([0, 0, 1, 1])[:, None] != torch.tensor([0, 0, 1, 1])
    other = robustness.others(differ, torch.Generator().manual_seed(0))
    assert differ[torch.arange(4), other].all()
    found = robustness.behind_person(imgs, masks, other, 0.5, torch.Generator().manual_seed(0))
    for row, img in enumerate(found):
        there = img[0] == float(other[row])
        assert there.sum() == 10 * 5 and there[10:].any(1).all() and not there[:10].any()
    with pytest.raises(ValueError, match="no other query"):
        robustness.others(torch.zeros(2, 2, dtype=torch.bool), torch.Generator())


def test_gradients_at_the_tapped_map_are_those_of_the_terms(lab, market_root):
    protocols, gradients = lab("protocols"), lab("gradients")
    options = [
        *("--backbone", "resnet_slim", "--height", "64", "--width", "32", "--batch-size", "8"),
        *("--workers", "0", "--device", "cpu", "--root", str(market_root)),
        *("--sources", "market1501", "--lambda-sa", "0.3"),
    ]
    engine = protocols.build_engine(protocols.parse_args(options))
    batch = gradients.probe(engine.train_loader.dataset.train, engine.casn.preprocessing)
    first, second, third, fourth = batch["pid"].tolist()  # four people to train on: two pairs
    assert first == second and len({first, third, fourth}) == 3
    before = {key: value.clone() for key, value in engine.casn.state_dict().items()}
    found = gradients.gradient_norms(engine, batch)
    assert set(found) == {"ide", "ia", "sa"} and all(norm > 0 for norm in found.values())
    assert gradients.gradient_norms(engine, batch) == found  # nothing was learned
    after = engine.casn.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    engine.lambda_sa = 0.6
    assert gradients.gradient_norms(engine, batch)["sa"] == pytest.approx(2 * found["sa"], rel=1e-4)
    engine.lambda_sa = engine.lambda_ia = 0
    assert set(gradients.gradient_norms(engine, batch)) == {"ide"}
    with pytest.raises(ValueError, match="two people with two pictures"):
        gradients.probe(engine.train_loader.dataset.train[:2], engine.casn.preprocessing)


def test_evidence_is_measured_of_each_run_and_reported(lab, market_root, monkeypatch):
    ablation = lab("ablation")
    few = partial(ablation.faithfulness_of, number=6)
    monkeypatch.setattr(ablation, "faithfulness_of", few)

    def made_of(study, *only):
        arguments = [
            *("--data", "market1501", "--name", "market", "--root", str(market_root)),
            *("--backbone", "resnet_slim", "--max-epoch", "1", "--device", "cpu"),
            *("--study", study, "--seeds", "0", "--results", "results", "--only", *only, *SMALL),
        ]
        return run_here(lab, arguments)

    study = made_of("evidence", "IDE", "CASN(IDE)")
    assert [run["name"] for run in study.runs()] == ["CASN(IDE)", "IDE"]
    for run, better in zip(study.runs(), (0.5, 0.0), strict=True):  # a seed that was luckier
        of_all = run["results"]["robustness"]
        for kind in (of_all["none"]["features"], of_all["shift"]["0.2"]["features"]):
            kind["ap"] = [min(ap + better, 1.0) for ap in kind["ap"]]
        study.add(run | {"seed": 1})
    made = study.runs()
    robust = made[0]["results"]["robustness"]
    # of no change: what the measurements have of the same model
    assert np.nanmean(np.array(robust["none"]["fused"]["ap"], dtype=float)) == pytest.approx(
        made[0]["results"]["fused"]["mAP"], abs=1e-3
    )
    assert set(robust) == {"none", "shift", "crop", "block", "person", "background"}
    curves = made[0]["results"]["faithfulness"]["centre"]["closeness"]["both"]
    assert len(curves["gap"]) == 6 and curves["deletion"][0] == curves["insertion"][-1]
    assert set(made[0]["gradients"][0]) == {"ide", "ia", "sa"}
    assert set(made[2]["gradients"][0]) == {"ide"} and made[2]["name"] == "IDE"

    for name in ("IDE+IA", "IDE+SA"):  # of one seed, as if they were the same as with both losses
        study.add(made[0] | {"name": name, "gradients": [{"ide": 1.0, name[-2:].lower(): 3.0}]})

    value = "log-odds, attention trained, λ1 0.5"
    (reading,) = made_of("readings", f"score of Eq. 2: {value}").runs()
    assert reading["settings"]["score"] == "log-odds"
    assert list(reading["results"]["robustness"]) == ["none"]

    lab("tables").main(["--out", "results.md", "--results", "results"])
    text = Path("results.md").read_text(encoding="utf-8")
    rows = cells(text)
    evidence = lab("evidence_report")
    ours, base = (
        {run["seed"]: run for run in made if run["name"] == name} for name in ("CASN(IDE)", "IDE")
    )
    known = evidence.difference(ours, base, ("none",), "features").points()
    assert ["CASN(IDE)", "2", known] in [row[:3] for row in rows]
    one = {0: ours[0]}
    known = evidence.difference(one, base, ("none",), "features").points()
    assert [["IDE+IA", "1", known], ["IDE+SA", "1", known]] == [
        row[:3] for row in rows if row[1:] and row[1] == "1" and "+" in row[0] and len(row) == 6
    ]
    (head,) = (row for row in rows if row[:1] == ["change"])
    assert head[2:] == [
        *("IDE, features", "IDE+IA", "IDE+SA", "CASN(IDE)"),
        *("IDE, fused", "IDE+IA", "IDE+SA", "CASN(IDE)"),
    ]
    (shift,) = (row for row in rows if row[0].startswith("shifted") and row[1] == "0.2")
    assert shift[5] == evidence.difference(ours, base, ("shift", "0.2"), "features").points()
    assert shift[3] == evidence.difference(one, base, ("shift", "0.2"), "features").points()
    assert shift[8] == evidence.difference(one, base, ("shift", "0.2"), "fused").points()
    means = [np.nanmean(np.array(run["results"]["robustness"]["shift"]["0.2"]["features"]["ap"],
                                 dtype=float)) for run in base.values()]  # fmt: skip
    assert shift[2] == f"{100 * np.mean(means):.1f}"
    of_logits = [row[:4] for row in rows if row[2:3] == ["same-identity logit"]]
    assert of_logits == [  # not of the rows IDE and IDE+IA
        [name, seeds, "same-identity logit", sides]
        for name, seeds in (("IDE+SA", "1"), ("CASN(IDE)", "2"))
        for sides in ("one picture", "both")
    ]
    shares = [row for row in rows if len(row) == 3 and row[1].startswith("λ")]
    assert shares[:2] == [["IDE+IA", "λ1 L_ia", "75.0 %"], ["IDE+SA", "λ2 L_sa", "75.0 %"]]
    assert [row[:2] for row in shares[2:]] == [["CASN(IDE)", "λ1 L_ia"], ["CASN(IDE)", "λ2 L_sa"]]
    assert sum(row[:1] == [value] for row in rows) == 1
    assert Path("images", "robustness_market.png").is_file()
    assert Path("images", "faithfulness_market.png").is_file()


def test_pairs_are_drawn_once_a_query(lab):
    wanted = torch.rand(20, 9) > 0.6
    wanted[4] = False
    rows, columns = lab("explained").random_pairs(wanted, 15)
    assert len(rows) == 15 == len(set(rows.tolist())) and 4 not in rows.tolist()
    assert wanted[rows, columns].all()
    assert len(lab("explained").random_pairs(wanted, 50)[0]) == 19
