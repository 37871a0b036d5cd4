"""The server's own figures, from ``/metrics``."""

from __future__ import annotations

import httpx
from prometheus_client.parser import text_string_to_metric_families


class Figures:
    """One reading of ``/metrics``."""

    def __init__(self, text: str) -> None:
        self._samples = {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def value(self, name: str, **labels: str) -> float:
        """A sample by its name and all of its labels; 0 for one that the server has not counted yet."""
        return self._samples.get((name, tuple(sorted(labels.items()))), 0.0)


async def scrape(http: httpx.AsyncClient) -> Figures:
    reply = await http.get("/metrics")
    reply.raise_for_status()
    return Figures(reply.text)
