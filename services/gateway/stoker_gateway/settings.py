"""Settings of the gateway: `STOKER_GATEWAY_<FIELD>`."""

from __future__ import annotations

from typing import Annotated, ClassVar

from msgspec import Meta

from stoker_core.settings import SharedSettings

Count = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(gt=0)]


class GatewaySettings(SharedSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    SCOPE: ClassVar[str] = "gateway"

    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 8080  # 0: any free one
    body_bytes_max: Count = 1024 * 1024
    streams_max: Count = 1000  # requests in hand, waiting ones included
    stream_buffer_tokens_max: Count = 16384  # generated and not yet taken by the client
    client_stall_s: Seconds = 30.0  # a client that takes nothing for this long is cut off
    tokenizer_threads: Count = 2
    tokenizers_max: Count = 32  # models whose tokenizers stay in memory
    model_refresh_s: Seconds = 1.0
    generate_timeout_s: Seconds = 2.0  # for an instance's answer to a request
    register_timeout_s: Seconds = 60.0  # for a storage agent's answer to a registration
    cluster_secret: str = (
        ""  # of all gateways alike: tenants' prefix caches are told apart by it; '': random, per process
    )
