"""What the dashboard asks Prometheus, and a Prometheus to ask."""

import json
import math
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

DASHBOARD = Path(__file__).parents[2] / "deploy" / "observability" / "grafana" / "dashboards" / "plaudit.json"


def dashboard_queries() -> list[str]:
    """The expression of every target of every panel."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


class Prometheus:
    """The HTTP API of the Prometheus at `url`."""

    def __init__(self, url: str) -> None:
        self._url = url

    def result(self, expression: str) -> list[Any]:
        """The series that `expression` gives now; an error in it raises `urllib.error.HTTPError`."""
        answer: list[Any] = self._get("query?" + urllib.parse.urlencode({"query": expression}))["result"]
        return answer

    def without_data(self) -> list[str]:
        """The dashboard's queries that give no series or no number now."""
        return [query for query in dashboard_queries() if not any(map(_is_number, self.result(query)))]

    def jobs_up(self) -> list[str]:
        """The job of each target that was scraped, sorted; once for each target."""
        targets = self._get("targets?state=active")["activeTargets"]
        return sorted(target["labels"]["job"] for target in targets if target["health"] == "up")

    def _get(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self._url}/api/v1/{path}", timeout=10) as answer:
            return json.load(answer)["data"]


def _is_number(series: Any) -> bool:
    return math.isfinite(float(series["value"][1]))
