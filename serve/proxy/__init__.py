"""The proxy: rules and reports before any engine that has the Messages API or one of OpenAI's."""
