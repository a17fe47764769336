"""The HTTP server's own ``send``, for parts of answers that need not pass through the middleware."""

SERVER_SEND = "octavo.send"
"""Key of the scope. Middleware acts on the heads of answers alone, so the parts of a started stream, one per token, are
sent with this function if the scope has it."""
