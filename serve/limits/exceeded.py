"""What goes beyond a limit: the error that every limit raises, which the routes answer in the form of their API."""

from __future__ import annotations

RETRY_SECONDS = 1  # after which what was too much at once may fit


class LimitExceeded(Exception):
    """A request, or a connection, goes beyond a limit.

    Its text names what was found, what was expected and what to do. `limit` is the name of the limit as its flag has
    it, with underscores; `status` is that of the answer, which says to try again after `retry_s` seconds, if any.
    """

    def __init__(self, text: str, limit: str, status: int, retry_s: int | None = None) -> None:
        super().__init__(text)
        self.limit, self.status, self.retry_s = limit, status, retry_s

    @property
    def headers(self) -> dict[str, str]:
        """The headers that its answer has besides the usual ones."""
        return {} if self.retry_s is None else {"retry-after": str(self.retry_s)}
