"""What a run needs before it runs: bytes, operations, seconds, money; and what to change where it does not fit."""
