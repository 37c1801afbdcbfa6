"""The protocols of reward endpoints: one small file each, all translated to and from `services.wire`."""
