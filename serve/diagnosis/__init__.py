"""Why a prompt missed the cache."""
