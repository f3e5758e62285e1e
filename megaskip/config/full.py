"""What does not go with --train full, which trains every weight. The standard library only."""

from collections.abc import Iterator, Sequence

from megaskip.config.parallel import ParallelConfig


def full_problems(parallel: ParallelConfig, of_routers: Sequence[str]) -> Iterator[str]:
    """Yield what of a run does not go with it; `of_routers` are the given flags of other sections
    that say how routers learn."""
    if parallel.compile:
        yield (
            "--compile does not go with --train full: it compiles layers of a frozen backbone; "
            "leave one of them out"
        )
    if parallel.cache_prefix is not None:
        yield (
            "--cache_prefix does not go with --train full, which changes every layer; leave one of "
            "them out"
        )
    if parallel.pipeline_stages > 1:
        yield (
            "--train full does not run in stages (--pipeline_stages "
            f"{parallel.pipeline_stages}): they hold a frozen backbone; leave one of them out"
        )
    skips = ["train_execution"] if parallel.train_execution != "dense" else []
    for name in (*of_routers, *skips):
        yield (
            f"--{name} does not go with --train full, which has no routers and no frozen model "
            "beside it; leave one of them out"
        )
