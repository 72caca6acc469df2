"""The base of all experiments: a server process, a client that measures, provenance, tables and figures."""
