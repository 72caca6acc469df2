"""What an engine counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counters:
    """What the engine has done since the start; read by the metrics page."""

    steps: int = 0
    requests: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    prefilled_tokens: int = 0
    generated_tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    preemptions: int = 0
    failures: int = 0

    def started(self, prompt: int, reused: int) -> None:
        """Count a request whose prompt, of so many tokens, is computed."""
        self.requests += 1
        self.prompt_tokens += prompt
        self.reused_tokens += reused
