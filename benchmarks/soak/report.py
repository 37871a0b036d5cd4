"""What the soaks found, as tables."""

from __future__ import annotations

from rich.table import Table

from benchmarks.soak.churn import STREAMS, ChurnReport
from benchmarks.soak.percentile import percentile
from benchmarks.soak.probes import TIERS
from benchmarks.soak.zipf import ZipfReport


def churn_table(report: ChurnReport) -> Table:
    made = Table("what", "found", title=f"churn: {STREAMS} adapters stream for {report.seconds:.0f} s while adapters change")
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(report.changes.items()))
    made.add_row("changes", f"{report.changes_per_s:.1f}/s: {kinds}")
    made.add_row("requests", ", ".join(f"{count} {kind}" for kind, count in sorted(report.requests.items())))
    made.add_row("tokens checked", f"{report.checked_tokens}, of {report.contents_seen} versions")
    made.add_row("adapters in the bank", f"at most {report.most_resident}, {report.evictions} evictions")
    made.add_row("tokens from the prefix cache", str(report.cached_tokens))
    for name, taken in (("push", report.push_ms), ("delete", report.delete_ms)):
        made.add_row(name, f"p50 {percentile(taken, 50):.0f} ms, p99 {percentile(taken, 99):.0f} ms, longest {max(taken):.0f} ms")
    freed = f"after {report.freed_after_s:.2f} s" if report.freed_after_s is not None else f"not: {report.left} stayed"
    made.add_row("everything freed", freed)
    for name, found in (("mismatches", report.mismatches), ("hangs", report.hangs), ("other errors", report.errors)):
        made.add_row(name, "\n".join([str(len(found)), *found[:3]]))
    return made


def zipf_tables(report: ZipfReport) -> list[Table]:
    plan = report.plan
    title = (
        f"{plan.adapters} adapters of {report.program_bytes / 1024:.0f} KiB each; {report.asked_for} are asked for, and only those have "
        f"program files; {report.capacity_per_s * plan.load:.1f} requests/s, {plan.load:.0%} of what the base alone serves"
    )
    return [_tiers(report, title), _blocks(report), _memory(report)]


def failures(report: ZipfReport) -> str:
    return "\n".join([f"requests that failed: {len(report.failures)}", *report.failures[:3]])


def _tiers(report: ZipfReport, title: str) -> Table:
    made = Table("adapter is", "budget", "hit rate", "probes", "first token p50", "p99", title=title)
    budgets = {"resident": str(report.plan.device), "host": str(report.plan.host), "disk": "all"}
    for tier, seconds in report.probes.items():
        made.add_row(
            tier,
            budgets[tier],
            f"{report.with_loads.hit_rates[tier]:.1%}",
            str(len(seconds)),
            _ms(seconds, 50),
            _ms(seconds, 99),
        )
    return made


def _blocks(report: ZipfReport) -> Table:
    made = Table(
        "requests",
        "count",
        "resident",
        "host",
        "disk",
        "first token p50",
        "p99",
        "others' tokens p50",
        "p99",
        title=f"tenants that load nothing: p99 between tokens with loads is {report.ratio:.2f} times that without (goal: at most 1.2)",
    )
    for name, block in (("resident adapters only", report.without_loads), ("Zipf(1.0)", report.with_loads)):
        made.add_row(
            name,
            str(len(block.first_token)),
            *(str(block.found[tier]) for tier in TIERS),
            _ms(block.first_token, 50),
            _ms(block.first_token, 99),
            _ms(block.between_tokens, 50),
            _ms(block.between_tokens, 99),
        )
    return made


def _memory(report: ZipfReport) -> Table:
    made = Table("process", "RSS at the start", "at the end", "slope", title="memory, after the tiers were filled")
    for row in report.memory:
        made.add_row(
            row["process"],
            f"{row['start_mib']:.0f} MiB",
            f"{row['end_mib']:.0f} MiB",
            f"{row['slope_mib_per_min']:+.1f} MiB/min",
        )
    return made


def _ms(seconds: list[float], percent: float) -> str:
    return f"{percentile(seconds, percent) * 1000:.0f} ms"
