"""The rules and the divergence report in front of any engine that speaks the Messages API or OpenAI's."""
