"""What Prometheus sees. Labels come from fixed sets or the keys file, never from request bodies; adapters are never a label."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server import __version__
from server.engine.client import EngineClient
from server.engine.types import ProgramEvent, ProgramState

MAX_TENANTS = 200
_LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_COUNTERS = {
    "steps": ("medley_engine_steps", "Steps that the engine ran."),
    "preemptions": ("medley_preemptions", "Sequences preempted for want of K/V blocks."),
    "evictions": ("medley_adapter_evictions", "Adapters evicted from the device bank."),
    "failed_rows": ("medley_failed_rows", "Requests that failed alone inside a step."),
}


class Metrics:
    """All metrics of one server, in a registry of its own."""

    def __init__(self, engine: EngineClient) -> None:
        self.registry = CollectorRegistry()
        self._tenants: set[str] = set()
        registry = self.registry
        self.requests = Counter(
            "medley_requests", "Requests by route, tenant and outcome.", ["route", "tenant", "outcome"], registry=registry
        )
        self.duration = Histogram(
            "medley_request_duration_seconds", "From request to last byte.", ["route"], buckets=_LATENCY, registry=registry
        )
        self.first_token = Histogram(
            "medley_time_to_first_token_seconds", "From submission to the first token.", buckets=_LATENCY, registry=registry
        )
        self.between_tokens = Histogram(
            "medley_inter_token_latency_seconds",
            "Between tokens of a sequence; their mean where the reply is not streamed.",
            buckets=_LATENCY,
            registry=registry,
        )
        self.tokens = Counter("medley_tokens", "Tokens by tenant and direction.", ["tenant", "direction"], registry=registry)
        self.rejections = Counter("medley_rejections", "Requests refused, by error code.", ["reason"], registry=registry)
        self.uploads = Counter("medley_upload", "Uploads by result.", ["result"], registry=registry)
        self.upload_bytes = Counter("medley_upload_bytes", "Bytes of adapters published.", registry=registry)
        self.loads = Counter("medley_adapter_loads", "Adapter loads by tier reached.", ["tier"], registry=registry)
        self.load_seconds = Histogram(
            "medley_adapter_load_seconds", "Time of adapter loads by tier reached.", ["tier"], buckets=_LATENCY, registry=registry
        )
        self.quarantined = Gauge(
            "medley_adapters_quarantined",
            "Programs refused because they failed a tenant three times in a row.",
            registry=registry,
        )
        self.degraded = Gauge("medley_degraded", "1 while a dependency does not answer.", ["dep"], registry=registry)
        Gauge("medley_build_info", "1; the labels say what runs.", ["version"], registry=registry).labels(__version__).set(1)
        self.registry.register(_EngineCollector(engine))

    def tenant(self, name: str) -> str:
        """The tenant's label: its name while there are at most MAX_TENANTS, then ``other``."""
        if name in self._tenants or len(self._tenants) < MAX_TENANTS:
            self._tenants.add(name)
            return name
        return "other"

    def waited(self, seconds: float, tokens: int, *, is_first: bool) -> None:
        """How long a request waited for its first token, or for its next ones, which count as evenly spaced."""
        kind = self.first_token if is_first else self.between_tokens
        for _ in range(tokens):
            kind.observe(seconds / tokens)

    def program_event(self, event: ProgramEvent) -> None:
        """Count loads as the engine reports them."""
        if event.seconds and event.state in (ProgramState.HOST, ProgramState.RESIDENT):
            self.loads.labels(event.state.value).inc()
            self.load_seconds.labels(event.state.value).observe(event.seconds)

    def render(self) -> bytes:
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    """The engine's latest snapshot, read when Prometheus asks."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        stats = self._engine.stats
        yield GaugeMetricFamily("medley_requests_running", "Sequences in the running batch.", stats.running)
        waiting = GaugeMetricFamily("medley_requests_waiting", "Sequences that wait, by what for.", labels=["for"])
        waiting.add_metric(["capacity"], stats.waiting)
        waiting.add_metric(["adapter"], stats.waiting_for_adapter)
        yield waiting
        blocks = GaugeMetricFamily("medley_kv_blocks", "K/V blocks by state.", labels=["state"])
        blocks.add_metric(["used"], stats.kv_blocks_used)
        blocks.add_metric(["cached"], stats.kv_blocks_cached)
        blocks.add_metric(["free"], stats.kv_blocks_total - stats.kv_blocks_used - stats.kv_blocks_cached)
        yield blocks
        slots = GaugeMetricFamily("medley_adapter_slots", "Bank slots by state.", labels=["state"])
        slots.add_metric(["pinned"], stats.slots_pinned)
        slots.add_metric(["used"], stats.slots_used - stats.slots_pinned)
        slots.add_metric(["free"], stats.slots_total - stats.slots_used)
        yield slots
        size = GaugeMetricFamily("medley_adapter_bytes", "Bytes of adapters by tier.", labels=["tier"])
        size.add_metric(["device"], stats.bank_bytes_used)
        size.add_metric(["host"], stats.host_bytes_used)
        yield size
        hits = CounterMetricFamily("medley_adapter_hits", "Requests by where their adapter was when they came.", labels=["tier"])
        for tier in ("resident", "host", "disk"):
            hits.add_metric([tier], stats.counters.get(f"{tier}_hits", 0))
        yield hits
        for name, (metric, text) in _COUNTERS.items():
            yield CounterMetricFamily(metric, text, stats.counters.get(name, 0))
        prefix = CounterMetricFamily("medley_prefix_cache_tokens", "Prompt tokens by prefix cache result.", labels=["result"])
        prefix.add_metric(["hit"], stats.counters.get("cached_tokens", 0))
        prefix.add_metric(["miss"], stats.counters.get("prompt_tokens", 0))
        yield prefix
        yield GaugeMetricFamily("medley_engine_step_seconds", "Duration of the last step.", stats.last_step_seconds)
        yield GaugeMetricFamily("medley_batch_adapters", "Distinct adapters in the last step.", stats.last_step_adapters)
        yield CounterMetricFamily("medley_engine_restarts", "Times the engine process was restarted.", self._engine.restarts)
        yield GaugeMetricFamily("medley_engine_ready", "1 while the engine can take requests.", int(self._engine.ready))
