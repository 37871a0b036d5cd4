"""Keys: only hashes are stored, wrong ones are refused alike, and a revoked one stops working."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from server.api.auth import DEFAULT_TENANT, Caller, Keys, main, new_key
from server.errors import ApiError


def test_without_a_file_everybody_is_the_default_tenant_and_an_operator() -> None:
    assert Keys(None).caller(None) == Caller(DEFAULT_TENANT, is_operator=True)


def test_keys_name_their_tenant(tmp_path: Path) -> None:
    file = tmp_path / "keys.txt"
    made = [new_key(tenant) for tenant in ("acme", "globex")]
    file.write_text("# tenants\n\n" + "\n".join(line for _, line in made))
    keys = Keys(file)
    assert [keys.caller(f"Bearer {key}").tenant for key, _ in made] == ["acme", "globex"]
    secret = made[0][0].split("_", 2)[2]
    assert secret not in file.read_text()
    assert len(secret) >= 43


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer x", "Basic abc", "Bearer medley_000000000000_" + "a" * 43])
def test_everything_else_is_refused(header: str | None, tmp_path: Path) -> None:
    file = tmp_path / "keys.txt"
    file.write_text(new_key("acme")[1])
    with pytest.raises(ApiError) as caught:
        Keys(file).caller(header)
    assert caught.value.row.status == 401


def test_a_mixed_up_key_is_refused(tmp_path: Path) -> None:
    (first, line), (second, other) = new_key("acme"), new_key("globex")
    file = tmp_path / "keys.txt"
    file.write_text(f"{line}\n{other}\n")
    mixed = "_".join([*first.split("_")[:2], second.split("_", 2)[2]])
    with pytest.raises(ApiError):
        Keys(file).caller(f"Bearer {mixed}")


def test_a_revoked_key_stops_working(tmp_path: Path) -> None:
    key, line = new_key("acme")
    file = tmp_path / "keys.txt"
    file.write_text(line)
    keys = Keys(file)
    assert keys.caller(f"Bearer {key}") == Caller("acme")
    file.write_text("")
    time.sleep(1.1)
    with pytest.raises(ApiError):
        keys.caller(f"Bearer {key}")


@pytest.mark.parametrize("line", ["acme:nonsense", "acme:1:" + "0" * 64 + ":root", "acme:1:" + "0" * 64 + ":operator:x"])
def test_a_broken_file_is_named(line: str, tmp_path: Path) -> None:
    file = tmp_path / "keys.txt"
    file.write_text(line)
    with pytest.raises(ValueError, match="line 1"):
        Keys(file)


def test_the_command_prints_the_key_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys.txt"

    def new(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["auth", "new", *arguments, "--file", str(file)])
        main()
        return capsys.readouterr().out.strip()

    command = [sys.executable, "-m", "server.api.auth", "new", "acme", "--file", str(file)]
    key = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert Keys(file).caller(f"Bearer {key}") == Caller("acme")
    operator = new("acme", "--operator")
    assert Keys(file).caller(f"Bearer {operator}") == Caller("acme", is_operator=True)
    assert Keys(file).caller(f"Bearer {key}") == Caller("acme")
    assert file.stat().st_mode & 0o077 == 0
    with pytest.raises(SystemExit) as ended:
        new("Not A Tenant")
    assert ended.value.code == 2
