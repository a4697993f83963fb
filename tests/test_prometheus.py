"""What is looked at: the rules fire when they should, the panels are asked of metrics that there are."""

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import ray.dashboard.modules.metrics.dashboards
import yaml
from ray._private.telemetry.open_telemetry_metric_recorder import OpenTelemetryMetricRecorder

from pipelines.metrics import IMAGES, METRICS
from tests.processes import CODE
from tests.promtool import promtool

RULES = CODE / "infra/prometheus/rules.yaml"
TESTS = CODE / "infra/prometheus/rules-test.yaml"
BOARD = json.loads((CODE / "infra/grafana/brickyard.json").read_text())
PANELS: list[dict[str, Any]] = BOARD["panels"]


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def asked() -> dict[str, str]:
    """Every expression, by where it stands; the dashboard's with its variables filled in."""
    found = {rule.get("alert") or rule["record"]: rule["expr"] for rule in rules()}
    for panel in PANELS:
        for target in panel["targets"]:
            expression = target["expr"].replace("$__rate_interval", "5m").replace("$run", ".*")
            assert "$" not in expression, panel["title"]
            found[f"{panel['title']}, {target['refId']}"] = expression
    return found


def test_each_alert_fires_and_none_when_all_is_well() -> None:
    promtool("test", "rules", TESTS)


def test_each_alert_is_seen_to_fire_and_to_be_quiet() -> None:
    tested = [one for case in yaml.safe_load(TESTS.read_text())["tests"] for one in case.get("alert_rule_test", [])]
    for rule in rules():
        if "alert" in rule:
            told = {bool(one["exp_alerts"]) for one in tested if one["alertname"] == rule["alert"]}
            assert told == {True, False}, rule["alert"]
            assert rule["annotations"].keys() == {"summary", "description"}
            assert rule["labels"]["severity"] in ("critical", "warning", "info")


def test_what_a_counter_is_born_with_counts() -> None:
    """It has no series before there is any of it, and increase() and rate() see no more than what comes later. Of the
    images that is all but one step, by which a picture of their rate is no worse."""
    alerts = [rule["expr"] for rule in rules()]
    for where, expression in asked().items():
        blind = set(re.findall(r"\b(?:i?rate|increase|i?delta)\(\s*(\w+)", expression))
        assert blind <= (set() if expression in alerts else {IMAGES.exported}), where
    for case in yaml.safe_load(TESTS.read_text())["tests"]:
        for one in case["input_series"]:
            values = re.sub(r"^(_\S* )*", "", one["values"])
            assert "_total{" not in one["series"] or not re.match(r"0\b", values), f"{case['name']}: {one}"


def test_prometheus_takes_the_configuration() -> None:
    said = promtool("check", "config", CODE / "infra/prometheus/prometheus.yaml")
    assert f"{len(rules())} rules found" in said
    (scrape,) = yaml.safe_load((CODE / "infra/prometheus/prometheus.yaml").read_text())["scrape_configs"]
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    assert scrape["file_sd_configs"][0]["files"] == [f"/tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]


def test_the_panels_ask_what_prometheus_understands(tmp_path: Path) -> None:
    recorded = [{"record": f"a{i}", "expr": expression} for i, expression in enumerate(asked().values())]
    file = tmp_path / "asked.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "asked", "rules": recorded}]}))
    assert f"{len(recorded)} rules found" in promtool("check", "rules", file)


def test_rules_and_panels_ask_for_metrics_that_there_are() -> None:
    ours = {metric.exported for metric in METRICS} | {rule["record"] for rule in rules() if "record" in rule}
    # What Ray exports, by the panels of its own.
    folder = Path(ray.dashboard.modules.metrics.dashboards.__file__).parent
    rays = {name for file in folder.glob("*.py") for name in re.findall(r"\bray_\w+", file.read_text())}
    for where, expression in asked().items():
        names = set(re.findall(r"\b(?:ray_\w+|brickyard:\w+)", expression))
        assert names or where.startswith("What Brickyard"), where
        unknown = names - ours - (rays if where not in {rule.get("alert") for rule in rules()} else set())
        assert not unknown, f"{where}: {unknown}"
    everything = " ".join(asked().values())
    assert all(metric.exported in everything for metric in METRICS), "what nobody looks at need not be told"


def test_a_last_word_is_heard_though_scrapes_fail() -> None:
    """Ray itself says for how long it serves a gauge that nobody sets any more."""
    (scrape,) = yaml.safe_load((CODE / "infra/prometheus/prometheus.yaml").read_text())["scrape_configs"]
    assert OpenTelemetryMetricRecorder._resolve_gauge_ttl_seconds(None) / int(scrape["scrape_interval"][:-1]) >= 4


def test_the_dashboard_is_one_that_grafana_draws() -> None:
    variables = {one["name"] for one in BOARD["templating"]["list"]}
    assert variables == {"datasource", "run"} and BOARD["uid"] and BOARD["title"]
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    for panel in PANELS:
        assert panel["datasource"]["uid"] == "${datasource}" and panel["description"], panel["title"]
        at = panel["gridPos"]
        assert at["x"] >= 0 and at["x"] + at["w"] <= 24 and at["w"] > 0 and at["h"] > 0, panel["title"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) > 0
    for one, other in combinations(PANELS, 2):
        a, b = one["gridPos"], other["gridPos"]
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        below = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert beside or below, f"{one['title']} lies over {other['title']}"
