"""Settings of the server: where it listens, who may come, and within which limits."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field, fields
from typing import Annotated, get_args

import tyro

from scd.common.config import PrecisionChoice, at_least
from scd.common.files import read_text
from scd.models.config import ENGINES

ORIGIN = re.compile(r"https?://(\[[0-9a-fA-F:.]{2,45}\]|[^\s/?#\[\]@:]{1,253})(:\d{1,5})?")
"""Of a page."""

SHORTEST_TOKEN = 16
"""Characters; a token from `python -c "import secrets; print(secrets.token_urlsafe())"` has 43."""


@dataclass(frozen=True, kw_only=True)
class ClientLimits:
    """What one client may ask for."""

    max_message_bytes: int = 65536
    """Of one message."""
    messages_per_s: float = 200.0
    """Messages of one connection, on average; as many again may come at once."""
    max_errors: int = 32
    """Refused messages in a row after which a connection is closed."""
    hello_s: float = 10.0
    """Seconds within which a connection must say hello."""
    head_s: float = 10.0
    """Seconds within which a request must have said what it wants, from the connection on."""
    body_s: float = 60.0
    """Seconds within which the body of a request must have come, and a client read something."""
    max_connections: int = 64
    """WebSockets at once."""
    requests_per_s: float = 50.0
    """HTTP requests under /v1 of one address, on average; four times as many may come at once."""
    max_steps: int = 100
    """Denoising steps per frame."""
    max_step_count: int = 100
    """Frames of one step."""
    max_upload_bytes: int = 32 * 2**20
    """Of one upload."""
    max_upload_pixels: int = 2**24
    """Rows times columns of an uploaded picture or video."""
    max_upload_s: float = 30.0
    """Length of an uploaded video, in seconds."""
    max_upload_frames: int = 64
    """Frames that are kept of an uploaded video: the last ones, at the world's pace."""
    decoder_s: float = 20.0
    """Seconds for decoding one upload."""
    max_uploads: int = 64
    """Decoded uploads that are kept at once."""
    upload_kept_s: float = 600.0
    """Seconds for which a decoded upload is kept."""
    max_snapshot_bytes: int = 256 * 2**20
    """Of a snapshot that is sent to be restored."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < float("inf"):
                raise ValueError(f"{name} must be a finite number above 0, got {value}")


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """Which world is served, and by what."""

    run: str = ""
    """World, run or step folder; empty: the world that comes with the package."""
    data: str = ""
    """Dataset whose recorded clips streams may begin with, of those held out of training; empty:
    the clips that the world carries, if any."""
    prompt: str = ""
    """What streams show that bring no prompt, in a world that a text steers; empty: each must."""
    port: int = 8000
    """Port to listen on; 0: any free one."""
    sessions: int = 8
    """Streams in memory at once; every fork is one."""
    device: str = "auto"
    """Where the model runs: auto, cpu, cuda, cuda:1 or mps."""
    engine: Annotated[str, tyro.conf.arg(metavar="{plain,fast}")] = "fast"
    """What runs the model: as it is written, or laid out for the machine."""
    precision: Annotated[str, tyro.conf.arg(metavar="{auto,fp32,bf16}")] = "fp32"
    """Numbers of weights, KV cache and products: 32 bits, or bfloat16 in half the memory. auto:
    bf16 where the device has instructions for it."""


@dataclass(frozen=True, kw_only=True)
class ServeConfig(WorldConfig):
    """Serve a world to many players at once: the page of `scd play`, a WebSocket and HTTP."""

    host: str = "127.0.0.1"
    """Address to listen on; another one than this machine's own needs allow-remote and a token."""
    allow_remote: bool = False
    """Listen on an address that other machines reach."""
    token: str = ""
    """What clients must show; empty: nothing, or what token-file holds."""
    token_file: str = ""
    """File that holds the token, which keeps it out of the list of processes; empty: none."""
    origins: tuple[str, ...] = ()
    """Further origins whose pages may connect, such as https://play.example.org; a proxy in front
    of the server needs its own here."""
    tls_cert: str = ""
    """File of a certificate, for https and wss; empty: none. Browsers show H.264 from another
    machine only so."""
    tls_key: str = ""
    """File of the certificate's key."""
    max_rows: int = 16
    """Frames that are denoised in one batch, of all streams together; guided ones count twice."""
    memory_gib: float | None = None
    """Memory that sessions may take in all; None: what is free."""
    history_frames: int = 300
    """Frames that a session can be rewound by, about."""
    max_fps: float = 60.0
    """Frames per second of one session."""
    queue_frames: int = 3
    """Frames sent but not acknowledged after which a session waits for its client."""
    idle_s: float = 300.0
    """Seconds without a message after which a session is written to evict-dir."""
    evict_dir: str = ""
    """Folder for idle sessions, and for all when the server stops; empty: a temporary one, which
    is removed then."""
    kept_sessions: int = 1000
    """Sessions on disk; beyond, the one is removed that nobody came back to for longest."""
    kept_gib: float | None = None
    """Of sessions on disk, by the same rule; None: 8, or more where sessions in memory need it."""
    kept_s: float = 604800.0
    """Seconds for which a session stays on disk to which nobody comes back: a week."""
    left_s: float = 60.0
    """Seconds for which a session stays whose page was left, and not just reloaded."""
    backup_s: float | None = None
    """Seconds between two copies of each session that are written to evict-dir while it stays in
    memory, from which it goes on if this process is killed; None: there are none, but with replicas
    every 2 seconds."""
    replicas: int | None = None
    """Serve with so many processes, each with the world and sessions of its own, through Ray Serve;
    None: with this process alone. What is said of sessions and memory is of each."""
    max_replicas: int | None = None
    """Start more replicas, up to so many, while there are more clients than clients-per-replica;
    None: there are always as many as replicas says."""
    clients_per_replica: float = 4.0
    """WebSockets of one replica above which another one is started, on average."""
    replica_gpus: float = 0.0
    """GPUs of one replica; 0.5: two share one."""
    ray_address: str = ""
    """Ray cluster to join, such as auto; empty: one of this machine alone is started."""
    limits: ClientLimits = field(default_factory=ClientLimits)
    """What one client may ask for."""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ValueError(f"port must lie in 0 .. 65535, got {self.port}")
        at_least(
            1,
            sessions=self.sessions,
            max_rows=self.max_rows,
            history_frames=self.history_frames,
            queue_frames=self.queue_frames,
            kept_sessions=self.kept_sessions,
            replicas=self.replicas,
        )
        for name in ("max_fps", "idle_s", "kept_s", "left_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be finite and above 0, got {getattr(self, name)}")
        for name in ("memory_gib", "kept_gib"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        for name, known in (("engine", ENGINES), ("precision", get_args(PrecisionChoice))):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be one of {list(known)}, got {getattr(self, name)!r}"
                )
        if self.token and self.token_file:
            raise ValueError("token and token_file are two ways to say one thing: give one of them")
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ValueError("tls_cert and tls_key go together: give both or none")
        for origin in self.origins:
            if not ORIGIN.fullmatch(origin):
                raise ValueError(f"an origin is scheme://host[:port], got {origin!r}")
        self._check_replicas()
        self._check_reach()

    def _check_replicas(self) -> None:
        if self.backup_s is not None and not 0 < self.backup_s < float("inf"):
            raise ValueError(f"backup_s must be finite and above 0, got {self.backup_s}")
        if self.clients_per_replica <= 0 or self.replica_gpus < 0:
            raise ValueError("clients_per_replica must be above 0, replica_gpus 0 or more")
        if self.replicas is None:
            if self.max_replicas is not None or self.ray_address:
                raise ValueError("max_replicas and ray_address need replicas")
            return
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(
                f"max_replicas must be {self.replicas} or more, as replicas, "
                f"got {self.max_replicas}"
            )
        if self.ray_address and not self.evict_dir:
            raise ValueError("ray_address needs an evict_dir that all machines of it reach")

    def _check_reach(self) -> None:
        if self.is_local:
            return
        if not self.allow_remote:
            raise ValueError(
                f"host {self.host} may be reached by other machines: that needs --allow-remote "
                "and a --token or --token-file"
            )
        if not self.token and not self.token_file:
            raise ValueError(
                f"host {self.host} may be reached by other machines: --allow-remote needs a "
                "--token or --token-file"
            )

    @property
    def is_local(self) -> bool:
        """Whether only programs of this machine can connect."""
        return is_loopback(self.host)


@dataclass(frozen=True, kw_only=True)
class PlayConfig(WorldConfig):
    """Play a world in this machine's browser: each frame is made while you steer."""

    browser: bool = True
    """Open the page in a browser."""

    def served(self) -> ServeConfig:
        """Return the settings of the server behind the page.

        Raises:
            ValueError: settings that no server can have.
        """
        return ServeConfig(**{one.name: getattr(self, one.name) for one in fields(WorldConfig)})


def is_loopback(host: str) -> bool:
    """Return whether a name or address stands for this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def read_token(config: ServeConfig) -> str | None:
    """Return what clients must show; None: nothing.

    Raises:
        OSError: the token file cannot be read.
        ValueError: the token is too short to keep anybody out, or not plain text.
    """
    token = config.token
    if config.token_file:
        token = read_text(config.token_file).strip()
    if not token and not config.token_file:
        return None
    if len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable():
        raise ValueError(
            f"a token has {SHORTEST_TOKEN} or more plain characters, got {len(token)} characters"
        )
    return token
