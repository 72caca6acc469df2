"""What all experiments stand on: a server process, a client that measures, provenance, figures."""
