"""What a caller is told of a request before its first token: what it reads of the cache, from where, and its TTFT.

The engine's forecast (serve.engine.forecast) begins with the tokens and ends with the first one. Before it come the
body and its text, whose time is known by then, and after it the way to the client, which is learned here.
"""

from __future__ import annotations

import asyncio
import logging

import numpy as np

from serve.api.answers import CacheForecast
from serve.engine.request import Forecast, GenerationRequest
from serve.server.context import ServerContext

log = logging.getLogger("tokenzero.server")

# The engine answers between two steps. A count does not wait longer for what it would find.
ASK_SECONDS = 1.0


def cache_forecast(context: ServerContext, forecast: Forecast, before_s: float) -> CacheForecast:
    """What the caller is told, where `before_s` seconds passed before the engine had the request."""
    ttft_s = before_s + forecast.ttft_s + context.overhead.seconds
    return CacheForecast(sum(forecast.cached.values()), dict(forecast.cached), round(1e3 * ttft_s, 1))


def forecast_header(found: CacheForecast, prompt_tokens: int) -> str:
    """The value of FORECAST_HEADER."""
    by_tier = [f"{name}={tokens}" for name, tokens in found.cache_read_by_tier.items()]
    computed = prompt_tokens - found.cache_read_input_tokens
    return ", ".join([*by_tier, f"computed={computed}", f"ttft-ms={found.predicted_ttft_ms}"])


async def ask(
    context: ServerContext,
    tokens: np.ndarray,  # [tokens] int32
    salt: bytes,
    head: int,
    before_s: float,
) -> CacheForecast | None:
    """What a prompt would find now; None if it is too long, or the engine does not say in time. It never raises."""
    if not 0 < len(tokens) < context.engine.settings.max_model_len:
        return None
    try:
        async with asyncio.timeout(ASK_SECONDS):
            forecast = await context.engine.forecast(GenerationRequest(tokens, 1, salt=salt, head=head))
    except TimeoutError:
        return None
    except Exception:  # a count does not fail for it
        log.exception("nothing is foreseen of a prompt")
        return None
    return cache_forecast(context, forecast, before_s) if forecast else None
