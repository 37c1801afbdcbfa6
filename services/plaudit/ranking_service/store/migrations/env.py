"""Alembic's entry point. `Database.migrate` passes the connection, whose transaction has begun.

Outside Alembic, importing it does nothing.
"""

from alembic import context

from plaudit.ranking_service.store.schema import metadata

config = getattr(context, "config", None)
if config is not None:
    context.configure(connection=config.attributes["connection"], target_metadata=metadata, transactional_ddl=False)
    context.run_migrations()
