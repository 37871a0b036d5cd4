"""The HTTP edge: schemas, routes and authentication. Knows the engine only through its client."""
