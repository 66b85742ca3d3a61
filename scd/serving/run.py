"""`scd serve` and `scd play`: open a world, start its host, listen until a signal comes."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import torch
import uvicorn
from rich.console import Console
from starlette.types import ASGIApp

from scd.common.files import TEMPORARY
from scd.common.runtime import choose_device, choose_precision, explain_precision
from scd.common.signals import SIGNALS, Interrupted
from scd.data.clip import frames_to_pixels
from scd.data.source import open_source
from scd.engine.open import advised_threads, open_engine
from scd.evaluation.predict import check_fit
from scd.models.about import read_about
from scd.models.checkpoint import World, load_world, resolve
from scd.models.shipped import Clips, read_clips, shipped_world
from scd.serving.admission import HostConfig
from scd.serving.host import Host
from scd.serving.http_api import make_app
from scd.serving.service import LOG, Service
from scd.serving.settings import PlayConfig, ServeConfig, read_token
from scd.serving.store import abandoned, kept_files, locked_folder, remove_old
from scd.serving.web_server import WAITING, Patience, PatientProtocol
from scd.serving.worlds import Choice
from scd.streaming.texts import WorldTexts

KEPT = "scd-sessions-"
"""How temporary folders of sessions begin."""

STOP_S = 30.0
"""Seconds in which sessions are written to disk when the server stops."""

FAREWELL_S = 5.0
"""Seconds that requests under way have to end."""

say: Callable[[str], None] = partial(print, flush=True)
"""Prints a line at once, in a pipe or a log too."""

NUM_CLIPS, CLIP_FRAMES = 8, 16
"""Held-out clips that are taken of a dataset, and frames of each."""


def serve(config: ServeConfig, on_ready: Callable[[str], None] = say) -> None:
    """Serve a world until SIGINT or SIGTERM.

    Args:
        config: what and where.
        on_ready: is told the address of the page once it can be opened.

    Raises:
        OSError: the port is in use, or the world is not there.
        ValueError: a damaged world, settings that do not fit it, or too little memory.
        Interrupted: a signal came; all sessions are on disk where there is an evict_dir.
    """
    with listening(config) as listener, kept_in(config) as folder:
        service = open_service(config, folder)
        with playing(service):
            run_server(service, listener, on_ready)


@contextmanager
def playing(service: Service) -> Iterator[None]:
    """Let the host run; a signal's Interrupted says in the end what became of the sessions."""
    host = service.host
    host.start()
    try:
        yield
    except Interrupted as end:
        said = what_is_kept(service.config, host.stop(STOP_S))
        raise Interrupted(end.signal_name, f"{end}{said}") from None
    finally:
        host.stop(STOP_S)


def what_is_kept(config: ServeConfig, num_lost: int | None = 0) -> str:
    """Say how many sessions lie in the folder after a server has stopped.

    Args:
        config: of the server; one without a folder that stays keeps nothing.
        num_lost: that could not be written; None: the host is still at it.
    """
    if not config.evict_dir:
        return ""
    said = f"; sessions in {config.evict_dir}: {len(kept_files(Path(config.evict_dir)))}"
    if num_lost is None:
        return f"{said}, others were not written within {STOP_S:g} s"
    return f"{said}, lost: {num_lost}" if num_lost else said


def run_server(
    service: Service, listener: socket.socket, on_ready: Callable[[str], None] = say
) -> None:
    """Serve a service whose host has started until a signal comes (Interrupted)."""
    run_app(service.config, make_app(service), listener, on_ready, service.choice)


def run_app(
    config: ServeConfig,
    app: ASGIApp,
    listener: socket.socket,
    on_ready: Callable[[str], None] = say,
    choice: Choice | None = None,
) -> None:
    """Let an application answer until a signal comes (Interrupted), or another world is chosen."""
    server = Server(uvicorn_config(config, app), lambda: on_ready(address(config, listener)))
    if choice is not None:
        choice.stop = partial(setattr, server, "should_exit", True)
    server.run(sockets=[listener])
    if server.signal is not None:
        raise Interrupted(server.signal.name, f"stopped by {server.signal.name}")


def open_service(
    config: ServeConfig, evict_dir: Path | None, shared: Path | None = None
) -> Service:
    """Load the world and put the server's parts together; the host is not started.

    Args:
        config: of the server.
        evict_dir: of its host.
        shared: folder of uploads that several servers share; None: there is one server.

    Raises:
        OSError, ValueError: as `serve`.
    """
    token = read_token(config)
    folder = world_folder(config)
    device = choose_device(config.device)
    world = load_world(folder, device=device)
    if device.type == "cpu":
        torch.set_num_threads(advised_threads(world.model.config))
    clips = held_out_clips(config.data, world) if config.data else read_clips(folder)
    precision = choose_precision(config.precision, device)
    if config.precision == "auto":
        say(f"precision {explain_precision(precision, device)}")
    engine = open_engine(world.model, config.engine, precision, release=True)
    num_given = 0 if clips is None else clips.frames.shape[1]
    name = resolve(folder).name if not (folder / "last").is_file() else folder.name
    # What a video decoder remembers can be gigabytes: such sessions stay in memory.
    kept = None if world.autoencoder.config.is_video else evict_dir
    limits, about = host_config(config, kept, num_given), read_about(resolve(folder))
    texts = WorldTexts(world, device=str(device)) if world.card.conditions.has_text else None
    host = Host(world, engine, limits, LOG.warning, clips, name, about, texts, config.prompt)
    return Service(host, config, token, shared)


def world_folder(config: ServeConfig) -> Path:
    """Return the folder of the world that is served (OSError: there is none)."""
    folder = Path(config.run) if config.run else shipped_world()
    resolve(folder)
    return folder


def host_config(config: ServeConfig, evict_dir: Path | None, num_given: int = 0) -> HostConfig:
    """Return the part of the settings that is the host's; `num_given` frames has a clip."""
    return HostConfig(
        max_sessions=config.sessions,
        max_rows=config.max_rows,
        memory_gib=config.memory_gib,
        history_frames=config.history_frames,
        max_fps=config.max_fps,
        max_steps=config.limits.max_steps,
        max_step_count=config.limits.max_step_count,
        # Limits of uploads are none of the world's own clips.
        max_start_frames=max(config.limits.max_upload_frames, num_given),
        queue_frames=config.queue_frames,
        idle_s=config.idle_s,
        evict_dir=evict_dir,
        backup_s=config.backup_s,
        kept_sessions=config.kept_sessions,
        kept_gib=config.kept_gib,
        kept_s=config.kept_s,
        left_s=config.left_s,
    )


def held_out_clips(data: str, world: World) -> Clips:
    """Read the first held-out clips of a dataset, one of each episode.

    Raises:
        OSError, ValueError: no such dataset, or none that fits the world.
    """
    source = open_source(data, "val")
    check_fit(world, source.card, data)
    lengths = [source.num_frames(one) for one in range(source.num_episodes)]
    num_frames = min(CLIP_FRAMES, max(lengths))
    long = [one for one, length in enumerate(lengths) if length >= num_frames]
    clips = [source.read(one, 0, num_frames) for one in long[:NUM_CLIPS]]
    frames = torch.stack([frames_to_pixels(clip.frames).movedim(-1, -3) for clip in clips])
    none = torch.zeros(num_frames, dtype=torch.long)
    actions = torch.stack([none if one.actions is None else one.actions for one in clips])
    return Clips(frames=frames, actions=actions)


@contextmanager
def kept_in(config: ServeConfig) -> Iterator[Path]:
    """Give the folder of idle sessions: the one of the settings, or a temporary one.

    Temporary ones of servers that were killed are removed.
    """
    if config.evict_dir:
        yield Path(config.evict_dir)
        return
    place = Path(tempfile.gettempdir())
    for folder in place.glob(f"{KEPT}*"):
        # Others may make links, and folders of this name, where everybody may write.
        with suppress(OSError):
            if os.stat(folder, follow_symlinks=False).st_uid == os.getuid():
                with abandoned(folder):
                    shutil.rmtree(folder)
    remove_old(place, f"{TEMPORARY}{KEPT}*")
    folder, lock = locked_folder(place, KEPT, 0o700)
    with lock:
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def listening(config: ServeConfig) -> Iterator[socket.socket]:
    """Take the port, before anything is loaded.

    Raises:
        OSError: it is in use, may not be taken, or there is no such address.
    """
    where = f"port {config.port} of {config.host}"
    try:
        family, kind, number, _, target = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise OSError(f"there is no address {config.host!r}: {error.strerror}") from error
    listener = socket.socket(family, kind, number)
    with contextlib.closing(listener):
        # A server that has just stopped leaves its port waiting for late packets.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(target)
            listener.listen(128)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                message = f"{where} is in use: choose another --port, or 0 for any free one"
            else:
                message = f"cannot listen on {where}: {error.strerror}"
            raise OSError(message) from error
        yield listener


def address(config: ServeConfig, listener: socket.socket) -> str:
    scheme = "https" if config.tls_cert else "http"
    host = f"[{config.host}]" if ":" in config.host else config.host
    return f"{scheme}://{host}:{listener.getsockname()[1]}/"


def uvicorn_config(config: ServeConfig, app: ASGIApp) -> uvicorn.Config:
    """Return the web server's settings: quiet, without compression, with bounds."""
    limits = config.limits
    patience = Patience(
        head_s=limits.head_s, read_s=limits.body_s, most=WAITING * limits.max_connections
    )
    return uvicorn.Config(
        app,
        http=partial(PatientProtocol, patience=patience),  # type: ignore[arg-type]
        ws="websockets-sansio",
        # Larger ones are cut off at once; those above the limit of clients end with a reason.
        ws_max_size=max(2**20, 2 * config.limits.max_message_bytes),
        # Pictures are compressed already, and small messages could unfold to large ones.
        ws_per_message_deflate=False,
        timeout_graceful_shutdown=int(FAREWELL_S),
        lifespan="auto",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ssl_certfile=config.tls_cert or None,
        ssl_keyfile=config.tls_key or None,
    )


class Server(uvicorn.Server):
    """The web server; a signal ends it without ending the process."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        """Prepare; `on_ready` is called once connections are taken."""
        super().__init__(config)
        self._on_ready = on_ready
        self.signal: signal.Signals | None = None
        """That ended it; None: none did."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            self._on_ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Note signals while the server runs; a second one stops without farewells."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {one: signal.signal(one, self._note) for one in SIGNALS}
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)

    def _note(self, number: int, frame: object) -> None:
        self.force_exit = self.signal is not None
        self.signal = self.signal or signal.Signals(number)
        self.should_exit = True


WATCH_S = 0.02
"""Seconds between two looks whether the page has drawn a frame."""


def play(config: PlayConfig, say: Callable[[str], None] | None = None) -> None:
    """Serve a world on this machine and show its page, until SIGINT or SIGTERM; where the player
    chooses another one, that in its place, at the same address.

    Args:
        config: what, where, and whether a browser opens.
        say: is told the address, and how long it took to the first frame; None: the console is.

    Raises:
        OSError: the port is in use, or the world is not there.
        ValueError: a damaged world, settings that do not fit it, or too little memory.
        Interrupted: a signal came.
    """
    say = say or Console(soft_wrap=True, highlight=False).print
    served = config.served()
    with listening(served) as listener:
        chosen = _play_one(config, served, listener, say, bool(config.run))
        while chosen:
            served = replace(served, run=chosen, data="")
            chosen = _play_one(replace(config, browser=False), served, listener, say, True)


def _play_one(
    config: PlayConfig,
    served: ServeConfig,
    listener: socket.socket,
    say: Callable[[str], None],
    asked: bool,
) -> str:
    """Serve one world; return the name of the one that was chosen to come next."""
    over = threading.Event()
    # The web server closes the socket that it is given.
    with kept_in(served) as folder, listener.dup() as own:
        service = open_service(served, folder)
        service.choice = Choice(service.host.info.name, asked)

        def ready(address: str) -> None:
            say(f"{service.host.info.name}: play at {address}  (Ctrl-C ends it)")
            threading.Thread(
                target=_say_first_frame, args=(service, say, over), daemon=True
            ).start()
            if config.browser:
                threading.Thread(target=show, args=(address, say), daemon=True).start()

        with playing(service):
            try:
                run_server(service, own, ready)
            finally:
                over.set()
        return service.choice.chosen


def show(address: str, say: Callable[[str], None]) -> bool:
    """Open a page in the player's browser, if this machine has a screen; return whether it did."""
    # Without a screen some systems would open a browser of letters in this very terminal.
    has_screen = sys.platform in ("darwin", "win32") or any(
        os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")
    )
    try:
        opened = has_screen and webbrowser.open(address)
    except webbrowser.Error:
        opened = False
    if not opened:
        say("no browser could be opened here: open the address yourself")
    return opened


def num_drawn(service: Service) -> int:
    """Return how many messages have said that a page drew a frame."""
    value = service.metrics.registry.get_sample_value("scd_messages_total", {"type": "ack"})
    return int(value or 0)


def _say_first_frame(service: Service, say: Callable[[str], None], over: threading.Event) -> None:
    while not over.wait(WATCH_S):
        if num_drawn(service):
            age_s = time.time() - psutil.Process().create_time()
            say(f"first frame on the screen {age_s:.1f} s after the start of the command")
            return
