"""ServerOptions: what the user asked of the HTTP side. Frozen and closed, as EngineConfig is for the engine."""

from __future__ import annotations

import math
from dataclasses import dataclass

from core.errors import ConfigError

LOG_LEVELS = ("critical", "error", "warning", "info", "debug")


@dataclass(frozen=True)
class ServerOptions:
    """Options of one HTTP server. Raises ConfigError when a value cannot be right."""

    host: str = "127.0.0.1"
    port: int = 30000  # 0 = any free one; the address is printed
    api_key: str | None = None  # None = no key is asked for
    cors_origins: tuple[str, ...] = ()  # origins that browsers may call from; "*" = all
    max_request_bytes: int = 16 * 1024**2  # of one HTTP body
    shutdown_grace: float = 30.0  # seconds that requests in flight get on SIGTERM
    log_level: str = "info"
    access_log: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be in [0, 65535], got {self.port}.")
        if self.max_request_bytes < 1:
            raise ConfigError(f"max_request_bytes must be positive, got {self.max_request_bytes}.")
        if not math.isfinite(self.shutdown_grace) or self.shutdown_grace < 0:
            raise ConfigError(f"shutdown_grace must be a number of seconds, not below 0; got {self.shutdown_grace}.")
        if self.log_level not in LOG_LEVELS:
            raise ConfigError(f"log_level {self.log_level!r} is unknown; choose one of {', '.join(LOG_LEVELS)}.")
        if self.api_key == "":
            raise ConfigError("api_key is empty, which would let everybody in; leave it out or give a key.")
        object.__setattr__(self, "cors_origins", tuple(self.cors_origins))
