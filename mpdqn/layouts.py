"""`Layout`: one row of a comparison, written as text.

single@1          one process with one thread             dp2              d = 2 replicas
single@all/m8     all cores, 8 micro-batches              pp2-1f1b/m8      p = 2 stages, schedule 1f1b, m = 8
dp2xpp2-gpipe/m8  d = 2 × p = 2                           pp2-1f1b+stacked both stages in one process
pp2-zbv           the schedule's usual v = 2 stages a rank  pp2-looped_bfs+v3  v = 3 stages a rank
2*single@1/m8     two independent processes, a yardstick for p = 2 or d = 2 without any messages

Without /m a pipeline has `MICROBATCHES` micro-batches and every other layout 1, in every command.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Self

from mpdqn.plan import Parallelism, Partition, Plan
from mpdqn.schedule import SCHEDULES, check_virtual, lane_of_stages
from mpdqn.schedule.schedules import find_schedule

MICROBATCHES = 8
"""m of a pipeline whose text gives none."""

_FORM = re.compile(
    r"(?:(?P<copies>\d+)\*)?(?:single|dp(?P<data>\d+)(?:xpp(?P<both>\d+))?|pp(?P<pipeline>\d+))"
    r"(?:-(?P<schedule>[a-z0-9_]+))?(?P<options>(?:\+stacked|\+v\d+|/m\d+|@\d+|@all)*)"
)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """d × p, m and the schedule, with the threads of each rank; ``virtual`` is v, the stages of a rank.

    ``share`` is an equal share of the cores, which a rank has unless its ``threads`` say otherwise.
    ``copies`` > 1 are independent processes side by side that never talk; ``stacked`` runs a replica's stages in one
    process.
    """

    data: int = 1
    pipeline: int = 1
    num_microbatches: int = 1
    schedule: str = "gpipe"
    virtual: int = 1
    threads: int = 1
    share: int = 1
    copies: int = 1
    stacked: bool = False

    @classmethod
    def parse(cls, text: str, *, cores: int) -> Self:
        """The layout that ``text`` means.

        Args:
            text: see the head of this file.
            cores: cores of this machine; a rank has an equal share of them unless the text says otherwise.

        Raises:
            ValueError: if the text is no layout, or names an unknown schedule.
        """
        match = _FORM.fullmatch(text)
        if match is None:
            raise ValueError(
                f"{text!r} is no layout; write single@1, dp2, pp2-1f1b/m8 or dp2xpp2-gpipe/m8 (docs/layouts.md)"
            )
        options = re.findall(r"(\+stacked|\+v|/m|@)(\d+|all)?", match["options"])
        given = dict(options)
        if len(given) < len(options):
            raise ValueError(f"{text!r} gives an option twice; give each once")
        pipeline = match["pipeline"] or match["both"]
        schedule = match["schedule"] or next(iter(SCHEDULES))
        usual = find_schedule(schedule).virtual  # an unknown schedule is an error here, before any work
        layout = cls(
            data=int(match["data"] or 1),
            pipeline=int(pipeline or 1),
            num_microbatches=int(given.get("/m") or (MICROBATCHES if pipeline else 1)),
            schedule=schedule,
            virtual=int(given.get("+v", usual)),
            copies=int(match["copies"] or 1),
            stacked="+stacked" in given,
        )
        check_virtual(schedule, layout.virtual)
        if min(layout.copies, layout.data, layout.pipeline, layout.num_microbatches) < 1:
            raise ValueError(f"{text!r} has a count of 0; every count must be at least 1")
        if layout.copies > 1 and layout.data * layout.pipeline > 1:
            raise ValueError(f"{text!r}: only single processes can be copied, like 2*single@1")
        if layout.stacked and layout.pipeline == 1:
            raise ValueError(f"{text!r}: one stage cannot be stacked; drop +stacked or write pp2+stacked")
        if match["schedule"] and layout.pipeline == 1:
            raise ValueError(
                f"{text!r}: one stage has no schedule; drop -{layout.schedule} or write pp2-{layout.schedule}"
            )
        share = cores if layout.ranks == 1 else max(1, cores // layout.ranks)
        threads = cores if given.get("@") == "all" else int(given.get("@", share))
        if threads < 1:
            raise ValueError(f"{text!r} gives a rank 0 threads; give it at least 1")
        return replace(layout, threads=threads, share=share)

    @property
    def ranks(self) -> int:
        """The number of processes that this layout needs."""
        return self.copies * self.data * (1 if self.stacked else self.pipeline)

    @property
    def name(self) -> str:
        """The text form, in full."""
        parts = [f"dp{self.data}"] * (self.data > 1) + [f"pp{self.pipeline}"] * (self.pipeline > 1)
        name = f"{self.copies}*" * (self.copies > 1) + ("x".join(parts) or "single")
        name += f"-{self.schedule}" * (self.pipeline > 1) + "+stacked" * self.stacked
        name += f"+v{self.virtual}" * (self.virtual != find_schedule(self.schedule).virtual)
        name += f"@{self.threads}" * (not parts or self.threads != self.share)
        return name + f"/m{self.num_microbatches}" * (self.num_microbatches > 1 or self.pipeline > 1)

    @property
    def parallelism(self) -> Parallelism:
        """d, p, m and the schedule."""
        return Parallelism(
            data=self.data,
            pipeline=self.pipeline,
            num_microbatches=self.num_microbatches,
            schedule=self.schedule,
            virtual=self.virtual,
        )

    def plans(self, partition: Partition, recompute: tuple[str, ...] = ()) -> list[Plan]:
        """The plan of each copy; one plan unless these are independent processes."""
        if self.copies > 1:
            return [
                Plan(partition=partition, parallelism=self.parallelism, placement=((rank,),), recompute=recompute)
                for rank in range(self.copies)
            ]
        if self.stacked:
            return [Plan.stacked(partition, self.parallelism, recompute=recompute)]
        lanes = lane_of_stages(self.schedule, self.pipeline, self.virtual)
        return [Plan.rectangular(partition, self.parallelism, lanes=lanes, recompute=recompute)]

    def oversubscribed(self, cores: int, devices: int, local_world_size: int | None = None) -> bool:
        """Whether its ranks on one host want more cores than that has, or more GPUs where GPUs are used.

        ``local_world_size`` is the number of ranks on a host where a launcher dealt them to several.
        """
        ranks = self.ranks if local_world_size is None else min(self.ranks, local_world_size)
        return ranks > devices if devices else ranks * self.threads > cores


def default_layouts(
    num_microbatches: int, cores: int, num_shards: int, devices: int = 0, world_size: int | None = None
) -> list[Layout]:
    """The layouts of the main job.

    Args:
        num_microbatches: m of the pipelines, and of the second single row.
        cores: cores of this machine.
        num_shards: V; there are as many replicas, at most, as it can be dealt to.
        devices: GPUs of this machine, 0 on the CPU. Where a pipeline has more ranks than that, a replica's stages
            share one process, because NCCL refuses two ranks on one GPU.
        world_size: the processes that torchrun started, if it did: layouts that need more are left out, and the
            widest data-parallel, pipelined and hybrid layouts grow to that size.
    """
    m = f"/m{num_microbatches}"
    texts = ["single@all", f"single@all{m}"]
    if not devices:
        texts = ["single@1", f"single@1{m}", *texts]
    sizes = [2]
    # Two processes hold d = 2 or p = 2, and four also 2 × 2, if the shards can be dealt to two.
    if world_size is not None and world_size > 2 and (world_size != 4 or num_shards % 2):
        sizes.append(world_size)
    for n in sizes:
        replicas = [d for d in range(1, n + 1) if num_shards % d == 0]
        both = max(d for d in replicas if d <= max(2, n // 2))
        alone, paired = ("+stacked" if 0 < devices < ranks else "" for ranks in (n, 2 * both))
        texts += [f"dp{replicas[-1]}", f"pp{n}-gpipe{alone}{m}", f"pp{n}-1f1b{alone}{m}"]
        texts += [f"pp{n}-td1f1b{alone}{m}", f"dp{both}xpp2-1f1b{paired}{m}"]
    layouts = [Layout.parse(text, cores=cores) for text in texts]
    limit = world_size if world_size is not None else max(layout.ranks for layout in layouts)
    return list(dict.fromkeys(layout for layout in layouts if layout.ranks <= limit))
