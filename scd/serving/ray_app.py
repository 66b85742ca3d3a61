"""`scd serve RUN --replicas N`: several processes with the same world, kept by Ray Serve."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from scd.common.config import from_json, to_json
from scd.common.memory import GIB, free_bytes
from scd.common.runtime import choose_device
from scd.common.signals import Interrupted
from scd.serving.admission import SHARE
from scd.serving.ray_replica import ASK_S, LEASE_S, Replica, Report
from scd.serving.ray_router import ReplicaRegistry, Router
from scd.serving.run import (
    STOP_S,
    Server,
    kept_in,
    listening,
    run_app,
    say,
    uvicorn_config,
    what_is_kept,
    world_folder,
)
from scd.serving.settings import ServeConfig, read_token

NAME = "scd"
"""Of the application and its deployment in Ray Serve."""

BACKUP_S = 2.0
"""Between two copies of each session, unless told otherwise."""

UPSCALE_S, DOWNSCALE_S = 5.0, 300.0
"""How long there must have been too many clients, or too few, before replicas start or end."""

STORE_BYTES = 100 * 2**20
"""Of Ray's own memory for objects, the least that it takes: frames do not pass through it."""

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Every call needs a token, which the processes of this command share.
    "RAY_AUTH_MODE": "token",
    # No exporters of metrics, which would listen on all addresses.
    "RAY_enable_metrics_collection": "0",
}
"""Environment of a Ray that this command starts."""

LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Off, Ray takes the loopback address for that of the machine. Source: Ray's own default where
firewalls ask about every port."""


def serve_replicas(config: ServeConfig, on_ready: Callable[[str], None] = say) -> None:
    """Serve a world with several replicas until SIGINT or SIGTERM.

    Args:
        config: what, where, and with how many replicas.
        on_ready: is told the address of the page once it can be opened.

    Raises:
        OSError, ValueError: as `scd.serving.run.serve`; ray is not installed, or does not start.
        Interrupted: a signal came; all sessions are on disk where there is an evict_dir.
    """
    check_installed()
    token = read_token(config)
    world_folder(config)
    with listening(config) as listener, kept_in(config) as kept, ray_running(config):
        secret = secrets.token_urlsafe()
        handle = deploy(config, token, kept, secret)
        registry = registry_of(handle, config)
        registry.start()
        try:
            try:
                app = Router(registry, secret).with_access(config, token)
                run_app(config, app, listener, on_ready)
            finally:
                registry.stop()
                withdraw()
        except Interrupted as end:
            raise Interrupted(end.signal_name, f"{end}{what_is_kept(config)}") from None


def check_installed() -> None:
    """Say what is missing for replicas (ValueError)."""
    for package in ("ray", "aiohttp"):
        if find_spec(package) is None:
            raise ValueError(
                f"--replicas needs {package}, which is not installed: "
                'pip install -c constraints.txt -e ".[ray]"'
            )


@contextmanager
def ray_running(config: ServeConfig) -> Iterator[None]:
    """Join a cluster, or start one of this machine alone that only this machine reaches.

    Ray reads the environment when it is imported, so nobody may have done that before.

    Raises:
        OSError: there is no such cluster.
    """
    os.environ |= {name: os.environ.get(name, value) for name, value in QUIET.items()}
    if not config.ray_address:
        os.environ[LOOPBACK] = "0"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(16))
    import ray
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if config.ray_address:
            ray.init(config.ray_address, **quiet)
        else:
            most = config.max_replicas or config.replicas
            ray.init(
                include_dashboard=False,
                num_cpus=most,
                object_store_memory=STORE_BYTES,
                **quiet,
            )
        serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR"})
    except Exception as error:
        # Of many kinds, and one that is slow to start is an Exception and no more.
        raise OSError(f"Ray does not start: {str(error)[:500]}") from error
    try:
        yield
    finally:
        ray.shutdown()


def deploy(config: ServeConfig, token: str | None, folder: Path, secret: str) -> Any:
    """Start the replicas and wait for them; return Ray Serve's handle of the deployment.

    Raises:
        ValueError: a replica does not start; Ray's log says why at length.
    """
    from ray import serve

    bound = replicas_of(config, token, folder, secret)
    try:
        return serve.run(bound, name=NAME, route_prefix=None)
    except RuntimeError as error:
        # Ray Serve gives the trace of the replica, which ends with its error.
        said = serve.status().applications[NAME].deployments[NAME].message.strip() or str(error)
        raise ValueError(f"a replica does not start: {said.splitlines()[-1]}") from error


def replicas_of(config: ServeConfig, token: str | None, folder: Path, secret: str) -> Any:
    """Return the replicas as an application of Ray Serve, not started.

    Args:
        config: of the server.
        token: that clients must show.
        folder: of sessions, that all replicas reach.
        secret: that the router must show.
    """
    from ray import serve

    is_local = not config.ray_address
    num_most = config.max_replicas or config.replicas or 1
    memory_gib = config.memory_gib
    if memory_gib is None and is_local:
        memory_gib = SHARE * free_bytes(choose_device(config.device)) / num_most / GIB
    config = replace(
        config,
        run=str(Path(config.run).resolve()) if config.run else "",
        data=str(Path(config.data).resolve()) if config.data else "",
        token=token or "",
        token_file="",
        tls_cert="",
        tls_key="",
        memory_gib=memory_gib,
        backup_s=config.backup_s or BACKUP_S,
    )
    options: dict[str, Any] = {"num_replicas": config.replicas}
    if config.max_replicas is not None:
        options = {
            "autoscaling_config": {
                "min_replicas": config.replicas,
                "max_replicas": config.max_replicas,
                "target_ongoing_requests": config.clients_per_replica,
                "upscale_delay_s": UPSCALE_S,
                "downscale_delay_s": DOWNSCALE_S,
                "look_back_period_s": UPSCALE_S,
            }
        }
    deployment = serve.deployment(
        Replica,
        name=NAME,
        ray_actor_options={"num_cpus": 1, "num_gpus": config.replica_gpus},
        max_ongoing_requests=10_000,
        health_check_period_s=5.0,
        health_check_timeout_s=30.0,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=2 * STOP_S + LEASE_S,
        **options,
    )
    return deployment.bind(config, str(folder.resolve()), secret, "127.0.0.1" if is_local else "")


def registry_of(handle: Any, config: ServeConfig) -> ReplicaRegistry:
    """Return the replicas behind a handle."""

    def report() -> list[Report]:
        said = handle.broadcast("report").results(timeout_s=ASK_S, return_exceptions=True)
        return [Report(**one) for one in said if not isinstance(one, BaseException)]

    def lease(count: int) -> None:
        if config.max_replicas is not None:
            for _ in range(count):
                handle.lease.remote(LEASE_S)

    return ReplicaRegistry(report, lease)


def withdraw() -> None:
    """End the replicas; each writes its sessions first."""
    from ray import serve

    serve.delete(NAME)


class Ingress:
    """The router as a deployment of Ray Serve, for clusters that are given their applications."""

    def __init__(self, config: ServeConfig, token: str | None, secret: str, handle: Any) -> None:
        """Take the port and begin to answer.

        Raises:
            OSError: the port is in use, or there is no such address on this machine.
        """
        self._stack = ExitStack()
        listener = self._stack.enter_context(listening(config))
        self._registry = registry_of(handle, config)
        self._registry.start()
        app = Router(self._registry, secret).with_access(config, token)
        self._server = Server(uvicorn_config(config, app), lambda: None)
        self._thread = threading.Thread(
            target=lambda: self._server.run(sockets=[listener]), daemon=True
        )
        self._thread.start()

    def check_health(self) -> None:
        if not self._thread.is_alive():
            raise RuntimeError("the web server has ended")

    async def __del__(self) -> None:
        """Say farewell to clients."""
        self._server.should_exit = True
        await asyncio.to_thread(self._thread.join, STOP_S)
        await asyncio.to_thread(self._registry.stop)
        self._stack.close()


def build(args: dict[str, Any]) -> Any:
    """Return the whole server as an application, for `serve run` and `serve deploy`.

    Args:
        args: fields of `scd.serving.settings.ServeConfig`; `run` and `evict_dir` are paths on every
            machine of the cluster, `token_file` on that which builds it.

    Raises:
        ValueError: settings that no server can have.
    """
    from ray import serve

    usual = to_json(ServeConfig(replicas=1))
    limits = usual["limits"] | args.get("limits", {})
    values = usual | {"ray_address": "auto"} | args | {"limits": limits}
    config = from_json(ServeConfig, values, "args")
    secret, token = secrets.token_urlsafe(), read_token(config)
    replicas = replicas_of(config, token, Path(config.evict_dir), secret)
    ingress = serve.deployment(
        Ingress,
        name="ingress",
        num_replicas=1,
        # Where its address is known: on the machine that began the cluster.
        ray_actor_options={"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}},
    )
    return ingress.bind(config, token, secret, replicas)
