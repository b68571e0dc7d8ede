"""What was decided and what became of it, and nodes that are to be empty.

Revision: 0003, after 0002
"""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

DRAINS = """
CREATE TABLE drains (
    node      text COLLATE "C" NOT NULL,
    term      bigint NOT NULL,
    drained   boolean NOT NULL DEFAULT false,
    asked_at  timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT pk_drains PRIMARY KEY (node),
    CONSTRAINT ck_drains_term_not_negative CHECK (term >= 0)
)
"""

DECISIONS = """
CREATE TABLE decisions (
    decision_id  text COLLATE "C" NOT NULL,
    term         bigint NOT NULL,
    model_id     text COLLATE "C" NOT NULL,
    instance_id  text COLLATE "C" NOT NULL DEFAULT '',
    chosen       integer,
    weighed      integer NOT NULL,
    reason       text NOT NULL DEFAULT '',
    options      jsonb NOT NULL,
    outcome      jsonb,
    made_at      timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT pk_decisions PRIMARY KEY (decision_id),
    CONSTRAINT ck_decisions_term_not_negative CHECK (term >= 0),
    CONSTRAINT ck_decisions_weighed_not_negative CHECK (weighed >= 0)
)
"""

DECISIONS_OF_MODEL = """
CREATE INDEX ix_decisions_model_id_made_at_decision_id ON decisions (model_id, made_at, decision_id)
"""
DECISIONS_OF_INSTANCE = "CREATE INDEX ix_decisions_instance_id ON decisions (instance_id) WHERE instance_id <> ''"
DECISIONS_CONCLUDED = """
CREATE INDEX ix_decisions_concluded ON decisions (made_at, decision_id) WHERE outcome IS NOT NULL
"""
DECISIONS_AGE = "CREATE INDEX ix_decisions_made_at ON decisions (made_at)"


def upgrade() -> None:
    for statement in (
        DRAINS,
        DECISIONS,
        DECISIONS_OF_MODEL,
        DECISIONS_OF_INSTANCE,
        DECISIONS_CONCLUDED,
        DECISIONS_AGE,
    ):
        op.execute(statement)


def downgrade() -> None:
    op.execute("DROP TABLE decisions")
    op.execute("DROP TABLE drains")
