"""What runs beside the trainer. `services.wire` is the only module that both deployables share."""
