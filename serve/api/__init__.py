"""The APIs on the wire: requests in, answers and errors out, as structs without tokens or HTTP."""
