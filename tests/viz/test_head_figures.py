"""Figures of heads, by hand and pair by pair."""

import csv
import io
import math

import pytest
import torch
from torch import nn

from sagan_attn import graft, head_importance, record_attention
from sagan_attn.viz.cells import Places
from sagan_attn.viz.head_figures import COLUMNS, agreement, as_json, csv_of, head_statistics
from sagan_attn.viz.record import AttentionRecord


def record(weights, queries=None, query_size=(2, 2), key_size=(2, 2), pool=1):
    weights = torch.as_tensor(weights, dtype=torch.float32)
    queries = torch.arange(weights.shape[2]) if queries is None else torch.as_tensor(queries)
    return AttentionRecord("s.grafts.g", "s", 0, weights, queries, query_size, key_size, pool)


def test_by_hand():
    """A head of even weight and one that looks at itself, on a 2 x 2 map of an 8 x 8 image."""
    even, self_ = torch.full((4, 4), 0.25), torch.eye(4)
    one, two = head_statistics(record(torch.stack([even, self_])[None]), Places(8, 8, ({}, {})))
    assert one.entropy == pytest.approx(math.log(4))
    assert one.entropy_share == pytest.approx(1)
    assert one.self_weight == pytest.approx(0.25)
    assert one.distance == pytest.approx((4 + 4 + 4 * math.sqrt(2)) / 4)  # to the cell beside, below and across
    assert one.query_independence == pytest.approx(1)
    assert one.query_cosine == pytest.approx(1)
    assert one.agreement == pytest.approx(0.25)
    assert (two.entropy, two.entropy_share, two.self_weight, two.distance) == (0, 0, 1, 0)
    assert (two.query_independence, two.query_cosine) == (0, 0)
    assert two.agreement == pytest.approx(0.25)
    assert two.distance_even == pytest.approx(one.distance)
    assert (two.images, two.queries, two.keys, two.head, two.site) == (1, 4, 4, 1, "s")


def test_pair_by_pair():
    weights = torch.rand(3, 2, 6, 4).double().softmax(-1)
    figures = head_statistics(record(weights, query_size=(2, 3), key_size=(2, 2)))
    w = weights.float().double()
    for head, found in enumerate(figures):
        pairs = [(b, i, j) for b in range(3) for i in range(6) for j in range(i)]
        tv = [float((w[b, head, i] - w[b, head, j]).abs().sum()) / 2 for b, i, j in pairs]
        cos = [float(torch.cosine_similarity(w[b, head, i], w[b, head, j], dim=0)) for b, i, j in pairs]
        assert found.query_independence == pytest.approx(1 - sum(tv) / len(tv))
        assert found.query_cosine == pytest.approx(sum(cos) / len(cos))
        assert found.entropy == pytest.approx(float(-(w[:, head] * w[:, head].log()).sum(-1).mean()))
        assert math.isnan(found.self_weight)  # keys of another map
    between = float(1 - (w[:, 0] - w[:, 1]).abs().sum(-1).mean() / 2)
    torch.testing.assert_close(agreement(record(weights)), torch.tensor([[1, between], [between, 1]]).double())


def test_pooled_keys_cover_their_queries():
    weights = torch.rand(1, 1, 3, 2).softmax(-1)
    floor = record(weights, queries=[0, 8, 14], query_size=(3, 5), key_size=(1, 2), pool=2)
    (found,) = head_statistics(floor)
    assert found.self_weight == pytest.approx(
        float(weights[0, 0, 0, 0] + weights[0, 0, 1, 1]) / 2
    )  # the last lies in the edge


def test_what_has_no_meaning_is_empty():
    (found,) = head_statistics(record(torch.randn(1, 1, 2, 3), query_size=None, key_size=None))
    empty = [name for name, value in vars(found).items() if isinstance(value, float) and math.isnan(value)]
    assert empty == [
        "entropy",
        "entropy_share",
        "self_weight",
        "distance",
        "distance_even",
        "query_independence",
        "agreement",
        "importance",
    ]
    (row,) = csv.DictReader(io.StringIO(csv_of([found])))
    assert list(row) == list(COLUMNS)
    assert row["entropy"] == ""
    assert as_json([found])[0]["entropy"] is None
    assert float(row["query_cosine"]) == pytest.approx(found.query_cosine, rel=1e-5)
    (single,) = head_statistics(record(torch.ones(1, 1, 1, 1), query_size=(1, 1), key_size=(1, 1)))
    assert (single.entropy, single.self_weight) == (0, 1)
    assert math.isnan(single.entropy_share)


def test_of_a_model_with_importance():
    model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    grafts = graft(model, "1", options={"heads": 2, "reduction": 2}, example_input=torch.rand(1, 3, 16, 16))
    nn.init.ones_(next(iter(grafts.gammas().values())))
    images = torch.rand(2, 3, 16, 16)
    with record_attention(model) as recording, torch.no_grad():
        model(images)
    importance = head_importance(model, [(images, torch.tensor([0, 1]))])
    found = head_statistics(recording.only(), Places(16, 16, ({}, {})), importance["1.grafts.sagan"])
    assert [one.importance for one in found] == pytest.approx(importance["1.grafts.sagan"].tolist())
    assert all(0 < one.distance < 16 for one in found)
