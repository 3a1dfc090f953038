"""Metrics against hand-made values, and inside MONAI's handlers."""

import csv
import math

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.bundle import ConfigParser
from monai.data import MetaTensor, decollate_batch
from monai.handlers import IgniteMetricHandler, MetricsSaver, from_engine

from equireg import blocks
from equireg.fields import identity_grid, invert, jacobian_determinant
from equireg.metrics import (
    FoldingFraction,
    InverseConsistencyError,
    SDLogJacobian,
    TargetRegistrationError,
    folding_fraction,
    inverse_consistency_error,
    sd_log_jacobian,
    target_registration_error,
)


def one_fold(shape=(6, 7, 8)):
    """Displaces one voxel past its neighbor along axis 0: only the cell that starts at it is folded."""
    ddf = torch.zeros(1, len(shape), *shape)
    ddf[(0, 0, *[3] * len(shape))] = 1.5
    return ddf


def smooth_ddf(shape, size):
    grid = identity_grid(list(shape), dtype=torch.float64)
    return size * torch.sin(0.3 * grid + 0.2 * grid.flip(1))


# ---- the functions


@pytest.mark.parametrize("shape", [(9,), (6, 7), (6, 7, 8)])
def test_one_fold_counts_once(shape):
    cells = math.prod(n - 1 for n in shape)
    value = folding_fraction(torch.cat([one_fold(shape), torch.zeros(1, len(shape), *shape)]))
    assert value.tolist() == pytest.approx([1 / cells, 0.0], abs=1e-7)


def test_folding_range_and_undefined_values():
    grid = identity_grid([5, 5])
    assert folding_fraction(-grid).item() == 1.0  # all points collapse: determinant 0
    flipped = torch.cat([-2.0 * grid[:, :1], torch.zeros_like(grid[:, 1:])], dim=1)
    assert folding_fraction(flipped).item() == 1.0
    assert folding_fraction(torch.full((1, 2, 5, 5), torch.nan)).item() == 1.0
    assert folding_fraction(torch.zeros(1, 3, 1, 4, 4)).item() == 0.0
    assert folding_fraction(one_fold().half()).dtype == torch.float32


@pytest.mark.parametrize("shape", [(1, 4), (2, 9), (33, 5), (9, 1, 6), (17, 6, 5)])
@pytest.mark.parametrize("voxels", [1, 10, 60])
def test_parts_give_what_the_whole_gives(shape, voxels, monkeypatch):
    noise = torch.rand(2, len(shape), *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ddf = 1.5 * noise
    folded = ~(jacobian_determinant(ddf, "forward") > 0)
    logs = [determinant[determinant > 0].log() for determinant in jacobian_determinant(ddf, "central")]
    expected = torch.stack([log.std(correction=0) for log in logs])
    monkeypatch.setattr(blocks, "_VOXELS", voxels)
    torch.testing.assert_close(folding_fraction(ddf), folded.flatten(1).double().mean(dim=1), rtol=0, atol=1e-15)
    torch.testing.assert_close(sd_log_jacobian(ddf), expected, rtol=1e-12, atol=1e-12)


def test_sd_log_jacobian_of_scalings_is_zero():
    grid = identity_grid([6, 7, 8], dtype=torch.float64)
    values = sd_log_jacobian(torch.cat([0.1 * grid, grid * 0 + 3, -0.5 * grid]))
    assert values.abs().max().item() < 1e-12


def test_sd_log_jacobian_by_hand():
    """The first half of the rows is stretched by 2, the other kept: with central differences one row lies between."""
    ddf = torch.zeros(1, 2, 8, 4, dtype=torch.float64)
    ddf[0, 0] = torch.arange(8).clamp(max=4)[:, None]
    logs = np.log([2.0] * 4 + [1.5] + [1.0] * 3)
    assert sd_log_jacobian(ddf).item() == pytest.approx(np.std(logs), abs=1e-12)


def test_sd_log_jacobian_leaves_folds_out():
    ddf = torch.zeros(2, 2, 8, 4, dtype=torch.float64)
    ddf[0, 0, 5] = -4.0  # central determinants: -1 at row 4, 3 at row 6, 1 elsewhere
    ddf[1] = -2 * identity_grid([8, 4], dtype=torch.float64)[0] * torch.tensor([1.0, 0.0])[:, None, None]
    values = sd_log_jacobian(ddf)
    assert values[0].item() == pytest.approx(np.std(np.log([3.0] + [1.0] * 6)), abs=1e-12)
    assert values[1].isnan()


def test_target_registration_error():
    a = torch.zeros(2, 3, 3)
    b = torch.tensor([[[3.0, 4.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]], [[1.0, 2.0, 2.0]] * 3])
    assert target_registration_error(a, b).tolist() == [2.0, 3.0]
    assert target_registration_error(b, a).tolist() == [2.0, 3.0]
    assert target_registration_error(torch.zeros(1, 1, 2), torch.ones(1, 1, 2)).item() == pytest.approx(2**0.5)


def test_inverse_consistency_error_is_a_vector_norm_on_the_fixed_grid():
    there = torch.zeros(2, 3, 5, 6, 7)
    back = torch.tensor([3.0, 4.0, 0.0]).reshape(1, 3, 1, 1, 1) * torch.tensor([1.0, 2.0]).reshape(2, 1, 1, 1, 1)
    assert inverse_consistency_error(there, back.expand(2, 3, 4, 4, 9)).tolist() == [5.0, 10.0]
    assert inverse_consistency_error(back.expand(2, 3, 4, 4, 9), there).tolist() == [5.0, 10.0]


def test_inverse_consistency_error_follows_the_points():
    """The way back is read where the way there ends: a ramp at x + 2, not at x."""
    there = torch.zeros(1, 2, 4, 3)
    there[:, 0] = 2.0
    back = torch.zeros(1, 2, 8, 3)
    back[:, 0] = -torch.arange(8.0)[:, None]
    expected = np.mean([abs(2.0 - (x + 2.0)) for x in range(4)])
    assert inverse_consistency_error(there, back).item() == pytest.approx(expected, abs=1e-6)
    ddf = smooth_ddf((20, 22), 1.0)
    assert inverse_consistency_error(invert(ddf, iterations=100), ddf).item() < 1e-9
    assert inverse_consistency_error(ddf, ddf).item() > 0.5


@pytest.mark.parametrize(
    "function, arguments",
    [
        (folding_fraction, [(1, 3, 4, 4)]),
        (sd_log_jacobian, [(2, 4, 4)]),
        (target_registration_error, [(1, 4, 3), (1, 5, 3)]),
        (target_registration_error, [(1, 0, 3), (1, 0, 3)]),
        (target_registration_error, [(4, 3), (4, 3)]),
        (inverse_consistency_error, [(1, 2, 4, 4), (2, 2, 4, 4)]),
        (inverse_consistency_error, [(1, 2, 4, 4), (1, 3, 4, 4, 4)]),
        (inverse_consistency_error, [(1, 3, 4, 4), (1, 3, 4, 4)]),
    ],
)
def test_functions_reject(function, arguments):
    with pytest.raises(ValueError, match="expects .* got ") as info:
        function(*[torch.zeros(shape) for shape in arguments])
    assert str(list(arguments[0])) in str(info.value)


# ---- the metrics


def test_metrics_collect_reduce_and_reset():
    metric = FoldingFraction()
    ddf = torch.cat([one_fold(), torch.zeros_like(one_fold())])
    assert metric(ddf).shape == (2, 1)
    metric(list(ddf[:1]))
    single = folding_fraction(one_fold()).item()
    assert metric.aggregate().item() == pytest.approx(2 / 3 * single, abs=1e-7)
    assert metric.aggregate("sum").item() == pytest.approx(2 * single, abs=1e-7)
    assert metric.get_buffer().shape == (3, 1)
    metric.reset()
    with pytest.raises(ValueError, match="got none"):
        metric.aggregate()


def test_metrics_take_the_prediction_of_a_pair_network():
    pred = torch.cat([one_fold(), torch.rand(1, 1, 6, 7, 8)], dim=1)
    assert FoldingFraction()(pred).item() == folding_fraction(one_fold()).item()
    assert SDLogJacobian()(MetaTensor(pred)).item() == sd_log_jacobian(one_fold()).item() > 0


def test_metrics_do_not_hide_undefined_values():
    metric = SDLogJacobian(get_not_nans=True)
    folded = -2.0 * identity_grid([5, 5]) * torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1)
    metric(folded)
    value, count = metric.aggregate()
    assert value.isnan() and count.item() == 0
    metric(torch.zeros(1, 2, 5, 5))
    value, count = metric.aggregate()
    assert value.item() == 0.0 and count.item() == 1


def test_metrics_need_both_arguments():
    with pytest.raises(ValueError, match="got no y"):
        TargetRegistrationError()(torch.zeros(1, 4, 3))
    with pytest.raises(ValueError, match="got no y"):
        InverseConsistencyError()(torch.zeros(1, 2, 4, 4))


def sample(seed):
    """What an evaluator holds for one pair: prediction, label, ddf back, points."""
    random = torch.Generator().manual_seed(seed)
    pred = torch.randn(3, 8, 9, generator=random)
    back = torch.randn(2, 7, 6, generator=random)
    points = torch.randn(5, 2, generator=random)
    return {"pred": pred, "label": torch.ones(2, 8, 9), "ddf": pred[:2], "back": back, "a": points, "b": 2 * points}


HANDLED = {
    "folding": ("FoldingFraction", ["pred", "label"], lambda s: folding_fraction(s["ddf"][None])),
    "sd_log_j": ("SDLogJacobian", ["pred", "label"], lambda s: sd_log_jacobian(s["ddf"][None])),
    "tre": ("TargetRegistrationError", ["a", "b"], lambda s: target_registration_error(s["a"][None], s["b"][None])),
    "ice": (
        "InverseConsistencyError",
        ["ddf", "back"],
        lambda s: inverse_consistency_error(s["ddf"][None], s["back"][None]),
    ),
}


@pytest.mark.parametrize("decollated", [True, False])
def test_in_monai_handlers(tmp_path, decollated):
    batches = [{k: torch.stack([sample(s)[k] for s in seeds]) for k in sample(0)} for seeds in ([0, 1], [2, 3])]
    evaluator = Engine(lambda engine, batch: decollate_batch(batch) if decollated else batch)
    for name, (target, keys, _) in HANDLED.items():
        config = {"metric": {"_target_": f"equireg.metrics.{target}"}}
        metric = ConfigParser(config).get_parsed_content("metric")
        IgniteMetricHandler(metric_fn=metric, output_transform=from_engine(keys)).attach(evaluator, name)
    MetricsSaver(save_dir=tmp_path, metrics="*", metric_details="*", summary_ops="mean").attach(evaluator)
    evaluator.run(batches)
    with open(tmp_path / "metrics.csv") as file:
        table = {row[0]: row[1] for row in csv.reader(file)}
    for name, (*_, function) in HANDLED.items():
        expected = torch.cat([function(sample(seed)) for seed in range(4)])
        assert evaluator.state.metric_details[name].flatten().tolist() == pytest.approx(expected.tolist(), abs=1e-6)
        assert evaluator.state.metrics[name] == pytest.approx(expected.mean().item(), abs=1e-6)
        assert float(table[name]) == pytest.approx(expected.mean().item(), abs=1e-6)
        assert (tmp_path / f"{name}_raw.csv").exists() and (tmp_path / f"{name}_summary.csv").exists()


def test_handler_takes_lists_of_points_of_different_number():
    evaluator = Engine(lambda engine, batch: batch)
    IgniteMetricHandler(TargetRegistrationError(), output_transform=from_engine(["a", "b"])).attach(evaluator, "tre")
    batch = [{"a": torch.zeros(n, 3), "b": torch.full((n, 3), float(n))} for n in (2, 5)]
    metric = TargetRegistrationError()
    metric(*from_engine(["a", "b"])(batch))
    assert metric.aggregate().item() == pytest.approx(3.5 * 3**0.5, abs=1e-6)
    evaluator.run([batch])
    assert evaluator.state.metrics["tre"] == pytest.approx(3.5 * 3**0.5, abs=1e-6)
