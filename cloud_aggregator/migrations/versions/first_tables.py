"""The store's first tables: runs, devices, rounds, updates."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "runs",
        sa.Column("run", sa.String(64), primary_key=True),
        sa.Column("epoch", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "devices",
        sa.Column("run", sa.String(64), primary_key=True),
        sa.Column("client", sa.String(64), primary_key=True),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("record", sa.Text),
    )
    op.create_table(
        "rounds",
        sa.Column("run", sa.String(64), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("stage", sa.String(32), nullable=False),
        sa.Column("wanted", sa.Integer, nullable=False),
        sa.Column("cohort", sa.Text, nullable=False),
        sa.Column("accepted", sa.Text),
        sa.Column("closed_seconds", sa.Float),
        sa.Column("noise_key", sa.String(32)),
    )
    op.create_table(
        "updates",
        sa.Column("arrival", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("run", sa.String(64), nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("client", sa.String(64), nullable=False),
        sa.Column("blob", sa.String(64), nullable=False),
        sa.Column("offer", sa.Text, nullable=False),
        sa.Column("verdict", sa.String(16)),
        sa.UniqueConstraint("run", "number", "client"),
    )


def downgrade() -> None:
    """Remove them."""
    for table in ("updates", "rounds", "devices", "runs"):
        op.drop_table(table)
