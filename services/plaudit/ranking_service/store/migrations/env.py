"""Alembic's entry: `Database.migrate` hands over the connection, with its transaction begun.

Imported by anybody else than Alembic, it does nothing.
"""

from alembic import context

from plaudit.ranking_service.store.schema import metadata

config = getattr(context, "config", None)
if config is not None:
    context.configure(connection=config.attributes["connection"], target_metadata=metadata, transactional_ddl=False)
    context.run_migrations()
