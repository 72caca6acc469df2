"""What the server and the proxy share over HTTP."""
