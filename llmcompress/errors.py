"""The two ways in which a run ends badly, and their messages in one line."""


class InputError(ValueError):
    """Bad input: the message says in one line what is wrong and what would be right. Exit code 2."""


class RunError(RuntimeError):
    """A failure while running: disk full, non-finite activations, corrupt file. Exit code 1."""


def one_line(text: str) -> str:
    """Runs of white space, line ends among them, as single spaces."""
    return " ".join(text.split())
