"""The auditor: what requests reused is computed again and compared, while the engine has nothing else to do."""
