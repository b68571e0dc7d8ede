"""The six processes of a local system, and what each needs: the one place that knows."""

from __future__ import annotations

import hmac
import signal
import sys
from collections.abc import Mapping

from stoker_cli.embedded.nats import EmbeddedNats
from stoker_cli.embedded.postgres import EmbeddedPostgres
from stoker_cli.home import Endpoints, Secrets
from stoker_cli.ports import HOST
from stoker_cli.settings import UpSettings
from stoker_cli.supervisor import ProcessSpec

STOP_MARGIN_S = 5.0
POSTGRES_DEATH_SIGNAL = signal.SIGINT  # "fast": a killed postmaster would leave its shared memory behind


def servers(
    settings: UpSettings, secrets: Secrets, nats_port: int, postgres_port: int
) -> tuple[EmbeddedNats, EmbeddedPostgres]:
    """NATS and PostgreSQL, not started."""
    nats = EmbeddedNats(settings.home / "nats", port=nats_port, user="stoker", password=secrets.nats_password)
    postgres = EmbeddedPostgres(settings.home / "postgres", port=postgres_port, password=secrets.postgres_password)
    return nats, postgres


def peer_token(cluster_secret: str) -> str:
    """What storage agents prove to each other that they know. Not the secret itself, which gateways use for another thing."""
    return hmac.new(cluster_secret.encode(), b"stoker storage agents", "sha256").hexdigest()


def service_env(
    settings: UpSettings, endpoints: Endpoints, secrets: Secrets, base: Mapping[str, str]
) -> dict[str, str]:
    """The environment of the four services: `base` (with the user's own STOKER_ settings) and what `stoker up` decides."""
    port = endpoints.gateway_url.rpartition(":")[2]
    env = {
        **base,
        "STOKER_HOME": str(settings.home),
        "STOKER_NODE": settings.node,
        "STOKER_NATS_URL": endpoints.nats_url,
        "STOKER_POSTGRES_URL": endpoints.postgres_url,
        "STOKER_GATEWAY_HOST": HOST,
        "STOKER_GATEWAY_PORT": port,
        "STOKER_GATEWAY_CLUSTER_SECRET": secrets.cluster_secret,
        "STOKER_STOREAGENT_CLUSTER_TOKEN": peer_token(secrets.cluster_secret),
        "PYTHONUNBUFFERED": "1",
    }
    if settings.cpu_slots is not None:
        env["STOKER_WORKER_CPU_SLOTS"] = str(settings.cpu_slots)
    return env


def plan(
    settings: UpSettings,
    nats: EmbeddedNats,
    postgres: EmbeddedPostgres,
    env: Mapping[str, str],
    base: Mapping[str, str],
) -> list[ProcessSpec]:
    """In the order of starting; stopping goes backwards, so that gateways finish their streams first.

    env: of the services.  base: of NATS and PostgreSQL, which need no settings of ours.
    """

    async def migrate() -> None:
        from stoker_db.migrate import upgrade

        await postgres.ensure_database()
        await upgrade(postgres.url)

    def service(name: str) -> ProcessSpec:
        return ProcessSpec(
            name=name,
            command=(sys.executable, "-m", f"stoker_{name}"),
            env=env,
            after=("nats", "postgres"),
            stop_timeout_s=settings.drain_s + STOP_MARGIN_S,
        )

    return [
        ProcessSpec(
            name="nats",
            command=tuple(nats.command),
            env=base,
            ready=nats.ready,
            death_signal=signal.SIGTERM,
            own_log=nats.log,
        ),
        ProcessSpec(
            name="postgres",
            command=tuple(postgres.command),
            env=base,
            ready=postgres.ready,
            once_ready=migrate,
            stop_signal=postgres.stop_signal,
            death_signal=POSTGRES_DEATH_SIGNAL,
            popen=postgres.spawn_kwargs,
        ),
        service("storeagent"),
        service("worker"),
        service("scheduler"),
        service("gateway"),
    ]
