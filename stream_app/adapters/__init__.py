"""What touches the world: Kafka, Redis, HTTP. One module a concern; the rules are in `stream_app.core`."""
