"""Every error Stoker raises on purpose. Callers branch on the type or on `retryable`, never on text.

The first line of each docstring says what went wrong; fields carry the particulars; `code` is stable
and crosses process boundaries. Only the gateway knows how a code maps to HTTP.
"""

from __future__ import annotations

import os
from typing import ClassVar


class StokerError(Exception):
    """Stoker could not do what was asked."""

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str = "") -> None:
        self.message = message or (type(self).__doc__ or "").strip().splitlines()[0]
        super().__init__(self.message)


class InvalidSettings(StokerError):
    """A setting is unknown or its value cannot be used."""

    code = "invalid_settings"


class InvalidMessage(StokerError):
    """A message does not decode as its contract says."""

    code = "invalid_message"


class MessageTooLarge(StokerError):
    """A message is over the byte limit that its type declares."""

    code = "message_too_large"

    def __init__(self, subject: str, size_bytes: int, limit_bytes: int) -> None:
        self.subject, self.size_bytes, self.limit_bytes = subject, size_bytes, limit_bytes
        super().__init__(f"message on {subject} has {size_bytes} bytes; the limit is {limit_bytes}")


class BusError(StokerError):
    """The message bus failed."""

    code = "bus_error"
    retryable = True


class Disconnected(BusError):
    """There is no connection to the message bus."""

    code = "bus_disconnected"


class BusRefused(BusError):
    """The message bus refused the credentials."""

    code = "bus_refused"
    retryable = False


class BusLost(BusError):
    """The message bus cannot be reached again by this process."""

    code = "bus_lost"
    retryable = False


class NoResponders(BusError):
    """Nobody listens on a subject."""

    code = "no_responders"

    def __init__(self, subject: str) -> None:
        self.subject = subject
        super().__init__(f"nobody listens on {subject}")


class RequestTimeout(BusError):
    """No answer came in time."""

    code = "request_timeout"

    def __init__(self, subject: str, timeout_s: float) -> None:
        self.subject, self.timeout_s = subject, timeout_s
        super().__init__(f"no answer on {subject} within {timeout_s:g} s")


class DatabaseUnavailable(StokerError):
    """The database cannot be reached or closed the connection."""

    code = "database_unavailable"
    retryable = True


class StaleTerm(StokerError):
    """A command or write carries a term lower than the highest one seen."""

    code = "stale_term"

    def __init__(self, term: int, highest: int | None = None) -> None:
        self.term, self.highest = term, highest
        seen = "a higher one was seen" if highest is None else f"the highest seen is {highest}"
        super().__init__(f"term {term} is superseded: {seen}")


class LeadershipLost(StokerError):
    """This scheduler no longer leads."""

    code = "leadership_lost"


class NodeTaken(StokerError):
    """Another live process registered this node name."""

    code = "node_taken"

    def __init__(self, node: str, boot_id: str) -> None:
        self.node, self.boot_id = node, boot_id
        super().__init__(f"node {node} is registered by boot {boot_id}")


class ModelNotFound(StokerError):
    """No model has this name."""

    code = "model_not_found"

    def __init__(self, model: str) -> None:
        self.model = model
        super().__init__(f"the model {model!r} does not exist")


class InstanceNotFound(StokerError):
    """Nothing is known of this instance."""

    code = "instance_not_found"

    def __init__(self, instance_id: str) -> None:
        self.instance_id = instance_id
        super().__init__(f"nothing is known of how an instance {instance_id!r} was started")


class ModelExists(StokerError):
    """A different model has this name already."""

    code = "model_exists"

    def __init__(self, model: str) -> None:
        self.model = model
        super().__init__(f"a model named {model!r} is registered with other contents; delete it first")


class InvalidModelName(StokerError):
    """A model name may hold letters, digits, '.', '_' and '-', and begins with a letter or digit."""

    code = "invalid_model_name"

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(
            f"{name!r} is no model name: letters, digits, '.', '_', '-' only, a letter or digit first, at most 96"
        )


class RefusedCheckpoint(StokerError):
    """A checkpoint cannot be served safely or at all."""

    code = "refused_checkpoint"

    def __init__(self, path: str, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(f"{path}: {reason}")


class CorruptCheckpoint(RefusedCheckpoint):
    """A safetensors file breaks its format, or its contents are not what was registered."""

    code = "corrupt_checkpoint"


class CheckpointChanged(CorruptCheckpoint):
    """A file of a checkpoint is not as it was when it was registered."""

    code = "checkpoint_changed"


class ReadFailed(StokerError):
    """A file of a checkpoint could not be read."""

    code = "read_failed"
    retryable = True

    def __init__(self, path: str, offset_bytes: int, errno: int) -> None:
        self.path, self.offset_bytes, self.errno = path, offset_bytes, errno
        super().__init__(f"{path}: reading at byte {offset_bytes}: {os.strerror(errno)}")


class LoadCancelled(StokerError):
    """A load was cancelled, or the process that read for it is gone."""

    code = "load_cancelled"
    retryable = True


class PoolExhausted(StokerError):
    """The pool of pinned memory has too few free chunks."""

    code = "pool_exhausted"
    retryable = True

    def __init__(self, need_bytes: int, free_bytes: int) -> None:
        self.need_bytes, self.free_bytes = need_bytes, free_bytes
        super().__init__(f"the pool needs {need_bytes} bytes and has {free_bytes} free")


class NativeUnavailable(StokerError):
    """The kernel or a driver refuses something the native loader cannot do without."""

    code = "native_unavailable"


class TierFull(StokerError):
    """A tier has no room, and nothing in it may be evicted."""

    code = "tier_full"
    retryable = True

    def __init__(self, tier: str, need_bytes: int, free_bytes: int) -> None:
        self.tier, self.need_bytes, self.free_bytes = tier, need_bytes, free_bytes
        super().__init__(f"tier {tier} needs {need_bytes} bytes and has {free_bytes} free")


class DeviceBusy(StokerError):
    """A start does not fit on the device it names."""

    code = "device_busy"
    retryable = True


class EngineFailed(StokerError):
    """An inference engine could not start or stopped working."""

    code = "engine_failed"
    retryable = True


class LeaseDenied(EngineFailed):
    """The storage agent cannot provide a model's files."""

    code = "lease_denied"


class InstanceLost(StokerError):
    """The instance that generated an answer died."""

    code = "instance_lost"
    retryable = True


class Overloaded(StokerError):
    """A queue is full."""

    code = "overloaded"
    retryable = True

    def __init__(self, what: str, retry_after_ms: int) -> None:
        self.what, self.retry_after_ms = what, retry_after_ms
        super().__init__(f"{what} is full; try again in {retry_after_ms} ms")


class NoCapacity(StokerError):
    """No device could take the model within the wait."""

    code = "no_capacity"
    retryable = True

    def __init__(self, model: str, waited_ms: int, reason: str = "") -> None:
        self.model, self.waited_ms, self.reason = model, waited_ms, reason
        why = f" ({reason})" if reason else ""
        super().__init__(f"no capacity for {model!r} within {waited_ms} ms{why}")


class InvalidRequest(StokerError):
    """A request names a parameter or value that cannot be served."""

    code = "invalid_request"

    def __init__(self, message: str, param: str | None = None) -> None:
        self.param = param
        super().__init__(message)


class PromptTooLong(InvalidRequest):
    """A prompt and its completion exceed the model's context."""

    code = "context_length_exceeded"


class Stopping(StokerError):
    """The service is shutting down and takes no new work."""

    code = "stopping"
    retryable = True


class PortTaken(StokerError):
    """Another process listens on a port that is needed."""

    code = "port_taken"

    def __init__(self, port: int, what: str, setting: str) -> None:
        self.port, self.what, self.setting = port, what, setting
        super().__init__(f"port {port} (for {what}) is taken by another process; choose one with {setting}")


class SetupFailed(StokerError):
    """A local server or the demo model could not be prepared."""

    code = "setup_failed"


class AlreadyRunning(StokerError):
    """A local system runs in this home already."""

    code = "already_running"


class NotRunning(StokerError):
    """There is no running system to talk to."""

    code = "not_running"
    retryable = True


class ApiFailed(StokerError):
    """A gateway refused a request."""

    code = "api_failed"

    def __init__(self, message: str, *, status: int, remote_code: str = "") -> None:
        self.status, self.remote_code = status, remote_code
        super().__init__(message)


class TokenizerFailed(StokerError):
    """A model's tokenizer cannot be loaded."""

    code = "tokenizer_failed"

    def __init__(self, model: str, reason: str) -> None:
        self.model, self.reason = model, reason
        super().__init__(f"the tokenizer of {model!r} cannot be loaded: {reason}")


class ClientTooSlow(StokerError):
    """A client reads its stream more slowly than it is made, and the buffer for it is full."""

    code = "client_too_slow"


class StorageFailed(StokerError):
    """A node's disk could not be written or read."""

    code = "storage_failed"
    retryable = True

    def __init__(self, path: str, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(f"{path}: {reason}")


class SourceUnavailable(StokerError):
    """Where a model's files come from does not answer, or breaks off."""

    code = "source_unavailable"
    retryable = True

    def __init__(self, source: str, reason: str) -> None:
        self.source, self.reason = source, reason
        super().__init__(f"{source}: {reason}")


class SourceDenied(StokerError):
    """Where a model's files come from refuses access to them."""

    code = "source_denied"

    def __init__(self, source: str, reason: str) -> None:
        self.source, self.reason = source, reason
        super().__init__(f"{source}: {reason}")


class PeerFailed(SourceUnavailable):
    """Another node's storage agent cannot give what it was asked for, or gives something else."""

    code = "peer_failed"


class NotHeld(StokerError):
    """A storage agent does not hold the chunk that was asked for."""

    code = "not_held"
    retryable = True


class NoNode(StokerError):
    """No live node can do this."""

    code = "no_node"
    retryable = True


class InvalidTrace(StokerError):
    """A trace of requests does not read as its format says."""

    code = "invalid_trace"

    def __init__(self, path: str, reason: str, *, line: int = 0, column: str = "") -> None:
        """line: from 1; 0: the file as a whole.  column: of a CSV file, or a key of a JSON line; '' where none is at fault."""
        self.path, self.reason, self.line, self.column = path, reason, line, column
        where = path + (f", line {line}" if line else "") + (f", column {column}" if column else "")
        super().__init__(f"{where}: {reason}")


class InvalidWorkload(StokerError):
    """A workload cannot be made as it was asked for."""

    code = "invalid_workload"


class InvalidProfile(StokerError):
    """A profile of hardware, models and loaders cannot be used."""

    code = "invalid_profile"

    def __init__(self, path: str, reason: str, *, key: str = "") -> None:
        """key: with its tables, as in hardware.nodes[0].count; '' where none is at fault."""
        self.path, self.reason, self.key = path, reason, key
        super().__init__(f"{path}{f', key {key}' if key else ''}: {reason}")
