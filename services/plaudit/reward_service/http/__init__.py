"""The engine over HTTP: routes, middleware, server."""
