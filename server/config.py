"""Settings: one table drives flags, environment variables and docs/CONFIG.md. Read once, then frozen."""

from __future__ import annotations

import argparse
import ipaddress
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

DTYPES = ("auto", "bfloat16", "float32", "float16", "float64")


class ConfigError(Exception):
    """A setting is wrong; the message names it and says how to fix it."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the server is told at start. Meanings and defaults: ``TABLE``."""

    model: str | None
    dtype: str
    device: str
    host: str
    port: int
    data_dir: Path
    keys_file: Path | None
    redis_url: str | None
    catalog_url: str | None
    blobs_url: str | None
    max_model_len: int | None
    kv_cache_bytes: int
    max_batch_tokens: int
    step_target_ms: int | None
    max_running: int
    max_waiting: int
    bank_bytes: int
    host_bytes: int
    disk_bytes: int
    blob_cache_bytes: int
    max_upload_bytes: int
    threads: int
    prefix_caching: bool
    drain_seconds: float
    log_level: str

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


@dataclass(frozen=True, slots=True)
class Setting:
    """One row: the field, its default as text ("" is unset), how to read it, and what it does."""

    name: str
    default: str
    kind: str
    help: str

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def env(self) -> str:
        return "MEDLEY_" + self.name.upper()


TABLE = (
    Setting("model", "", "text", "Base model: a directory or a Hugging Face id. Unset: the packaged SmolLM2-135M-Instruct."),
    Setting(
        "dtype", "auto", "dtype", f"Precision of the base: {', '.join(DTYPES)}. auto takes bfloat16 where the processor has it."
    ),
    Setting("device", "cpu", "text", "Device of the base model, as PyTorch names it."),
    Setting("host", "127.0.0.1", "text", "Address to listen on. Anything but loopback needs keys_file."),
    Setting("port", "8000", "count", "Port to listen on."),
    Setting("data_dir", ".medley", "path", "Where adapters, programs and converted bases are kept."),
    Setting("keys_file", "", "path", "API keys, made by `python -m server.api.auth new TENANT`. Unset: no keys, loopback only."),
    Setting("redis_url", "", "text", "Redis for the residency registry of several replicas. Unset: in this process."),
    Setting(
        "catalog_url",
        "",
        "text",
        "Database of names and versions, as SQLAlchemy writes it (postgresql+psycopg://USER@HOST/DB). Unset: SQLite in data_dir.",
    ),
    Setting(
        "blobs_url",
        "",
        "text",
        "Where uploaded files are kept: s3://BUCKET/PREFIX, with endpoint and credentials in AWS_* variables. Unset: in data_dir.",
    ),
    Setting(
        "max_model_len", "", "count", "Longest prompt plus output, in tokens. Unset: what the model and the K/V cache allow."
    ),
    Setting("kv_cache_bytes", "1GiB", "bytes", "Memory for K/V blocks."),
    Setting("max_batch_tokens", "1024", "count", "Most tokens in one step; long prompts are cut into such pieces."),
    Setting(
        "step_target_ms",
        "",
        "count",
        "How long a step may take, with others' prompts in it, while a stream waits for its next token; 0: as long as they take. "
        "Unset: 250 on a CPU, 50 on other devices.",
    ),
    Setting("max_running", "64", "count", "Most sequences in one step."),
    Setting("max_waiting", "512", "count", "Most sequences that wait; beyond it requests get 429 with Retry-After."),
    Setting("bank_bytes", "1GiB", "bytes", "Memory for adapters that are resident on the device."),
    Setting("host_bytes", "1GiB", "bytes", "Memory for adapters that are kept ready in host memory."),
    Setting(
        "disk_bytes", "64GiB", "bytes", "Disk space for lowered adapters; what goes is made again from the upload when asked for."
    ),
    Setting("blob_cache_bytes", "16GiB", "bytes", "Disk space for copies of uploaded files, where blobs_url is set."),
    Setting("max_upload_bytes", "1GiB", "bytes", "Largest upload, before and after unpacking."),
    Setting("threads", "0", "count", "Threads of the engine; 0 leaves the choice to PyTorch."),
    Setting("prefix_caching", "true", "flag", "Whether requests of one tenant and adapter share K/V of equal prompt beginnings."),
    Setting("drain_seconds", "30", "seconds", "How long running requests may take to finish after SIGTERM."),
    Setting("log_level", "info", "text", "debug, info, warning or error."),
)
_UNITS = {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "kb": 1000, "mb": 1000**2, "gb": 1000**3, "b": 1}


def load_settings(argv: Sequence[str], env: Mapping[str, str] = os.environ) -> Settings:
    """Flags over environment over defaults. Raises ConfigError; ``--help`` exits as argparse does."""
    parser = argparse.ArgumentParser(
        prog="medley serve", description="Serve one base model and many tenants' adapters over HTTP.", allow_abbrev=False
    )
    for row in TABLE:
        default = f"default: {row.default}" if row.default else "default: unset"
        parser.add_argument(row.flag, metavar=row.kind.upper(), help=f"{row.help} ({row.env}; {default})".replace("%", "%%"))
    given = vars(parser.parse_args(argv))
    known = {row.env for row in TABLE}
    if unknown := sorted(name for name in env if name.startswith("MEDLEY_") and name not in known and name not in _CLIENT_ENV):
        raise ConfigError(f"unknown environment variable {unknown[0]}; settings are listed by `medley serve --help`")
    values = {
        row.name: _read(row, given[row.name] if given[row.name] is not None else env.get(row.env, row.default)) for row in TABLE
    }
    settings = Settings(**values)
    _check(settings)
    return settings


# Read by the command line client, which shares the prefix.
_CLIENT_ENV = frozenset({"MEDLEY_URL", "MEDLEY_API_KEY"})


def _read(row: Setting, text: str) -> Any:
    optional = {field.name for field in fields(Settings) if "None" in str(field.type)}
    if not text:
        if row.name in optional:
            return None
        raise ConfigError(f"{row.flag} must not be empty: {row.help}")
    try:
        return _READERS[row.kind](text)
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{row.flag} (or {row.env}) is {text!r}, which is not a {row.kind}: {row.help}") from error


def _bytes(text: str) -> int:
    lowered = text.strip().lower()
    for unit, factor in _UNITS.items():
        if lowered.endswith(unit):
            return int(float(lowered.removesuffix(unit)) * factor)
    return _count(lowered)


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError(text)
    return value


def _flag(text: str) -> bool:
    return {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}[text.lower()]


def _dtype(text: str) -> str:
    if text not in DTYPES:
        raise ValueError(text)
    return text


_READERS: dict[str, Any] = {
    "text": str,
    "path": lambda text: Path(text).expanduser(),
    "count": _count,
    "bytes": _bytes,
    "flag": _flag,
    "seconds": float,
    "dtype": _dtype,
}


def _check(settings: Settings) -> None:
    if not settings.is_loopback and settings.keys_file is None:
        raise ConfigError(
            f"--host {settings.host} can be reached from other machines, so requests must carry keys: make one with "
            "`python -m server.api.auth new TENANT --file keys.txt` and start with --keys-file keys.txt"
        )
    if settings.keys_file is not None and not settings.keys_file.is_file():
        raise ConfigError(
            f"--keys-file {settings.keys_file} does not exist; make it with `python -m server.api.auth new TENANT --file ...`"
        )
    if settings.port > 65535:
        raise ConfigError(f"--port {settings.port} is above 65535")
    if min(settings.max_batch_tokens, settings.max_running) < 1:
        raise ConfigError("--max-batch-tokens and --max-running must be at least 1")
    if settings.log_level not in ("debug", "info", "warning", "error"):
        raise ConfigError(f"--log-level {settings.log_level} is none of debug, info, warning, error")
