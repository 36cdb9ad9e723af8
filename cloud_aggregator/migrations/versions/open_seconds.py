"""How long a round has been open, so that its deadline goes on after a restart."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column; a round that is open counts from its restart once."""
    op.add_column("rounds", sa.Column("open_seconds", sa.Float))


def downgrade() -> None:
    """Remove it."""
    op.drop_column("rounds", "open_seconds")
