"""``python -m server``: read the settings, build the application, serve it until a signal."""

from __future__ import annotations

import logging
import signal
import sys
from types import FrameType

import uvicorn

from adapter_store.errors import StoreError
from server.app import Services, build_services, create_app
from server.config import ConfigError, load_settings
from server.data_dir import claim
from server.engine.base_dir import UnsupportedBase
from server.log import configure

log = logging.getLogger("medley")


class _Server(uvicorn.Server):
    """Draining starts with the signal: readiness turns red at once, while requests under way finish."""

    def __init__(self, config: uvicorn.Config, services: Services) -> None:
        super().__init__(config)
        self._services = services

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._services.draining = True
        super().handle_exit(sig, frame)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 after a clean stop, 1 when serving failed, 2 for wrong settings."""
    try:
        settings = load_settings(sys.argv[1:] if argv is None else argv)
    except ConfigError as error:
        sys.stderr.write(f"medley: {error}\n")
        return 2
    configure(settings.log_level)
    try:
        lock = claim(settings.data_dir)
        services = build_services(settings)
    except (ConfigError, UnsupportedBase, StoreError) as error:
        sys.stderr.write(f"medley: {error}\n")
        return 2
    config = uvicorn.Config(
        create_app(services),
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(settings.drain_seconds),
        h11_max_incomplete_event_size=32 << 10,
    )
    log.info("listening on http://%s:%d once the model is loaded", settings.host, settings.port)
    server = _Server(config, services)
    # uvicorn raises the signal again once it has stopped; a stop that was asked for is a success.
    for stop in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stop, lambda *_: sys.exit(0))
    server.run()
    lock.close()
    return 0 if server.started else 1


if __name__ == "__main__":
    sys.exit(main())
