"""One contender or gate that fails must not cost the others their figures."""

from collections.abc import Callable


def attempt(what: str, action: Callable[[], object]) -> bool:
    """Return whether `action` ends without an exception; print the one that it raises."""
    try:
        action()
    except Exception as error:
        print(f"FAILED {what}: {type(error).__name__}: {error}", flush=True)
        return False
    return True
