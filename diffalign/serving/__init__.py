"""`diffalign serve`: rewards behind an address. Requests of all clients share batches; one thread runs each model."""
