"""Images of requests: where they come from, their pixels as the model's encoder reads them, their place in a prompt."""
