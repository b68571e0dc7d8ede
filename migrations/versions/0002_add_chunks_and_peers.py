"""Models by the digests of their chunks, the tier `peer`, and what nodes see of their links to each other.

Revision: 0002, after 0001
"""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

TIERS = "'remote', 'peer', 'ssd', 'dram', 'gpu', 'unknown'"
TIERS_BEFORE = "'remote', 'ssd', 'dram', 'gpu', 'unknown'"
TIER_COLUMNS = (("placements", "tier"), ("tier_metrics", "tier"), ("load_observations", "source"))

LINK_METRICS = """
CREATE TABLE link_metrics (
    id                bigint GENERATED ALWAYS AS IDENTITY,
    node              text COLLATE "C" NOT NULL,
    peer              text COLLATE "C" NOT NULL,
    read_bytes        bigint NOT NULL,
    read_bytes_per_s  double precision NOT NULL,
    sampled_at        timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT pk_link_metrics PRIMARY KEY (id),
    CONSTRAINT ck_link_metrics_read_bytes_not_negative CHECK (read_bytes >= 0),
    CONSTRAINT ck_link_metrics_read_bytes_per_s_not_negative CHECK (read_bytes_per_s >= 0)
)
"""

LINK_METRICS_LATEST = "CREATE INDEX ix_link_metrics_node_peer_id ON link_metrics (node, peer, id)"
LINK_METRICS_AGE = "CREATE INDEX ix_link_metrics_sampled_at ON link_metrics (sampled_at)"


def know_tiers(tiers: str) -> None:
    for table, column in TIER_COLUMNS:
        name = f"ck_{table}_{column}_known"
        op.execute(f"ALTER TABLE {table} DROP CONSTRAINT {name}")
        op.execute(f"ALTER TABLE {table} ADD CONSTRAINT {name} CHECK ({column} IN ({tiers}))")


def upgrade() -> None:
    op.execute("ALTER TABLE models ADD COLUMN manifest bytea NOT NULL DEFAULT ''")
    op.execute("ALTER TABLE model_files ADD COLUMN version text NOT NULL DEFAULT ''")
    op.execute("ALTER TABLE model_files ADD COLUMN chunk_digests text[] NOT NULL DEFAULT '{}'")
    op.execute("ALTER TABLE load_observations ADD COLUMN origin text NOT NULL DEFAULT ''")
    know_tiers(TIERS)
    for statement in (LINK_METRICS, LINK_METRICS_LATEST, LINK_METRICS_AGE):
        op.execute(statement)


def downgrade() -> None:
    op.execute("DROP TABLE link_metrics")
    op.execute("DELETE FROM placements WHERE tier = 'peer'")
    op.execute("DELETE FROM tier_metrics WHERE tier = 'peer'")
    op.execute("DELETE FROM load_observations WHERE source = 'peer'")
    know_tiers(TIERS_BEFORE)
    op.execute("ALTER TABLE load_observations DROP COLUMN origin")
    op.execute("ALTER TABLE model_files DROP COLUMN chunk_digests")
    op.execute("ALTER TABLE model_files DROP COLUMN version")
    op.execute("ALTER TABLE models DROP COLUMN manifest")
