"""The estimate of a dry run: size, time and memory of a job, stage by stage as in `run.json`."""

from trimbit.schema.base import Schema


class StageEstimate(Schema):
    """The estimate of one stage of `run.json`, all its runs together."""

    stage: str
    runs: int = 1  # with different keys, for example one for each plan that is applied to compare plans
    cached: bool  # its result is in the cache
    seconds: float  # excluding stages that run inside it; 0 if cached
    peak_rss_nbytes: int  # peak memory of the process while the stage runs


class Estimate(Schema):
    """A job's size, time and memory."""

    model: str
    parameters: int  # of the original
    budget_nbytes: int
    text: str
    opened_nbytes: int  # memory of the process once the model is open, before any stage
    stages: tuple[StageEstimate, ...]

    @property
    def seconds(self) -> float:
        """Total over all stages."""
        return sum(one.seconds for one in self.stages)

    @property
    def peak_rss_nbytes(self) -> int:
        """The peak over all stages."""
        return max((self.opened_nbytes, *(one.peak_rss_nbytes for one in self.stages)))
