"""Create the tables; stoker_db.tables says what each is for.

Revision: 0001, the first
"""

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

MODELS = """
CREATE TABLE models (
    model_id      text COLLATE "C" NOT NULL,
    name          text COLLATE "C" NOT NULL,
    architecture  text NOT NULL,
    weight_bytes  bigint NOT NULL,
    spec          jsonb NOT NULL,
    created_at    timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT pk_models PRIMARY KEY (model_id),
    CONSTRAINT uq_models_name UNIQUE (name),
    CONSTRAINT ck_models_weight_bytes_not_negative CHECK (weight_bytes >= 0)
)
"""

MODEL_FILES = """
CREATE TABLE model_files (
    model_id    text COLLATE "C" NOT NULL,
    path        text COLLATE "C" NOT NULL,
    size_bytes  bigint NOT NULL,
    digest      text NOT NULL DEFAULT '',
    content     bytea,
    CONSTRAINT pk_model_files PRIMARY KEY (model_id, path),
    CONSTRAINT fk_model_files_model_id FOREIGN KEY (model_id) REFERENCES models (model_id) ON DELETE CASCADE,
    CONSTRAINT ck_model_files_size_bytes_not_negative CHECK (size_bytes >= 0)
)
"""

NODES = """
CREATE TABLE nodes (
    name           text COLLATE "C" NOT NULL,
    boot_id        text NOT NULL,
    registered_at  timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT pk_nodes PRIMARY KEY (name)
)
"""

DEVICES = """
CREATE TABLE devices (
    node          text COLLATE "C" NOT NULL,
    index         integer NOT NULL,
    kind          text NOT NULL,
    name          text NOT NULL,
    memory_bytes  bigint NOT NULL,
    CONSTRAINT pk_devices PRIMARY KEY (node, index),
    CONSTRAINT fk_devices_node FOREIGN KEY (node) REFERENCES nodes (name) ON DELETE CASCADE,
    CONSTRAINT ck_devices_kind_known CHECK (kind IN ('cpu', 'cuda', 'unknown')),
    CONSTRAINT ck_devices_index_not_negative CHECK (index >= 0),
    CONSTRAINT ck_devices_memory_bytes_not_negative CHECK (memory_bytes >= 0)
)
"""

INSTANCES = """
CREATE TABLE instances (
    instance_id  text COLLATE "C" NOT NULL,
    model_id     text COLLATE "C" NOT NULL,
    node         text COLLATE "C" NOT NULL,
    boot_id      text NOT NULL,
    devices      integer[] NOT NULL,
    desired      text NOT NULL,
    actual       text NOT NULL,
    term         bigint NOT NULL,
    reason       text NOT NULL DEFAULT '',
    phases       jsonb NOT NULL,
    created_at   timestamptz NOT NULL DEFAULT now(),
    updated_at   timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT pk_instances PRIMARY KEY (instance_id),
    CONSTRAINT ck_instances_desired_known CHECK (desired IN ('ready', 'stopped')),
    CONSTRAINT ck_instances_actual_known
        CHECK (actual IN ('starting', 'ready', 'stopping', 'stopped', 'failed', 'unknown')),
    CONSTRAINT ck_instances_term_not_negative CHECK (term >= 0)
)
"""

INSTANCES_LIVE = """
CREATE INDEX ix_instances_live ON instances (instance_id)
WHERE actual IN ('ready', 'starting', 'stopping') OR desired = 'ready' AND actual <> 'failed'
"""

INSTANCES_NEWEST = "CREATE INDEX ix_instances_created_at_instance_id ON instances (created_at, instance_id)"

PLACEMENTS = """
CREATE TABLE placements (
    model_id    text COLLATE "C" NOT NULL,
    node        text COLLATE "C" NOT NULL,
    tier        text NOT NULL,
    held_bytes  bigint NOT NULL,
    updated_at  timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT pk_placements PRIMARY KEY (model_id, node, tier),
    CONSTRAINT fk_placements_model_id FOREIGN KEY (model_id) REFERENCES models (model_id) ON DELETE CASCADE,
    CONSTRAINT ck_placements_tier_known CHECK (tier IN ('remote', 'ssd', 'dram', 'gpu', 'unknown')),
    CONSTRAINT ck_placements_held_bytes_positive CHECK (held_bytes > 0)
)
"""

TIER_METRICS = """
CREATE TABLE tier_metrics (
    id                bigint GENERATED ALWAYS AS IDENTITY,
    node              text COLLATE "C" NOT NULL,
    tier              text NOT NULL,
    capacity_bytes    bigint NOT NULL,
    used_bytes        bigint NOT NULL,
    hits              bigint NOT NULL,
    misses            bigint NOT NULL,
    queue             integer NOT NULL,
    read_bytes_per_s  double precision NOT NULL,
    sampled_at        timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT pk_tier_metrics PRIMARY KEY (id),
    CONSTRAINT ck_tier_metrics_tier_known CHECK (tier IN ('remote', 'ssd', 'dram', 'gpu', 'unknown')),
    CONSTRAINT ck_tier_metrics_capacity_bytes_not_negative CHECK (capacity_bytes >= 0),
    CONSTRAINT ck_tier_metrics_used_bytes_not_negative CHECK (used_bytes >= 0),
    CONSTRAINT ck_tier_metrics_hits_not_negative CHECK (hits >= 0),
    CONSTRAINT ck_tier_metrics_misses_not_negative CHECK (misses >= 0),
    CONSTRAINT ck_tier_metrics_queue_not_negative CHECK (queue >= 0),
    CONSTRAINT ck_tier_metrics_read_bytes_per_s_not_negative CHECK (read_bytes_per_s >= 0)
)
"""

TIER_METRICS_LATEST = "CREATE INDEX ix_tier_metrics_node_tier_id ON tier_metrics (node, tier, id)"
TIER_METRICS_AGE = "CREATE INDEX ix_tier_metrics_sampled_at ON tier_metrics (sampled_at)"

LOAD_OBSERVATIONS = """
CREATE TABLE load_observations (
    id           bigint GENERATED ALWAYS AS IDENTITY,
    model_id     text COLLATE "C" NOT NULL,
    node         text COLLATE "C" NOT NULL,
    source       text NOT NULL,
    read_bytes   bigint NOT NULL,
    load_ms      double precision NOT NULL,
    wait_ms      double precision NOT NULL,
    observed_at  timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT pk_load_observations PRIMARY KEY (id),
    CONSTRAINT ck_load_observations_source_known CHECK (source IN ('remote', 'ssd', 'dram', 'gpu', 'unknown')),
    CONSTRAINT ck_load_observations_read_bytes_not_negative CHECK (read_bytes >= 0),
    CONSTRAINT ck_load_observations_load_ms_not_negative CHECK (load_ms >= 0),
    CONSTRAINT ck_load_observations_wait_ms_not_negative CHECK (wait_ms >= 0)
)
"""

LOAD_OBSERVATIONS_AGE = "CREATE INDEX ix_load_observations_observed_at ON load_observations (observed_at)"

LEADER = """
CREATE TABLE leader (
    id           smallint NOT NULL DEFAULT 1,
    term         bigint NOT NULL DEFAULT 0,
    holder       text NOT NULL DEFAULT '',
    acquired_at  timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT pk_leader PRIMARY KEY (id),
    CONSTRAINT ck_leader_one_row CHECK (id = 1),
    CONSTRAINT ck_leader_term_not_negative CHECK (term >= 0)
)
"""

LEADER_ROW = "INSERT INTO leader DEFAULT VALUES"


def upgrade() -> None:
    for statement in (
        MODELS,
        MODEL_FILES,
        NODES,
        DEVICES,
        INSTANCES,
        INSTANCES_LIVE,
        INSTANCES_NEWEST,
        PLACEMENTS,
        TIER_METRICS,
        TIER_METRICS_LATEST,
        TIER_METRICS_AGE,
        LOAD_OBSERVATIONS,
        LOAD_OBSERVATIONS_AGE,
        LEADER,
        LEADER_ROW,
    ):
        op.execute(statement)


def downgrade() -> None:
    for table in (
        "leader",
        "load_observations",
        "tier_metrics",
        "placements",
        "instances",
        "devices",
        "nodes",
        "model_files",
        "models",
    ):
        op.execute(f"DROP TABLE {table}")
