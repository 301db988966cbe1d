"""`deepspeed.utils.exceptions`, for scripts that catch it; xtrain raises the errors of xtrain.base.errors."""


class DeprecatedException(Exception):
    """Something is no longer supported."""
