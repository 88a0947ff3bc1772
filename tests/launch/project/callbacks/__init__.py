"""The project's own callbacks."""
