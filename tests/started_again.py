"""A stand-in for a CUDA graph, on any device."""


class StartedAgain:
    """In place of a recorded graph: its work done again, into the same results."""

    def __init__(self, work, _pool):
        self.work, self.results = work, [result.clone() for result in work()]

    def replay(self):
        for result, fresh in zip(self.results, self.work(), strict=True):
            result.copy_(fresh)
