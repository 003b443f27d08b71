"""The configuration: schema and loading."""
