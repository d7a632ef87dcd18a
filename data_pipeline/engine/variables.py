"""${NAME} in a mixture file: replaced from the environment, so that a file names no machine's folders."""

import os
import re

from nanollama.data.strict import FieldError

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


def expand_variables(text: str, where: str) -> str:
    """`text` with ${NAME} replaced from the environment. Raises FieldError when NAME is not set."""
    def value(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise FieldError(where, f"the environment has no variable {match[1]} (in {text!r})",
                             f"Set it, for example: export {match[1]}=/path/to/data")
        return os.environ[match[1]]
    return os.path.expanduser(_VARIABLE.sub(value, text))
