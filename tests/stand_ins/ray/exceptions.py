"""Of ray's exceptions, their base."""


class RayError(Exception):
    pass
