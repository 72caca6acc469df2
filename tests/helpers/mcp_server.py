"""An MCP server with one tool that adds, over standard input and output.

Format: https://modelcontextprotocol.io/specification/2025-06-18, JSON-RPC in lines.
"""

from __future__ import annotations

import json
import sys
from typing import Any

NUMBER = {"type": "integer"}
ADD = {
    "name": "add",
    "description": "Add two integers and return their sum.",
    "inputSchema": {"type": "object", "properties": {"a": NUMBER, "b": NUMBER}, "required": ["a", "b"]},
}


def result_of(method: str, params: dict[str, Any]) -> dict[str, Any]:
    """The result of a request."""
    match method:
        case "initialize":
            version = params.get("protocolVersion", "2025-06-18")
            about = {"name": "demo", "version": "1"}
            return {"protocolVersion": version, "capabilities": {"tools": {}}, "serverInfo": about}
        case "tools/list":
            return {"tools": [ADD]}
        case "tools/call":
            given = params["arguments"]
            return {"content": [{"type": "text", "text": str(given["a"] + given["b"])}]}
    return {}


if __name__ == "__main__":
    for line in sys.stdin:
        request = json.loads(line)
        if "id" in request:
            result = result_of(request["method"], request.get("params") or {})
            answer = {"jsonrpc": "2.0", "id": request["id"], "result": result}
            print(json.dumps(answer), flush=True)
