"""Commands other than ``serve``. They speak to a server over HTTP and import no engine."""
