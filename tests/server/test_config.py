"""Settings: precedence, units, and refusals that say what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.__main__ import main
from server.config import TABLE, ConfigError, load_settings


def test_flags_win_over_environment_over_defaults() -> None:
    env = {"MEDLEY_PORT": "9000", "MEDLEY_MAX_RUNNING": "8", "UNRELATED": "x"}
    settings = load_settings(["--port", "9001"], env)
    assert (settings.port, settings.max_running, settings.max_waiting) == (9001, 8, 512)
    assert settings.model is None


@pytest.mark.parametrize(("text", "value"), [("1GiB", 1 << 30), ("1.5 MiB", 3 << 19), ("2kb", 2000), ("77", 77)])
def test_sizes(text: str, value: int) -> None:
    assert load_settings(["--bank-bytes", text], {}).bank_bytes == value


@pytest.mark.parametrize(
    ("argv", "env", "message"),
    [
        (["--port", "x"], {}, "--port"),
        (["--port", "70000"], {}, "65535"),
        (["--max-running", "-1"], {}, "--max-running"),
        (["--dtype", "int8"], {}, "--dtype"),
        (["--host", "0.0.0.0"], {}, "server.api.auth new"),
        (["--host", "example.org"], {}, "keys"),
        (["--keys-file", "/nowhere"], {}, "does not exist"),
        (["--log-level", "loud"], {}, "log-level"),
        (["--prefix-caching", "maybe"], {}, "prefix"),
        ([], {"MEDLEY_PROT": "1"}, "MEDLEY_PROT"),
        ([], {"MEDLEY_BANK_BYTES": "lots"}, "MEDLEY_BANK_BYTES"),
    ],
)
def test_wrong_settings_are_refused(argv: list[str], env: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_settings(argv, env)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.0.0.5"])
def test_loopback_needs_no_keys(host: str) -> None:
    assert load_settings(["--host", host], {}).is_loopback


def test_a_bad_start_is_one_message_and_status_2(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--port", "x"]) == 2
    assert main(["--model", str(tmp_path), "--data-dir", str(tmp_path / "data")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert [line.startswith("medley: ") for line in lines] == [True, True]
    assert "config.json" in lines[1]


def test_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        load_settings(["--help"], {})
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert all(row.flag in shown and row.env in shown.replace("\n", "").replace(" ", "") for row in TABLE)
