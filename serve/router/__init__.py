"""Which replica answers a request soonest, in seconds: a pure choice, and the state that it is made from.

No HTTP, no Ray, no JAX and no clock: every call that needs the time takes `now`, in seconds of any clock that only goes
forward, so that the same code runs in a cluster, in the proxy and in a simulation.

- `request`: what is to be routed
- `replica`: what is known of one replica: its costs, its work in flight
- `choice`: the formula, and the choice by it
- `index`: how much of a prompt each replica has cached
- `summary`: what a replica publishes of its cache, in increments and snapshots
- `router`: all of these together, the one writer of their state
"""
