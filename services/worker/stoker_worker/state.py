"""A worker's state and what it allows; pure. Times are passed in, in seconds of a monotonic clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from stoker_contracts.control import ENDED_LISTED_S, Failed, InstanceStatus, StartInstance, StopInstance
from stoker_contracts.models import LIVE_STATES, Device, EngineKind, InstanceState, ModelSpec, StartPhases, Tier
from stoker_core.errors import DeviceBusy, StaleTerm, Stopping

_NEXT = {
    InstanceState.STARTING: {InstanceState.READY, InstanceState.STOPPING, InstanceState.FAILED, InstanceState.STOPPED},
    InstanceState.READY: {InstanceState.STOPPING, InstanceState.FAILED},
    InstanceState.STOPPING: {InstanceState.STOPPED, InstanceState.FAILED},
}


@dataclass(slots=True)
class Instance:
    """What the worker knows of one of its instances."""

    instance_id: str
    model: ModelSpec
    devices: tuple[int, ...]
    started_at_s: float
    state: InstanceState = InstanceState.STARTING
    pid: int = 0
    room: int = 0
    running: int = 0
    arrivals: int = 0
    finishes: int = 0
    idle_since_s: float | None = None
    ended_at_s: float | None = None
    phases: StartPhases = field(default_factory=StartPhases)
    load_source: Tier = Tier.UNKNOWN
    load_origin: str = ""
    failure: str = ""

    @property
    def live(self) -> bool:
        return self.state in LIVE_STATES

    def become(self, state: InstanceState) -> None:
        """Raises ValueError for a transition that cannot be."""
        if state not in _NEXT.get(self.state, ()):
            raise ValueError(f"{self.instance_id} cannot go from {self.state} to {state}")
        self.state = state
        if state != InstanceState.READY:
            self.room = 0

    def status(self, now_s: float) -> InstanceStatus:
        idle_ms = 0 if self.idle_since_s is None else int((now_s - self.idle_since_s) * 1e3)
        return InstanceStatus(
            instance_id=self.instance_id,
            model_id=self.model.model_id,
            model=self.model.name,
            state=self.state,
            devices=self.devices,
            room=self.room,
            running=self.running,
            arrivals=self.arrivals,
            finishes=self.finishes,
            idle_ms=idle_ms,
            age_ms=int((now_s - self.started_at_s) * 1e3),
            pid=self.pid,
            phases=self.phases,
            load_source=self.load_source,
            load_origin=self.load_origin,
            failure=self.failure,
            engine=self.model.engine.value,
        )


class WorkerState:
    """boot_id: of this process.  term: the highest that was seen, also by earlier boots."""

    def __init__(self, *, node: str, boot_id: str, devices: Sequence[Device], engines: Sequence[EngineKind], term: int):
        self.node, self.boot_id = node, boot_id
        self.devices = tuple(devices)
        self.engines = tuple(engines)
        self.term = term
        self.draining = False  # as the leader wants it
        self.leaving = False  # this process ends
        self.instances: dict[str, Instance] = {}
        self.prepared: set[str] = set()

    def starting(self) -> tuple[str, ...]:
        """Ids of instances that may be reading their weights."""
        return tuple(i.instance_id for i in self.instances.values() if i.state == InstanceState.STARTING)

    def check_term(self, term: int) -> Failed | None:
        """Refuse a superseded leader; remember a newer one."""
        if term < self.term:
            error = StaleTerm(term, self.term)
            return Failed(code=error.code, message=error.message)
        self.term = term
        return None

    def check_boot(self, boot_id: str) -> Failed | None:
        if boot_id != self.boot_id:
            return Failed(code="wrong_boot", message=f"this is boot {self.boot_id} of {self.node}, not {boot_id}")
        return None

    def check_start(self, command: StartInstance) -> Failed | None:
        """Why a new instance cannot start here now; the worker refuses it whatever the leader believes."""
        if self.draining or self.leaving:
            return Failed(code=Stopping.code, message=f"{self.node} is draining", retryable=True)
        if command.model.engine not in self.engines:
            return Failed(code="unsupported", message=f"{self.node} runs no engine {command.model.engine.value!r}")
        known = {device.index: device for device in self.devices}
        if not command.devices or not set(command.devices) <= known.keys():
            return Failed(code="unsupported", message=f"{self.node} has no devices {list(command.devices)}")
        for index in command.devices:
            need = command.model.bytes_on(known[index])
            free = known[index].memory_bytes - self.used_bytes(known[index])
            if need > free:
                text = f"device {index} of {self.node} has {free} bytes free; {command.model.name} needs {need}"
                return Failed(code=DeviceBusy.code, message=text, retryable=True)
        return None

    def check_stop(self, command: StopInstance) -> Failed | None:
        instance = self.instances.get(command.instance_id)
        if instance and command.only_if_idle and instance.running:
            return Failed(code="busy", message=f"{command.instance_id} has {instance.running} requests", retryable=True)
        return None

    def used_bytes(self, device: Device) -> int:
        return sum(i.model.bytes_on(device) for i in self.instances.values() if i.live and device.index in i.devices)

    def forget_ended(self, now_s: float) -> None:
        """Ended instances stay listed for a while, so that everybody learns how they ended."""
        for instance in list(self.instances.values()):
            if instance.ended_at_s is not None and now_s - instance.ended_at_s > ENDED_LISTED_S:
                del self.instances[instance.instance_id]
