"""An input that cannot be used, as a stable code and one line. Whoever works on many lists it and goes on."""


class RefusedInput(ValueError):
    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code

    def __reduce__(self):
        return RefusedInput, (self.code, str(self))


def code_of(error: ValueError) -> str:
    """The code of a refusal; BAD_INPUT where a value was refused that has none of its own."""
    return getattr(error, "code", "BAD_INPUT")


def text_of(error: ValueError) -> str:
    """What a refusal says, without its code."""
    return str(error).removeprefix(f"{code_of(error)}: ")
