"""What a job will take, told before it runs: by stage, as in `run.json`."""

from trimbit.schema.base import Schema


class StageEstimate(Schema):
    """One stage of `run.json`, all its runs together."""

    stage: str
    runs: int = 1  # with different keys, such as plans that are applied to compare them
    cached: bool  # its result is there already
    seconds: float  # without those of the stages inside it; cached: 0
    peak_rss_nbytes: int  # of the process while the stage runs


class Estimate(Schema):
    """A job's size, time and memory."""

    model: str
    parameters: int  # of the original
    budget_nbytes: int
    text: str
    opened_nbytes: int  # memory of the process when the model is open and nothing else is done
    stages: tuple[StageEstimate, ...]

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(one.seconds for one in self.stages)

    @property
    def peak_rss_nbytes(self) -> int:
        """Of the process, whatever stage it is in."""
        return max((self.opened_nbytes, *(one.peak_rss_nbytes for one in self.stages)))
