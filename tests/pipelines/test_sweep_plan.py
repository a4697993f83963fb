import math
from dataclasses import replace

import pytest

from jobs.presets import ARTICLE, DIGITS
from models.schedule import article, constant, linear, rate_that_leaves
from pipelines.errors import ConfigurationError
from pipelines.sweep_plan import SweepJob


def sweep(*grid: str, **settings: object) -> SweepJob:
    return SweepJob(grid=grid, train=DIGITS, **settings)  # type: ignore[arg-type]


def test_every_combination_of_a_grid_is_a_child_and_grids_add_up() -> None:
    job = sweep("seed=0,1 fit.learning-rate=1e-3,2e-3", "fit.flip=true")
    assert list(job.children) == [
        "seed=0 fit.learning_rate=1e-3", "seed=0 fit.learning_rate=2e-3",
        "seed=1 fit.learning_rate=1e-3", "seed=1 fit.learning_rate=2e-3", "fit.flip=true",
    ]  # fmt: skip
    child = job.children["seed=1 fit.learning_rate=2e-3"]
    fit = replace(DIGITS.fit, learning_rate=2e-3)
    assert child == replace(DIGITS, name="sweep.seed-1_learning_rate-2e-3", seed=1, fit=fit)
    assert job.children["fit.flip=true"].fit.flip is True
    lists = sweep("network.unet.multipliers=[1,2],[1,2,2] seed=0,1").children
    assert [child.network.unet.multipliers for child in lists.values()] == [(1, 2)] * 2 + [(1, 2, 2)] * 2


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ("", "grid is empty"),
        ("seed", "'seed' is no SETTING=VALUE,VALUE"),
        ("seed=", "'seed=' is no SETTING"),
        ("seed=1,,2", "'seed=1,,2' is no SETTING"),
        ("fit.learning_rat=1", "fit.learning_rat is no setting .* did you mean fit.learning_rate"),
        ("name=a,b", "name is no setting .* that children could differ in"),
        ("schedule.T=0", "schedule.T is 0; it must lie in"),
        ("seed=one", "child 'seed=one': seed is 'one'"),
        ("fit.learning_rate=1e-3,1e-3 seed=0,1", ""),
        ("schedule.kind=article fit.ema.warm_up=x", "warm_up is 'x'"),
        ("draw.label=*", r"'\*' is no value: quote it"),
        ("network.unet.multipliers=[1,2", r"'\[1' is no value"),
    ],
)
def test_a_grid_that_cannot_be_is_refused_with_the_way_out(grid: str, said: str) -> None:
    if not said:
        assert len(sweep(grid).children) == 2, "the same value twice is one child"
        return
    with pytest.raises(ConfigurationError, match=said):
        sweep(*([grid] if grid else []))


def test_children_whose_settings_differ_have_names_that_differ() -> None:
    with pytest.raises(ConfigurationError, match="two of its children would have one name"):
        sweep("data.ingest.side=8", "data.side=8")


@pytest.mark.parametrize(
    ("resources", "room"), [({"CPU": 4}, 1), ({"CPU": 4.5}, 2), ({"CPU": 45}, 20), ({"CPU": 1}, 1), ({}, 1)]
)
def test_as_many_train_at_once_as_there_is_room_for(resources: dict[str, float], room: int) -> None:
    train = replace(DIGITS, scaling=replace(DIGITS.scaling, workers=2, cpus_per_worker=0.5))  # and one reads
    assert sweep("seed=0", side_by_side=0).room({"CPU": 4}) == 2
    train = replace(train, draw=replace(DIGITS.draw, actors=2), scaling=replace(train.scaling, cpus_per_worker=0.625))
    assert SweepJob(grid=("seed=0",), train=train).room(resources) == room
    assert SweepJob(grid=("seed=0",), train=train, side_by_side=7).room(resources) == 7


def test_gpus_are_counted_too() -> None:
    train = replace(DIGITS, scaling=replace(DIGITS.scaling, workers=2, use_gpu=True), evaluate_images=0)
    assert SweepJob(grid=("seed=0",), train=train).room({"CPU": 64, "GPU": 8}) == 4
    one = replace(train, scaling=replace(train.scaling, workers=1))
    grid = ("scaling.workers=1,2",)
    assert SweepJob(grid=grid, train=one).room({"CPU": 64, "GPU": 8}) == 4, "the largest child is what counts"


@pytest.mark.parametrize(("kind", "make"), [("article", article), ("constant", constant), ("linear", linear)])
@pytest.mark.parametrize("T", [25, 100, 1000, 4000])
def test_a_rate_ends_where_it_should(kind: str, make: object, T: int) -> None:
    left = math.exp(-5.04)
    rate = rate_that_leaves(kind, T, left)  # type: ignore[arg-type]
    assert float(make(T, rate).log_alpha_bar[-1]) == pytest.approx(-5.04, rel=1e-12)  # type: ignore[operator]
    assert rate_that_leaves("article", 1000, float(article().alpha_bar[-1])) == pytest.approx(0.02, rel=1e-9)


def test_too_few_steps_for_what_is_to_be_left() -> None:
    with pytest.raises(ValueError, match=r"schedule\.T is 2; article cannot tear down to"):
        rate_that_leaves("article", 2, 1e-9)


def test_the_schedules_of_the_article_sweep_end_alike() -> None:
    ends = [
        float(child.schedule.tables().log_alpha_bar[-1])
        for apart, child in ARTICLE.children.items() if "schedule" in apart
    ]  # fmt: skip
    assert len(ends) == 6
    assert ends == pytest.approx([float(article().log_alpha_bar[-1])] * 6, rel=1e-4)
