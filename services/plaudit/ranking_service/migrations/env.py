"""Alembic's entry: `Database.migrate` hands over the connection, with its transaction begun."""

from alembic import context

from plaudit.ranking_service.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, transactional_ddl=False)
context.run_migrations()
