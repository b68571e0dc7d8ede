"""The tables. `migrations/` builds the same; a test compares the two down to each constraint and index.

Events are not rows: they live in the event stream. Timestamps are the database's, for people and for pruning.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from enum import StrEnum

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Double,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB

from stoker_contracts.models import LIVE_STATES, DeviceKind, InstanceState, Tier

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    }
)

# Names and ids sort by code point wherever the server's locale is from: as Python and the memory repositories sort.
_NAME = Text(collation="C")


def _quoted(values: Iterable[StrEnum]) -> str:
    return ", ".join(f"'{value}'" for value in values)


def _one_of(column: str, values: Iterable[StrEnum]) -> CheckConstraint:
    return CheckConstraint(f"{column} IN ({_quoted(values)})", name=f"{column}_known")


def _not_negative(*columns: str) -> list[CheckConstraint]:
    return [CheckConstraint(f"{column} >= 0", name=f"{column}_not_negative") for column in columns]


def _when(name: str) -> Column[datetime]:
    return Column(name, DateTime(timezone=True), nullable=False, server_default=func.now())


models = Table(
    "models",
    metadata,
    Column("model_id", _NAME, primary_key=True),
    Column("name", _NAME, nullable=False),
    Column("architecture", Text, nullable=False),
    Column("weight_bytes", BigInteger, nullable=False),
    Column("spec", JSONB, nullable=False),
    Column("manifest", LargeBinary, nullable=False, server_default=""),
    _when("created_at"),
    UniqueConstraint("name"),
    *_not_negative("weight_bytes"),
)
"""Registered models. What is queried has a column; `spec` is the whole ModelSpec, every field spelled out.

manifest: what the headers of its weights say, encoded by whoever registered it; Postgres only keeps it.
"""

model_files = Table(
    "model_files",
    metadata,
    Column("model_id", _NAME, ForeignKey(models.c.model_id, ondelete="CASCADE"), primary_key=True),
    Column("path", _NAME, primary_key=True),
    Column("size_bytes", BigInteger, nullable=False),
    Column("digest", Text, nullable=False, server_default=""),
    Column("content", LargeBinary),
    Column("version", Text, nullable=False, server_default=""),
    Column("chunk_digests", ARRAY(Text), nullable=False, server_default=text("'{}'")),
    *_not_negative("size_bytes"),
)
"""The files of each model: small files with their bytes, weights by size and by the digests of their chunks.

chunk_digests: empty until the first arrival, then binding.  version: at the source, '' where it has none.
"""

nodes = Table(
    "nodes",
    metadata,
    Column("name", _NAME, primary_key=True),
    Column("boot_id", Text, nullable=False),
    _when("registered_at"),
)
"""Which boot of its worker each node's name belongs to: what a registration compares and sets."""

devices = Table(
    "devices",
    metadata,
    Column("node", _NAME, ForeignKey(nodes.c.name, ondelete="CASCADE"), primary_key=True),
    Column("index", Integer, primary_key=True, autoincrement=False),
    Column("kind", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("memory_bytes", BigInteger, nullable=False),
    _one_of("kind", DeviceKind),
    *_not_negative("index", "memory_bytes"),
)
"""The devices of each node's present boot."""

drains = Table(
    "drains",
    metadata,
    Column("node", _NAME, primary_key=True),
    Column("term", BigInteger, nullable=False),
    Column("drained", Boolean, nullable=False, server_default=text("false")),
    _when("asked_at"),
    *_not_negative("term"),
)
"""Nodes that are to be empty. No foreign key: a drain outlives the boots of its node. drained: nothing was left there."""

instances = Table(
    "instances",
    metadata,
    Column("instance_id", _NAME, primary_key=True),
    Column("model_id", _NAME, nullable=False),
    Column("node", _NAME, nullable=False),
    Column("boot_id", Text, nullable=False),
    Column("devices", ARRAY(Integer), nullable=False),
    Column("desired", Text, nullable=False),
    Column("actual", Text, nullable=False),
    Column("term", BigInteger, nullable=False),
    Column("reason", Text, nullable=False, server_default=""),
    Column("phases", JSONB, nullable=False),
    _when("created_at"),
    _when("updated_at"),
    _one_of("desired", (InstanceState.READY, InstanceState.STOPPED)),
    _one_of("actual", InstanceState),
    *_not_negative("term"),
)
"""What the leader wants of each instance and what its worker last reported.

No foreign keys: an instance outlives the deletion of its model and the next boot of its node as history.
"""

INSTANCE_IS_LIVE = text(
    f"actual IN ({_quoted(sorted(LIVE_STATES))}) OR desired = '{InstanceState.READY}' AND actual <> '{InstanceState.FAILED}'"
)
"""The condition of `Instances.live`, literal so that Postgres can match it with the index: few live among all that ever did."""

Index("ix_instances_live", instances.c.instance_id, postgresql_where=INSTANCE_IS_LIVE)
Index(None, instances.c.created_at, instances.c.instance_id)

decisions = Table(
    "decisions",
    metadata,
    Column("decision_id", _NAME, primary_key=True),
    Column("term", BigInteger, nullable=False),
    Column("model_id", _NAME, nullable=False),
    Column("instance_id", _NAME, nullable=False, server_default=""),
    Column("chosen", Integer),
    Column("weighed", Integer, nullable=False),
    Column("reason", Text, nullable=False, server_default=""),
    Column("options", JSONB, nullable=False),
    Column("outcome", JSONB(none_as_null=True)),
    _when("made_at"),
    *_not_negative("term", "weighed"),
)
"""What was decided on models, of which options, and what became of the starts among them, until pruned.

options: what was predicted of each, every field spelled out.  outcome: NULL until the instance is ready or failed.
"""

DECISION_IS_CONCLUDED = text("outcome IS NOT NULL")

Index(None, decisions.c.model_id, decisions.c.made_at, decisions.c.decision_id)
Index("ix_decisions_instance_id", decisions.c.instance_id, postgresql_where=text("instance_id <> ''"))
Index("ix_decisions_concluded", decisions.c.made_at, decisions.c.decision_id, postgresql_where=DECISION_IS_CONCLUDED)
Index(None, decisions.c.made_at)

placements = Table(
    "placements",
    metadata,
    Column("model_id", _NAME, ForeignKey(models.c.model_id, ondelete="CASCADE"), primary_key=True),
    Column("node", _NAME, primary_key=True),
    Column("tier", Text, primary_key=True),
    Column("held_bytes", BigInteger, nullable=False),
    _when("updated_at"),
    _one_of("tier", Tier),
    CheckConstraint("held_bytes > 0", name="held_bytes_positive"),
)
"""How much of each model each tier of each node holds. A storage agent may report before its node's worker registers."""

tier_metrics = Table(
    "tier_metrics",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("node", _NAME, nullable=False),
    Column("tier", Text, nullable=False),
    Column("capacity_bytes", BigInteger, nullable=False),
    Column("used_bytes", BigInteger, nullable=False),
    Column("hits", BigInteger, nullable=False),
    Column("misses", BigInteger, nullable=False),
    Column("queue", Integer, nullable=False),
    Column("read_bytes_per_s", Double, nullable=False),
    _when("sampled_at"),
    _one_of("tier", Tier),
    *_not_negative("capacity_bytes", "used_bytes", "hits", "misses", "queue", "read_bytes_per_s"),
)
"""Samples of each node's tiers over time, until pruned."""

Index(None, tier_metrics.c.node, tier_metrics.c.tier, tier_metrics.c.id)
Index(None, tier_metrics.c.sampled_at)

link_metrics = Table(
    "link_metrics",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("node", _NAME, nullable=False),
    Column("peer", _NAME, nullable=False),
    Column("read_bytes", BigInteger, nullable=False),
    Column("read_bytes_per_s", Double, nullable=False),
    _when("sampled_at"),
    *_not_negative("read_bytes", "read_bytes_per_s"),
)
"""Samples of what each node saw of its way to each peer that it read from, until pruned."""

Index(None, link_metrics.c.node, link_metrics.c.peer, link_metrics.c.id)
Index(None, link_metrics.c.sampled_at)

load_observations = Table(
    "load_observations",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("model_id", _NAME, nullable=False),
    Column("node", _NAME, nullable=False),
    Column("source", Text, nullable=False),
    Column("read_bytes", BigInteger, nullable=False),
    Column("load_ms", Double, nullable=False),
    Column("wait_ms", Double, nullable=False),
    Column("origin", Text, nullable=False, server_default=""),
    _when("observed_at"),
    _one_of("source", Tier),
    *_not_negative("read_bytes", "load_ms", "wait_ms"),
)
"""What each load took in fact: bandwidths are learned from these, until pruned. origin: of remote and peer, else ''."""

Index(None, load_observations.c.observed_at)

leader = Table(
    "leader",
    metadata,
    Column("id", SmallInteger, primary_key=True, autoincrement=False, server_default=text("1")),
    Column("term", BigInteger, nullable=False, server_default=text("0")),
    Column("holder", Text, nullable=False, server_default=""),
    _when("acquired_at"),
    CheckConstraint("id = 1", name="one_row"),
    *_not_negative("term"),
)
"""One row, made by the migration: the highest term and who took it. Writes of desired state are fenced by it."""
