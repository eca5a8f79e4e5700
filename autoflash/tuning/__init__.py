"""The offline path: search the configs of a problem, measure them, and store what was learned."""
