"""Several engine replicas behind one endpoint: Ray Serve runs them, our router chooses among them.

- `cli`: `tokenzero cluster`; `app`: the same as an application for Kubernetes' RayService
- `config`: its flags
- `deploy`: starting Ray and the replicas, and sentences about what cannot be
- `client`: the engine that the ingress sees; `dispatch`: which replica serves a request
- `request_router`: where Ray asks `dispatch`
- `replica`: an engine in a process of its own; `publisher`: which pages it has
- `report`: what a replica says of itself; `figures`: all replicas' metrics as one engine's
- `wire`: requests and events between the processes

What needs Ray imports it inside of its functions, but for `request_router`, which Ray imports.
"""
